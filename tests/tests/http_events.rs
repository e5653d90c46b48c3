//! Live streams of events over HTTP.
#![allow(clippy::unwrap_used)]

mod http;
mod postgres;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annals::{EventStore, Position, ReadModel, Repository, Views, WaitError, archive::line::write_line};
use annals_http::events;
use annals_tests::tally::{Tally, TallyCommand, TallyEvent, add, log};
use futures::{SinkExt, StreamExt, future::join_all};
use hyper::Request;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_tungstenite::{connect_async, tungstenite::Message};
use uuid::Uuid;

use self::{
    http::{EventSource, SentEvent, Server},
    postgres::on_each_store,
};

/// The time limit for something that takes a moment on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(60);

async fn streams(store: &Arc<dyn EventStore>) -> Server {
    Server::start(|stop| events(store.clone(), stop)).await
}

/// Returns the events of the log as a client should receive them.
async fn expected(store: &Arc<dyn EventStore>, is_selected: impl Fn(&annals::Recorded) -> bool) -> Vec<SentEvent> {
    let recorded = log(store).await;
    recorded
        .iter()
        .filter(|event| is_selected(event))
        .map(|event| {
            let mut line = Vec::new();
            write_line(&event.into(), false, &mut line);
            let data = String::from_utf8(line).unwrap().trim_end().to_owned();
            SentEvent { id: Some(event.position.0), event: event.type_name.to_string(), data }
        })
        .collect()
}

async fn next(source: &mut EventSource) -> SentEvent {
    timeout(PATIENCE, source.event()).await.expect("an event arrives").expect("the stream goes on")
}

#[tokio::test]
async fn stream_starts_after_a_position_and_continues_live() {
    on_each_store(async |store| {
        add(&store, "a", [1, 2]).await;
        add(&store, "b", [3]).await;
        let server = streams(&store).await;
        let mut all = EventSource::open(&server, "/events?after=0", None).await;
        let mut of_a = EventSource::open(&server, "/events?stream=tally-a&after=0", None).await;
        let mut new = EventSource::open(&server, "/events?category=tally&type=tally.added,tally.closed", None).await;
        let mut closed = EventSource::open(&server, "/events?type=tally.closed&after=0", None).await;
        let mut others = EventSource::open(&server, "/events?category=tall", None).await;
        // The first block is the delay before a reconnect.
        others.next().await.unwrap();
        add(&store, "a", [4]).await;
        Repository::<Tally>::new(store.clone()).execute("b", TallyCommand::Close, Uuid::new_v4()).await.unwrap();

        let recorded = expected(&store, |_| true).await;
        let mut received = Vec::new();
        while received.len() < recorded.len() {
            received.push(next(&mut all).await);
        }
        assert_eq!(received, recorded);
        for event in expected(&store, |event| event.stream.as_str() == "tally-a").await {
            assert_eq!(next(&mut of_a).await, event);
        }
        assert_eq!([next(&mut new).await, next(&mut new).await], recorded[3..]);
        assert_eq!(next(&mut closed).await, recorded[4]);
        // A category is not matched by the beginning of its name.
        assert!(timeout(Duration::from_millis(300), others.next()).await.is_err());

        // A stop ends each stream with a reason.
        server.stop.cancel();
        for mut source in [all, of_a, new, closed] {
            let end = next(&mut source).await;
            assert_eq!((&*end.event, end.id), ("end", None));
            assert!(end.data.starts_with("the server stops"), "{end:?}");
            assert_eq!(source.event().await, None);
        }
    })
    .await;
}

