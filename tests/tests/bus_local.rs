//! The conformance suite for the local bus, and the properties that only the local bus promises.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use annals::{
    Bus, BusError, Consumer, LocalBus, Publisher,
    bus::{Bookmark, Outgoing, Partition, Polled, Receipt},
    local_bus::HELD_MAX,
};
use annals_conformance::bus::{Ledger, Member, Subject, message, publish, within};
use futures::poll;

struct Local;

#[async_trait::async_trait]
impl Subject for Local {
    const PARTITIONS: u32 = 4;
    const RECEIPT_AFTER_CONSUMPTION: bool = true;
    const RESUMES_AT_ACKNOWLEDGED: bool = true;

    async fn bus() -> Arc<dyn Bus> {
        Arc::new(LocalBus::default())
    }
}

annals_conformance::bus_suite!(Local);

/// Every property holds under a prefix, too.
mod prefixed {
    use super::*;

    struct LocalWithPrefix;

    #[async_trait::async_trait]
    impl Subject for LocalWithPrefix {
        const PARTITIONS: u32 = 4;
        const RECEIPT_AFTER_CONSUMPTION: bool = true;
        const RESUMES_AT_ACKNOWLEDGED: bool = true;

        async fn bus() -> Arc<dyn Bus> {
            Arc::new(LocalBus::default().prefix("staging."))
        }
    }

    annals_conformance::bus_suite!(LocalWithPrefix);
}

const TOPIC: &str = "payment.commands";

fn outgoing(numbers: impl Iterator<Item = i64>) -> Vec<Outgoing> {
    numbers.map(|number| Outgoing { topic: TOPIC.into(), message: message("order-1", number) }).collect()
}

async fn polled(consumer: &mut Box<dyn Consumer>) -> Polled {
    within("poll", consumer.poll(100)).await.unwrap()
}

async fn is_unavailable(receipt: Receipt) -> bool {
    matches!(within("receipt", receipt).await, Err(BusError::Unavailable(_)))
}

#[tokio::test]
async fn receipt_resolves_at_once_without_a_group() {
    let bus = LocalBus::default();
    within("receipt", publish(&bus, TOPIC, [message("order-1", 1)]).await).await.unwrap();
    let mut late = Member::join(&bus, "late", TOPIC).await;
    let _receipt = publish(&bus, TOPIC, [message("order-1", 2)]).await;
    assert_eq!(late.collect(1).await[0].message.as_ref().unwrap().version.0, 2);
}

#[tokio::test]
async fn same_names_under_other_prefixes_do_not_see_each_other() {
    let bus = LocalBus::new(1);
    let green = bus.clone().prefix("green.");
    let blue = bus.clone().prefix("blue.");
    let mut of_green = Member::join(&green, "payment", TOPIC).await;
    let mut of_blue = Member::join(&blue, "payment", TOPIC).await;
    let mut observer = Member::join(&bus, "observer", &format!("green.{TOPIC}")).await;
    let _of_green = publish(&green, TOPIC, [message("order-1", 1)]).await;
    let _of_blue = publish(&blue, TOPIC, [message("order-1", 2)]).await;
    let seen = [of_green.collect(1).await.remove(0), of_blue.collect(1).await.remove(0)];
    let numbers = seen.each_ref().map(|delivery| delivery.message.as_ref().unwrap().version.0);
    assert_eq!(numbers, [1, 2], "each prefix has messages of its own");
    for delivery in &seen {
        assert_eq!((&*delivery.partition.topic, delivery.offset), (TOPIC, 0), "names in deliveries have no prefix");
    }
    assert_ne!(seen[0].partition, seen[1].partition, "an offset under one prefix is meaningless under another");
    let observed = observer.collect(1).await.remove(0);
    assert_eq!(
        *observed.partition.topic,
        *format!("green.{TOPIC}"),
        "without a prefix, the prefix is part of the name"
    );
    of_green.acknowledge(&seen[..1]).await;
    observer.acknowledge(&[observed]).await;
    assert_eq!((green.held(TOPIC), blue.held(TOPIC)), (0, 1), "a group acknowledges only under its own prefix");
}

#[tokio::test]
async fn receipt_waits_for_each_group() {
    let bus = LocalBus::default();
    let mut one = Member::join(&bus, "one", TOPIC).await;
    let mut two = Member::join(&bus, "two", TOPIC).await;
    let mut receipt = publish(&bus, TOPIC, (0..40).map(|key| message(&format!("order-{key}"), 1))).await;
    one.fill(&mut Ledger::default(), 40, 10).await;
    assert!(poll!(&mut receipt).is_pending());
    assert_eq!(bus.held(TOPIC), 40);
    two.fill(&mut Ledger::default(), 40, 10).await;
    within("receipt", receipt).await.unwrap();
    assert_eq!(bus.held(TOPIC), 0);
}

