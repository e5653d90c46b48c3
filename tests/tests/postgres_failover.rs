//! Tests how readers, writers and caches behave when a server crashes, when it is read-only for a while, and when a log
//! has lost its end.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{sync::Arc, time::Duration};

use annals::{CommitError, EventStore, Health, LogQuery, Position, Repository, Subscription, Tail, saga::Status};
use annals_postgres::{PostgresStore, Settings};
use annals_tests::{
    tally::{Copier, Tally, TallyCommand, copies, eventually, log},
    trip::{World, trip},
};
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::postgres::{PROMPTLY, append, numbers, server::Server, virtual_address::VirtualAddress, whole_log};

const INSERT: &str = "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data)
    SELECT $1, n, gen_random_uuid(), 'thing.happened', 1, '{}' FROM generate_series(1, $2) AS n RETURNING position";

async fn insert(session: &mut PgConnection, stream: &str, count: i32) -> Vec<i64> {
    sqlx::query_scalar(INSERT).bind(stream).bind(count).fetch_all(session).await.unwrap()
}

async fn execute(session: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(session).await.unwrap();
}

/// Returns all positions in the log, read with plain SQL.
async fn positions(server: &Server) -> Vec<i64> {
    let sql = "SELECT position FROM annals.events ORDER BY position";
    sqlx::query_scalar(sql).fetch_all(&mut server.connection().await).await.unwrap()
}

/// Reads every event after the last one in `seen` until there are no more events. Each read uses the same store.
async fn read_on(store: &PostgresStore, seen: &mut Vec<i64>) {
    loop {
        let after = Position(seen.last().copied().unwrap_or(0));
        let page = store.read_log(&LogQuery::all(), after, 100).await.unwrap();
        if page.next == after {
            return;
        }
        seen.extend(numbers(&page.events));
    }
}

/// Each test runs once with a direct connection and once as if behind a pooler. Behind a pooler, the store checks each
/// transaction rather than each session.
const EITHER: [&str; 2] = ["", "?pooled=true"];

fn few() -> Settings {
    Settings { connections: 3, ..Settings::default() }
}

async fn store(url: &str) -> PostgresStore {
    PostgresStore::connect(url, few()).await.unwrap()
}

/// After a crash, the sequence assigns some positions a second time, because their first assignment never became
/// durable. The reader must not treat such a position as proven empty.
#[tokio::test(flavor = "multi_thread")]
async fn crash_at_a_gap_loses_no_event_for_readers() {
    const CRASHES: usize = 4;
    // There are more rounds than required crashes, because a server process sometimes flushes assigned positions just
    // before a crash, and such a crash does not count.
    const ROUNDS_MAX: usize = 16;
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    // With this setting, a crash loses everything that no commit has flushed.
    let mut server = Server::start_in(folder, data, vec!["wal_writer_delay=10s".into()]).await;
    let store = store(&server.url()).await;
    let mut seen = Vec::new();
    let mut drawn_twice = 0;
    for crash in 0..ROUNDS_MAX {
        if drawn_twice == CRASHES {
            break;
        }
        let mut slow = server.connection().await;
        let mut many = server.connection().await;
        execute(&mut slow, "BEGIN").await;
        insert(&mut slow, &format!("slow-{crash}"), 1).await;
        insert(&mut server.connection().await, &format!("visible-{crash}"), 1).await;
        execute(&mut many, "BEGIN").await;
        let drawn = insert(&mut many, &format!("many-{crash}"), 100).await;
        // The reader stops at the gap that `slow` leaves open, and starts to prove whether the gap is empty.
        read_on(&store, &mut seen).await;
        server.kill();
        server.resume().await;
        let mut again = server.connection().await;
        execute(&mut again, "BEGIN").await;
        let drawn_again = insert(&mut again, &format!("again-{crash}"), 1).await;
        drawn_twice += usize::from(drawn_again[0] <= drawn[99]);
        insert(&mut server.connection().await, &format!("behind-{crash}"), 1).await;
        read_on(&store, &mut seen).await;
        execute(&mut again, "COMMIT").await;
        timeout(PROMPTLY, store.wait(Position(*seen.last().unwrap()))).await.unwrap().unwrap();
        read_on(&store, &mut seen).await;
        assert_eq!(seen, positions(&server).await, "after crash {crash}");
    }
    assert_eq!(drawn_twice, CRASHES, "positions were hardly ever drawn again, so this tested nothing");
    assert_eq!((store.history(), store.status().await.unwrap().lost_end), (0, None), "nothing durable was lost");
}