/// Clients are cut off again and again, and each continues at another instance where it was, while eight writers on two
/// handles append. Each client gets each event once, in the order of the log.
#[tokio::test(flavor = "multi_thread")]
async fn client_that_comes_back_misses_nothing_and_gets_nothing_twice() {
    const EVENTS: i64 = 400;
    on_each_store(async |store| {
        let servers = [streams(&store).await, streams(&store).await];
        let is_over = AtomicBool::new(false);
        let client = async |path: &str| {
            let mut received: Vec<SentEvent> = Vec::new();
            let mut random = fastrand::Rng::with_seed(7);
            loop {
                let last = received.last().map_or(0, |event| event.id.unwrap());
                let server = &servers[random.usize(..2)];
                let mut source = EventSource::open(server, path, Some(last)).await;
                for _ in 0..random.usize(1..200) {
                    // Without new events for a while, the client has received everything.
                    let was_over = is_over.load(Ordering::Acquire);
                    match timeout(Duration::from_millis(500), source.event()).await {
                        Ok(event) => received.push(event.unwrap()),
                        Err(_) if was_over => return received,
                        Err(_) => {}
                    }
                }
            }
        };
        let write = async {
            let writers = (0..8).map(|writer| {
                let store = store.clone();
                async move { add(&store, &writer.to_string(), 0..EVENTS).await }
            });
            join_all(writers).await;
            is_over.store(true, Ordering::Release);
        };
        let paths = ["/events", "/events?stream=tally-3", "/events?type=tally.added", "/events?type=tally.closed"];
        let (received, ()) = tokio::join!(join_all(paths.map(client)), write);
        let all = expected(&store, |_| true).await;
        assert_eq!(all.len() as i64, 8 * EVENTS);
        assert!(received[0] == all, "{} of {} events", received[0].len(), all.len());
        assert!(received[1] == expected(&store, |event| event.stream.as_str() == "tally-3").await);
        assert!(received[2] == all);
        assert_eq!(received[3], []);
    })
    .await;
}

