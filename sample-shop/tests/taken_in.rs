//! What was taken in is said to be, whatever happens to the store after that.
#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

use annals::{EventStore, Health, MemoryStore};
use annals_tests::faulty::FaultyStore;
use axum::body::{Body, to_bytes};
use hyper::{Request, StatusCode, service::Service};
use hyper_util::service::TowerToHyperService;
use sample_shop::{
    http::{self, Follower, Front, Metrics, Probes, Sagas},
    shop::Counter,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// No service runs here, so no saga ends.
fn counter_alone(store: Arc<dyn EventStore>) -> axum::Router {
    let (metrics, stopping) = (Metrics::new().unwrap(), CancellationToken::new());
    let sagas = Sagas { store: store.clone(), follower: Follower::default(), stopping: stopping.clone() };
    let kept_in = (String::new(), String::new());
    let front = Front { store: store.clone(), counter: Counter::new(&store), sagas, metrics: metrics.clone(), kept_in };
    http::app(Some(front), Probes { store, health: Health::default(), metrics, stopping })
}

#[tokio::test]
async fn although_nothing_can_be_read_any_more() {
    let faulty = FaultyStore::new(Arc::new(MemoryStore::new()));
    let app = TowerToHyperService::new(counter_alone(Arc::new(faulty.clone())));
    let line = json!([{"sku": "85123A", "quantity": 2, "unit_price": "2.55"}]);
    let papers = [
        ("orders", json!({"lines": line}), json!({"order_id": "1", "total": "5.10", "currency": "GBP"})),
        ("returns", json!({"lines": line}), json!({"return_id": "1", "total": "5.10", "currency": "GBP"})),
        ("supplies", json!({"delivered": [{"sku": "85123A", "quantity": 2}]}), json!({"supply_id": "1"})),
        ("closings", Value::Null, json!({"closing_id": "1"})),
    ];
    for (number, (resource, body, receipt)) in papers.into_iter().enumerate() {
        let request = Request::post(format!("/{resource}?wait=1s"))
            .header("content-type", "application/json")
            .header("idempotency-key", "1")
            .body(Body::from(body.to_string()))
            .unwrap();
        let asked = tokio::spawn(app.call(request));
        faulty.committed(number as u64 + 1).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        faulty.away(true);
        let answer = asked.await.unwrap().unwrap();
        faulty.away(false);
        assert_eq!(answer.status(), StatusCode::CREATED, "{resource}");
        assert_eq!(answer.headers()["location"], format!("/{resource}/1"));
        let said = to_bytes(answer.into_body(), 1_000_000).await.unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&said).unwrap(), receipt);
    }
}
