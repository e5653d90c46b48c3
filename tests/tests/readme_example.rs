//! The README's example, a service of loyalty points, run together with the shop's order service.
#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

use annals::{EventStore, ExecuteError, LocalBus, LogQuery, MemoryStore, Position, Repository, Runtime};
use rust_decimal::Decimal;
use sample_shop::{
    order::{Line, OrderCommand, Repositories},
    services::order_service,
};
use uuid::Uuid;

#[path = "readme_example/loyalty.rs"]
mod loyalty;

use loyalty::{Points, PointsCommand};

#[tokio::test]
async fn an_order_earns_points_that_can_be_spent_once() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let points = Repository::<Points>::new(store.clone());
    let repositories = Repositories::new(&store);
    let services =
        vec![order_service(store.clone(), repositories.clone()), loyalty::service(store.clone(), points.clone())];
    let mut runtime = Runtime::new();
    runtime.start(services, Arc::new(LocalBus::default())).await.unwrap();

    let line = Line { sku: "85123A".into(), quantity: 6, unit_price: Decimal::new(255, 2) };
    let place = OrderCommand::Place {
        order_id: "1".into(),
        customer: Some("17850".into()),
        lines: vec![line],
        card: Default::default(),
    };
    repositories.orders.execute("1", place, Uuid::new_v4()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), event_in(&*store, "points")).await.unwrap();
    assert_eq!(points.state("17850").await.unwrap().0, Decimal::from(15));

    let request = Uuid::new_v4();
    let spent = points.execute("17850", PointsCommand::Spend(Decimal::from(10)), request).await.unwrap();
    assert!(!spent.repeated);
    let again = points.execute("17850", PointsCommand::Spend(Decimal::from(10)), request).await.unwrap();
    assert!(again.repeated);
    let more = points.execute("17850", PointsCommand::Spend(Decimal::from(10)), Uuid::new_v4()).await;
    assert!(matches!(more, Err(ExecuteError::Refused(_))));
    runtime.drain(Duration::from_secs(10)).await.unwrap();
}

/// Waits until the log has an event of this category.
async fn event_in(store: &dyn EventStore, category: &'static str) {
    let mut after = Position::START;
    loop {
        let page = store.read_log(&LogQuery::categories([category]), after, 1).await.unwrap();
        if !page.events.is_empty() {
            return;
        }
        if page.next == after {
            store.wait(after).await.unwrap();
        }
        after = page.next;
    }
}
