//! An HTTP server with the given routes, and a client that sees what is sent.
#![allow(dead_code)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use annals::{Health, MemoryStore};
use annals_http::{Api, Limits, Metrics, Probes, Stopping, app, serve};
use axum::{body::Bytes, http::HeaderMap};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Incoming, client::conn::http1::handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// A server on a free port, which stops when this value is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub stop: CancellationToken,
    pub serving: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Server {
    /// Starts a server. `api` gets the token that announces the stop of the server.
    pub async fn start(api: impl FnOnce(CancellationToken) -> Api) -> Self {
        let stop = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stopping = Stopping::new(stop.clone(), Duration::ZERO);
        let store = Arc::new(MemoryStore::new());
        let probes =
            Probes { store, health: Health::default(), metrics: Metrics::new().unwrap(), announced: stop.clone() };
        let app = app(api(stop.clone()), Limits::default(), probes);
        let serving = tokio::spawn(serve(listener, app, stopping));
        Self { address, stop, serving }
    }

    /// Sends a request over a connection of its own, and returns the head of the answer with its body.
    pub async fn send(&self, request: Request<String>) -> hyper::Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut client, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let (mut head, body) = request.into_parts();
        head.headers.insert("host", "127.0.0.1".parse().unwrap());
        client.send_request(Request::from_parts(head, Full::new(Bytes::from(body)))).await.unwrap()
    }

    /// Sends a request, and returns the status, the headers and the JSON of the answer; `null` without a body.
    pub async fn ask(&self, request: Request<String>) -> (u16, HeaderMap, Value) {
        let (head, body) = self.send(request).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let json = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
        (head.status.as_u16(), head.headers, json)
    }

    pub async fn get(&self, path: &str) -> (u16, HeaderMap, Value) {
        self.ask(Request::get(path).body(String::new()).unwrap()).await
    }

    /// Posts JSON with these headers.
    pub async fn post(&self, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, HeaderMap, Value) {
        let mut request = Request::post(path).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.ask(request.body(body.to_owned()).unwrap()).await
    }
}

/// A server-sent event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SentEvent {
    pub id: Option<i64>,
    pub event: String,
    pub data: String,
}

/// A client of server-sent events.
pub struct EventSource {
    body: Incoming,
    received: String,
}

impl EventSource {
    /// Opens a stream, as a browser does that has received events up to `last`.
    pub async fn open(server: &Server, path: &str, last: Option<i64>) -> Self {
        let mut request = Request::get(path);
        if let Some(last) = last {
            request = request.header("last-event-id", last.to_string());
        }
        let response = server.send(request.body(String::new()).unwrap()).await;
        assert_eq!(response.status().as_u16(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: response.into_body(), received: String::new() }
    }

    /// Returns the next block of lines, which may be a comment or a position without an event; `None` at the end.
    pub async fn next(&mut self) -> Option<SentEvent> {
        loop {
            if let Some((block, rest)) = self.received.split_once("\n\n") {
                let mut sent = SentEvent::default();
                for line in block.lines() {
                    match line.split_once(": ") {
                        Some(("id", id)) => sent.id = Some(id.parse().unwrap()),
                        Some(("event", event)) => sent.event = event.to_owned(),
                        Some(("data", data)) => sent.data = data.to_owned(),
                        Some(("" | "retry", _)) => {}
                        _ => panic!("not a line of an event: {line}"),
                    }
                }
                self.received = rest.to_owned();
                return Some(sent);
            }
            let frame = self.body.frame().await?.ok()?;
            self.received += std::str::from_utf8(frame.data_ref()?).unwrap();
        }
    }

    /// Returns the next event.
    pub async fn event(&mut self) -> Option<SentEvent> {
        loop {
            let sent = self.next().await?;
            if !sent.data.is_empty() {
                return Some(sent);
            }
        }
    }
}