#[tokio::test]
async fn seek_acknowledges_earlier_messages() {
    let bus = LocalBus::new(1);
    let mut first = Member::join(&bus, "heirs", TOPIC).await;
    let receipt = publish(&bus, TOPIC, (1..=3).map(|number| message("order-1", number))).await;
    let taken = first.collect(3).await;
    // The member committed everything, but ended before it could acknowledge.
    drop(first);
    let mut second = Member::join(&bus, "heirs", TOPIC).await;
    second.starts.insert(taken[2].partition.clone(), taken[2].offset + 1);
    let _pending = poll!(Box::pin(second.collect(1)));
    within("receipt", receipt).await.unwrap();
}

#[tokio::test]
async fn group_without_members_stays() {
    let bus = LocalBus::default();
    let mut absent = Member::join(&bus, "absent", TOPIC).await;
    let mut other = Member::join(&bus, "other", TOPIC).await;
    let mut receipt = publish(&bus, TOPIC, (1..=5).map(|number| message("order-1", number))).await;
    let taken = absent.collect(5).await;
    absent.acknowledge(&taken[..2]).await;
    drop(absent);
    other.fill(&mut Ledger::default(), 5, 10).await;
    assert!(poll!(&mut receipt).is_pending());
    let mut returned = Member::join(&bus, "absent", TOPIC).await;
    let rest = returned.collect(3).await;
    assert_eq!(rest[0].offset, taken[2].offset);
    returned.acknowledge(&rest).await;
    within("receipt", receipt).await.unwrap();
}

#[tokio::test]
async fn late_group_starts_at_the_oldest_message_held() {
    let bus = LocalBus::default();
    let mut early = Member::join(&bus, "early", TOPIC).await;
    let mut receipt = publish(&bus, TOPIC, (1..=5).map(|number| message("order-1", number))).await;
    let taken = early.collect(5).await;
    early.acknowledge(&taken[..2]).await;
    let mut late = Member::join(&bus, "late", TOPIC).await;
    early.acknowledge(&taken).await;
    assert!(poll!(&mut receipt).is_pending(), "the late group has them to come");
    let theirs = late.collect(3).await;
    assert_eq!(theirs[0].offset, taken[2].offset);
    late.acknowledge(&theirs).await;
    within("receipt", receipt).await.unwrap();
}

#[tokio::test]
async fn publisher_waits_while_a_topic_is_full() {
    let bus = LocalBus::default();
    let mut member = Member::join(&bus, "full", TOPIC).await;
    let held = i64::try_from(HELD_MAX).unwrap();
    drop(publish(&bus, TOPIC, (1..=held).map(|number| message("order-1", number))).await);
    let mut more = bus.publish(outgoing(held + 1..=held + 10));
    assert!(poll!(&mut more).is_pending());
    assert_eq!(bus.held(TOPIC), HELD_MAX);
    // Each topic has its own buffer.
    let _other = Member::join(&bus, "other", "other").await;
    drop(publish(&bus, "other", [message("order-1", 1)]).await);

    let taken = member.collect(9).await;
    member.acknowledge(&taken).await;
    assert!(poll!(&mut more).is_pending(), "nine of ten found room");
    assert_eq!(bus.held(TOPIC), HELD_MAX);
    let mut ledger = Ledger::default();
    ledger.enter(&taken).unwrap();
    member.fill(&mut ledger, held, 1_000).await;
    let receipt = within("publish", more).await.unwrap();
    member.fill(&mut ledger, held + 10, 1_000).await;
    within("receipt", receipt).await.unwrap();
    assert_eq!(bus.held(TOPIC), 0);
}

#[tokio::test]
async fn publish_given_up_half_way_can_be_repeated() {
    let bus = LocalBus::default();
    let mut member = Member::join(&bus, "given-up", TOPIC).await;
    let many = i64::try_from(HELD_MAX).unwrap() + 100;
    assert!(poll!(bus.publish(outgoing(1..=many))).is_pending());
    let mut ledger = Ledger::default();
    member.fill(&mut ledger, many - 100, 10_000).await;
    let again = tokio::spawn({
        let bus = bus.clone();
        async move { bus.publish(outgoing(1..=many)).await.unwrap().await }
    });
    member.fill(&mut ledger, many, 10_000).await;
    within("receipt", again).await.unwrap().unwrap();
}

#[tokio::test]
async fn dropped_bus_fails_receipts_and_waiting_polls() {
    let bus = LocalBus::new(1);
    let mut member = Member::join(&bus, "dropped", TOPIC).await;
    let clone = bus.clone();
    let mut full = Vec::new();
    full.push(publish(&bus, TOPIC, (1..=HELD_MAX as i64).map(|number| message("order-1", number))).await);
    let waiting = tokio::spawn(async move {
        let waits = clone.publish(outgoing(1..=1));
        tokio::pin!(waits);
        assert!(poll!(&mut waits).is_pending());
        clone.close();
        within("publish", waits).await
    });
    assert!(matches!(waiting.await.unwrap(), Err(BusError::Unavailable(_))));
    assert!(is_unavailable(full.remove(0)).await);
    assert!(matches!(within("poll", member.consumer.poll(1)).await, Err(BusError::Unavailable(_))));
    assert!(bus.join("dropped", &[TOPIC]).await.is_err());

    let bus = LocalBus::new(1);
    let mut member = Member::join(&bus, "dropped", TOPIC).await;
    let receipt = publish(&bus, TOPIC, [message("order-1", 1)]).await;
    assert_eq!(member.collect(1).await.len(), 1);
    let mut poll_of_nothing = member.consumer.poll(1);
    assert!(poll!(&mut poll_of_nothing).is_pending());
    drop(bus);
    assert!(is_unavailable(receipt).await);
    assert!(matches!(within("poll", poll_of_nothing).await, Err(BusError::Unavailable(_))));
}

