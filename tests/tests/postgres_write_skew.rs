//! Two commits each write what the other only checks. One of them must lose, even if they come from different
//! processes.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::sync::Arc;

use annals::{Append, Commit, CommitError, DocumentKey, EventStore, Expected, Put, StreamId, Version};
use annals_conformance::store::concurrency::relying_on_absence;
use annals_postgres::PostgresStore;
use sqlx::{Connection, PgConnection};
use tokio::{sync::Barrier, task::JoinSet, time::timeout};

use self::postgres::{PROMPTLY, Schema, append};

/// Returns a commit that writes to one stream and relies on the version of another stream.
fn relying(on: (&str, i64), write: (&str, i64)) -> Commit {
    let mut commit = append(write.0, write.1, 1);
    let stream = StreamId::parse(on.0).unwrap();
    let expected = Expected::Version(Version(on.1));
    commit.appends.push(Append { stream, expected, events: Vec::new() });
    commit
}

/// Waits until a transaction is waiting for the gate of a stream, the advisory lock that serializes access to it.
async fn somebody_waits(schema: &Schema) {
    let mut observer = schema.connection().await;
    let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
                                   AND classid = 'annals.events'::regclass::oid)";
    let observed = async {
        while !sqlx::query_scalar::<_, bool>(schema.sql(waits)).fetch_one(&mut observer).await.unwrap() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PROMPTLY, observed).await.expect("the other one must be waited for");
}

/// Acts as another process: checks that `checked` is empty, and writes to `written` in an open transaction.
async fn rely_within(connection: &mut PgConnection, schema: &Schema, checked: &str, written: &str) {
    let sql = "SELECT positions[1] IS NOT NULL FROM annals.append(
        ARRAY[$1, $2], '{0,0}', '{t,f}', '{}', '{}', '{}', '{}', '{}', '{}', '{}',
        '{1}', '{2}', ARRAY[$2], '{1}', ARRAY[gen_random_uuid()], '{thing.happened}', '{1}', '{\"{}\"}', '{\"{}\"}')";
    let query = sqlx::query_scalar::<_, bool>(schema.sql(sql)).bind(checked).bind(written);
    assert!(query.fetch_one(connection).await.unwrap(), "nothing is in its way");
}

/// The second commit performs its check only after the first has ended.
#[tokio::test(flavor = "multi_thread")]
async fn second_writer_waits_and_sees_the_first_commit() {
    for (ending, holds) in [("COMMIT", false), ("ROLLBACK", true)] {
        let schema = Schema::new();
        let store = schema.store().await;
        let mut first = schema.connection().await;
        sqlx::raw_sql("BEGIN").execute(&mut first).await.unwrap();
        rely_within(&mut first, &schema, "left-1", "right-1").await;
        let second = {
            let store = store.clone();
            tokio::spawn(async move { store.commit(relying(("right-1", 0), ("left-1", 0))).await })
        };
        somebody_waits(&schema).await;
        sqlx::raw_sql(ending).execute(&mut first).await.unwrap();
        match second.await.unwrap() {
            Ok(_) => assert!(holds, "the commit relied on a changed document"),
            Err(CommitError::Conflict { stream, actual, .. }) => {
                assert_eq!((stream.as_str(), actual, holds), ("right-1", Version(1), false));
            }
            Err(other) => panic!("{other}"),
        }
        first.close().await.unwrap();
    }
}

/// At least one doctor must stay on call, so each doctor leaves only if the other has not left.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_mutually_dependent_commits_succeeds() {
    const ROUNDS: i64 = 200;
    let schema = Schema::new();
    let stores = [schema.store().await, schema.store().await];
    let barrier = Barrier::new(2);
    let leave = async |store: &PostgresStore, own: &str, other: &str| {
        let mut left = 0;
        for round in 0..ROUNDS {
            barrier.wait().await;
            let own = format!("{own}-{round}");
            let other = format!("{other}-{round}");
            match store.commit(relying((&other, 0), (&own, 0))).await {
                Ok(_) => left += 1,
                Err(CommitError::Conflict { .. }) => {}
                Err(unexpected) => panic!("{unexpected}"),
            }
        }
        left
    };
    let (first, second) = tokio::join!(leave(&stores[0], "anna", "berta"), leave(&stores[1], "berta", "anna"));
    assert_eq!(first + second, ROUNDS, "in each round exactly one leaves");
    let both: i64 = sqlx::query_scalar(schema.sql(
        "SELECT count(*) FROM (SELECT FROM annals.events GROUP BY split_part(stream_id, '-', 2) HAVING count(*) > 1) AS rounds",
    ))
    .fetch_one(&mut schema.connection().await)
    .await
    .unwrap();
    assert_eq!(both, 0, "rounds in which both left");
}

