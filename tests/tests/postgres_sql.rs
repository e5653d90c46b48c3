//! A user's SQL runs in the transaction that moves the checkpoint, so the table and the checkpoint always agree.
#![allow(clippy::unwrap_used)]

mod postgres;
mod sql_rows;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use annals::{Health, Operator, Repository, Subscription, commit::COMMIT_ROWS_MAX, health::State};
use annals_tests::tally::{Tally, TallyCommand, eventually};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use self::sql_rows::{Bed, Trouble};

#[tokio::test(flavor = "multi_thread")]
async fn rows_and_checkpoint_commit_together() {
    let bed = Bed::new().await;
    let watch = bed.watch();
    bed.add("a", 1..=100).await;
    let running = bed.start(1);
    bed.add("b", 101..=200).await;
    bed.exactly_once(200).await;
    bed.becomes(&Vec::from_iter(1..=200)).await;
    running.stop().await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    bed.nothing_is_open().await;
    // None of the internal documents that the handler passes to the store is kept.
    let sql = bed.schema.sql("SELECT DISTINCT collection FROM annals.documents");
    let left: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut bed.schema.connection().await).await.unwrap();
    assert_eq!(left, ["checkpoint"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_message_leaves_no_rows_and_succeeds_later() {
    for trouble in [Trouble::Error, Trouble::Panic, Trouble::SwallowedError, Trouble::Deferred] {
        // Fails at the first message of the batch, at a message in the middle, and at the last message.
        for failing in [1, 3, 5] {
            let bed = Bed::new().await;
            bed.trouble(failing, trouble);
            for amount in 1..=5 {
                bed.add(&amount.to_string(), [amount]).await;
            }
            bed.add(&failing.to_string(), [6]).await;
            let others: Vec<i64> = (1..=5).filter(|amount| *amount != failing).collect();
            let running = bed.start(1);
            let letters = bed.parked(1).await;
            assert_eq!(*letters[0].0, *format!("tally-{failing}"));
            let reason = match trouble {
                Trouble::Error => "does not please",
                Trouble::Panic => "is too much",
                Trouble::SwallowedError => "current transaction is aborted",
                _ => "violates foreign key constraint",
            };
            assert!(letters[0].1.contains(reason), "{letters:?}");
            bed.becomes(&others).await;
            bed.nothing_is_open().await;
            // The first redrive fails, and a later one succeeds.
            let operator = Operator::new(Arc::new(bed.plain.clone()), "ann");
            operator.redrive("rows", &letters[0].0, "a test").await.unwrap();
            let tries = bed.rows.handled.load(Ordering::SeqCst);
            let again = async || (bed.rows.handled.load(Ordering::SeqCst) > tries).then_some(());
            eventually("the message is retried", again).await;
            bed.nothing_is_open().await;
            assert_eq!(bed.seen().await, others, "{trouble:?}");
            bed.rows.troubles.lock().unwrap().clear();
            eventually("the message is redriven", async || {
                operator.redrive("rows", &letters[0].0, "a test").await.ok();
                sleep(Duration::from_millis(50)).await;
                bed.letters().await.is_empty().then_some(())
            })
            .await;
            bed.exactly_once(6).await;
            running.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn message_moved_to_the_next_commit_keeps_its_row() {
    let bed = Bed::new().await;
    // The second message makes the commit too large, so the worker removes that message from the batch.
    bed.trouble(1, Trouble::Large(COMMIT_ROWS_MAX / 2 - 100));
    bed.trouble(2, Trouble::Large(COMMIT_ROWS_MAX / 2 + 200));
    // This message is too large even on its own.
    bed.trouble(5, Trouble::Large(COMMIT_ROWS_MAX + 1));
    let watch = bed.watch();
    bed.add("a", 1..=4).await;
    let running = bed.start(1);
    bed.exactly_once(4).await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    bed.add("b", [5]).await;
    bed.add("c", [6]).await;
    let letters = bed.parked(1).await;
    assert!(letters[0].1.contains("rows; the limit of a commit is"), "{letters:?}");
    bed.becomes(&[1, 2, 3, 4, 6]).await;
    running.stop().await;
    bed.nothing_is_open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nested_transaction_is_a_savepoint() {
    let bed = Bed::new().await;
    bed.trouble(1, Trouble::NestedCommit);
    bed.trouble(3, Trouble::NestedRollback);
    bed.trouble(4, Trouble::NestedCommit);
    let watch = bed.watch();
    bed.add("a", 1..=5).await;
    let running = bed.start(1);
    bed.exactly_once(5).await;
    running.stop().await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
}

/// Staged changes and SQL stay consistent even if others write to the same stream.
#[tokio::test(flavor = "multi_thread")]
async fn conflicts_roll_the_rows_back() {
    let mut bed = Bed::new().await;
    bed.rows.copies = Some(Repository::with(Arc::new(bed.store.clone()), "copy", 10));
    bed.add("a", 1..=200).await;
    let running = bed.start(1);
    let rival: Repository<Tally> = Repository::with(Arc::new(bed.schema.store().await), "copy", 10);
    let mut rivals = 0;
    while bed.seen().await.len() < 200 {
        rivals += 1;
        rival.execute("all", TallyCommand::Add(1_000), uuid::Uuid::new_v4()).await.unwrap();
    }
    bed.exactly_once(200).await;
    let copy = rival.state("all").await.unwrap();
    assert_eq!(copy.sum(), 200 * 201 / 2 + 1_000 * rivals);
    assert_eq!(bed.letters().await, []);
    running.stop().await;
    bed.nothing_is_open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sql_handler_on_another_store_does_nothing() {
    let bed = Bed::new().await;
    bed.add("a", [1]).await;
    let shutdown = CancellationToken::new();
    let health = Health::default();
    let astray = Subscription::new("rows", bed.store.handler(bed.rows.clone()));
    let task = tokio::spawn(astray.run(Arc::new(bed.plain.clone()), health.clone(), shutdown));
    let reason = eventually("the dead letter gives the reason", async || match health.parts().get("rows/0") {
        Some(State::Trouble(reason)) => Some(reason.clone()),
        _ => None,
    });
    assert!(reason.await.contains("runs only on that store"));
    assert_eq!((bed.seen().await, bed.letters().await), (vec![], vec![]));
    task.abort();
}