#[tokio::test]
async fn offsets_of_another_bus_are_ignored() {
    let assigned = async |bus: &LocalBus| {
        let mut consumer = bus.join("group", &[TOPIC]).await.unwrap();
        let Polled::Assigned(partitions) = polled(&mut consumer).await else { panic!("not assigned") };
        (consumer, partitions)
    };
    let old = LocalBus::new(1);
    let new = LocalBus::new(1);
    let (_consumer, before) = assigned(&old).await;
    let (mut consumer, after) = assigned(&new).await;
    assert_ne!(before[0].incarnation, after[0].incarnation);
    let at = |next| Some(Bookmark { next, last: None });
    let refused = |result| matches!(result, Err(BusError::Misconfigured(_)));
    assert!(refused(consumer.seek(&before[0], at(0)).await));
    assert!(refused(consumer.acknowledge(&before[0], 0).await));
    assert!(refused(consumer.seek(&after[0], at(1)).await), "past the end");
    assert!(refused(consumer.acknowledge(&after[0], 1).await), "past the end");
    assert!(refused(consumer.seek(&Partition { number: 1, ..after[0].clone() }, None).await), "no such partition");
    assert!(matches!(new.join("group", &[]).await, Err(BusError::Misconfigured(_))));
}

#[tokio::test]
async fn no_message_is_delivered_before_seek_or_after_revocation() {
    let bus = LocalBus::new(2);
    let mut one = bus.join("group", &[TOPIC]).await.unwrap();
    let Polled::Assigned(all) = polled(&mut one).await else { panic!("not assigned") };
    let _receipt = publish(&bus, TOPIC, (0..20).map(|key| message(&format!("order-{key}"), 1))).await;
    assert!(poll!(one.poll(10)).is_pending(), "not sought yet");
    one.seek(&all[0], None).await.unwrap();
    one.seek(&all[1], None).await.unwrap();

    let mut two = bus.join("group", &[TOPIC]).await.unwrap();
    assert!(poll!(two.poll(10)).is_pending(), "not revoked yet");
    let Polled::Revoked(gone) = polled(&mut one).await else { panic!("not revoked") };
    assert!(poll!(two.poll(10)).is_pending(), "work in flight may still end");
    let Polled::Messages(kept) = polled(&mut one).await else { panic!("no messages") };
    assert!(kept.iter().all(|delivery| !gone.contains(&delivery.partition)));
    let Polled::Assigned(taken) = polled(&mut two).await else { panic!("not assigned") };
    assert_eq!(taken, gone);
    // Calls by the former owner have no effect any more.
    one.seek(&gone[0], None).await.unwrap();
    one.acknowledge(&gone[0], 1).await.unwrap();
    two.seek(&gone[0], None).await.unwrap();
    let Polled::Messages(theirs) = polled(&mut two).await else { panic!("no messages") };
    assert_eq!((theirs[0].offset, kept.len() + theirs.len()), (0, 20));
}

#[tokio::test]
async fn rebalance_wakes_waiting_polls() {
    let bus = LocalBus::new(2);
    let mut one = bus.join("group", &[TOPIC]).await.unwrap();
    polled(&mut one).await;
    let mut idle = one.poll(1);
    assert!(poll!(&mut idle).is_pending());
    let mut two = bus.join("group", &[TOPIC]).await.unwrap();
    let mut heir = two.poll(1);
    assert!(poll!(&mut heir).is_pending());
    assert!(matches!(within("revocation", idle).await, Ok(Polled::Revoked(_))));
    let mut giving_up = one.poll(1);
    assert!(poll!(&mut giving_up).is_pending());
    assert!(matches!(within("assignment", heir).await, Ok(Polled::Assigned(_))));
    drop(giving_up);
    let mut last = two.poll(1);
    assert!(poll!(&mut last).is_pending());
    drop(one);
    assert!(matches!(within("the rest", last).await, Ok(Polled::Assigned(_))));
}

#[tokio::test]
async fn partitions_are_spread_evenly_over_topics() {
    let bus = LocalBus::new(3);
    let mut members: Vec<Box<dyn Consumer>> = Vec::new();
    for _ in 0..4 {
        members.push(bus.join("even", &["a", "b"]).await.unwrap());
    }
    let mut owned = Vec::new();
    for consumer in &mut members {
        let Polled::Assigned(partitions) = polled(consumer).await else { panic!("not assigned") };
        owned.push(partitions.len());
    }
    owned.sort_unstable();
    assert_eq!(owned, [1, 1, 2, 2]);
}
