//! The limits of requests: the size of the body, the time, and the number of concurrent requests.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, HttpBody, to_bytes},
    extract::{Request, State},
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body_util::LengthLimitError;
use tokio::{sync::Semaphore, time::timeout};

use crate::problem::Problem;

/// The default of [`Limits::body_bytes`].
pub const BODY_BYTES_MAX: usize = 1_000_000;
/// The default of [`Limits::body_time`].
pub const BODY_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a request may wait for the end of a saga.
pub const WAIT_MAX: Duration = Duration::from_secs(30);
/// The default of [`Limits::answer_time`].
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(40);
/// The default of [`Limits::requests`].
pub const REQUESTS_MAX: usize = 2_048;

/// The limits of requests.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The largest body of a request, in bytes. A larger body gets a 413, before the body is read if its length is
    /// declared.
    pub body_bytes: usize,
    /// How long a body may take to arrive. A slower body gets a 408.
    pub body_time: Duration,
    /// How long the answer may take in total after the body has arrived. A slower answer becomes a 504. The limit should
    /// be longer than [`WAIT_MAX`].
    pub answer_time: Duration,
    /// The maximum number of concurrent requests, including requests that wait for a saga. Further requests get a 503.
    pub requests: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: BODY_BYTES_MAX,
            body_time: BODY_TIME_MAX,
            answer_time: ANSWER_TIME_MAX,
            requests: REQUESTS_MAX,
        }
    }
}

impl Limits {
    pub(crate) fn places(self) -> Places {
        Places { limits: self, free: Arc::new(Semaphore::new(self.requests)) }
    }
}

/// The places for concurrent requests.
#[derive(Clone)]
pub(crate) struct Places {
    limits: Limits,
    free: Arc<Semaphore>,
}

/// Applies the limits to a request. Handlers behind this middleware receive the whole body in memory.
pub(crate) async fn hold(State(places): State<Places>, request: Request, next: Next) -> Response {
    let Limits { body_bytes, body_time, answer_time, requests } = places.limits;
    let Ok(_place) = places.free.try_acquire() else {
        let detail = format!("{requests} requests are in progress; retry in a moment");
        return Problem::unavailable(detail).into_response();
    };
    let (head, body) = request.into_parts();
    if body.size_hint().lower() > body_bytes as u64 {
        return too_large(body_bytes).into_response();
    }
    let body = match timeout(body_time, to_bytes(body, body_bytes)).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return unread(error, body_bytes).into_response(),
        Err(_) => {
            let detail = format!("the body did not arrive within {} s", body_time.as_secs());
            return Problem::new(StatusCode::REQUEST_TIMEOUT, detail).into_response();
        }
    };
    match timeout(answer_time, next.run(Request::from_parts(head, Body::from(body)))).await {
        Ok(response) => response,
        Err(_) => {
            let detail = "the outcome is not known yet: repeat the request with the same Idempotency-Key";
            Problem::new(StatusCode::GATEWAY_TIMEOUT, detail).into_response()
        }
    }
}

fn too_large(body_bytes: usize) -> Problem {
    let detail = format!("the body has more than {body_bytes} bytes, which is the limit");
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
}

fn unread(error: axum::Error, body_bytes: usize) -> Problem {
    let error = error.into_inner();
    if error.is::<LengthLimitError>() {
        return too_large(body_bytes);
    }
    Problem::new(StatusCode::BAD_REQUEST, format!("the body could not be read: {error}"))
}

#[cfg(test)]
mod tests {
    use axum::{Router, http, middleware::from_fn_with_state, routing::post};
    use futures::future::join_all;
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;
    use tokio_util::sync::CancellationToken;

    use super::*;

    const REQUESTS: usize = 100;

    /// Requests without an answer hold all permits, and the next request is rejected.
    #[tokio::test]
    async fn request_beyond_the_limit_is_rejected() {
        let answer = CancellationToken::new();
        let held = answer.clone();
        let places = Limits { requests: REQUESTS, ..Limits::default() }.places();
        let app: Router = Router::new()
            .route("/", post(move || async move { held.cancelled().await }))
            .layer(from_fn_with_state(places.clone(), hold));
        let app = TowerToHyperService::new(app);
        let ask = || app.call(http::Request::post("/").body(Body::empty()).expect("a request"));
        let asked: Vec<_> = (0..REQUESTS).map(|_| tokio::spawn(ask())).collect();
        while places.free.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = ask().await.expect("an answer");
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(refused.headers()["retry-after"], "1");
        answer.cancel();
        for answered in join_all(asked).await {
            assert_eq!(answered.expect("joined").expect("an answer").status(), StatusCode::OK);
        }
    }
}
