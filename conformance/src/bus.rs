//! The contract of every bus, with one function per property. Where buses may differ, each bus declares its behaviour,
//! and the property checks the declared behaviour. No property is skipped.
//!
//! ```
//! use std::sync::Arc;
//! use annals::{Bus, LocalBus};
//!
//! struct Local;
//!
//! #[async_trait::async_trait]
//! impl annals_conformance::bus::Subject for Local {
//!     const PARTITIONS: u32 = 4;
//!     const RECEIPT_AFTER_CONSUMPTION: bool = true;
//!     const RESUMES_AT_ACKNOWLEDGED: bool = true;
//!     async fn bus() -> Arc<dyn Bus> {
//!         Arc::new(LocalBus::new(Self::PARTITIONS))
//!     }
//! }
//!
//! annals_conformance::bus_suite!(Local);
//! ```
#![allow(clippy::unwrap_used)]

mod group;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use annals::{
    Bus, Message, Metadata, Position, TraceContext, Version,
    bus::{Bookmark, Delivery, Receipt},
    event::Party,
};
use async_trait::async_trait;
use chrono::DateTime;
use tokio::{
    sync::watch,
    task::{JoinHandle, yield_now},
};
use uuid::Uuid;

use self::group::{Crew, Roll, numbers, read};
pub use self::group::{Ledger, Member, message, publish, within};

/// A number of messages that is larger than the buffers of all buses and clients, so that publishers must wait.
const BEYOND_ANY_BUFFER: i64 = 100_000;

/// A bus under test.
#[async_trait]
pub trait Subject: 'static {
    /// The number of partitions of a new topic, at least 2.
    const PARTITIONS: u32;
    /// Whether a receipt waits until every group has acknowledged the messages. If false, the receipt must not wait for
    /// any group.
    const RECEIPT_AFTER_CONSUMPTION: bool;
    /// Whether a seek to `None` resumes at the offset that the group has acknowledged. If false, the seek returns to
    /// the beginning.
    const RESUMES_AT_ACKNOWLEDGED: bool;

    /// Connects to the bus. The suite calls this function at least once per property.
    async fn bus() -> Arc<dyn Bus>;

    /// Returns a new topic.
    async fn topic() -> String {
        format!("suite-{}", Uuid::new_v4())
    }
}

/// Generates a test for each property of a [`Subject`](crate::bus::Subject). The calling crate needs `tokio` with the
/// features `macros` and `rt-multi-thread`.
#[macro_export]
macro_rules! bus_suite {
    ($subject:ty) => {
        $crate::bus_suite!($subject:
            order_is_kept_per_key,
            every_key_is_delivered,
            unacknowledged_messages_are_redelivered,
            redelivery_starts_at_the_sought_offset,
            seek_replays,
            each_group_gets_everything,
            topics_are_separate,
            members_share_partitions,
            join_and_leave_rebalance,
            offsets_rise,
            attributes_round_trip,
            slow_consumer_loses_nothing,
            cancelled_polls_lose_nothing,
            large_batch_arrives,
            receipts_resolve,
        );
    };
    ($subject:ty: $($property:ident),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $property() {
            $crate::bus::$property::<$subject>().await
        }
    )*};
}

/// Messages with the same key arrive in the order of publication, whatever other publishers do.
pub async fn order_is_kept_per_key<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "orders", &topic).await;
    let publishers: Vec<JoinHandle<Vec<Receipt>>> = (0..8)
        .map(|publisher| {
            let bus = bus.clone();
            let topic = topic.clone();
            tokio::spawn(async move {
                let mut receipts = Vec::new();
                let mut next = 1;
                while next <= 500 {
                    let batch = next..(next + 1 + (next + publisher) % 37).min(501);
                    next = batch.end;
                    let key = format!("order-{publisher}");
                    receipts.push(publish(&*bus, &topic, batch.map(|number| message(&key, number))).await);
                }
                receipts
            })
        })
        .collect();
    member.fill(&mut Ledger::default(), 8 * 500, 100).await;
    for publisher in publishers {
        for receipt in publisher.await.unwrap() {
            within("receipt", receipt).await.unwrap();
        }
    }
}

