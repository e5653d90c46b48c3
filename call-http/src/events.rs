//! Live streams of events: from a position, first page by page, then as they are recorded.

mod channels;
mod following;
mod line;
mod selection;
mod socket;
mod sse;

use std::sync::Arc;

use annals::EventStore;
use axum::{Router, routing::get};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use utoipa::openapi::path::HttpMethod;

use self::following::Streams;
pub use self::following::{HEARTBEAT, SLOW_CLIENT, STREAMS_MAX};
use crate::api::{Api, Described, query, request_header};

/// Returns the routes with which clients follow the events of a store, until `ended` is cancelled:
///
/// - `GET /events` sends [server-sent events](https://html.spec.whatwg.org/multipage/server-sent-events.html): `id` is
///   the position of the event, `event` the type, and `data` the line that `annals tail --json` prints.
/// - `GET /events/ws` sends the same lines over a WebSocket, one text message per event. A client that opens the socket
///   with `?credits=N` gets at most N events until it sends `{"credits": M}`, which allows M more. `{"position": N}`
///   says that the client has received all of its events up to position N, and `{"end": "…"}` is the last message.
///
/// Both routes take these parameters. `category` and `type` may be repeated, and each may hold several names, separated
/// by commas:
///
/// - `category`, `type`: only events of these categories and types.
/// - `stream`: only events of this stream.
/// - `after`: start after this position; 0 is the beginning of the log. Without this parameter, the stream begins with
///   new events. The header `Last-Event-ID`, which a browser sends when it reconnects, takes precedence.
///
/// A client that comes back with the position of its last event misses no event and gets no event twice. A new event is
/// read once and held in memory once for all clients that have caught up. A client that falls behind is served from the
/// store until it has caught up. A client that accepts nothing for [`SLOW_CLIENT`] is dropped.
///
/// These routes show every event of the store. Put a layer with your own authorization in front of them, with
/// [`Api::map_routes`].
pub fn events(store: Arc<dyn EventStore>, ended: CancellationToken) -> Api {
    let streams = Streams::new(store, ended);
    let routes = Router::new().route("/events", get(sse::follow)).route("/events/ws", get(socket::follow));
    let text = || json!({"type": "string"});
    let position = || json!({"type": "integer", "format": "int64", "minimum": 0});
    let described = |summary| {
        Described::new("events", summary)
            .parameter(query("category", text(), "Only events of these categories."))
            .parameter(query("type", text(), "Only events of these types."))
            .parameter(query("stream", text(), "Only events of this stream."))
            .parameter(query("after", position(), "Start after this position."))
            .parameter(request_header("Last-Event-ID", position(), "Like `after`, and takes precedence."))
            .problem("409", "The position is beyond the end of the log.")
    };
    let sse = described("Sends events live").media("200", "Server-sent events.", "text/event-stream");
    let socket = described("Sends events live over a WebSocket")
        .parameter(query("credits", json!({"type": "integer", "minimum": 0}), "The number of events to send at first."))
        .empty("101", "The connection is a WebSocket now.");
    Api::from(routes.with_state(streams)).describe(HttpMethod::Get, "/events", sse).describe(
        HttpMethod::Get,
        "/events/ws",
        socket,
    )
}