/// An open transaction blocks only the commits that conflict with it. A commit that only checks versions, and a commit
/// on other streams, do not wait.
#[tokio::test(flavor = "multi_thread")]
async fn open_transaction_blocks_only_conflicting_commits() {
    let schema = Schema::new();
    let store = schema.store().await;
    let mut open = schema.connection().await;
    sqlx::raw_sql("BEGIN").execute(&mut open).await.unwrap();
    rely_within(&mut open, &schema, "left-1", "right-1").await;

    let looks = Append { events: Vec::new(), ..append("right-1", 0, 0).appends.remove(0) };
    let [contradicts, looks, also_relies, writes] = [
        relying(("right-1", 0), ("left-1", 0)),
        Commit { appends: vec![looks], puts: Vec::new() },
        relying(("other-1", 0), ("other-2", 0)),
        append("other-3", 0, 1),
    ]
    .map(|commit| {
        let store = store.clone();
        tokio::spawn(async move { store.commit(commit).await })
    });
    for unrelated in [looks, also_relies, writes] {
        timeout(PROMPTLY, unrelated).await.expect("the commit must not wait for the transaction").unwrap().unwrap();
    }
    let outcome = timeout(PROMPTLY, contradicts).await.expect("the commit must give up").unwrap();
    assert!(matches!(outcome, Err(CommitError::Unavailable(_))), "{outcome:?}");
    sqlx::raw_sql("ROLLBACK").execute(&mut open).await.unwrap();
    store.commit(relying(("right-1", 0), ("left-1", 0))).await.unwrap();
}

/// The same holds for missing documents: a commit that creates a document, or relies on its absence, waits and then
/// checks again.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_commits_relying_on_absence_succeeds_between_processes() {
    const ROUNDS: usize = 100;
    let schema = Schema::new();
    let stores = [schema.store().await, schema.store().await];
    for round in 0..ROUNDS {
        for (kind, commits) in relying_on_absence(round).into_iter().enumerate() {
            let mut writers = JoinSet::new();
            let barrier = Arc::new(Barrier::new(2));
            for (store, commit) in stores.iter().zip(commits) {
                let store = store.clone();
                let barrier = barrier.clone();
                writers.spawn(async move {
                    barrier.wait().await;
                    store.commit(commit).await
                });
            }
            let held = writers.join_all().await.into_iter().filter(|outcome| match outcome {
                Ok(_) => true,
                Err(CommitError::Conflict { .. } | CommitError::DocumentConflict { .. }) => false,
                Err(unexpected) => panic!("{unexpected}"),
            });
            assert_eq!(held.count(), 1, "kind {kind}, round {round}");
        }
    }
    let left: i64 = sqlx::query_scalar(schema.sql("SELECT count(*) FROM annals.documents WHERE body::text = 'null'"))
        .fetch_one(&mut schema.connection().await)
        .await
        .unwrap();
    assert_eq!(left, 0, "the placeholder of an absent document ends with the transaction");
}

/// A commit that would create the document waits for a transaction that relies on the document's absence.
#[tokio::test(flavor = "multi_thread")]
async fn writers_wait_for_a_commit_relying_on_absence() {
    for (ending, holds) in [("COMMIT", false), ("ROLLBACK", true)] {
        let schema = Schema::new();
        let store = schema.store().await;
        let mut first = schema.connection().await;
        sqlx::raw_sql("BEGIN").execute(&mut first).await.unwrap();
        // Creates `b` because `a` does not exist.
        let sql =
            "SELECT positions IS NOT NULL FROM annals.append('{}', '{}', '{}', '{c,c}', '{a,b}', '{0,NULL}', '{f,f}',
                   '{0,1}', '{NULL,{}}'::text[], '{NULL,NULL}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}')";
        let sql = sql.replace("'{NULL,{}}'::text[]", "ARRAY[NULL, '{}']");
        let query = sqlx::query_scalar::<_, bool>(schema.sql(&sql));
        assert!(query.fetch_one(&mut first).await.unwrap(), "nothing is in its way");
        let second = {
            let store = store.clone();
            let put = |id: &str, expected, body: Option<&str>| Put {
                key: DocumentKey::new("c", id),
                expected,
                body: body.map(Into::into),
                due: None,
            };
            let commit =
                Commit { appends: Vec::new(), puts: vec![put("a", None, Some("{}")), put("b", Some(0), None)] };
            tokio::spawn(async move { store.commit(commit).await })
        };
        let mut observer = schema.connection().await;
        let waits = "SELECT EXISTS (SELECT FROM pg_locks AS w JOIN pg_locks AS l ON l.pid = w.pid
                                     WHERE NOT w.granted AND w.locktype = 'transactionid'
                                       AND l.relation = 'annals.documents'::regclass)";
        let observed = async {
            while !sqlx::query_scalar::<_, bool>(schema.sql(waits)).fetch_one(&mut observer).await.unwrap() {
                assert!(!second.is_finished(), "the commit must wait");
            }
        };
        timeout(PROMPTLY, observed).await.expect("the other one must be waited for");
        sqlx::raw_sql(ending).execute(&mut first).await.unwrap();
        match second.await.unwrap() {
            Ok(_) => assert!(holds, "the commit relied on the absence of an existing document"),
            Err(CommitError::DocumentConflict { key, actual, .. }) => {
                assert_eq!((&*key.id, actual, holds), ("b", 1, false));
            }
            Err(other) => panic!("{other}"),
        }
        first.close().await.unwrap();
    }
}