/// Messages of all keys arrive. Each key is on one partition, and the keys are spread over several partitions.
pub async fn every_key_is_delivered<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "keys", &topic).await;
    let odd = ["k".to_owned(), "заказ-№ 1 ✓".to_owned(), "k".repeat(512)];
    let keys: Vec<String> = (0..997).map(|n| format!("order-{n}")).chain(odd).collect();
    let _receipt = publish(&*bus, &topic, keys.iter().map(|key| message(key, 1))).await;
    let _receipt = publish(&*bus, &topic, keys.iter().map(|key| message(key, 2))).await;
    let deliveries = member.collect(2_000).await;
    let mut places: BTreeMap<Arc<str>, BTreeSet<u32>> = BTreeMap::new();
    for delivery in &deliveries {
        assert_eq!(*delivery.partition.topic, *topic);
        places.entry(read(delivery).key.clone()).or_default().insert(delivery.partition.number);
    }
    assert_eq!(places.len(), 1_000);
    let torn = places.iter().find(|(_, partitions)| partitions.len() > 1);
    assert!(torn.is_none(), "a key on several partitions: {torn:?}");
    let used: BTreeSet<u32> = places.into_values().flatten().collect();
    assert_eq!(used, (0..S::PARTITIONS).collect());
}

/// Messages that a member received but did not acknowledge are delivered to the next member.
pub async fn unacknowledged_messages_are_redelivered<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut first = Member::join(&*bus, "heirs", &topic).await;
    let _receipt = publish(&*bus, &topic, (1..=20).map(|number| message("order-1", number))).await;
    let taken = first.collect(20).await;
    assert_eq!(numbers(&taken), (1..=20).collect::<Vec<_>>());
    first.acknowledge(&taken[..5]).await;
    drop(first);
    let mut second = Member::join(&*bus, "heirs", &topic).await;
    let start = if S::RESUMES_AT_ACKNOWLEDGED { 6 } else { 1 };
    let again = second.collect(21 - start as usize).await;
    assert_eq!(numbers(&again), (start..=20).collect::<Vec<_>>());
    assert_eq!(again.last().map(|d| d.offset), taken.last().map(|d| d.offset), "an offset is for ever");
}

/// The next member starts at the offset that the consumer itself committed.
pub async fn redelivery_starts_at_the_sought_offset<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut first = Member::join(&*bus, "heirs", &topic).await;
    let _receipt = publish(&*bus, &topic, (1..=20).map(|number| message("order-1", number))).await;
    let taken = first.collect(20).await;
    drop(first);
    let mut second = Member::join(&*bus, "heirs", &topic).await;
    second.starts.insert(taken[7].partition.clone(), taken[7].offset);
    assert_eq!(numbers(&second.collect(13).await), (8..=20).collect::<Vec<_>>());
}

/// A seek to an earlier offset delivers the same messages again, including messages that the client had prefetched.
pub async fn seek_replays<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "replay", &topic).await;
    let _receipt = publish(&*bus, &topic, (1..=20).map(|number| message("order-1", number))).await;
    let taken = member.collect(10).await;
    let third = Bookmark { next: taken[2].offset, last: Some(taken[1].id()) };
    member.consumer.seek(&taken[2].partition, Some(third)).await.unwrap();
    let again = member.collect(18).await;
    assert_eq!(numbers(&again), (3..=20).collect::<Vec<_>>());
    for (first, second) in taken[2..].iter().zip(&again) {
        assert_eq!((first.offset, read(first)), (second.offset, read(second)));
    }
}

/// Groups are independent of each other.
pub async fn each_group_gets_everything<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut groups = [Member::join(&*bus, "a", &topic).await, Member::join(&*bus, "b", &topic).await];
    let messages = (0..300).map(|n| message(&format!("order-{}", n % 30), n / 30 + 1));
    let receipt = publish(&*bus, &topic, messages).await;
    for member in &mut groups {
        member.fill(&mut Ledger::default(), 300, 100).await;
    }
    within("receipt", receipt).await.unwrap();
}