/// On a standby, no session holds a lock, so every gap would look final.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_on_a_standby_read_and_write_nothing() {
    for pooled in EITHER {
        led_to_a_standby_for_a_moment(pooled).await;
    }
}

async fn led_to_a_standby_for_a_moment(pooled: &str) {
    let primary = Server::start().await;
    let address = VirtualAddress::of(&primary).await;
    let store = store(&(address.url() + pooled)).await;
    store.commit(append("before-1", 0, 1)).await.unwrap();
    let standby = primary.standby().await;
    standby.catch_up(&primary).await;

    address.lead_to(&standby);
    address.cut();
    let looks = (0..6).map(|_| store.status());
    for status in futures::future::join_all(looks).await {
        let error = status.expect_err("a reader must not read from a standby").to_string();
        assert!(error.contains("standby"), "{error}");
    }
    for _ in 0..3 {
        let outcome = store.commit(append("before-1", 1, 1)).await;
        // The first commit may have been in progress when the connection was cut.
        assert!(matches!(outcome, Err(CommitError::Unavailable(_) | CommitError::Unknown(_))), "{outcome:?}");
    }

    // This time, the open connections are not cut.
    address.lead_to(&primary);
    let mut slow = primary.connection().await;
    execute(&mut slow, "BEGIN").await;
    insert(&mut slow, "slow-1", 1).await;
    let committed = async {
        while store.commit(append("after-1", 0, 1)).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PROMPTLY, committed).await.expect("the writer must leave the standby by itself");
    let mut seen = Vec::new();
    read_on(&store, &mut seen).await;
    assert_eq!(seen, [1], "a gap is not settled while its writer is open");
    execute(&mut slow, "COMMIT").await;
    timeout(PROMPTLY, store.wait(Position(1))).await.unwrap().unwrap();
    read_on(&store, &mut seen).await;
    assert_eq!(seen, positions(&primary).await);
}

