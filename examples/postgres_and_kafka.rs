//! Step 6 of 8. Runs the services of step 4 on PostgreSQL and Kafka. In production, each service is its own process.
//!
//!     DATABASE_URL=postgres://… KAFKA_BROKERS=host:9092 cargo run -p annals-examples --example postgres_and_kafka -- shop
//!
//! The argument is the prefix of the names of the schemas and topics.

use std::{convert::Infallible, env, error::Error, sync::Arc, time::Duration};

use annals::{Aggregate, Event, EventStore, Group, Handler, HandlerError, Message, Repository, Runtime, Service, Work};
use annals_kafka::KafkaBus;
use annals_postgres::{PostgresStore, Settings};
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

// ANCHOR: run
async fn store(schema: &str) -> Result<Arc<dyn EventStore>, Box<dyn Error>> {
    let url = env::var("DATABASE_URL").map_err(|_| "set DATABASE_URL to a PostgreSQL, such as postgres://host/db")?;
    let separator = if url.contains('?') { '&' } else { '?' };
    let url = format!("{url}{separator}schema={schema}");
    Ok(Arc::new(PostgresStore::connect(&url, Settings::default()).await?))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let name = env::args().nth(1).unwrap_or_else(|| "example".to_owned());
    let brokers = env::var("KAFKA_BROKERS").map_err(|_| "set KAFKA_BROKERS to a Kafka, such as localhost:9092")?;
    let of_orders = store(&format!("{name}_orders")).await?;
    let of_points = store(&format!("{name}_points")).await?;
    let bus = KafkaBus::connect(annals_kafka::Settings::new(&brokers).partitions(2)).await?;

    let points = Repository::<Points>::new(of_points.clone());
    let orders = Service::new(&format!("{name}.orders"), of_orders.clone()).publish(&[Order::CATEGORY]);
    let topic = format!("{name}.orders.events");
    let award = Group::new(&format!("{name}.points.orders"), &[&topic], Award(points.clone()));
    let loyalty = Service::new(&format!("{name}.points"), of_points).consume(award);
    let mut runtime = Runtime::new();
    runtime.start(vec![orders, loyalty], Arc::new(bus)).await?;

    let before = points.state("ada").await?.0;
    let order = Uuid::new_v4();
    Repository::<Order>::new(of_orders).execute(&order.to_string(), ("ada", 1_250), order).await?;
    while points.state("ada").await?.0 == before {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("ada had {before} points and has {}", points.state("ada").await?.0);
    Ok(runtime.drain(Duration::from_secs(20)).await?)
}
// ANCHOR_END: run