/// A group receives only messages of the topics that the group joined.
pub async fn topics_are_separate<S: Subject>() {
    let bus = S::bus().await;
    let one = S::topic().await;
    let two = S::topic().await;
    let mut narrow = Member::join(&*bus, "narrow", &one).await;
    let wide = within("join", bus.join(&format!("wide-{one}"), &[&one, &two])).await.unwrap();
    let mut wide = Member { consumer: wide, starts: HashMap::new() };
    let _receipt = publish(&*bus, &two, (1..=10).map(|number| message("two", number))).await;
    let _receipt = publish(&*bus, &one, (1..=10).map(|number| message("one", number))).await;
    assert!(narrow.collect(10).await.iter().all(|delivery| *delivery.partition.topic == *one));
    let both = wide.collect(20).await;
    let on = |topic: &str| both.iter().filter(|delivery| *delivery.partition.topic == *topic).count();
    assert_eq!((on(&one), on(&two)), (10, 10));
}

/// The members of a group share all partitions, and each partition has one owner. Each member delivers only messages of
/// its own partitions.
pub async fn members_share_partitions<S: Subject>() {
    let crew = Crew { bus: S::bus().await, topic: S::topic().await, roll: watch::Sender::default() };
    let all = S::PARTITIONS as usize;
    let one = crew.start(1).await;
    crew.until("one member owns all partitions", |roll| roll.owners.len() == all).await;
    // Nothing has been published so far, but a member that waits for messages must notice the rebalance anyway.
    let two = crew.start(2).await;
    crew.until("both members own partitions", |roll| {
        roll.owners.len() == all && roll.owners() == BTreeSet::from([1, 2])
    })
    .await;
    crew.publish_round(1).await;
    crew.until("all messages", |roll| roll.ledger.count == 200).await;
    crew.until("both deliver", |roll| roll.active == BTreeSet::from([1, 2])).await;
    one().await;
    two().await;
}

/// When a member joins, it gets some of the partitions, after the other members have given these partitions up. When a
/// member leaves, the other members get its partitions. In both cases, no message is lost or reordered.
pub async fn join_and_leave_rebalance<S: Subject>() {
    let crew = Crew { bus: S::bus().await, topic: S::topic().await, roll: watch::Sender::default() };
    let all = S::PARTITIONS as usize;
    let owned_by = |members: &'static [usize]| {
        move |roll: &Roll| roll.owners.len() == all && roll.owners() == members.iter().copied().collect()
    };
    let one = crew.start(1).await;
    crew.until("one member owns all partitions", owned_by(&[1])).await;
    crew.publish_round(1).await;
    let two = crew.start(2).await;
    crew.publish_round(2).await;
    crew.until("both members own partitions", owned_by(&[1, 2])).await;
    crew.publish_round(3).await;
    one().await;
    crew.publish_round(4).await;
    crew.until("member two owns all partitions", owned_by(&[2])).await;
    crew.publish_round(5).await;
    crew.until("all messages", |roll| roll.ledger.count == 1_000).await;
    two().await;
}

/// Offsets rise within a partition.
pub async fn offsets_rise<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "offsets", &topic).await;
    for round in 1..=10 {
        drop(publish(&*bus, &topic, (0..50).map(|key| message(&format!("order-{key}"), round))).await);
    }
    let mut latest = BTreeMap::new();
    for Delivery { partition, offset, .. } in member.collect(500).await {
        let before = latest.insert(partition.clone(), offset);
        assert!(before.is_none_or(|before| before < offset), "{offset} after {before:?} on {partition:?}");
    }
    assert_eq!(latest.len(), S::PARTITIONS as usize);
}

/// Messages arrive unchanged, to the byte and the microsecond.
pub async fn attributes_round_trip<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "attributes", &topic).await;
    let event = Message {
        id: Uuid::new_v4(),
        type_name: "order.placed".into(),
        schema_version: 7,
        source: "bestellungen/größe".into(),
        subject: "order-№ 536365".into(),
        key: "checkout-订单 1".into(),
        data: "{ \"b\" : 1.10,\t\"a\":\"\\u00e9é\\n✓\u{1f980}\", \"a\":12345678901234567890.0 }\n".into(),
        metadata: Metadata {
            correlation_id: Uuid::new_v4(),
            causation_id: Uuid::new_v4(),
            trace: TraceContext::parse(
                ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
                ["vendor=\"1\",other=2"],
            ),
            actor: Party::new("user \"ü\" \\").ok(),
            tenant: Party::new("t-1").ok(),
            ..Metadata::default()
        },
        time: DateTime::from_timestamp_micros(1_700_000_000_123_457).unwrap(),
        position: Position(i64::MAX - 1),
        version: Version(42),
        lane: Some("3@0123456789abcdef".into()),
        extensions: [("partner", "Ærø & søn, \"a=b\""), ("dataref", "")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
    };
    let command = Message {
        id: Uuid::new_v4(),
        metadata: Metadata::of_request(Uuid::new_v4()),
        time: DateTime::from_timestamp_micros(-1).unwrap(),
        position: Position::START,
        version: Version::START,
        lane: None,
        data: "null".into(),
        extensions: BTreeMap::new(),
        ..event.clone()
    };
    let _receipt = publish(&*bus, &topic, [event.clone(), command.clone()]).await;
    let deliveries = member.collect(2).await;
    assert_eq!((read(&deliveries[0]), read(&deliveries[1])), (&event, &command));
}

