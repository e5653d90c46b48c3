//! Step 3 of 8. A read model keeps one view per customer up to date from the events of all orders.
//!
//!     cargo run -p annals-examples --example read_model

use std::{convert::Infallible, error::Error, sync::Arc, time::Duration};

use annals::{
    Aggregate, Event, EventStore, LocalBus, LogQuery, MemoryStore, Message, Position, Projection, ReadModel,
    Repository, Runtime, Service, Views,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "order")]
enum OrderEvent {
    Placed { customer: String, pence: u64 },
}

#[derive(Clone, Default)]
struct Order;

impl Aggregate for Order {
    const CATEGORY: &'static str = "order";
    type Command = (&'static str, u64);
    type Event = OrderEvent;
    type Refusal = Infallible;

    fn decide(&self, (customer, pence): &(&'static str, u64)) -> Result<Vec<OrderEvent>, Infallible> {
        Ok(vec![OrderEvent::Placed { customer: (*customer).to_owned(), pence: *pence }])
    }

    fn evolve(&mut self, _: &OrderEvent) {}
}

// ANCHOR: model
/// The orders of one customer.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Customer {
    orders: u32,
    pence: u64,
}

struct Customers;

impl ReadModel for Customers {
    const NAME: &'static str = "customers";
    type Event = OrderEvent;
    type View = Customer;

    fn keys(&self, event: &OrderEvent, _: &Message) -> Vec<String> {
        match event {
            OrderEvent::Placed { customer, .. } => vec![customer.clone()],
        }
    }

    fn apply(&self, _: &str, view: &mut Customer, event: &OrderEvent, _: &Message) {
        match event {
            OrderEvent::Placed { pence, .. } => {
                view.orders += 1;
                view.pence += pence;
            }
        }
    }
}
// ANCHOR_END: model

// ANCHOR: run
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let projection = Projection::new(Customers, LogQuery::categories([Order::CATEGORY]));
    let service = Service::new("orders", store.clone()).project(projection);
    let mut runtime = Runtime::new();
    runtime.start(vec![service], Arc::new(LocalBus::default())).await?;

    let orders = Repository::<Order>::new(store.clone());
    let mut last = Position::START;
    for (id, command) in [("1", ("ada", 250)), ("2", ("bob", 90)), ("3", ("ada", 1_000))] {
        let decided = orders.execute(id, command, Uuid::new_v4()).await?;
        last = decided.position.unwrap_or(last);
    }
    let views = Views::<Customers>::new(store);
    // The views follow the log: they show an event a moment after it was committed.
    views.wait_for(last, Duration::from_secs(10)).await?;
    for (name, customer) in views.list("", 100).await? {
        println!("{name}: {} orders, {} pence", customer.orders, customer.pence);
    }
    Ok(runtime.drain(Duration::from_secs(10)).await?)
}
// ANCHOR_END: run