/// Sets `default_transaction_read_only`, as for maintenance. Sessions that were opened during that time would stay
/// read-only.
#[tokio::test(flavor = "multi_thread")]
async fn writers_recover_from_a_read_only_database() {
    let server = Server::start().await;
    let address = VirtualAddress::of(&server).await;
    let store = store(&address.url()).await;
    let mut outside = server.connection().await;
    execute(&mut outside, "ALTER DATABASE postgres SET default_transaction_read_only = on").await;
    address.cut();
    let mut refusal = None;
    let refused = async {
        while refusal.is_none() {
            match store.commit(append("a-1", 0, 1)).await {
                Err(CommitError::Unavailable(reason)) if reason.contains("read-only") => refusal = Some(reason),
                Err(CommitError::Unavailable(_) | CommitError::Unknown(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    timeout(PROMPTLY, refused).await.expect("the error must give the reason");
    let mut session = server.connection().await;
    execute(&mut session, "SET default_transaction_read_only = off").await;
    execute(&mut session, "ALTER DATABASE postgres RESET default_transaction_read_only").await;
    let committed = async {
        while store.commit(append("a-1", 0, 1)).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PROMPTLY, committed).await.expect("the writer must leave its session by itself");

    // The same must hold for a session that is already writing.
    execute(&mut session, "ALTER SYSTEM SET default_transaction_read_only = on").await;
    execute(&mut session, "SELECT pg_reload_conf()").await;
    eventually("the change is refused", async || {
        store.commit(append(&format!("b-{}", Uuid::new_v4()), 0, 1)).await.err()
    })
    .await;
    execute(&mut session, "ALTER SYSTEM RESET default_transaction_read_only").await;
    execute(&mut session, "SELECT pg_reload_conf()").await;
    let written = async || store.commit(append(&format!("b-{}", Uuid::new_v4()), 0, 1)).await.ok();
    timeout(PROMPTLY, eventually("the write is accepted again", written)).await.unwrap();
}

/// A failover to an asynchronous standby that lacks the last commits, while a service is running.
struct Failover {
    address: VirtualAddress,
    primary: Server,
    standby: Server,
}

impl Failover {
    async fn prepare() -> Self {
        let primary = Server::start().await;
        let address = VirtualAddress::of(&primary).await;
        drop(store(&address.url()).await);
        let standby = primary.standby().await;
        Self { address, primary, standby }
    }

    /// Stops the standby, so that the failover will lose all later commits.
    async fn detach(&mut self) {
        self.standby.catch_up(&self.primary).await;
        self.standby.kill();
    }

    async fn fail_over(&mut self) {
        self.primary.kill();
        self.standby.resume().await;
        self.standby.promote().await;
        self.address.lead_to(&self.standby);
        self.address.cut();
    }
}

async fn pay(tallies: &Repository<Tally>, id: &str, amount: i64) {
    let paid = async || tallies.execute(id, TallyCommand::Add(amount), Uuid::new_v4()).await.ok();
    eventually(&format!("{amount} is added to {id}"), paid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_notice_a_lost_end_and_decide_nothing_on_lost_events() {
    for pooled in EITHER {
        caches_after_a_failover(pooled).await;
    }
}

async fn caches_after_a_failover(pooled: &str) {
    let mut failover = Failover::prepare().await;
    let here: Arc<dyn EventStore> = Arc::new(store(&(failover.address.url() + pooled)).await);
    let tallies = Repository::<Tally>::new(here.clone());
    for id in ["x", "y", "z"] {
        pay(&tallies, id, 1).await;
    }
    failover.detach().await;
    for id in ["x", "y", "z"] {
        pay(&tallies, id, 100).await;
    }
    failover.fail_over().await;

    // Before this store reads anything, another process brings one of the streams to the version that this store has
    // cached.
    let elsewhere: Arc<dyn EventStore> = Arc::new(store(&failover.address.url()).await);
    pay(&Repository::<Tally>::new(elsewhere.clone()), "y", 7).await;
    for id in ["x", "y"] {
        pay(&tallies, id, 10).await;
    }
    assert_eq!(tallies.state("x").await.unwrap().amounts, [1, 10]);
    assert_eq!(tallies.state("y").await.unwrap().amounts, [1, 7, 10]);
    assert_eq!(tallies.state("z").await.unwrap().amounts, [1]);
    let stored: Vec<_> = log(&here).await.into_iter().map(|event| (event.stream.to_string(), event.data)).collect();
    assert!(!stored.iter().any(|(_, data)| data.contains("100")), "{stored:?}");

    let lost = here.status().await.unwrap().lost_end.expect("health must say it");
    assert_eq!(lost.position, Position(6));
    assert!(lost.to_string().contains("lost its end") && lost.to_string().contains("annals verify"), "{lost}");
    assert!(here.history() > 0);
    assert_eq!(elsewhere.status().await.unwrap().lost_end, None, "the store has seen none of the lost events");
}

/// The tail, the checkpoint and the reader's position are beyond the new end of the log. New events at the lost
/// positions must still be handled.
#[tokio::test(flavor = "multi_thread")]
async fn running_subscriptions_notice_a_lost_end() {
    let mut failover = Failover::prepare().await;
    let shared: Arc<dyn EventStore> = Arc::new(store(&failover.address.url()).await);
    let tail: Arc<dyn EventStore> = Arc::new(Tail::follow(shared).await.unwrap());
    let health = Health::default();
    let shutdown = CancellationToken::new();
    let copier = Subscription::new("copier", Copier::new(tail.clone())).query(LogQuery::categories(["tally"]));
    let running = tokio::spawn(copier.run(tail.clone(), health.clone(), shutdown.clone()));
    let tallies = Repository::<Tally>::new(tail.clone());
    let copied = async |amounts: &[i64]| {
        eventually(&format!("{amounts:?} are copied"), async || {
            let found = copies(&tail, "x").await;
            (found.0 == amounts && found.1 == amounts).then_some(())
        })
        .await;
    };
    for amount in 1..=3 {
        pay(&tallies, "x", amount).await;
    }
    copied(&[1, 2, 3]).await;
    failover.detach().await;
    // A standby's sequence is 32 positions ahead. Positions are assigned twice only if there are more new events than
    // that.
    for amount in 101..=140 {
        pay(&tallies, "x", amount).await;
    }
    copied(&[1, 2, 3].into_iter().chain(101..=140).collect::<Vec<_>>()).await;
    failover.fail_over().await;

    // Another process writes new events at positions that this process had already read past.
    let elsewhere: Arc<dyn EventStore> = Arc::new(store(&failover.address.url()).await);
    pay(&Repository::<Tally>::new(elsewhere.clone()), "x", 4).await;
    timeout(
        PROMPTLY,
        eventually("the event is handled", async || {
            let found = copies(&elsewhere, "x").await;
            (found.0 == [1, 2, 3, 4]).then_some(())
        }),
    )
    .await
    .expect("a subscription must not stay beyond the end");
    pay(&tallies, "x", 5).await;
    copied(&[1, 2, 3, 4, 5]).await;
    assert!(tail.status().await.unwrap().lost_end.is_some());
    eventually("health is fine again", async || health.is_fine().then_some(())).await;
    shutdown.cancel();
    running.await.unwrap().unwrap();
}

/// Nothing remains of the lost sagas, and later sagas at the same positions run once.
#[tokio::test(flavor = "multi_thread")]
async fn running_sagas_notice_a_lost_end() {
    const STEPS: [&str; 4] = ["book", "charge", "confirm", "announce"];
    let mut failover = Failover::prepare().await;
    let shared: Arc<dyn EventStore> = Arc::new(store(&failover.address.url()).await);
    let tail: Arc<dyn EventStore> = Arc::new(Tail::follow(shared).await.unwrap());
    let world = World::new(tail.clone(), trip(Duration::from_secs(2), 20));
    let runtime = world.start(&["shop", "hotel", "bank"]).await;
    let tallies = Repository::<Tally>::new(tail.clone());
    let travel = async |names: std::ops::Range<usize>| {
        for name in names.clone() {
            pay(&tallies, &format!("t{name}"), 1).await;
        }
        for name in names {
            world.becomes(&format!("t{name}"), Status::Completed).await;
        }
    };
    travel(0..3).await;
    failover.detach().await;
    travel(3..10).await;
    // These sagas are running when the log loses its end.
    for name in 10..14 {
        pay(&tallies, &format!("t{name}"), 1).await;
    }
    failover.fail_over().await;
    travel(20..30).await;
    for name in (0..3).chain(20..30) {
        assert_eq!(world.ledger(&format!("t{name}")).await, STEPS, "t{name}");
    }
    for name in 3..10 {
        let name = format!("t{name}");
        assert!(world.status(&name).await.is_none() && world.history(&name).await.is_empty(), "{name} is gone");
    }
    assert!(tail.status().await.unwrap().lost_end.is_some());
    eventually("health is fine again", async || runtime.health().is_fine().then_some(())).await;
    runtime.drain(Duration::from_secs(20)).await.unwrap();
}

/// The database is restored in place, while its sessions stay connected.
#[tokio::test(flavor = "multi_thread")]
async fn lost_end_is_noticed_in_open_sessions() {
    let server = Server::start().await;
    for (by_commit, pooled) in [(true, ""), (false, ""), (true, "?pooled=true"), (false, "?pooled=true")] {
        let mut outside = server.connection().await;
        execute(&mut outside, "DROP SCHEMA IF EXISTS annals CASCADE").await;
        let store = store(&(server.url() + pooled)).await;
        for version in 0..5 {
            store.commit(append("a-1", version, 1)).await.unwrap();
        }
        let mut seen = Vec::new();
        read_on(&store, &mut seen).await;
        execute(
            &mut outside,
            "ALTER TABLE annals.events DISABLE TRIGGER ALL; DELETE FROM annals.events WHERE position > 3;
             ALTER TABLE annals.events ENABLE ALWAYS TRIGGER events_never_change;
             ALTER TABLE annals.events ENABLE ALWAYS TRIGGER event_never_changes;
             SELECT setval('annals.events_position', 3)",
        )
        .await;
        if by_commit {
            let committed = store.commit(append("b-1", 0, 1)).await;
            if !pooled.is_empty() && matches!(committed, Err(CommitError::Unavailable(_))) {
                // The store had noticed the loss before this write.
                store.commit(append("b-1", 0, 1)).await.unwrap();
            } else {
                committed.unwrap();
            }
        } else {
            let waiting = store.wait(Position(5));
            timeout(PROMPTLY, waiting).await.expect("a reader that waits beyond the end must wake up").unwrap();
        }
        let lost = store.status().await.unwrap().lost_end;
        assert_eq!(lost.map(|lost| lost.position), Some(Position(5)), "by a commit: {by_commit}");
        assert_eq!(whole_log(&store).await.len(), if by_commit { 4 } else { 3 });
    }
}

/// The events come from an older backup than the documents. A checkpoint is beyond the end of the log, and another
/// process has already written new events at the lost positions.
#[tokio::test(flavor = "multi_thread")]
async fn service_started_on_a_log_that_lost_its_end_rewinds() {
    let server = Server::start().await;
    let here: Arc<dyn EventStore> = Arc::new(store(&server.url()).await);
    let follow = |store: &Arc<dyn EventStore>, shutdown: &CancellationToken| {
        let copier = Subscription::new("copier", Copier::new(store.clone())).query(LogQuery::categories(["tally"]));
        tokio::spawn(copier.run(store.clone(), Health::default(), shutdown.clone()))
    };
    let copied = async |amounts: &[i64]| {
        let found = async || (copies(&here, "x").await.0 == amounts).then_some(());
        eventually(&format!("{amounts:?} are copied"), found).await;
    };
    let shutdown = CancellationToken::new();
    let running = follow(&here, &shutdown);
    let tallies = Repository::<Tally>::new(here.clone());
    for amount in 1..=5 {
        pay(&tallies, "x", amount).await;
    }
    copied(&[1, 2, 3, 4, 5]).await;
    shutdown.cancel();
    running.await.unwrap().unwrap();

    let mut outside = server.connection().await;
    let third = "(SELECT position FROM annals.events WHERE stream_id = 'tally-x' AND version = 3)";
    let lose = format!(
        "ALTER TABLE annals.events DISABLE TRIGGER ALL;
         SELECT setval('annals.events_position', {third}); DELETE FROM annals.events WHERE position > {third};
         DELETE FROM annals.documents WHERE collection LIKE 'snapshot.%'"
    );
    execute(&mut outside, &lose).await;
    let elsewhere: Arc<dyn EventStore> = Arc::new(store(&server.url()).await);
    let other = Repository::<Tally>::new(elsewhere.clone());
    for amount in 6..=20 {
        pay(&other, "x", amount).await;
    }
    let shutdown = CancellationToken::new();
    let running = follow(&elsewhere, &shutdown);
    copied(&(1..=20).collect::<Vec<_>>()).await;
    shutdown.cancel();
    running.await.unwrap().unwrap();
}

/// Only a store that has read lost events must react to the failover.
#[tokio::test(flavor = "multi_thread")]
async fn failover_without_loss_reports_nothing() {
    let mut failover = Failover::prepare().await;
    let store = store(&failover.address.url()).await;
    store.commit(append("a-1", 0, 3)).await.unwrap();
    failover.detach().await;
    failover.fail_over().await;
    let committed = async || store.commit(append("a-1", 3, 1)).await.ok();
    timeout(PROMPTLY + Duration::from_secs(20), eventually("it goes on", committed)).await.unwrap();
    assert_eq!(store.status().await.unwrap().lost_end, None);
    assert_eq!(whole_log(&store).await.len(), 4);
}

/// Services that send messages to a bus compare the log with the bus before they write to a log that has changed.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_committed_to_a_changed_log_before_it_is_accepted() {
    let mut failover = Failover::prepare().await;
    let here = store(&failover.address.url()).await;
    for by in ["one", "other"] {
        here.accept_history(by, here.history());
    }
    here.commit(append("a-1", 0, 1)).await.unwrap();
    failover.detach().await;
    here.commit(append("a-1", 1, 1)).await.unwrap();
    failover.fail_over().await;
    let refused = async || {
        let error = here.commit(append("a-1", 1, 1)).await.err()?.to_string();
        error.contains("compared the log with the bus").then_some(())
    };
    eventually("it is refused", async || refused().await).await;
    here.accept_history("one", here.history());
    assert!(refused().await.is_some(), "the other has not accepted the log");
    assert_eq!(positions(&failover.standby).await.len(), 1);
    here.accept_history("other", u64::MAX);
    here.commit(append("a-1", 1, 1)).await.unwrap();
}
