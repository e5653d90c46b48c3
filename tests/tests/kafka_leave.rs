//! A member can be dropped at any moment, even while its group is still deciding which partitions the member gets.
#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

use annals::{Bus, bus::Polled};
use annals_kafka::{KafkaBus, Settings};
use annals_tests::{kafka::brokers, log_output::LogOutput, tally::eventually};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer as _},
};
use tokio::time::{Instant, sleep};
use tracing_subscriber::filter::LevelFilter;
use uuid::Uuid;

const GROUPS: usize = 4;
/// The number of members of each group that are dropped while they join.
const MEMBERS: usize = 30;
/// A member that cannot join within four seconds, because its group waits for another member, is closed all the same.
const CLOSED_EARLY_MAX: usize = MEMBERS / 2;

/// Lets members join one group, one after the other, and drops each member shortly before the group would assign its
/// partitions.
async fn join_and_leave(bus: Arc<KafkaBus>, name: String) {
    let joined_at = Instant::now();
    let mut member = bus.join(&name, &[&name]).await.unwrap();
    while !matches!(member.poll(1).await.unwrap(), Polled::Assigned(_)) {}
    let joining = joined_at.elapsed();
    drop(member);
    for number in 1..MEMBERS {
        let member = bus.join(&name, &[&name]).await.unwrap();
        sleep(joining.mul_f64(number as f64 / MEMBERS as f64)).await;
        drop(member);
    }
}

/// Counts the lines that contain both texts.
fn count(log: &LogOutput, one: &str, other: &str) -> usize {
    log.text().lines().filter(|line| line.contains(one) && line.contains(other)).count()
}

fn members_of(group: &str) -> usize {
    let client: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap();
    let groups = client.fetch_group_list(Some(group), Duration::from_secs(10)).unwrap();
    groups.groups().iter().map(|group| group.members().len()).sum()
}

/// If a client is closed while it joins a group, the group adds the client as a member after the client has ended, and
/// librdkafka crashes if the group's answer arrives at the wrong moment. The log shows each close in such a state,
/// whether or not the crash follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_dropped_while_they_join_join_before_they_leave() {
    let log = LogOutput::default();
    let written = log.clone();
    tracing_subscriber::fmt().with_max_level(LevelFilter::DEBUG).with_writer(move || written.clone()).init();
    let settings = Settings::new(&brokers()).set("debug", "cgrp");
    let bus = Arc::new(KafkaBus::connect(settings).await.unwrap());
    let names: Vec<_> = (0..GROUPS).map(|_| Uuid::new_v4().to_string()).collect();
    let groups: Vec<_> = names.iter().map(|name| tokio::spawn(join_and_leave(bus.clone(), name.clone()))).collect();
    for group in groups {
        group.await.unwrap();
    }
    let members = async || {
        let names = names.clone();
        let members = tokio::task::spawn_blocking(move || names.iter().map(|name| members_of(name)).sum::<usize>());
        members.await.unwrap()
    };
    eventually("all members have left", async || (members().await == 0).then_some(())).await;
    // The log ends with the client, so the last lines of some clients are missing.
    let closed = |states: &[&str]| -> Vec<usize> {
        states.iter().map(|state| count(&log, "received op TERMINATE ", &format!("join-state {state}"))).collect()
    };
    eventually("most clients have ended", async || (closed(&["init"])[0] > GROUPS * MEMBERS / 2).then_some(())).await;
    let early = closed(&["wait-join", "wait-metadata", "wait-sync"]);
    assert!(early.iter().sum::<usize>() <= CLOSED_EARLY_MAX, "clients closed while they joined, by state: {early:?}");
}
