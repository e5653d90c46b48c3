//! Puts the routes of a service behind the limits, and adds problems, probes and metrics.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use tokio_util::sync::CancellationToken;

use crate::{
    api::Api,
    limits::{self, Limits},
    metrics::Metrics,
    probes::{self, Probes},
    problem::Problem,
};

/// Returns all routes of a service: its own, which the limits apply to, with `/openapi.json`, and the probes, which are
/// answered under any load. Requests without a route get a problem, and a panic becomes an answer with status 500.
pub fn app(api: impl Into<Api>, limits: Limits, probes: Probes) -> Router {
    let metrics = probes.metrics.clone();
    let announced = probes.announced.clone();
    api.into()
        .merge(probes::described())
        .into_routes()
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(limits.places(), limits::hold))
        .merge(probes::routes(probes).method_not_allowed_fallback(no_method))
        .layer(from_fn_with_state(metrics, measure))
        .layer(from_fn_with_state(announced, announce))
}

/// Once the service has been asked to stop, closes each connection after its next answer, so that clients reconnect to
/// another instance. Also turns a panic into an error answer.
async fn announce(State(announced): State<CancellationToken>, request: Request, next: Next) -> Response {
    let answered = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    // The panic hook prints the panic on standard error.
    let panicked = |_| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error; see the log of the server").into_response()
    };
    let mut response = answered.unwrap_or_else(panicked);
    // An upgraded connection is no longer HTTP, and its header names the upgrade.
    if announced.is_cancelled() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn no_route(request: Request) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("no resource at {:.200}", request.uri().path()))
}

async fn no_method(request: Request) -> Problem {
    let detail = format!("method {:.20} is not allowed at {:.200}", request.method().as_str(), request.uri().path());
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)
}

/// Counts requests and measures their duration by route. The labels of the metrics never contain ids.
async fn measure(
    State(metrics): State<Arc<Metrics>>,
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    let _in_hand = InHand::new(&metrics);
    let method = match *request.method() {
        Method::GET => "GET",
        Method::POST => "POST",
        _ => "other",
    };
    let response = next.run(request).await.into_response();
    let route = path.as_ref().map_or("none", MatchedPath::as_str);
    metrics.answered(method, route, response.status().as_u16(), started.elapsed());
    response
}

/// Counts a request as in progress until this value is dropped, even if the client disconnects.
struct InHand(prometheus::IntGauge);

impl InHand {
    fn new(metrics: &Metrics) -> Self {
        metrics.in_hand.inc();
        Self(metrics.in_hand.clone())
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, routing::get};
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;

    use super::*;

    #[tokio::test]
    async fn panic_is_answered_without_source_location() {
        async fn panics() {
            panic!("in the middle of src/secret.rs");
        }
        let app = Router::new().route("/", get(panics)).layer(from_fn_with_state(CancellationToken::new(), announce));
        let request = Request::get("/").body(Body::empty()).expect("a request");
        let answer = TowerToHyperService::new(app).call(request).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let said = axum::body::to_bytes(answer.into_body(), 1_000).await.expect("a body");
        assert!(!String::from_utf8_lossy(&said).contains("secret"));
    }
}
