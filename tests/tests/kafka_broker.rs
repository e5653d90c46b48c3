//! Relays and consumers recover without help from brokers that are killed, absent for a long time, lost or wiped.
#![allow(clippy::unwrap_used)]

mod kafka;
mod postgres;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use annals::{
    Bus, BusError, Consumer, Publisher, Runtime,
    bus::{Outgoing, Receipt},
    health::State,
};
use annals_kafka::KafkaBus;
use annals_tests::kafka::Broker;
use async_trait::async_trait;
use kafka::{DRAIN, Load, Pair, TALLIES, add, in_trouble, shows, topic, until};
use tokio::time::{Instant, sleep};

const PAUSE: Duration = Duration::from_millis(50);
const AWAY: Duration = Duration::from_secs(20);
/// The number of rounds recorded while the broker is away: more than a relay reads ahead.
const ROUNDS_AWAY: i64 = 850;
/// The maximum number of messages that a relay passes to the client before an acknowledgement: 16 pages of 1,000.
const MESSAGES_AHEAD_MAX: usize = 16_000;

/// Counts the messages that have been published but not yet acknowledged.
struct Counting {
    inner: KafkaBus,
    ahead: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

#[async_trait]
impl Publisher for Counting {
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError> {
        let count = messages.len();
        let ahead = self.ahead.clone();
        self.most.fetch_max(ahead.fetch_add(count, Ordering::SeqCst) + count, Ordering::SeqCst);
        let receipt = self.inner.publish(messages).await?;
        Ok(Box::pin(async move {
            let taken = receipt.await;
            ahead.fetch_sub(count, Ordering::SeqCst);
            taken
        }))
    }
}

#[async_trait]
impl Bus for Counting {
    async fn join(&self, group: &str, topics: &[&str]) -> Result<Box<dyn Consumer>, BusError> {
        self.inner.join(group, topics).await
    }
}

async fn are_fine(runtimes: [&Runtime; 2]) {
    for runtime in runtimes {
        shows(runtime, "fine again", |parts| !in_trouble(parts)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_killed_and_away_under_load_loses_nothing() {
    let mut broker = Broker::start();
    let pair = Pair::on(&broker.address()).await;
    let ahead = Arc::<AtomicUsize>::default();
    let most = Arc::<AtomicUsize>::default();
    let bus = Counting { inner: pair.bus().await, ahead, most: most.clone() };
    let relay = pair.start_relay(pair.source_store().await, Arc::new(bus), 1, None).await;
    let consumer = pair.consumer().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    let mut sql = pair.sql().await;
    {
        let before = sql.copies().await;
        until("a load", async || sql.copies().await >= before + 200).await;
        broker.kill();
        shows(&relay, "in trouble", in_trouble).await;
        shows(&consumer, "in trouble", in_trouble).await;
        broker.resume();
        are_fine([&relay, &consumer]).await;
    }
    let rounds = load.end().await;
    pair.handled(&mut sql).await;

    broker.kill();
    let away_since = Instant::now();
    add(&pair.source_store().await, rounds..rounds + ROUNDS_AWAY).await;
    sleep(AWAY.saturating_sub(away_since.elapsed())).await;
    shows(&relay, "in trouble", in_trouble).await;
    shows(&consumer, "in trouble", in_trouble).await;
    let events = ROUNDS_AWAY as usize * TALLIES;
    let most = most.load(Ordering::SeqCst);
    assert!(most <= MESSAGES_AHEAD_MAX && events > MESSAGES_AHEAD_MAX, "{most} of {events} were read ahead");
    broker.resume();
    pair.agrees().await;
    are_fine([&relay, &consumer]).await;
    relay.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}

/// A producer has several clients if its broker is distant. All clients are replaced together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn distant_broker_killed_under_load_loses_nothing() {
    let mut broker = Broker::at_distance(Duration::from_millis(3)).await;
    let pair = Pair::on(&broker.address()).await;
    let relay = pair.start_relay(pair.source_store().await, Arc::new(pair.bus().await), 1, None).await;
    let consumer = pair.consumer().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    let mut sql = pair.sql().await;
    for _ in 0..2 {
        let before = sql.copies().await;
        until("a load", async || sql.copies().await >= before + 200).await;
        broker.kill();
        shows(&relay, "in trouble", in_trouble).await;
        broker.resume();
        are_fine([&relay, &consumer]).await;
    }
    load.end().await;
    pair.handled(&mut sql).await;
    pair.agrees().await;
    relay.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_leader_is_replaced() {
    let mut brokers = Broker::cluster(3);
    let addresses: Vec<_> = brokers.iter().map(Broker::address).collect();
    let pair = Pair::on(&addresses.join(",")).await.set("replication", "3");
    let relay = pair.relay().await;
    let consumer = pair.consumer().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    let mut sql = pair.sql().await;
    until("a load", async || sql.copies().await >= 200).await;
    let leader = {
        let brokers = pair.brokers.clone();
        let topic = pair.topic();
        tokio::task::spawn_blocking(move || topic::leaders(&brokers, &topic)[&0]).await.unwrap()
    };
    brokers.retain(|broker| broker.node() != leader);
    assert_eq!(brokers.len(), 2);
    let before = sql.copies().await;
    until("another leader", async || sql.copies().await >= before + 1_000).await;
    load.end().await;
    pair.agrees().await;
    are_fine([&relay, &consumer]).await;
    relay.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topic_emptied_and_rebuilt_loses_nothing() {
    let mut broker = Broker::start();
    let pair = Pair::on(&broker.address()).await;
    let relay = pair.relay().await;
    let consumer = pair.consumer().await;
    let store = pair.source_store().await;
    let mut sql = pair.sql().await;
    add(&store, 0..50).await;
    pair.agrees().await;
    // Relay and consumer both continue with new messages. The first time, there are so few new messages that their
    // offsets are below the offsets handled before. The second time, there are more messages than before.
    let mut round = 50;
    for more in [1, 100] {
        broker.kill();
        broker.wipe();
        broker.resume();
        add(&store, round..round + more).await;
        pair.handled(&mut sql).await;
        assert!(pair.sent().await < sql.events().await, "the topic was not emptied");
        sql.set_back().await;
        round += more;
        // If the commit that moves the checkpoint fails, the relay reads its checkpoint again.
        add(&store, round..round + 1).await;
        round += 1;
        until("all events are in the topic", async || pair.sent().await >= sql.events().await).await;
        pair.agrees_out_of_order().await;
    }
    are_fine([&relay, &consumer]).await;
    relay.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topic_emptied_before_its_end_loses_nothing() {
    let mut broker = Broker::start();
    let pair = Pair::on(&broker.address()).await;
    let relay = pair.relay().await;
    let consumer = pair.consumer().await;
    let store = pair.source_store().await;
    let mut sql = pair.sql().await;
    add(&store, 0..20).await;
    pair.agrees().await;
    consumer.drain(DRAIN).await.unwrap();
    add(&store, 20..30).await;
    until("all events are in the topic", async || pair.sent().await >= sql.events().await).await;
    broker.kill();
    broker.wipe();
    broker.resume();
    let consumer = pair.consumer().await;
    // The topic is gone, and with it the messages that had been sent but not yet handled. New messages are handled
    // before the lost messages are sent again.
    add(&store, 30..40).await;
    let lost = 10 * TALLIES as i64;
    until("new messages are handled", async || sql.copies().await + lost >= sql.events().await).await;
    sql.set_back().await;
    add(&store, 40..41).await;
    pair.handled(&mut sql).await;
    pair.caught_up(&mut sql).await;
    let expected: Vec<i64> = (0..20).chain(30..40).collect();
    for (tally, amounts) in sql.copied().await {
        assert_eq!(amounts[..30], expected, "of tally {tally}");
        let mut late = amounts[30..].to_vec();
        late.sort_unstable();
        assert_eq!(late, [&(20..30).collect::<Vec<_>>()[..], &[40]].concat(), "of tally {tally}");
    }
    relay.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}

/// A producer without the right to write gets a fatal error from its client. A consumer without the right to read gets
/// an error for its topic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_rights_are_reported_and_services_resume_with_them() {
    let broker = Broker::with_acls();
    let pair = Pair::on(&broker.address()).await;
    let relay = pair.relay().await;
    let consumer = pair.consumer().await;
    let store = pair.source_store().await;
    let mut sql = pair.sql().await;
    add(&store, 0..1).await;
    pair.handled(&mut sql).await;
    broker.change_acl("add", "allow", "All", &pair.topic());
    for (round, right, runtime) in [(1, "Write", &relay), (2, "Read", &consumer)] {
        broker.change_acl("add", "deny", right, &pair.topic());
        add(&store, round..round + 1).await;
        let names_it = |parts: &BTreeMap<String, State>| format!("{parts:?}").to_lowercase().contains("authoriz");
        shows(runtime, "without a right", |parts| in_trouble(parts) && names_it(parts)).await;
        // A later failure has another direct cause, and health still names the missing right.
        let shown_at = Instant::now();
        while shown_at.elapsed() < Duration::from_secs(1) {
            let parts = runtime.health().parts();
            assert!(!in_trouble(&parts) || names_it(&parts), "{parts:?}");
            sleep(PAUSE).await;
        }
        broker.change_acl("remove", "deny", right, &pair.topic());
        pair.handled(&mut sql).await;
        are_fine([&relay, &consumer]).await;
    }
    pair.agrees().await;
    relay.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}
