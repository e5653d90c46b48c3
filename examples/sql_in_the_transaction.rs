//! Step 7 of 8. A handler writes a table of its own, in the transaction that moves its checkpoint.
//!
//!     DATABASE_URL=postgres://… cargo run -p annals-examples --example sql_in_the_transaction -- shop
//!
//! The argument names the schema.

use std::{convert::Infallible, env, error::Error, sync::Arc, time::Duration};

use annals::{
    Aggregate, Event, EventStore, HandlerError, LocalBus, LogQuery, Message, Repository, Runtime, Service,
    Subscription, Work,
};
use annals_postgres::{PostgresStore, Settings, SqlHandler, SqlStore};
use async_trait::async_trait;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "order")]
enum OrderEvent {
    Placed { country: String, pence: i64 },
}

#[derive(Clone, Default)]
struct Order;

impl Aggregate for Order {
    const CATEGORY: &'static str = "order";
    type Command = (&'static str, i64);
    type Event = OrderEvent;
    type Refusal = Infallible;

    fn decide(&self, (country, pence): &(&'static str, i64)) -> Result<Vec<OrderEvent>, Infallible> {
        Ok(vec![OrderEvent::Placed { country: (*country).to_owned(), pence: *pence }])
    }

    fn evolve(&mut self, _: &OrderEvent) {}
}

// ANCHOR: handler
/// Adds up the turnover of each country in the table `turnover`.
struct Turnover {
    schema: String,
}

#[async_trait]
impl SqlHandler for Turnover {
    async fn handle(&self, message: &Message, sql: &mut PgConnection, _: &mut Work) -> Result<(), HandlerError> {
        if let Some(OrderEvent::Placed { country, pence }) = message.decode()? {
            let add = format!(
                "INSERT INTO {}.turnover AS t VALUES ($1, $2)
                 ON CONFLICT (country) DO UPDATE SET pence = t.pence + excluded.pence",
                self.schema
            );
            sqlx::query(AssertSqlSafe(add)).bind(country).bind(pence).execute(sql).await?;
        }
        Ok(())
    }
}
// ANCHOR_END: handler

// ANCHOR: run
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = env::var("DATABASE_URL").map_err(|_| "set DATABASE_URL to a PostgreSQL, such as postgres://host/db")?;
    let schema = env::args().nth(1).unwrap_or_else(|| "example".to_owned());
    let separator = if url.contains('?') { '&' } else { '?' };
    let store = format!("{url}{separator}schema={schema}");
    let store = SqlStore::new(PostgresStore::connect(&store, Settings::default()).await?);
    let mut sql = PgConnection::connect(&url).await?;
    let table = format!("CREATE TABLE IF NOT EXISTS {schema}.turnover (country text PRIMARY KEY, pence bigint)");
    sqlx::query(AssertSqlSafe(table)).execute(&mut sql).await?;

    let of_orders = LogQuery::categories([Order::CATEGORY]);
    let turnover = store.handler(Turnover { schema: schema.clone() });
    let turnover = Subscription::new("turnover", turnover).query(of_orders);
    let store: Arc<dyn EventStore> = Arc::new(store);
    let mut runtime = Runtime::new();
    let service = Service::new("orders", store.clone()).subscribe(turnover);
    runtime.start(vec![service], Arc::new(LocalBus::default())).await?;

    let orders = Repository::<Order>::new(store);
    for (country, pence) in [("GB", 250), ("JP", 90), ("GB", 1_000)] {
        let order = Uuid::new_v4();
        orders.execute(&order.to_string(), (country, pence), order).await?;
    }
    // Handles everything that is recorded so far, and then ends the runtime.
    runtime.drain(Duration::from_secs(20)).await?;
    let rows = format!("SELECT country, pence FROM {schema}.turnover ORDER BY country");
    let rows: Vec<(String, i64)> = sqlx::query_as(AssertSqlSafe(rows)).fetch_all(&mut sql).await?;
    for (country, pence) in rows {
        println!("{country}: {pence} pence");
    }
    Ok(())
}
// ANCHOR_END: run
