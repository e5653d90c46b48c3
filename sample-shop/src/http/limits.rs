//! The limits of requests: the size of the body, the time, and the number of concurrent requests.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, to_bytes},
    extract::{Request, State},
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body_util::LengthLimitError;
use tokio::{sync::Semaphore, time::timeout};

use super::problem::Problem;

/// The largest body of a request, in bytes. An order with five thousand lines needs less than half of that.
pub const BODY_BYTES_MAX: usize = 1_000_000;
/// How long a body may take to arrive.
pub const BODY_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a request may wait for the end of a saga.
pub const WAIT_MAX: Duration = Duration::from_secs(30);
/// How long the answer may take in total after the body has arrived.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(40);
/// The maximum number of concurrent requests, including requests that wait for a saga. Further requests are rejected.
pub const REQUESTS_MAX: usize = 2_048;

/// The permits for concurrent requests.
#[derive(Clone)]
pub struct Limits {
    places: Arc<Semaphore>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(REQUESTS_MAX)) }
    }
}

/// Applies the limits to a request. Handlers behind this middleware receive the whole body in memory.
pub async fn hold(State(limits): State<Limits>, request: Request, next: Next) -> Response {
    let Ok(_place) = limits.places.try_acquire() else {
        let detail = format!("{REQUESTS_MAX} requests are in progress; retry in a moment");
        return Problem::unavailable(detail).into_response();
    };
    let (head, body) = request.into_parts();
    let body = match timeout(BODY_TIME_MAX, to_bytes(body, BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return unread(error).into_response(),
        Err(_) => {
            let detail = format!("the body did not arrive within {} s", BODY_TIME_MAX.as_secs());
            return Problem::new(StatusCode::REQUEST_TIMEOUT, detail).into_response();
        }
    };
    match timeout(ANSWER_TIME_MAX, next.run(Request::from_parts(head, Body::from(body)))).await {
        Ok(response) => response,
        Err(_) => {
            let detail = "the outcome is not known yet: repeat the request with the same Idempotency-Key";
            Problem::new(StatusCode::GATEWAY_TIMEOUT, detail).into_response()
        }
    }
}

fn unread(error: axum::Error) -> Problem {
    let error = error.into_inner();
    if error.is::<LengthLimitError>() {
        return Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body has more than {BODY_BYTES_MAX} bytes, which is the limit"),
        );
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

    /// Requests without an answer hold all permits, and the next request is rejected.
    #[tokio::test]
    async fn request_beyond_the_limit_is_rejected() {
        let answer = CancellationToken::new();
        let held = answer.clone();
        let limits = Limits::default();
        let app: Router = Router::new()
            .route("/", post(move || async move { held.cancelled().await }))
            .layer(from_fn_with_state(limits.clone(), hold));
        let app = TowerToHyperService::new(app);
        let ask = || app.call(http::Request::post("/").body(Body::empty()).expect("a request"));
        let asked: Vec<_> = (0..REQUESTS_MAX).map(|_| tokio::spawn(ask())).collect();
        while limits.places.available_permits() > 0 {
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
