//! The shop acknowledges an order, a return or a supply that its store has accepted, even if the store fails
//! immediately afterwards.
#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

use annals::{
    Commit, CommitError, Committed, Document, DocumentKey, EventStore, Health, LogPage, LogQuery, MemoryStore,
    Position, Recorded, Scan, StoreError, StoreStatus, StreamId, Version,
};
use annals_http::{Follower, Limits, Metrics, Probes, Sagas};
use annals_tests::faulty::FaultyStore;
use async_trait::async_trait;
use axum::body::{Body, to_bytes};
use hyper::{Request, StatusCode, service::Service};
use hyper_util::service::TowerToHyperService;
use sample_shop::{
    http::{self, OrderApi},
    order::Repositories,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// Returns the HTTP interface without any service behind it, so no saga ends.
fn api_alone(store: Arc<dyn EventStore>) -> axum::Router {
    let metrics = Metrics::new().unwrap();
    let sagas = Sagas { store: store.clone(), follower: Follower::default(), over: CancellationToken::new() };
    let api = OrderApi {
        store: store.clone(),
        repositories: Repositories::new(&store),
        sagas,
        accepted: http::accepted(&metrics).unwrap(),
        store_url: String::new(),
        bus_url: String::new(),
    };
    let probes = Probes { store, health: Health::default(), metrics, announced: CancellationToken::new() };
    annals_http::app(http::routes(api), Limits::default(), probes)
}

#[tokio::test]
async fn submission_is_acknowledged_although_reads_fail() {
    let faulty = FaultyStore::new(Arc::new(MemoryStore::new()));
    let app = TowerToHyperService::new(api_alone(Arc::new(faulty.clone())));
    let line = json!([{"sku": "85123A", "quantity": 2, "unit_price": "2.55"}]);
    let submissions = [
        ("orders", json!({"lines": line}), json!({"order_id": "1", "total": "5.10", "currency": "GBP"})),
        ("returns", json!({"lines": line}), json!({"return_id": "1", "total": "5.10", "currency": "GBP"})),
        ("supplies", json!({"delivered": [{"sku": "85123A", "quantity": 2}]}), json!({"supply_id": "1"})),
        ("closings", Value::Null, json!({"closing_id": "1"})),
    ];
    for (number, (resource, body, receipt)) in submissions.into_iter().enumerate() {
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

/// A store whose errors all contain file names, as database errors do.
struct Broken;

const ON_DISK: &str = "could not extend file \"base/5/16389\": /var/lib/shop/shop.db-wal: No space left on device";

impl Broken {
    fn error<T>() -> Result<T, StoreError> {
        Err(StoreError::Unavailable(ON_DISK.into()))
    }
}

#[async_trait]
impl EventStore for Broken {
    async fn commit(&self, _: Commit) -> Result<Committed, CommitError> {
        Err(CommitError::Unavailable(ON_DISK.into()))
    }
    async fn read_stream(&self, _: &StreamId, _: Version, _: usize) -> Result<Vec<Recorded>, StoreError> {
        Self::error()
    }
    async fn read_log(&self, _: &LogQuery, _: Position, _: usize) -> Result<LogPage, StoreError> {
        Self::error()
    }
    async fn documents(&self, _: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        Self::error()
    }
    async fn scan(&self, _: &str, _: &Scan, _: usize) -> Result<Vec<Document>, StoreError> {
        Self::error()
    }
    async fn wait(&self, _: Position) -> Result<(), StoreError> {
        Self::error()
    }
    async fn status(&self) -> Result<StoreStatus, StoreError> {
        Self::error()
    }
}

#[tokio::test]
async fn answers_name_no_file() {
    let app = TowerToHyperService::new(api_alone(Arc::new(Broken)));
    let order = json!({"lines": [{"sku": "85123A", "quantity": 2, "unit_price": "2.55"}]}).to_string();
    for (method, path, body) in [
        ("POST", "/orders", &*order),
        ("POST", "/orders?wait=1s", &order),
        ("POST", "/returns", &order),
        ("POST", "/closings", ""),
        ("POST", "/orders/1/cancel", ""),
        ("GET", "/orders/1", ""),
        ("GET", "/returns/1?wait=1s", ""),
        ("GET", "/supplies/1", ""),
        ("GET", "/closings/1", ""),
        ("GET", "/readyz", ""),
    ] {
        let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        let answer = app.call(request.body(Body::from(body.to_owned())).unwrap()).await.unwrap();
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "{method} {path}");
        let said = to_bytes(answer.into_body(), 1_000_000).await.unwrap();
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains("No space left on device"), "{method} {path}: {said}");
        assert!(!said.contains("16389") && !said.contains("shop.db"), "{method} {path}: {said}");
    }
}
