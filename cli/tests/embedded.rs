//! Tests the `annals` command inside a service's own binary, which knows the service's read models and the handlers
//! that are registered as safe to replay events to. The test of the read models runs on PostgreSQL while the service
//! runs. Run by `./test`.
#![allow(clippy::unwrap_used)]

mod travel;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annals::{
    DocumentKey, EventStore, Handler, HandlerError, LocalBus, LogQuery, Message, Projection, ReadModel, Repository,
    Runtime, Service, Work,
};
use annals_cli::Ops;
use annals_postgres::{PostgresStore, Settings};
use async_trait::async_trait;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use travel::{Place, TRIPS, Trip, TripEvent, until, url};

/// The number of trips per place. `times` stands for a rule that changes from build to build.
struct Places {
    times: u64,
}

impl ReadModel for Places {
    const NAME: &'static str = "places";
    type Event = TripEvent;
    type View = u64;

    fn keys(&self, TripEvent::Ordered { trip_id, .. }: &TripEvent, _: &Message) -> Vec<String> {
        vec![trip_id.split('-').next().unwrap_or_default().to_owned()]
    }

    fn apply(&self, _: &str, trips: &mut u64, _: &TripEvent, _: &Message) {
        *trips += self.times;
    }
}

fn places(times: u64) -> Projection<Places> {
    Projection::new(Places { times }, LogQuery::categories(["trip"]))
}

/// Counts its own calls.
struct Calls;

#[async_trait]
impl Handler for Calls {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let key = DocumentKey::new("calls", &*message.subject);
        let calls: u64 = work.document(&key).await?.unwrap_or(0);
        Ok(work.put(&key, &(calls + 1))?)
    }
}

async fn run(ops: Ops, words: &[&str]) -> String {
    format!("{:?}", ops.run(words.iter().map(Into::into)).await)
}

fn code(code: u8) -> String {
    format!("{:?}", std::process::ExitCode::from(code))
}

async fn sql(schema: &str, sql: &str) -> Vec<(String, String)> {
    let mut connection = PgConnection::connect(&std::env::var("DATABASE_URL").unwrap()).await.unwrap();
    let sql = AssertSqlSafe(sql.replace("annals.", &format!("{schema}.")));
    sqlx::query_as(sql).fetch_all(&mut connection).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_calls_only_handlers_registered_as_replayable() {
    let place = Place::with_trips().await;
    let store = url(&place.file("travel.db"));
    let replay = ["replay", "--category", "trip", "--handler", "calls", "--store", &store];
    assert_eq!(run(Ops::named("ops"), &replay).await, code(2));
    assert!(place.annals(&replay).refused().contains("this binary has no replayable handler"));
    let calls = async || {
        let opened = place.open().await;
        let found = opened.scan("calls", &annals::Scan::After("".into()), 100).await.unwrap();
        opened.close().await.unwrap();
        found.iter().map(|document| (document.key.id.to_string(), document.body.to_string())).collect::<Vec<_>>()
    };
    assert!(calls().await.is_empty());
    assert_eq!(
        run(Ops::named("ops").replayable("calls", Calls), &[&replay[..], &["--dry-run"]].concat()).await,
        code(0)
    );
    assert!(calls().await.is_empty());
    assert_eq!(run(Ops::named("ops").replayable("calls", Calls), &replay).await, code(0));
    let expected = TRIPS.map(|trip| (format!("trip-{trip}"), "1".to_owned()));
    assert_eq!(calls().await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn views_are_rebuilt_compared_and_swapped_while_the_service_runs() {
    let database = std::env::var("DATABASE_URL").expect("DATABASE_URL is not set: run the tests by ./test");
    let schema = format!("cli_{}", Uuid::new_v4().simple());
    let settings = Settings { schema: schema.clone(), connections: 6 };
    let store: Arc<dyn EventStore> = Arc::new(PostgresStore::connect(&database, settings).await.unwrap());
    let mut runtime = Runtime::new();
    let service = Service::new("agency", store.clone()).project(places(1));
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    let orders = Repository::<Trip>::new(store.clone());
    let order = async |trip: String| {
        let ordered = TripEvent::Ordered { trip_id: trip.clone(), price: 1 };
        orders.execute(&trip, ordered, Uuid::new_v4()).await.unwrap();
    };
    for n in 0..300 {
        order(format!("{}-{n}", ["rome", "oslo", "bern"][n % 3])).await;
    }
    // Orders keep arriving, so no two reads of a view return the same value.
    let stop = AtomicBool::new(false);
    let goes_on = async {
        let mut n = 0;
        while !stop.load(Ordering::Relaxed) {
            order(format!("rome-more-{n}")).await;
            n += 1;
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        n
    };
    let operates = async {
        let words = |verb: &[&str]| {
            let words = ["--store", &database, "--schema", &schema, "read-model", "places"];
            words.iter().chain(verb).map(|word| (*word).to_owned()).collect::<Vec<_>>()
        };
        let run = async |times: u64, verb: &[&str]| {
            let words = words(verb);
            run(Ops::named("ops").read_model(places(times)), &words.iter().map(|word| &**word).collect::<Vec<_>>())
                .await
        };
        let same = run(1, &["compare"]).await;
        let other = run(2, &["compare"]).await;
        let swapped = run(2, &["rebuild", "--yes", "--reason", "all count twice", "--by", "tester"]).await;
        stop.store(true, Ordering::Relaxed);
        (same, other, swapped)
    };
    let (more, (same, other, swapped)) = tokio::join!(goes_on, operates);
    assert_eq!((same, other, swapped), (code(0), code(1), code(0)));
    assert!(more > 10, "only {more} orders came meanwhile");
    runtime.drain(Duration::from_secs(20)).await.unwrap();

    // The running service, which is an old build, has continued with the rebuilt views. All but a few orders count
    // twice.
    let views = "SELECT id, body::text FROM annals.documents WHERE collection = 'read.places@4' ORDER BY id";
    let views = sql(&schema, views).await;
    let count = |name: &str| views.iter().find(|(id, _)| id == name).map(|(_, body)| body.parse::<u64>().unwrap());
    assert_eq!((count("bern"), count("oslo")), (Some(200), Some(200)), "{views:?}");
    let least = 200 + more;
    let most = 200 + 2 * more;
    assert!(count("rome").is_some_and(|rome| (least..=most).contains(&rome)), "{views:?}");
    let left = "SELECT collection, id FROM annals.documents WHERE collection IN ('read.places@1', 'read.places@2', 'read.places@3')";
    until("the old views are gone", || async { sql(&schema, left).await.is_empty() }).await;
    let acts = "SELECT data ->> 'by', data ->> 'reason' FROM annals.events WHERE stream_id = 'operator-places'";
    assert_eq!(sql(&schema, acts).await, [("tester".to_owned(), "all count twice".to_owned())]);
    let mut connection = PgConnection::connect(&database).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(format!("DROP SCHEMA {schema} CASCADE"))).execute(&mut connection).await.unwrap();
}