/// A publisher that is faster than its consumer waits, and no message is lost.
pub async fn slow_consumer_loses_nothing<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "slow", &topic).await;
    let publisher = tokio::spawn({
        let bus = bus.clone();
        let topic = topic.clone();
        async move {
            for batch in 0..BEYOND_ANY_BUFFER / 500 {
                let numbers = batch * 50..(batch + 1) * 50;
                let messages = numbers.flat_map(|n| (0..10).map(move |key| message(&format!("order-{key}"), n + 1)));
                drop(publish(&*bus, &topic, messages).await);
            }
        }
    });
    let mut ledger = Ledger::default();
    for goal in (0..=BEYOND_ANY_BUFFER).step_by(1_000) {
        member.fill(&mut ledger, goal, 97).await;
        yield_now().await;
    }
    publisher.await.unwrap();
}

/// A poll that is dropped before it completes loses no message, no matter how far the poll has come.
pub async fn cancelled_polls_lose_nothing<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "cancelled", &topic).await;
    let publisher = tokio::spawn({
        let bus = bus.clone();
        let topic = topic.clone();
        async move {
            for round in 1..=500 {
                drop(publish(&*bus, &topic, (0..4).map(|key| message(&format!("order-{key}"), round))).await);
                yield_now().await;
            }
        }
    });
    let mut ledger = Ledger::default();
    let impatient = async {
        for round in 0_u64.. {
            let polled = tokio::select! {
                polled = member.consumer.poll(3) => polled,
                () = async { for _ in 0..round % 4 { yield_now().await } } => { yield_now().await; continue }
            };
            let deliveries = member.take(polled).await;
            ledger.enter(&deliveries).unwrap();
            if ledger.count == 2_000 {
                break;
            }
        }
    };
    within("all messages through cancelled polls", impatient).await;
    publisher.await.unwrap();
}

/// A single call may publish many messages.
pub async fn large_batch_arrives<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "large", &topic).await;
    let messages = (0..50_000).map(|n| message(&format!("order-{}", n % 100), n / 100 + 1));
    let receipt = publish(&*bus, &topic, messages).await;
    member.fill(&mut Ledger::default(), 50_000, 10_000).await;
    within("receipt", receipt).await.unwrap();
}

/// A receipt resolves once the messages are durable, in the sense in which the bus defines durability. Dropping a
/// receipt has no effect.
pub async fn receipts_resolve<S: Subject>() {
    let bus = S::bus().await;
    let topic = S::topic().await;
    let mut member = Member::join(&*bus, "receipts", &topic).await;
    within("receipt of nothing", publish(&*bus, &topic, []).await).await.unwrap();
    drop(publish(&*bus, &topic, [message("order-1", 1)]).await);
    let mut receipt = publish(&*bus, &topic, (2..=10).map(|number| message("order-1", number))).await;
    if S::RECEIPT_AFTER_CONSUMPTION {
        let taken = member.collect(10).await;
        member.acknowledge(&taken[..9]).await;
        assert!(futures::poll!(&mut receipt).is_pending(), "the last message is not acknowledged");
        member.acknowledge(&taken).await;
        within("receipt", receipt).await.unwrap();
    } else {
        within("receipt without consumption", receipt).await.unwrap();
        assert_eq!(numbers(&member.collect(10).await), (1..=10).collect::<Vec<_>>());
    }
}
