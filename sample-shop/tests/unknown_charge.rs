//! A provider takes the money but never answers in time. No customer may pay for an order that was cancelled.
#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use annals::{Aggregate, EventStore, LocalBus, LogQuery, MemoryStore, Position, Repository, Runtime};
use async_trait::async_trait;
use rust_decimal::Decimal;
use sample_shop::{
    card::Card,
    inventory::{OfSku, Stock, StockCommand},
    order::{Line, OrderCommand, Repositories},
    payment::{Payment, PaymentEvent, Provider, ProviderError},
    services,
};
use uuid::Uuid;

/// The charges by key, and the amount that each order has cost its customer so far.
#[derive(Default)]
struct DeafProvider {
    charges: Mutex<HashMap<Uuid, Decimal>>,
    balances: Mutex<HashMap<String, Decimal>>,
}

#[async_trait]
impl Provider for DeafProvider {
    async fn charge(&self, key: Uuid, order_id: &str, _card: Card, amount: Decimal) -> Result<(), ProviderError> {
        if self.charges.lock().unwrap().insert(key, amount).is_none() {
            *self.balances.lock().unwrap().entry(order_id.to_owned()).or_default() += amount;
        }
        Err(ProviderError::TimedOut)
    }

    async fn refund(&self, _key: Uuid, id: &str, amount: Decimal) -> Result<(), ProviderError> {
        if let Some(balance) = self.balances.lock().unwrap().get_mut(id) {
            *balance -= amount.min(*balance);
        }
        Ok(())
    }
}

#[tokio::test]
async fn unanswered_charge_is_refunded_and_not_booked() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let repositories = Repositories::new(&store);
    let provider = Arc::new(DeafProvider::default());
    let mut runtime = Runtime::new();
    let services = services::all(&store, repositories.clone(), provider.clone());
    runtime.start(services, Arc::new(LocalBus::default())).await.unwrap();
    let received = StockCommand::Receive { quantity: 3, delivery_id: "first".into() };
    let stock = Repository::<Stock>::new(store.clone());
    stock.execute("tea", OfSku { sku: "tea".into(), command: received }, Uuid::new_v4()).await.unwrap();
    let line = Line { sku: "tea".into(), quantity: 2, unit_price: Decimal::new(250, 2) };
    let place = OrderCommand::Place { order_id: "1".into(), customer: None, lines: vec![line], card: Card::Good };
    repositories.orders.execute("1", place, Uuid::new_v4()).await.unwrap();

    let cancelled = async {
        loop {
            let types: Vec<_> = read(&store).await.into_iter().map(|event| event.type_name.to_string()).collect();
            if types.iter().any(|name| name == "order.cancelled") {
                return types;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let types = tokio::time::timeout(Duration::from_secs(60), cancelled).await.unwrap();
    assert_eq!(provider.charges.lock().unwrap().len(), 1, "every attempt has one key");
    assert_eq!(provider.balances.lock().unwrap()["1"], Decimal::ZERO, "the card is not charged");
    assert!(!types.iter().any(|name| name.starts_with("payment.")), "{types:?}");
    assert!(types.iter().any(|name| name == "stock.released"), "{types:?}");
    runtime.drain(Duration::from_secs(10)).await.unwrap();
}

async fn read(store: &Arc<dyn EventStore>) -> Vec<Arc<annals::Recorded>> {
    store.read_log(&LogQuery::all(), Position::START, 1_000).await.unwrap().events
}

#[test]
fn refund_is_booked_only_after_a_booked_charge() {
    let amount = Decimal::ONE;
    let charged = PaymentEvent::Charged { order_id: "1".into(), amount, currency: "GBP".into() };
    let refunded =
        PaymentEvent::Refunded { order_id: Some("1".into()), return_id: None, amount, currency: "GBP".into() };
    let mut payment = Payment::default();
    assert_eq!(payment.decide(&refunded), Ok(vec![]));
    payment.evolve(&charged);
    assert_eq!(payment.decide(&refunded), Ok(vec![refunded.clone()]));
}
