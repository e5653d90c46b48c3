//! Events as server-sent events.

use std::sync::{Arc, Mutex, PoisonError};

use axum::{
    body::{Body, Bytes},
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures::{StreamExt, stream};
use tokio::{sync::mpsc, time::timeout};

use super::{
    following::{LOG_CHANGED, PIECE, Piece, SLOW, SLOW_CLIENT, Streams},
    line::Line,
    selection::Parameters,
};
use crate::{problem::Problem, request::bad};

/// How long a browser waits before it connects again.
const RETRY: &str = "retry: 1000\n\n";

pub(super) async fn follow(
    State(streams): State<Streams>,
    parameters: Result<Query<Parameters>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Query(parameters) = parameters.map_err(|error| bad(error.body_text()))?;
    let mut following = streams.follow(&parameters, &headers).await?;
    let (pieces, taken) = mpsc::channel::<Bytes>(1);
    let reason = Arc::<Mutex<&'static str>>::default();
    let end = reason.clone();
    tokio::spawn(async move {
        let ended = loop {
            let piece = tokio::select! {
                piece = following.next(PIECE) => piece,
                () = pieces.closed() => return,
            };
            let text = match piece {
                Piece::Events(lines) => lines.iter().map(|line| shown(line)).collect(),
                // An event without data only moves the position with which the client reconnects.
                Piece::Nothing(position) => format!(": nothing new\nid: {position}\n\n"),
                Piece::End(reason) => break reason,
            };
            match timeout(SLOW_CLIENT, pieces.send(text.into())).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => break SLOW,
            }
        };
        *end.lock().unwrap_or_else(PoisonError::into_inner) = ended;
    });
    let events = stream::unfold(taken, |mut taken| async { taken.recv().await.map(|piece| (piece, taken)) });
    let last = stream::once(async move {
        let reason = *reason.lock().unwrap_or_else(PoisonError::into_inner);
        // An empty id makes a browser forget its position, which has no meaning any more.
        let id = if reason == LOG_CHANGED { "id:\n" } else { "" };
        Bytes::from(format!("{id}event: end\ndata: {reason}\n\n"))
    });
    let body = stream::once(async { Bytes::from_static(RETRY.as_bytes()) }).chain(events).chain(last);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    Ok((headers, Body::from_stream(body.map(Ok::<_, std::convert::Infallible>))).into_response())
}

fn shown(line: &Line) -> String {
    // A stored type name has no line break unless the row was written by hand.
    let type_name = line.type_name.replace(['\n', '\r'], " ");
    format!("id: {}\nevent: {type_name}\ndata: {}\n\n", line.position, line.json)
}

#[cfg(test)]
mod tests {
    use annals::{Append, Commit, EventStore, Expected, MemoryStore, Metadata, NewEvent, StreamId, Version};
    use axum::http::Request;
    use http_body_util::BodyExt;
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;
    use tokio::time::sleep;
    use tokio_util::sync::CancellationToken;
    use uuid::Uuid;

    use super::*;
    use crate::events::events;

    const EVENTS: usize = 1_000;

    async fn store() -> Arc<dyn EventStore> {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let event = |_| NewEvent {
            id: Uuid::new_v4(),
            type_name: "thing.happened".into(),
            schema_version: 1,
            data: "{}".into(),
            metadata: Metadata::of_request(Uuid::new_v4()),
        };
        let stream = StreamId::parse("thing-1").expect("a stream");
        let append =
            Append { stream, expected: Expected::Version(Version::START), events: (0..EVENTS).map(event).collect() };
        store.commit(Commit { appends: vec![append], ..Commit::default() }).await.expect("a commit");
        store
    }

    /// A client that reads nothing for a while gets what was sent before, and the reason why it was dropped. A new
    /// request of the client then continues after the last event that the client received.
    #[tokio::test(start_paused = true)]
    async fn slow_client_is_dropped_with_a_reason_and_continues() {
        let app = TowerToHyperService::new(events(store().await, CancellationToken::new()).routes);
        let open = async |last: usize| {
            let request = Request::get("/events").header("last-event-id", last).body(Body::empty()).expect("a request");
            app.call(request).await.expect("an answer").into_body()
        };
        let slow = open(0).await;
        sleep(2 * SLOW_CLIENT).await;
        let received = slow.collect().await.expect("a body").to_bytes();
        let received = String::from_utf8_lossy(&received).into_owned();
        let count = received.matches("event: thing.happened\n").count();
        assert!(count > 0 && count < EVENTS / 2, "{count}");
        assert!(received.ends_with(&format!("event: end\ndata: {SLOW}\n\n")), "{received}");

        let mut body = open(count).await;
        let mut received = String::new();
        while received.matches("event: thing.happened\n").count() < EVENTS - count {
            let frame = body.frame().await.expect("a frame").expect("no error");
            received += &String::from_utf8_lossy(frame.data_ref().expect("data"));
        }
        assert!(received.starts_with(&format!("{RETRY}id: {}\n", count + 1)), "{received:.100}");
    }
}
