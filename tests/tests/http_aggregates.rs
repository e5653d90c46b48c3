//! Commands and states of aggregates, and views, over HTTP.
#![allow(clippy::unwrap_used)]

mod http;
mod postgres;

use std::{sync::Arc, time::Duration};

use annals::{EventStore, LocalBus, LogQuery, Message, Projection, ReadModel, Repository, Runtime, Service, Views};
use annals_http::{Api, aggregate, views};
use annals_tests::tally::{Tally, TallyEvent, log};
use futures::future::join_all;
use hyper::Request;
use serde_json::json;

use self::{http::Server, postgres::on_each_store};

async fn tallies(store: &Arc<dyn EventStore>) -> Server {
    let api = Api::default().nest("/tallies", aggregate(Repository::<Tally>::new(store.clone())));
    Server::start(|_| api).await
}

#[tokio::test]
async fn repeated_command_gets_the_first_answer() {
    on_each_store(async |store| {
        let key = [("idempotency-key", "first")];
        let first = tallies(&store).await;
        let (status, headers, receipt) = first.post("/tallies/a", &key, r#"{"Add": 5}"#).await;
        assert_eq!(
            (status, &headers["etag"], headers.get("idempotency-replayed")),
            (200, &"\"1\"".parse().unwrap(), None)
        );
        assert_eq!((&receipt["id"], &receipt["version"]), (&json!("a"), &json!(1)));
        assert_eq!(receipt["position"], log(&store).await[0].position.0);
        let (status, ..) = first.post("/tallies/a", &[("idempotency-key", "second")], r#"{"Add": 7}"#).await;
        assert_eq!(status, 200);

        // Another instance knows the command too, whatever the version of the stream is by now.
        for server in [first, tallies(&store).await] {
            let with_condition = [key[0], ("if-none-match", "*")];
            let (status, headers, again) = server.post("/tallies/a", &with_condition, r#"{"Add": 5}"#).await;
            assert_eq!((status, &headers["idempotency-replayed"]), (200, &"true".parse().unwrap()));
            assert_eq!((&again["version"], &again["position"]), (&json!(1), &receipt["position"]));
        }
        // The same key names another command of another aggregate.
        let server = tallies(&store).await;
        let (_, headers, receipt) = server.post("/tallies/b", &key, r#"{"Add": 5}"#).await;
        assert_eq!((headers.get("idempotency-replayed"), &receipt["version"]), (None, &json!(1)));
        // An id and a key that are split elsewhere name another command.
        server.post("/tallies/x%2Fb", &[("idempotency-key", "c")], r#"{"Add": 5}"#).await;
        server.post("/tallies/x", &[("idempotency-key", "b/c")], r#"{"Add": 5}"#).await;
        let events = log(&store).await;
        let ids: std::collections::HashSet<_> = events.iter().map(|event| event.id).collect();
        assert_eq!((events.len(), ids.len()), (5, 5));
    })
    .await;
}

#[tokio::test]
async fn one_of_many_commands_at_one_version_succeeds() {
    on_each_store(async |store| {
        let servers = [tallies(&store).await, tallies(&store).await];
        servers[0].post("/tallies/a", &[], r#"{"Add": 1}"#).await;
        for version in 1..=5 {
            let tag = format!("\"{version}\"");
            let condition = [("if-match", &*tag)];
            let commands = (0..20).map(|at| servers[at % 2].post("/tallies/a", &condition, r#"{"Add": 1}"#));
            let answers = join_all(commands).await;
            let with = |wanted| answers.iter().filter(|(status, ..)| *status == wanted).count();
            assert_eq!((with(200), with(412)), (1, 19), "{answers:?}");
            let refused = answers.iter().find(|(status, ..)| *status == 412).unwrap();
            let detail = refused.2["detail"].as_str().unwrap();
            assert!(detail.contains("stream tally-a is at version"), "{detail}");
        }
        assert_eq!(log(&store).await.len(), 6);
        // An aggregate that must not exist yet is made once.
        let commands =
            (0..20).map(|at| servers[at % 2].post("/tallies/new", &[("if-none-match", "*")], r#"{"Add": 1}"#));
        let answers = join_all(commands).await;
        assert_eq!(answers.iter().filter(|(status, ..)| *status == 200).count(), 1, "{answers:?}");
        assert_eq!(log(&store).await.len(), 7);
    })
    .await;
}

#[tokio::test]
async fn state_has_the_version_as_its_tag() {
    on_each_store(async |store| {
        let server = tallies(&store).await;
        assert_eq!(server.get("/tallies/a").await.0, 404);
        server.post("/tallies/a", &[], r#"{"Add": 4}"#).await;
        let (status, headers, state) = server.get("/tallies/a").await;
        assert_eq!((status, &headers["etag"]), (200, &"\"1\"".parse().unwrap()));
        assert_eq!(state, json!({"amounts": [4], "closed": false}));
        let conditional = || Request::get("/tallies/a").header("if-none-match", "\"1\"").body(String::new()).unwrap();
        assert_eq!(server.ask(conditional()).await.0, 304);
        // Another instance has changed the aggregate.
        tallies(&store).await.post("/tallies/a", &[], r#"{"Add": 3}"#).await;
        let (status, headers, state) = server.ask(conditional()).await;
        assert_eq!((status, &headers["etag"]), (200, &"\"2\"".parse().unwrap()));
        assert_eq!(state["amounts"], json!([4, 3]));
    })
    .await;
}

#[tokio::test]
async fn bad_command_gets_a_problem_and_does_nothing() {
    on_each_store(async |store| {
        let server = tallies(&store).await;
        server.post("/tallies/a", &[], r#"{"Add": 4}"#).await;
        server.post("/tallies/a", &[], "\"Close\"").await;
        let (status, headers, problem) = server.post("/tallies/a", &[], r#"{"Add": 5}"#).await;
        assert_eq!((status, &headers["content-type"]), (422, &"application/problem+json".parse().unwrap()));
        assert_eq!((&problem["refusal"], &problem["detail"]), (&json!(4), &json!("the tally is closed at 4")));
        let long = "k".repeat(300);
        for (path, headers, body, status) in [
            ("/tallies/b", vec![], r#"{"Add": "x"}"#, 422),
            ("/tallies/b", vec![], r#"{"Subtract": 5}"#, 422),
            ("/tallies/b", vec![], r#"{"Add": 5"#, 400),
            ("/tallies/b", vec![("idempotency-key", &*long)], r#"{"Add": 5}"#, 400),
            ("/tallies/b", vec![("idempotency-key", "")], r#"{"Add": 5}"#, 400),
            ("/tallies/b", vec![("if-match", "7")], r#"{"Add": 5}"#, 400),
            ("/tallies/b", vec![("if-match", "")], r#"{"Add": 5}"#, 400),
            ("/tallies/b", vec![("if-match", "\"7\"")], r#"{"Add": 5}"#, 412),
            ("/tallies/%00", vec![], r#"{"Add": 5}"#, 400),
            ("/tallies/b", vec![], "\"Panic\"", 422),
        ] {
            let (found, _, problem) = server.post(path, &headers, body).await;
            assert_eq!(
                (found, problem["status"].as_u64()),
                (status, Some(status.into())),
                "{path} {headers:?} {body}: {problem}"
            );
        }
        assert_eq!(log(&store).await.len(), 2);
    })
    .await;
}

/// The sum of each tally.
struct Sums;

impl ReadModel for Sums {
    const NAME: &'static str = "sums";
    type Event = TallyEvent;
    type View = i64;

    fn keys(&self, _: &TallyEvent, message: &Message) -> Vec<String> {
        vec![message.key.to_string()]
    }

    fn apply(&self, _: &str, sum: &mut i64, event: &TallyEvent, _: &Message) {
        if let TallyEvent::Added { amount } = event {
            *sum += amount;
        }
    }
}

#[tokio::test]
async fn client_reads_its_own_writes_from_views() {
    on_each_store(async |store| {
        let mut runtime = Runtime::new();
        let service = Service::new("sums", store.clone()).project(Projection::new(Sums, LogQuery::all()));
        runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
        let api = Api::default()
            .nest("/tallies", aggregate(Repository::<Tally>::new(store.clone())))
            .nest("/sums", views(Views::<Sums>::new(store.clone())));
        let server = Server::start(|_| api).await;
        for (id, amount) in [("a", 5), ("b", 7), ("c", 9), ("a", 1)] {
            let (_, _, receipt) =
                server.post(&format!("/tallies/{id}"), &[], &json!({"Add": amount}).to_string()).await;
            let path = format!("/sums/tally-{id}?position={}&wait=20s", receipt["position"]);
            let (status, _, sum) = server.get(&path).await;
            let expected = if receipt["version"] == 2 { 6 } else { amount };
            assert_eq!((status, sum), (200, json!(expected)));
        }
        let (_, headers, page) = server.get("/sums?limit=2").await;
        assert_eq!(
            page,
            json!({"views": [{"key": "tally-a", "view": 6}, {"key": "tally-b", "view": 7}], "next": "tally-b"})
        );
        let tag = headers["etag"].to_str().unwrap();
        let again = Request::get("/sums?limit=2").header("if-none-match", tag).body(String::new()).unwrap();
        assert_eq!(server.ask(again).await.0, 304);
        let (_, _, page) = server.get("/sums?limit=2&after=tally-b").await;
        assert_eq!(page, json!({"views": [{"key": "tally-c", "view": 9}], "next": null}));
        let (_, _, page) = server.get("/sums?limit=3").await;
        assert_eq!((page["views"].as_array().unwrap().len(), &page["next"]), (3, &json!(null)));

        for (path, status) in [
            ("/sums/tally-z", 404),
            ("/sums?after=%00", 400),
            ("/sums?limit=0", 400),
            ("/sums?limit=1001", 400),
            ("/sums?size=3", 400),
            ("/sums?position=x", 400),
            ("/sums?position=1&wait=x", 400),
            ("/sums?position=999999999&wait=0s", 409),
        ] {
            let (found, _, problem) = server.get(path).await;
            assert_eq!(found, status, "{path}: {problem}");
        }
        runtime.drain(Duration::from_secs(20)).await.unwrap();
    })
    .await;
}
