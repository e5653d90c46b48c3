//! Services are stopped and restarted one after the other, while clients keep their connections. The clients notice
//! nothing.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod serving;

use std::{
    io::Write,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use annals_tests::kafka::Broker;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use self::serving::{Asked, KeepAlive, PATIENCE, Serving};

const ROLES: [&str; 4] = ["order", "inventory", "payment", "notification"];
const JSON: (&str, &str) = ("content-type", "application/json");

fn order() -> String {
    json!({"lines": [{"sku": "85123A", "quantity": 1, "unit_price": "2.55"}]}).to_string()
}

/// Ends the customers when the test ends, also after a panic.
struct UntilDropped<'d>(&'d AtomicBool);

impl Drop for UntilDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Places orders alternately at two addresses until `done` is set. If one address accepts no connection, sends the
/// order to the other address.
fn buy(client: usize, at: [SocketAddr; 2], done: &AtomicBool) -> (Vec<String>, Vec<String>) {
    let mut connections = at.map(KeepAlive::new);
    let mut placed = Vec::new();
    let mut failed = Vec::new();
    for number in 0.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        let id = format!("{client}-{number}");
        // Some of the requests wait until the saga of their order has ended.
        let path = if number % 3 == 0 { "/orders?wait=10s" } else { "/orders" };
        let mut ask = |at: usize| connections[at].ask("POST", path, &[JSON, ("idempotency-key", &id)], &order());
        let asked = match ask(number % 2) {
            Asked::Refused => ask((number + 1) % 2),
            asked => asked,
        };
        match asked {
            Asked::Answered(answer) if answer.status == 201 => placed.push(id),
            other => failed.push(format!("{id}: {other:?}")),
        }
    }
    (placed, failed)
}

