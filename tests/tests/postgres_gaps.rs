//! Reads the log while some positions have been assigned but are not yet, or never, committed.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annals::{EventStore, LogQuery, Position, Recorded};
use annals_postgres::PostgresStore;
use sqlx::{Connection, PgConnection};
use tokio::{task::JoinSet, time::timeout};
use uuid::Uuid;

use self::postgres::{PROMPTLY, Schema, append, numbers, readable_log, whole_log};

/// Appends through the same SQL function that the store uses.
async fn append_within(connection: &mut PgConnection, schema: &Schema, stream: &str) -> i64 {
    let sql = "SELECT positions[1] FROM annals.append(
        ARRAY[$1], ARRAY[NULL]::bigint[], '{f}', '{}', '{}', '{}', '{}', '{}', '{}', '{}',
        '{1}', '{1}', ARRAY[$1], '{1}', ARRAY[gen_random_uuid()], '{thing.happened}', '{1}', '{1}', '{\"{}\"}')";
    sqlx::query_scalar(schema.sql(sql)).bind(stream).fetch_one(connection).await.unwrap()
}

async fn execute(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(connection).await.unwrap();
}

/// Reads from the beginning until a read returns nothing more. A single read is not enough, because the store may need
/// one read to learn which writers are active.
async fn streams(store: &PostgresStore) -> Vec<String> {
    readable_log(store).await.iter().map(|event| event.stream.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_wait_for_a_slower_writer() {
    for ending in ["COMMIT", "ROLLBACK"] {
        let schema = Schema::new();
        let store = schema.store().await;
        let other = schema.store().await;
        store.commit(append("before-1", 0, 1)).await.unwrap();
        let mut slow = schema.connection().await;
        execute(&mut slow, "BEGIN").await;
        append_within(&mut slow, &schema, "slow-1").await;
        for _ in 0..2 {
            other.commit(append(&format!("after-{}", Uuid::new_v4()), 0, 2)).await.unwrap();
        }

        for query in [LogQuery::all(), LogQuery::types(["thing.happened"])] {
            let page = store.read_log(&query, Position::START, 100).await.unwrap();
            assert_eq!((page.events.len(), page.next), (1, Position(1)));
            let page = store.read_log(&query, page.next, 100).await.unwrap();
            assert_eq!((page.events.len(), page.next), (0, Position(1)));
        }
        let status = store.status().await.unwrap();
        assert_eq!(status.head, Position(1));
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut slow).await.unwrap();
        let writer = status.waits_for.unwrap();
        assert!(writer.pid == Some(pid) && writer.to_string().contains(&format!("pid {pid} ")), "{writer:?}");
        let waiting = store.wait(Position(1));
        assert!(timeout(Duration::from_millis(300), waiting).await.is_err(), "there is nothing to read yet");

        execute(&mut slow, ending).await;
        timeout(PROMPTLY, store.wait(Position(1))).await.expect("the gap is settled").unwrap();
        let found = streams(&store).await;
        assert_eq!(found.len(), if ending == "COMMIT" { 6 } else { 5 });
        assert_eq!(found[1] == "slow-1", ending == "COMMIT");
        let status = store.status().await.unwrap();
        assert_eq!((status.head, status.waits_for), (Position(6), None));
    }
}

/// A transaction is still in flight after its session has prepared it for `COMMIT PREPARED`.
#[tokio::test(flavor = "multi_thread")]
async fn readers_wait_for_a_prepared_writer() {
    let schema = Schema::new();
    let store = schema.store().await;
    let mut slow = schema.connection().await;
    execute(&mut slow, "BEGIN").await;
    append_within(&mut slow, &schema, "slow-1").await;
    store.commit(append("after-1", 0, 1)).await.unwrap();
    // The reader sees the writer before that writer's transaction is prepared, and reads again afterwards.
    assert!(streams(&store).await.is_empty());
    let id = schema.prepared();
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("PREPARE TRANSACTION '{id}'")))
        .execute(&mut slow)
        .await
        .expect("the server must take prepared transactions; `./test` starts one that does");
    slow.close().await.unwrap();
    assert!(streams(&store).await.is_empty());
    assert!(streams(&schema.store().await).await.is_empty());
    let writer = store.status().await.unwrap().waits_for.unwrap();
    assert!(writer.pid.is_none() && writer.to_string().contains(&id), "{writer:?}");
    execute(&mut schema.connection().await, &format!("COMMIT PREPARED '{id}'")).await;
    assert_eq!(streams(&store).await, ["slow-1", "after-1"]);
}

