//! `/healthz`, `/readyz` and `/metrics`, which every service has.

use std::{fmt, sync::Arc, time::Duration};

use annals::{EventStore, Health, StoreStatus, health::State as PartState};
use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::json;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use utoipa::openapi::path::HttpMethod;

use crate::{
    api::{Api, Described},
    metrics::Metrics,
    problem::{Problem, without_files},
};

/// How long the store may take to answer.
const STORE_TIME_MAX: Duration = Duration::from_secs(2);

/// The state that the probes inspect.
#[derive(Clone)]
pub struct Probes {
    /// The store of the service.
    pub store: Arc<dyn EventStore>,
    /// The health of the runtime.
    pub health: Health,
    /// The metrics of the process.
    pub metrics: Arc<Metrics>,
    /// Cancelled when the service is asked to stop.
    pub announced: CancellationToken,
}

impl fmt::Debug for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probes").field("health", &self.health).finish_non_exhaustive()
    }
}

/// Returns the description of the routes that [`routes`] serves. The limits do not apply to these routes.
pub fn described() -> Api {
    let healthz = Described::new("probes", "Reports whether the process is healthy")
        .media("200", "Healthy.", "application/json")
        .problem("503", "Not healthy.");
    let readyz = Described::new("probes", "Reports whether the process can work now")
        .media("200", "Ready.", "application/json")
        .media("503", "Not ready.", "application/json");
    let metrics = Described::new("probes", "Returns the metrics of the process").media(
        "200",
        "The metrics, as text for Prometheus.",
        "text/plain",
    );
    Api::default().describe(HttpMethod::Get, "/healthz", healthz).describe(HttpMethod::Get, "/readyz", readyz).describe(
        HttpMethod::Get,
        "/metrics",
        metrics,
    )
}

/// Returns the routes.
pub fn routes(probes: Probes) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(probes)
}

/// Reports whether the process is healthy. The probe fails once a part has ended with an error, because only a restart
/// repairs the part.
async fn healthz(State(probes): State<Probes>) -> Response {
    let failed = probes.health.parts().into_iter().find_map(|(part, state)| match state {
        PartState::Failed(reason) => Some(format!("{part} has ended: {}", without_files(&reason))),
        _ => None,
    });
    match failed {
        Some(reason) => Problem::unavailable(reason).into_response(),
        None => Json(json!({"status": "ok"})).into_response(),
    }
}

/// Reports whether the process can work now, and the reasons if it cannot. Also reports a writer that makes readers of
/// the log wait; orders are still accepted in that state.
async fn readyz(State(probes): State<Probes>) -> Response {
    let mut reasons = Vec::new();
    if probes.announced.is_cancelled() {
        reasons.push("stopping".to_owned());
    }
    let found = match timeout(STORE_TIME_MAX, probes.store.status()).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            reasons.push(without_files(&error));
            StoreStatus::default()
        }
        Err(_) => {
            reasons.push(format!("the store did not answer within {} s", STORE_TIME_MAX.as_secs()));
            StoreStatus::default()
        }
    };
    let waits_for = found.waits_for.map(|writer| writer.to_string());
    // The store works, but an operator has to act: other systems may have received events that are no longer in the
    // log.
    let lost_end = found.lost_end.map(|lost| lost.to_string());
    let mut attention = Vec::new();
    let mut parts = probes.health.parts();
    for state in parts.values_mut() {
        if let PartState::Trouble(reason) | PartState::Failed(reason) | PartState::NeedsAttention(reason) = state {
            *reason = without_files(reason);
        }
    }
    for (part, state) in &parts {
        match state {
            PartState::Fine | PartState::Elsewhere(_) => {}
            // Another instance would need the operator for the same reason, so this instance keeps accepting requests.
            PartState::NeedsAttention(reason) => attention.push(format!("{part}: {reason}")),
            PartState::Starting => reasons.push(format!("{part} is starting")),
            PartState::Stopped => reasons.push(format!("{part} has stopped")),
            PartState::Trouble(reason) | PartState::Failed(reason) => reasons.push(format!("{part}: {reason}")),
        }
    }
    let (status, word) = match reasons.is_empty() {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
    };
    let body = json!({
        "status": word, "reasons": reasons, "needs_attention": attention, "readers_wait_for": waits_for, "log_lost_its_end": lost_end, "parts": parts,
    });
    (status, Json(body)).into_response()
}

async fn metrics(State(probes): State<Probes>) -> Response {
    match probes.metrics.text(&probes.store, &probes.health).await {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => Problem::new(StatusCode::INTERNAL_SERVER_ERROR, without_files(&error)).into_response(),
    }
}
