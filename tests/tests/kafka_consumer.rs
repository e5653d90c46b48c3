//! Each message takes effect once and in order, even if consumers are killed or stopped, or join and leave.
#![allow(clippy::unwrap_used)]

mod kafka;
mod postgres;

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use annals::{Group, Handler, HandlerError, Message, Repository, Runtime, Service, Work};
use annals_tests::tally::{Copier, Tally, TallyCommand};
use async_trait::async_trait;
use kafka::{
    DRAIN, Load, Pair, add,
    process::{self, Point, Role, Task},
    shows, until,
};
use sqlx::Connection;
use tokio::time::{Instant, interval, sleep};

const KILLS: u64 = 10;
const PAUSE: Duration = Duration::from_millis(10);
/// If a member disappears without notice, the group keeps its partitions reserved for this long.
const SHORT_SESSION_MS: &str = "1500";
/// With the default settings, the group has removed a stopped member after this time.
const PAST_THE_SESSION: Duration = Duration::from_secs(12);
const MEMBERS: usize = 8;
const COMING_AND_GOING: Duration = Duration::from_secs(30);

/// The task of the child processes.
#[test]
fn process() {
    process::run();
}

fn consumer(pair: &Pair) -> Task {
    let pair = pair.clone();
    let role = Role::Consumer;
    Task { pair, role, instance: None, lanes: 1, point: Point::Nowhere, passes: 0 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_killed_between_commit_and_offset_duplicates_nothing() {
    let pair = Pair::new().await.set("session.timeout.ms", SHORT_SESSION_MS);
    let relay = pair.relay().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    for point in [Point::Offset, Point::BeforeCommit, Point::InCommit, Point::AfterCommit] {
        let mut process = Task { point, passes: 3, ..consumer(&pair) }.start();
        process.reached().await;
        process.kill();
    }
    load.end().await;
    let last = pair.consumer().await;
    pair.agrees().await;
    last.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment() {
    let pair = Pair::new().await.set("session.timeout.ms", SHORT_SESSION_MS);
    let relay = pair.relay().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    let mut sql = pair.sql().await;
    for kill in 0..KILLS {
        let before = sql.copies().await;
        let mut process = consumer(&pair).start();
        process.started().await;
        // Every second process is killed at its start, before it owns a partition. The other processes are killed while
        // they work.
        while kill % 2 == 1 && sql.copies().await == before {
            sleep(Duration::from_millis(1)).await;
        }
        sleep(Duration::from_micros(RandomState::new().hash_one(kill) % 100_000)).await;
        process.kill();
    }
    load.end().await;
    let last = pair.consumer().await;
    pair.agrees().await;
    last.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_stopped_past_its_session_changes_nothing() {
    let pair = Pair::new().await;
    let relay = pair.relay().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    // The process stops while it holds a batch that it has not committed.
    let mut zombie = Task { point: Point::InCommit, passes: 20, ..consumer(&pair) }.start();
    zombie.reached().await;
    zombie.stop();
    let stopped_at = Instant::now();
    let other = pair.consumer().await;
    let mut sql = pair.sql().await;
    let before = sql.copies().await;
    sleep(PAST_THE_SESSION.saturating_sub(stopped_at.elapsed())).await;
    while sql.copies().await == before {
        assert!(stopped_at.elapsed() < kafka::RECOVERY, "no other member has taken over");
        sleep(Duration::from_millis(20)).await;
    }
    zombie.wake();
    // After it wakes, the process takes its share of the partitions again.
    sleep(Duration::from_secs(1)).await;
    load.end().await;
    pair.agrees().await;
    zombie.kill();
    other.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_members_join_and_leave_without_loss() {
    let pair = Pair::new().await.set("partitions", "12");
    let relay = pair.relay().await;
    let mut members: [Option<Runtime>; MEMBERS] = Default::default();
    for member in &mut members {
        *member = Some(pair.consumer().await);
    }
    let load = Load::start(pair.source_store().await, PAUSE);
    let started_at = Instant::now();
    let mut turn = interval(Duration::from_secs(2));
    let mut slots = (0..MEMBERS).cycle();
    while started_at.elapsed() < COMING_AND_GOING {
        turn.tick().await;
        for _ in 0..2 {
            let leaving = slots.next().unwrap();
            let coming = slots.clone().nth(MEMBERS / 2).unwrap();
            match members[leaving].take() {
                Some(member) if leaving % 2 == 0 => member.drain(DRAIN).await.unwrap(),
                // Drops the member while it is working.
                member => drop(member),
            }
            if members[coming].is_none() {
                members[coming] = Some(pair.consumer().await);
            }
        }
    }
    load.end().await;
    pair.agrees().await;
    for member in members.into_iter().flatten() {
        shows(&member, "fine", |parts| !kafka::in_trouble(parts)).await;
        member.drain(DRAIN).await.unwrap();
    }
    relay.drain(DRAIN).await.unwrap();
}

/// Copies each message, and also appends a mark of its own to a stream that no other member writes to.
struct Marking {
    copier: Copier,
    marks: Repository<Tally>,
    mark: String,
}

#[async_trait]
impl Handler for Marking {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        work.execute(&self.marks, &self.mark, &TallyCommand::Add(1)).await?;
        self.copier.handle(message, work).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commit_delayed_past_a_rebalance_changes_nothing() {
    let pair = Pair::new().await.set("partitions", "1");
    // The group removes a member that does not poll within this time, even if it is alive.
    let pair = pair.set("session.timeout.ms", SHORT_SESSION_MS).set("max.poll.interval.ms", "3000");
    let relay = pair.relay().await;
    let mut sql = pair.sql().await;
    let mut holder = pair.sql().await;
    // Every commit takes the advisory locks of its streams (the gates) in order. The first gate belongs to the mark's
    // stream and to no copy.
    let first_gate =
        "SELECT n::text FROM generate_series(1, 100000) AS n WHERE hashtextextended('mark-' || n, 0) & 1023 = 0
                       LIMIT 1";
    let mark: String = sqlx::query_scalar(first_gate).fetch_one(&mut sql.connection).await.unwrap();
    let store = pair.sink_store().await;
    let marks = Repository::with(store.clone(), "mark", 10);
    let marking = Marking { copier: Copier::new(store.clone()), marks, mark };
    let mut slow = Runtime::new();
    let group = Group::new(&pair.group(), &[&pair.topic()], marking);
    let service = Service::new(&pair.group(), store).consume(group);
    slow.start(vec![service], Arc::new(pair.bus().await)).await.unwrap();
    add(&pair.source_store().await, 0..3).await;
    pair.handled(&mut sql).await;

    let hold = "SELECT pg_backend_pid() FROM pg_advisory_xact_lock('annals.events'::regclass::oid::int, 0)";
    let hold = holder.sink.sql(hold);
    let mut held = holder.connection.begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar(hold).fetch_one(&mut *held).await.unwrap();
    add(&pair.source_store().await, 3..4).await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))";
    let mut waits = async || -> bool {
        let waiting = sqlx::query_scalar::<_, i64>(waiting).bind(pid).fetch_one(&mut sql.connection);
        waiting.await.unwrap() > 0
    };
    until("the commit is in flight", &mut waits).await;
    // The group gives the partition to another member, which handles the messages of the commit in progress.
    let other = pair.consumer().await;
    let mut watched = pair.sql().await;
    pair.handled(&mut watched).await;
    until("the commit is still blocked", &mut waits).await;
    held.rollback().await.unwrap();
    // The slow member learns that it has lost the partition, and joins again.
    shows(&slow, "fine again", |parts| !kafka::in_trouble(parts)).await;
    add(&pair.source_store().await, 4..6).await;
    pair.agrees().await;
    slow.drain(DRAIN).await.unwrap();
    other.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}