#[tokio::test]
async fn socket_sends_as_many_events_as_the_client_allows() {
    on_each_store(async |store| {
        add(&store, "a", 0..300).await;
        let server = streams(&store).await;
        let url = |query: &str| format!("ws://{}/events/ws?{query}", server.address);
        let (mut socket, _) = connect_async(url("after=0&credits=5")).await.unwrap();
        let recorded = expected(&store, |_| true).await;
        let mut received = Vec::new();
        for more in [0, 250, 45] {
            if more > 0 {
                socket.send(Message::text(json!({"credits": more}).to_string())).await.unwrap();
            }
            let until = received.len() + if more == 0 { 5 } else { more };
            while received.len() < until {
                let message = timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
                received.push(message.into_text().unwrap().to_string());
            }
            assert!(timeout(Duration::from_millis(100), socket.next()).await.is_err(), "more than the credits");
        }
        assert_eq!(received, recorded.iter().map(|event| event.data.clone()).collect::<Vec<_>>());

        // A client without credits misses more events than the server holds for it, and still gets them all.
        let mut all = EventSource::open(&server, "/events?after=0", None).await;
        add(&store, "a", 300..700).await;
        for _ in 0..700 {
            next(&mut all).await;
        }
        socket.send(Message::text(r#"{"credits": 400}"#)).await.unwrap();
        let recorded = expected(&store, |_| true).await;
        for event in &recorded[300..] {
            let message = timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
            assert_eq!(message.to_text().unwrap(), event.data);
        }

        let (mut socket, _) = connect_async(url("")).await.unwrap();
        add(&store, "b", [1]).await;
        let message = timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
        let event: Value = serde_json::from_str(message.to_text().unwrap()).unwrap();
        assert_eq!((&event["stream"], &event["data"]), (&json!("tally-b"), &json!({"amount": 1})));
        // A message that is not understood ends the socket with a reason, also while there are no credits.
        let (mut poor, _) = connect_async(url("credits=0")).await.unwrap();
        for (socket, message) in
            [(&mut socket, Message::text("{\"credit\": 1}")), (&mut poor, Message::binary(vec![1, 2]))]
        {
            socket.send(message).await.unwrap();
            let end = timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
            assert!(end.to_text().unwrap().starts_with("{\"end\":"), "{end}");
            assert!(matches!(timeout(PATIENCE, socket.next()).await.unwrap(), Some(Ok(Message::Close(Some(_))))));
        }
        // A stop ends the socket of a client without credits too.
        let (mut poor, _) = connect_async(url("credits=0")).await.unwrap();
        server.stop.cancel();
        let end = timeout(PATIENCE, poor.next()).await.unwrap().unwrap().unwrap();
        assert!(end.to_text().unwrap().contains("the server stops"), "{end}");
    })
    .await;
}

#[tokio::test]
async fn bad_request_for_a_stream_gets_a_problem() {
    on_each_store(async |store| {
        add(&store, "a", [1]).await;
        let server = streams(&store).await;
        for (query, status) in [
            ("after=x", 400),
            ("after=-1", 400),
            ("after=1&after=2", 400),
            ("stream=nothing", 400),
            ("type=%00", 400),
            ("category=tally,a%0Ab", 400),
            ("colour=red", 400),
            ("after=1000000", 409),
        ] {
            let (found, _, problem) = server.get(&format!("/events?{query}")).await;
            assert_eq!(found, status, "{query}: {problem}");
        }
        let ahead = Request::get("/events").header("last-event-id", "999999").body(String::new()).unwrap();
        let (status, _, problem) = server.ask(ahead).await;
        assert!(
            status == 409 && problem["detail"].as_str().unwrap().contains("beyond the end of the log"),
            "{problem}"
        );
        assert_eq!(server.get("/events/ws").await.0, 400);
    })
    .await;
}

/// An open transaction hides a committed event from readers. The position of that event is part of the log, so a client
/// that has this position, from its own command or from an instance that saw more, is not refused.
#[tokio::test(flavor = "multi_thread")]
async fn position_behind_an_open_transaction_is_part_of_the_log() {
    let schema = postgres::Schema::new();
    let store: Arc<dyn EventStore> = Arc::new(schema.store().await);
    add(&store, "a", [1]).await;
    let mut slow = schema.connection().await;
    let open = "BEGIN; INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data)
        VALUES ('tally-slow', 1, gen_random_uuid(), 'tally.closed', 1, 'null')";
    sqlx::raw_sql(schema.sql(open)).execute(&mut slow).await.unwrap();
    let tallies = Repository::<Tally>::new(store.clone());
    let added = tallies.execute("b", TallyCommand::Add(2), Uuid::new_v4()).await.unwrap();
    let position = added.position.unwrap();
    let fresh: Arc<dyn EventStore> = Arc::new(schema.store().await);
    assert!(fresh.status().await.unwrap().head < position, "the event is hidden");
    let server = streams(&fresh).await;
    let mut back = EventSource::open(&server, "/events", Some(position.0)).await;
    let mut new = EventSource::open(&server, "/events", None).await;
    new.next().await.unwrap();
    let views = Views::<Nothing>::new(fresh.clone());
    let late = views.wait_for(position, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(late, WaitError::TimedOut { .. }), "{late}");
    sqlx::raw_sql("COMMIT").execute(&mut slow).await.unwrap();
    add(&store, "c", [3]).await;
    assert_eq!(next(&mut back).await.id, Some(position.0 + 1));
    // The stream of new events began at the last event that readers could reach.
    let received = [next(&mut new).await.id, next(&mut new).await.id, next(&mut new).await.id];
    assert_eq!(received, [position.0 - 1, position.0, position.0 + 1].map(Some));
    let beyond = views.wait_for(Position(position.0 + 2), Duration::from_secs(60)).await.unwrap_err();
    assert!(matches!(beyond, WaitError::BeyondEnd { .. }), "{beyond}");
}

/// A read model that no service keeps.
struct Nothing;

impl ReadModel for Nothing {
    const NAME: &'static str = "nothing";
    type Event = TallyEvent;
    type View = ();

    fn keys(&self, _: &TallyEvent, _: &annals::Message) -> Vec<String> {
        Vec::new()
    }

    fn apply(&self, _: &str, (): &mut (), _: &TallyEvent, _: &annals::Message) {}
}
