//! Step 4 of 8. Two services, each with a store of its own, communicate over a bus.
//!
//!     cargo run -p annals-examples --example two_services

use std::{convert::Infallible, error::Error, sync::Arc, time::Duration};

use annals::{
    Aggregate, Event, EventStore, Group, Handler, HandlerError, LocalBus, MemoryStore, Message, Repository, Runtime,
    Service, Work,
};
use async_trait::async_trait;
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

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "points")]
enum PointsEvent {
    Earned { points: u64 },
}

/// The points of one customer.
#[derive(Clone, Default)]
struct Points(u64);

impl Aggregate for Points {
    const CATEGORY: &'static str = "points";
    type Command = u64;
    type Event = PointsEvent;
    type Refusal = Infallible;

    fn decide(&self, points: &u64) -> Result<Vec<PointsEvent>, Infallible> {
        Ok(vec![PointsEvent::Earned { points: *points }])
    }

    fn evolve(&mut self, PointsEvent::Earned { points }: &PointsEvent) {
        self.0 += points;
    }
}

// ANCHOR: handler
/// Awards one point for each whole pound of an order.
struct Award(Repository<Points>);

#[async_trait]
impl Handler for Award {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if let Some(OrderEvent::Placed { customer, pence }) = message.decode()? {
            work.execute(&self.0, &customer, &(pence / 100)).await?;
        }
        Ok(())
    }
}
// ANCHOR_END: handler

// ANCHOR: run
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let of_orders: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let of_points: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let points = Repository::<Points>::new(of_points.clone());

    let orders = Service::new("orders", of_orders.clone()).publish(&[Order::CATEGORY]);
    let award = Group::new("points.orders", &["orders.events"], Award(points.clone()));
    let loyalty = Service::new("points", of_points).consume(award);
    let mut runtime = Runtime::new();
    runtime.start(vec![orders, loyalty], Arc::new(LocalBus::default())).await?;

    let orders = Repository::<Order>::new(of_orders);
    orders.execute("1", ("ada", 250), Uuid::new_v4()).await?;
    orders.execute("2", ("ada", 1_099), Uuid::new_v4()).await?;
    while points.state("ada").await?.0 < 12 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("ada has {} points", points.state("ada").await?.0);
    Ok(runtime.drain(Duration::from_secs(10)).await?)
}
// ANCHOR_END: run