#[tokio::test]
async fn rolling_restart_of_all_services_fails_no_request() {
    let broker = Broker::start();
    let url = std::env::var("DATABASE_URL").unwrap();
    let run = Uuid::new_v4().simple().to_string();
    let bus = format!("kafka://{}?partitions=4", broker.address());
    let and = if url.contains('?') { '&' } else { '?' };
    let start = |role: &&str| Serving::start_with_grace(role, &format!("{url}{and}schema={role}_{run}"), &bus, "2s");
    let mut shop: Vec<Option<Serving>> = ROLES.iter().chain(&ROLES).map(start).map(Some).collect();
    let at = [0, ROLES.len()].map(|number| shop[number].as_ref().unwrap().at);
    let stock = json!({"delivered": [{"sku": "85123A", "quantity": 1_000_000}]});
    assert_eq!(shop[0].as_ref().unwrap().post("/supplies?wait=30s", "stock", &stock).status, 201);
    let done = AtomicBool::new(false);
    let ended: Vec<_> = std::thread::scope(|scope| {
        let done = &done;
        let open = UntilDropped(done);
        let clients: Vec<_> = (0..6).map(|client| scope.spawn(move || buy(client, at, done))).collect();
        for service in &mut shop {
            *service = service.take().map(Serving::stop_and_restart);
            let started = Instant::now();
            while service.as_ref().unwrap().get("/readyz").status != 200 {
                assert!(started.elapsed() < PATIENCE, "the service is never ready");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        drop(open);
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let failed: Vec<_> = ended.iter().flat_map(|(_, failed)| failed).collect();
    assert!(failed.is_empty(), "{} requests failed: {failed:?}", failed.len());
    let placed: Vec<_> = ended.iter().flat_map(|(placed, _)| placed).collect();
    assert!(placed.len() > 100, "{} orders while eight services were restarted", placed.len());
    println!("{} orders", placed.len());
    let mut order = KeepAlive::new(at[1]);
    for id in placed {
        let Asked::Answered(answer) = order.ask("GET", &format!("/orders/{id}?wait=30s"), &[], "") else {
            panic!("no answer about {id}");
        };
        assert_eq!(answer.json()["status"], "confirmed", "{id}: {answer:?}");
    }
    drop(shop);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    for role in ROLES {
        let sql = format!("DROP SCHEMA {role}_{run} CASCADE");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    }
}

/// Checks what each kind of client sees after the stop signal.
#[test]
fn stop_is_announced_and_answers_open_requests() {
    let mut shop = Serving::start_with_grace("all", "memory:", "local:", "3s");
    let answered = |asked: Asked| match asked {
        Asked::Answered(answer) => answer,
        other => panic!("{other:?}"),
    };
    let mut used = KeepAlive::new(shop.at);
    let mut idle = KeepAlive::new(shop.at);
    for client in [&mut used, &mut idle] {
        let answer = answered(client.ask("GET", "/healthz", &[], ""));
        assert_eq!((answer.status, answer.header("connection")), (200, None));
    }
    // This request waits for the end of its saga while the shop is asked to stop.
    let at = shop.at;
    let waits = std::thread::spawn(move || {
        KeepAlive::new(at).ask("POST", "/orders?wait=30s", &[JSON, ("idempotency-key", "waits")], &order())
    });
    let mut late = std::net::TcpStream::connect(shop.at).unwrap();
    shop.signal("TERM");
    let stopped = Instant::now();
    // Until the stop is announced, the first reason may be a part that is still starting.
    while shop.get("/readyz").json()["reasons"][0] != "stopping" {
        assert!(stopped.elapsed() < Duration::from_secs(2), "the service does not announce its stop");
    }
    // Requests on old and new connections are served as before, and each answer asks the client to close the
    // connection.
    for client in [&mut used, &mut KeepAlive::new(shop.at)] {
        let answer = answered(client.ask("POST", "/orders", &[JSON], &order()));
        assert_eq!((answer.status, answer.header("connection")), (201, Some("close")), "{answer:?}");
        let answer = answered(client.ask("GET", "/healthz", &[], ""));
        assert_eq!((answer.status, answer.header("connection")), (200, Some("close")), "{answer:?}");
    }
    assert!(matches!(waits.join().unwrap(), Asked::Answered(answer) if answer.status == 201));
    // A client that has connected but sent no request yet is also answered at the end of the grace.
    let mut ask = || {
        std::thread::sleep(Duration::from_millis(3_300).saturating_sub(stopped.elapsed()));
        late.write_all(b"GET /healthz HTTP/1.1\r\nhost: shop\r\n\r\n").unwrap();
        serving::read_answer(&mut late)
    };
    assert!(ask().is_some_and(|answer| answer.status == 200), "the client had connected in time");
    assert_eq!(shop.code(), Some(143));
    assert!(stopped.elapsed() >= Duration::from_secs(3), "{:?}", stopped.elapsed());
    assert!(stopped.elapsed() < Duration::from_secs(10), "{:?}", stopped.elapsed());
    assert!(matches!(idle.ask("GET", "/healthz", &[], ""), Asked::Refused));
}

/// A supervisor may start an instance before the previous one has ended.
#[test]
fn next_instance_waits_for_the_address() {
    let mut shop = Serving::start_with_grace("all", "memory:", "local:", "2s");
    shop.signal("TERM");
    let next = shop.start_next();
    assert_eq!(shop.code(), Some(143));
    assert_eq!((next.at, next.get("/healthz").status), (shop.at, 200));
}

/// Stops the shop on each bus and store while orders are in progress.
#[tokio::test]
async fn normal_stop_logs_no_warning() {
    let broker = Broker::start();
    let url = std::env::var("DATABASE_URL").unwrap();
    let schema = format!("quiet_{}", Uuid::new_v4().simple());
    let and = if url.contains('?') { '&' } else { '?' };
    let folder = tempfile::tempdir().unwrap();
    let kafka = format!("kafka://{}?partitions=2", broker.address());
    for (store, bus) in [
        ("memory:".to_owned(), "local:"),
        (format!("sqlite:{}", folder.path().join("shop.db").display()), "local:"),
        (format!("{url}{and}schema={schema}"), &*kafka),
    ] {
        for signal in ["TERM", "INT"] {
            let mut shop = Serving::start("all", &store, bus);
            let at = shop.at;
            let client = std::thread::spawn(move || {
                let mut client = KeepAlive::new(at);
                while let Asked::Answered(answer) = client.ask("POST", "/orders", &[JSON], &order()) {
                    assert!(answer.status == 201, "{answer:?}");
                }
            });
            // Once the saga of an order has ended, the shop is certainly under load.
            let ended: Value = shop.post("/orders?wait=30s", signal, &serde_json::from_str(&order()).unwrap()).json();
            assert_eq!(ended["status"], "cancelled", "{ended}");
            shop.stop(signal);
            client.join().unwrap();
        }
    }
    let sql = format!("DROP SCHEMA {schema} CASCADE");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut PgConnection::connect(&url).await.unwrap()).await.unwrap();
}