/// Rolling back to a savepoint uses up positions and releases the locks taken since the savepoint.
#[tokio::test(flavor = "multi_thread")]
async fn rolled_back_savepoints_burn_positions() {
    let schema = Schema::new();
    let store = schema.store().await;
    let mut slow = schema.connection().await;
    execute(&mut slow, "BEGIN; SAVEPOINT one").await;
    append_within(&mut slow, &schema, "burnt-1").await;
    execute(&mut slow, "ROLLBACK TO one").await;
    store.commit(append("first-1", 0, 1)).await.unwrap();
    assert_eq!(streams(&store).await, ["first-1"]);
    execute(&mut slow, "SAVEPOINT two").await;
    append_within(&mut slow, &schema, "second-1").await;
    execute(&mut slow, "RELEASE two").await;
    store.commit(append("third-1", 0, 1)).await.unwrap();
    assert_eq!(streams(&store).await, ["first-1"]);
    execute(&mut slow, "COMMIT").await;
    assert_eq!(streams(&store).await, ["first-1", "second-1", "third-1"]);
}

/// The test runs slow writers, some of which roll back, a session that is idle in a transaction, and a prepared
/// transaction in another session.
#[tokio::test(flavor = "multi_thread")]
async fn a_tailing_reader_sees_every_committed_event_once_and_in_order() {
    const WRITERS: usize = 24;
    const ROUNDS: usize = 60;
    let schema = Schema::new();
    let reading = schema.store().await;
    let writing = schema.store().await;
    let mut elsewhere = schema.connection().await;
    let bystander = schema.prepared();
    execute(&mut elsewhere, &schema.sql("CREATE TABLE annals.elsewhere (number int)").0).await;
    execute(&mut elsewhere, &schema.sql("BEGIN; INSERT INTO annals.elsewhere VALUES (1)").0).await;
    execute(&mut elsewhere, &format!("PREPARE TRANSACTION '{bystander}'")).await;
    execute(&mut elsewhere, &schema.sql("BEGIN; INSERT INTO annals.elsewhere VALUES (2)").0).await;

    let done = Arc::new(AtomicBool::new(false));
    let tail = {
        let done = done.clone();
        tokio::spawn(async move {
            let mut seen = Vec::<Arc<Recorded>>::new();
            let mut after = Position::START;
            loop {
                let ends = done.load(Ordering::SeqCst);
                let page = reading.read_log(&LogQuery::all(), after, 37).await.unwrap();
                if page.next == after {
                    if ends && reading.status().await.unwrap().head == after {
                        return seen;
                    }
                    timeout(Duration::from_millis(100), reading.wait(after)).await.ok();
                }
                after = page.next;
                seen.extend(page.events);
            }
        })
    };
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let schema = schema.clone();
        let writing = writing.clone();
        writers.spawn(async move {
            let mut connection = schema.connection().await;
            for round in 0..ROUNDS {
                if round % 4 == 0 {
                    writing.commit(append(&format!("stored-{writer}"), round as i64 / 4, 1)).await.unwrap();
                }
                execute(&mut connection, "BEGIN").await;
                append_within(&mut connection, &schema, &format!("slow-{writer}")).await;
                // Makes each commit slow.
                let pause = format!("SELECT pg_sleep({})", pause_seconds(writer, round));
                execute(&mut connection, &pause).await;
                match (writer + round) % 10 {
                    0 => execute(&mut connection, "ROLLBACK").await,
                    5 => {
                        let id = schema.prepared();
                        execute(&mut connection, &format!("PREPARE TRANSACTION '{id}'")).await;
                        execute(&mut connection, &format!("COMMIT PREPARED '{id}'")).await;
                    }
                    _ => execute(&mut connection, "COMMIT").await,
                }
            }
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    done.store(true, Ordering::SeqCst);
    let seen = timeout(PROMPTLY * 6, tail).await.expect("the reader must get to the end").unwrap();
    let seen: Vec<i64> = seen.iter().map(|event| event.position.0).collect();
    let held: Vec<i64> = sqlx::query_scalar(schema.sql("SELECT position FROM annals.events ORDER BY position"))
        .fetch_all(&mut schema.connection().await)
        .await
        .unwrap();
    assert_eq!(held.len(), WRITERS * (ROUNDS * 9 / 10 + ROUNDS / 4));
    assert!(held.last().unwrap() > &(held.len() as i64), "some positions must have been skipped");
    assert_eq!(seen, held);
    execute(&mut elsewhere, "ROLLBACK").await;
    execute(&mut elsewhere, &format!("ROLLBACK PREPARED '{bystander}'")).await;
}

/// Returns a pause of up to 12 ms. The pause differs between writers and rounds, but is the same on each run.
fn pause_seconds(writer: usize, round: usize) -> f64 {
    ((writer * 31 + round * 17) % 13) as f64 / 1_000.0
}

/// A row that was inserted by hand beyond the sequence belongs to the log only once the sequence reaches its position.
#[tokio::test(flavor = "multi_thread")]
async fn event_inserted_at_the_last_position_blocks_no_writer() {
    let schema = Schema::new();
    let store = schema.store().await;
    store.commit(append("before-1", 0, 2)).await.unwrap();
    let sql =
        "INSERT INTO annals.events (position, stream_id, version, event_id, type, schema_version, data, recorded_at)
               VALUES (9223372036854775807, 'hand-1', 1, gen_random_uuid(), 'by.hand', 1, '{}', 'infinity')";
    sqlx::query(schema.sql(sql)).execute(&mut schema.connection().await).await.unwrap();
    store.commit(append("after-1", 0, 2)).await.unwrap();
    for store in [store, schema.store().await] {
        assert_eq!(streams(&store).await, ["before-1", "before-1", "after-1", "after-1"]);
        assert_eq!(store.status().await.unwrap().head, Position(4));
        assert!(timeout(Duration::from_millis(200), store.wait(Position(4))).await.is_err());
        let name = annals::StreamId::from_stored("hand-1");
        assert_eq!(store.read_stream(&name, annals::Version::START, 10).await.unwrap().len(), 1);
    }
    let store = schema.store().await;
    let committed = store.commit(append("last-1", 0, 1)).await.unwrap();
    assert_eq!(committed.position, Position(5));
    assert_eq!(numbers(&whole_log(&store).await), [1, 2, 3, 4, 5]);
}

/// After a restore of the tables alone, the sequence is lower than the last position in the table. Opening the store
/// and writing to it both detect and repair this state.
#[tokio::test(flavor = "multi_thread")]
async fn sequence_that_is_behind_is_advanced() {
    let schema = Schema::new();
    let store = schema.store().await;
    store.commit(append("a-1", 0, 500)).await.unwrap();
    let back = || async {
        let sql = schema.sql("SELECT setval('annals.events_position', 7)");
        sqlx::query(sql).execute(&mut schema.connection().await).await.unwrap();
    };
    back().await;
    assert_eq!(store.commit(append("b-1", 0, 1)).await.unwrap().versions.len(), 1);
    back().await;
    let store = schema.store().await;
    store.commit(append("c-1", 0, 1)).await.unwrap();
    let log = whole_log(&store).await;
    assert_eq!(log.len(), 502);
    assert_eq!(log[500].stream.as_str(), "b-1");
    assert_eq!(log[501].stream.as_str(), "c-1");
}

/// The reader relies on the rule that a writer waiting for the lock has not yet drawn a position. The store follows
/// this rule, and so does a manual INSERT that takes its position from the column default.
#[tokio::test(flavor = "multi_thread")]
async fn positions_are_drawn_under_the_lock() {
    let schema = Schema::new();
    let store = schema.store().await;
    store.commit(append("before-1", 0, 1)).await.unwrap();
    let mut observer = schema.connection().await;
    for by_hand in [false, true] {
        let mut holder = schema.connection().await;
        execute(&mut holder, &schema.sql("BEGIN; LOCK TABLE annals.events IN SHARE MODE").0).await;
        let drawn = "SELECT annals.drawn()";
        let before: i64 = sqlx::query_scalar(schema.sql(drawn)).fetch_one(&mut observer).await.unwrap();
        let writer = store.clone();
        let of_writer = schema.clone();
        let writing = tokio::spawn(async move {
            if by_hand {
                let sql = "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data)
                           VALUES ('hand-1', 1, gen_random_uuid(), 'by.hand', 1, '{}')";
                sqlx::query(of_writer.sql(sql)).execute(&mut of_writer.connection().await).await.unwrap();
            } else {
                writer.commit(append("stored-1", 0, 1)).await.unwrap();
            }
        });
        let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'annals.events'::regclass)";
        let observed = async {
            while !sqlx::query_scalar::<_, bool>(schema.sql(waits)).fetch_one(&mut observer).await.unwrap() {
                tokio::task::yield_now().await;
            }
        };
        timeout(PROMPTLY, observed).await.expect("the writer must wait for the lock");
        let now: i64 = sqlx::query_scalar(schema.sql(drawn)).fetch_one(&mut observer).await.unwrap();
        assert_eq!(now, before, "a position was drawn without the lock (by hand: {by_hand})");
        execute(&mut holder, "COMMIT").await;
        writing.await.unwrap();
    }
    assert_eq!(whole_log(&store).await.len(), 3);
}

/// Two processes draw positions from one sequence at the same time. If a commit's events do not have consecutive
/// positions, the commit must not report consecutive positions.
#[tokio::test(flavor = "multi_thread")]
async fn commit_reports_one_run_only_for_consecutive_positions() {
    const EVENTS: i64 = 400;
    const ROUNDS: i64 = 40;
    let schema = Schema::new();
    let mut writers = JoinSet::new();
    for writer in 0..4 {
        let store = schema.store().await;
        writers.spawn(async move {
            let name = format!("run-{writer}");
            let mut notified = Vec::new();
            let mut silent = 0;
            for round in 0..ROUNDS {
                let committed = store.commit(append(&name, round * EVENTS, EVENTS as usize)).await.unwrap();
                match committed.recorded_at {
                    Some(_) => notified.push(committed.position.0),
                    None => silent += 1,
                }
            }
            (name, notified, silent)
        });
    }
    let mut one_run = 0;
    let mut interleaved = 0;
    let mut outside = schema.connection().await;
    for (name, notified, silent) in writers.join_all().await {
        one_run += notified.len();
        interleaved += silent;
        for last in notified {
            let sql =
                "SELECT count(*) FROM annals.events WHERE position > $1 - $2 AND position <= $1 AND stream_id = $3";
            let of_stream: i64 = sqlx::query_scalar(schema.sql(sql))
                .bind(last)
                .bind(EVENTS)
                .bind(&name)
                .fetch_one(&mut outside)
                .await
                .unwrap();
            assert_eq!(of_stream, EVENTS, "{name} up to {last}");
        }
    }
    assert!(one_run > 0 && interleaved > 0, "{one_run} runs, {interleaved} others: this tested nothing");
}
