//! Read models: their views are updated together with the checkpoint, rebuilt next to the live views, and swapped.
#![allow(clippy::unwrap_used, missing_docs)]

mod postgres;

use std::{sync::Arc, time::Duration};

use annals::{
    Aggregate, Event, EventStore, LocalBus, LogQuery, MemoryStore, Message, Repository, Runtime, Service, Version,
    WaitError,
    read_model::{Projection, ReadModel, Views},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "account", unknown = "skip")]
enum Moved {
    Deposited { owner: String, amount: u64 },
}

#[derive(Clone, Default)]
struct Account;

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    type Command = (String, u64);
    type Event = Moved;
    type Refusal = std::convert::Infallible;
    fn decide(&self, (owner, amount): &(String, u64)) -> Result<Vec<Moved>, Self::Refusal> {
        Ok(vec![Moved::Deposited { owner: owner.clone(), amount: *amount }])
    }
    fn evolve(&mut self, _: &Moved) {}
}

#[derive(Default, Serialize, Deserialize, Debug, PartialEq)]
struct Total {
    amount: u64,
    deposits: u64,
}

/// Totals by owner. `times` plays the role of a rule that changes from build to build.
struct Totals {
    times: u64,
}

impl ReadModel for Totals {
    const NAME: &'static str = "totals";
    type Event = Moved;
    type View = Total;
    fn keys(&self, Moved::Deposited { owner, .. }: &Moved, _: &Message) -> Vec<String> {
        vec![owner.clone()]
    }
    fn apply(&self, _: &str, total: &mut Total, Moved::Deposited { amount, .. }: &Moved, _: &Message) {
        total.amount += amount * self.times;
        total.deposits += 1;
    }
}

fn projection(times: u64) -> Projection<Totals> {
    Projection::new(Totals { times }, LogQuery::categories(["account"]))
}

async fn runtime(store: &Arc<dyn EventStore>, projection: Projection<Totals>) -> Runtime {
    let mut runtime = Runtime::new();
    let service = Service::new("bank", store.clone()).project(projection);
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    runtime
}

async fn deposit(accounts: &Repository<Account>, count: u64) {
    for n in 0..count {
        let owner = if n % 3 == 0 { "ada" } else { "bob" };
        accounts.execute(&format!("{n}"), (owner.to_owned(), 10), Uuid::new_v4()).await.unwrap();
    }
}

async fn until(views: &Views<Totals>, owner: &str, expected: Total) {
    let reached = tokio::time::timeout(Duration::from_secs(120), async {
        while views.get(owner).await.unwrap().as_ref() != Some(&expected) {
            tokio::task::yield_now().await;
        }
    });
    let reached = reached.await;
    assert!(reached.is_ok(), "{owner}: {:?} instead of {expected:?}", views.get(owner).await.unwrap());
}

#[tokio::test]
async fn views_follow_the_log_and_survive_a_restart() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let accounts = Repository::new(store.clone());
    let views = Views::<Totals>::new(store.clone());
    let first = runtime(&store, projection(1)).await;
    deposit(&accounts, 30).await;
    until(&views, "ada", Total { amount: 100, deposits: 10 }).await;
    first.drain(Duration::from_secs(10)).await.unwrap();
    deposit(&accounts, 30).await;
    let second = runtime(&store, projection(1)).await;
    until(&views, "ada", Total { amount: 200, deposits: 20 }).await;
    until(&views, "bob", Total { amount: 400, deposits: 40 }).await;
    let listed: Vec<_> = views.list("", 10).await.unwrap().into_iter().map(|(owner, _)| owner.to_string()).collect();
    assert_eq!(listed, ["ada", "bob"]);
    second.drain(Duration::from_secs(10)).await.unwrap();
}

/// A caller reads its own writes if it waits for the position of its command. Runs on each store.
#[tokio::test]
async fn views_show_a_command_once_they_have_reached_its_position() {
    let folder = tempfile::tempdir().unwrap();
    let sqlite = annals_sqlite::SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    let schema = postgres::Schema::new();
    let postgres = schema.store().await;
    let stores: [Arc<dyn EventStore>; 3] =
        [Arc::new(MemoryStore::new()), Arc::new(sqlite.clone()), Arc::new(postgres.clone())];
    for store in stores {
        let accounts = Repository::<Account>::new(store.clone());
        let views = Views::<Totals>::new(store.clone());
        let patience = Duration::from_secs(20);
        let first = ("ada".to_owned(), 10);
        let request = Uuid::new_v4();
        let decided = accounts.execute("1", first.clone(), request).await.unwrap();
        assert_eq!((decided.version, decided.repeated), (Version(1), false));
        let position = decided.position.unwrap();
        let late = views.wait_for(position, Duration::from_millis(20)).await.unwrap_err();
        assert!(matches!(late, WaitError::TimedOut { .. }), "{late}");
        assert!(late.to_string().contains("totals") && late.to_string().contains("position 0"), "{late}");
        let runtime = runtime(&store, projection(1)).await;
        views.wait_for(position, patience).await.unwrap();
        assert_eq!(views.get("ada").await.unwrap(), Some(Total { amount: 10, deposits: 1 }));
        for deposits in 2..20 {
            let decided = accounts.execute("1", first.clone(), Uuid::new_v4()).await.unwrap();
            assert_eq!(decided.version, Version(deposits));
            views.wait_for(decided.position.unwrap(), patience).await.unwrap();
            assert_eq!(views.get("ada").await.unwrap().unwrap().deposits, deposits as u64);
        }
        // A repeated command, even in another process, has the position and version of its first execution.
        let repeated = Repository::<Account>::new(store.clone()).execute("1", first, request).await.unwrap();
        assert_eq!((repeated.position, repeated.version, repeated.repeated), (Some(position), Version(1), true));
        runtime.drain(Duration::from_secs(10)).await.unwrap();
    }
    sqlite.close().await.unwrap();
    postgres.close().await.unwrap();
}

#[tokio::test]
async fn a_rebuild_leaves_the_live_views_alone_until_it_swaps() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let accounts = Repository::new(store.clone());
    let views = Views::<Totals>::new(store.clone());
    let old = runtime(&store, projection(1)).await;
    deposit(&accounts, 30).await;
    until(&views, "ada", Total { amount: 100, deposits: 10 }).await;
    old.drain(Duration::from_secs(10)).await.unwrap();

    let rebuilt = projection(2).rebuild(store.clone()).await.unwrap();
    assert_eq!((rebuilt.generation, rebuilt.views, rebuilt.views_before), (2, 2, 2));
    assert_eq!(views.get("ada").await.unwrap(), Some(Total { amount: 200, deposits: 10 }));

    // The service that runs after the swap continues where the rebuild ended, and no event is counted twice.
    let new = runtime(&store, projection(2)).await;
    deposit(&accounts, 3).await;
    until(&views, "ada", Total { amount: 220, deposits: 11 }).await;
    until(&views, "bob", Total { amount: 440, deposits: 22 }).await;
    new.drain(Duration::from_secs(10)).await.unwrap();
}

#[tokio::test]
async fn running_projection_switches_when_views_are_swapped() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let accounts = Repository::new(store.clone());
    let views = Views::<Totals>::new(store.clone());
    let running = runtime(&store, projection(1)).await;
    deposit(&accounts, 30).await;
    until(&views, "ada", Total { amount: 100, deposits: 10 }).await;
    assert_eq!(projection(1).rebuild(store.clone()).await.unwrap().generation, 2);
    deposit(&accounts, 30).await;
    until(&views, "ada", Total { amount: 200, deposits: 20 }).await;
    running.drain(Duration::from_secs(10)).await.unwrap();
}
