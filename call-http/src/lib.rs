//! HTTP for a service of Annals, on axum.
//!
//! - [`app()`] puts the routes of a service behind [`Limits`], and adds [`Probes`] (`/healthz`, `/readyz`, `/metrics`).
//! - [`serve`] accepts connections, and [stops](Stopping) without a failed request.
//! - [`Submission`] reads a request with an idempotency key, and [`Sagas`] waits for the end of the saga that the
//!   request starts.
//! - [`Problem`] is an error answer, as `application/problem+json`.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod app;
mod follower;
pub mod json;
mod limits;
mod listener;
mod metrics;
mod probes;
mod problem;
mod request;
mod sagas;

pub use self::{
    app::app,
    follower::{Followed, Follower, Whole},
    limits::{ANSWER_TIME_MAX, BODY_BYTES_MAX, BODY_TIME_MAX, Limits, REQUESTS_MAX, WAIT_MAX},
    listener::{CONNECTIONS_MAX, HEAD_TIME_MAX, LAST_ANSWERS, Stopping, serve},
    metrics::Metrics,
    probes::Probes,
    problem::{Problem, without_files},
    request::{
        ID_BYTES_MAX, IDEMPOTENCY_KEY, Id, REPLAYED, Submission, Wait, WaitParameters, asked, check_name, id, wait,
    },
    sagas::{Moment, STUCK, SagaView, Sagas, Watch},
};
