//! HTTP for a service of Annals, on axum.
//!
//! - [`Server`] is the server of a service: it puts the routes of the service behind limits, adds probes and metrics, and
//!   stops without a failed request.
//! - [`app()`] puts the routes of a service behind [`Limits`], and adds [`Probes`] (`/healthz`, `/readyz`, `/metrics`).
//! - [`serve`] accepts connections, and [stops](Stopping) without a failed request.
//! - [`aggregate`] makes routes for the commands and the state of aggregates, and [`views`] for the views of read models.
//! - [`events`] sends the events of the log live, as server-sent events and over a WebSocket.
//! - [`Submission`] reads a request with an idempotency key, and [`Sagas`] waits for the end of the saga that the
//!   request starts.
//! - [`Problem`] is an error answer, as `application/problem+json`.

pub use utoipa;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod aggregate;
mod api;
mod app;
mod conditions;
mod events;
mod follower;
pub mod json;
mod limits;
mod listener;
mod metrics;
mod probes;
mod problem;
mod request;
mod sagas;
mod server;
mod views;

pub use self::{
    aggregate::{Receipt, aggregate},
    api::Api,
    app::app,
    events::{HEARTBEAT, SLOW_CLIENT, STREAMS_MAX, events},
    follower::{Followed, Follower, Whole},
    limits::{ANSWER_TIME_MAX, BODY_BYTES_MAX, BODY_TIME_MAX, Limits, REQUESTS_MAX, WAIT_MAX},
    listener::{CONNECTIONS_MAX, HEAD_TIME_MAX, LAST_ANSWERS, Stopping, WRITE_TIME_MAX, serve},
    metrics::Metrics,
    probes::Probes,
    problem::{Problem, without_files},
    request::{
        ID_BYTES_MAX, IDEMPOTENCY_KEY, Id, REPLAYED, Submission, Wait, WaitParameters, asked, check_name, id, wait,
    },
    sagas::{Moment, STUCK, SagaView, Sagas, Watch},
    server::{GRACE, Server},
    views::views,
};
