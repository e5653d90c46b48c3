//! A replay returns the same events as reading the log, in constant memory, and cleans up when it is dropped.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{collections::BTreeMap, sync::Arc};

use annals::{Event, EventStore, LogQuery, Position, Recorded, Version};
use annals_postgres::{PostgresStore, Replay, ReplayError};
use annals_tests::tally::eventually;
use chrono::{DateTime, Utc};
use futures::{Stream, StreamExt, TryStreamExt};
use sqlx::PgConnection;
use tokio::time::timeout;

use self::postgres::{PROMPTLY, Schema, append, url};

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "number", unknown = "skip")]
enum NumberEvent {
    Drawn { n: i64 },
}

struct Bed {
    schema: Schema,
    store: PostgresStore,
}

impl Bed {
    async fn new() -> Self {
        let schema = Schema::new();
        let separator = if url().contains('?') { '&' } else { '?' };
        let named = format!("{}{separator}application_name={}", url(), schema.name());
        let store = PostgresStore::connect(&named, schema.settings()).await.unwrap();
        Self { schema, store }
    }

    /// Writes this many events to a hundred streams, each event padded with this many bytes.
    async fn fill(&self, events: i64, bytes: i32) {
        let sql = "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data, metadata)
            SELECT 'number-' || n % 100, 1 + n / 100, gen_random_uuid(), 'number.drawn', 1,
                   json_build_object('n', n, 'ballast', repeat('x', $2)), '{}'
              FROM generate_series(0, $1 - 1) AS n ORDER BY n";
        sqlx::query(self.schema.sql(sql))
            .bind(events)
            .bind(bytes)
            .execute(&mut self.schema.connection().await)
            .await
            .unwrap();
    }

    /// Reads through the store's trait, page by page.
    async fn read(&self, query: &LogQuery) -> Vec<Recorded> {
        let mut all = Vec::new();
        let mut after = Position::START;
        loop {
            let page = self.store.read_log(query, after, 1_000).await.unwrap();
            if page.next == after {
                return all;
            }
            after = page.next;
            all.extend(page.events.into_iter().map(Arc::unwrap_or_clone));
        }
    }

    async fn replayed(&self, replay: Replay) -> Vec<Recorded> {
        self.store.replay(replay).try_collect().await.unwrap()
    }

    /// Counts the sessions of this store that match a condition.
    async fn sessions(&self, which: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND {which}");
        let count = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).bind(self.schema.name());
        count.fetch_one(&mut self.schema.connection().await).await.unwrap()
    }
}

async fn execute(connection: &mut PgConnection, sql: sqlx::AssertSqlSafe<String>) {
    sqlx::raw_sql(sql).execute(connection).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_returns_the_same_events_as_the_log() {
    let bed = Bed::new().await;
    assert_eq!(bed.replayed(Replay::all()).await, []);
    // More events than fit into a page, or into a batch of any kind.
    bed.fill(45_000, 10).await;
    for (number, type_name) in ["it's", "100%", r"back\slash\", "naïve 🦀", "{after}"].into_iter().enumerate() {
        let mut commit = append(&format!("odd-{number}"), 0, 400);
        commit.appends[0].events.iter_mut().for_each(|event| event.type_name = type_name.into());
        bed.store.commit(commit).await.unwrap();
    }
    let mut by_hand = bed.schema.connection().await;
    // Inserts events with dates beyond the range that the library supports, and leaves gaps.
    execute(
        &mut by_hand,
        bed.schema.sql(
            "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
             VALUES ('odd-times', 1, gen_random_uuid(), '', 1, '1e400', '[]', 'infinity'),
                    ('odd-times', 2, gen_random_uuid(), '', 1, '1', '[]', '4714-11-24 00:00:00 BC');
             SELECT setval('annals.events_position', 60000)",
        ),
    )
    .await;
    bed.store.commit(append("last-1", 0, 3)).await.unwrap();

    let all = bed.read(&LogQuery::all()).await;
    assert_eq!(all.len(), 45_000 + 5 * 400 + 2 + 3);
    assert_eq!(bed.replayed(Replay::all()).await, all);

    let of_categories = |names: &[&str]| Replay::all().categories(names.iter().copied());
    for names in [&["odd"][..], &["last", "number"], &["none"], &["nul\0"], &["odd", "nul\0"]] {
        let query = LogQuery::categories(names.iter().copied());
        let expected: Vec<_> = all.iter().filter(|event| query.matches(event)).cloned().collect();
        assert_eq!(bed.replayed(of_categories(names)).await, expected, "{names:?}");
    }
    for types in
        [&["it's"][..], &["100%", r"back\slash\"], &["naïve 🦀", "number.drawn"], &["{after}"], &[""], &["odd"]]
    {
        let query = LogQuery::types(types.iter().copied());
        let expected: Vec<_> = all.iter().filter(|event| query.matches(event)).cloned().collect();
        let replay = Replay::all().types(types.iter().copied());
        assert_eq!(bed.replayed(replay.clone()).await, expected, "{types:?}");
        let odd: Vec<_> = expected.iter().filter(|event| event.stream.category() == "odd").cloned().collect();
        assert_eq!(bed.replayed(replay.categories(["odd"])).await, odd, "{types:?}");
    }
    let between = |from: i64, until: i64| {
        let within = all.iter().filter(|event| (from..=until).contains(&event.position.0));
        within.cloned().collect::<Vec<_>>()
    };
    for (from, until) in [(1, 1), (19_999, 20_002), (44_000, 60_002), (60_003, i64::MAX), (i64::MIN, 3), (9, 8)] {
        let first = Position(from);
        let last = Position(until);
        assert_eq!(bed.replayed(Replay::all().positions(first..=last)).await, between(from, until));
        let open = Replay::all().positions(first..last);
        assert_eq!(bed.replayed(open).await, between(from, until.saturating_sub(1)));
    }
    let time = all[46_000].recorded_at;
    let ever = [DateTime::<Utc>::MIN_UTC, all[0].recorded_at, time, Utc::now(), DateTime::<Utc>::MAX_UTC];
    for (from, until) in ever.iter().flat_map(|from| ever.iter().map(move |until| (*from, *until))) {
        // PostgreSQL's `infinity` is read as the end of time, which lies after every bound.
        let within = |event: &&Recorded| event.recorded_at >= from && event.recorded_at < until;
        let expected: Vec<_> = all.iter().filter(within).cloned().collect();
        assert_eq!(bed.replayed(Replay::all().recorded(from..until)).await.len(), expected.len(), "{from} {until}");
    }
    let since = bed.replayed(Replay::all().recorded(time..).positions(..Position(60_000))).await;
    assert!(since.iter().all(|event| event.recorded_at >= time) && since.contains(&all[46_000]));
}

/// Replay never passes a position that a transaction may still fill.
#[tokio::test(flavor = "multi_thread")]
async fn replay_stops_at_the_end_of_the_readable_log() {
    let bed = Bed::new().await;
    let insert = "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data)
                  VALUES ('slow-1', 1, gen_random_uuid(), 'thing.happened', 1, '{}')";
    bed.store.commit(append("before-1", 0, 2)).await.unwrap();
    let mut slow = bed.schema.connection().await;
    sqlx::raw_sql("BEGIN").execute(&mut slow).await.unwrap();
    execute(&mut slow, bed.schema.sql(insert)).await;
    bed.store.commit(append("after-1", 0, 2)).await.unwrap();
    let everything = [Replay::all(), Replay::all().types(["thing.happened"]), Replay::all().recorded(..Utc::now())];
    for replay in everything.clone() {
        let replayed = bed.replayed(replay).await;
        assert_eq!(replayed.len(), 2);
    }
    sqlx::raw_sql("COMMIT").execute(&mut slow).await.unwrap();
    for replay in everything {
        let replayed = bed.replayed(replay.clone()).await;
        assert_eq!(replayed.iter().map(|event| event.position.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5], "{replay:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn typed_replay_keeps_order_past_an_undecodable_event() {
    const EVENTS: i64 = 50_000;
    let bed = Bed::new().await;
    bed.fill(EVENTS, 10).await;
    let mut commit = append("number-bad", 0, 2);
    for (event, type_name) in commit.appends[0].events.iter_mut().zip(["number.drawn", "number.unknown"]) {
        (event.type_name, event.data) = (type_name.into(), r#"{"n":"many"}"#.into());
    }
    bed.store.commit(commit).await.unwrap();
    bed.fill_more(EVENTS).await;
    let mut replayed = bed.store.replay_as::<NumberEvent>(Replay::all());
    let mut count = 0;
    let mut errors = Vec::new();
    let mut streams = BTreeMap::new();
    while let Some(event) = replayed.next().await {
        match event {
            Ok(event) => {
                assert_eq!(event.event, NumberEvent::Drawn { n: count });
                let last = streams.entry(event.stream.to_string()).or_insert(Version::START);
                assert_eq!(event.version, last.next());
                *last = event.version;
                count += 1;
            }
            Err(ReplayError::Undecodable(error)) => errors.push((error.position.0, error.to_string())),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(count, EVENTS + 100);
    assert_eq!(errors.len(), 1);
    assert!(errors[0].0 == EVENTS + 1 && errors[0].1.contains("event 1 of stream number-bad"), "{errors:?}");
}

impl Bed {
    /// Adds one event to each stream.
    async fn fill_more(&self, from: i64) {
        let sql = "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data)
            SELECT 'number-' || n % 100, 1 + n / 100, gen_random_uuid(), 'number.drawn', 1, json_build_object('n', n)
              FROM generate_series($1, $1 + 99) AS n ORDER BY n";
        sqlx::query(self.schema.sql(sql)).bind(from).execute(&mut self.schema.connection().await).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_replay_leaves_no_query() {
    let bed = Bed::new().await;
    bed.fill(100_000, 500).await;
    for taken in [0, 1, 700, 30_000] {
        let types = Replay::all().types(["number.drawn"]);
        for replay in [Replay::all(), types] {
            let mut replayed = bed.store.replay(replay);
            for _ in 0..taken {
                replayed.try_next().await.unwrap().unwrap();
            }
            if taken > 0 {
                assert_eq!(bed.sessions("query LIKE '%COPY%'").await, 1);
            }
            drop(replayed);
            eventually("the session of the replay has ended", async || {
                (bed.sessions("query LIKE '%COPY%'").await == 0).then_some(())
            })
            .await;
        }
    }
    // The store still has all its sessions for reads.
    assert_eq!(bed.read(&LogQuery::all()).await.len(), 100_000);
}

async fn rest(replayed: &mut (impl Stream<Item = Result<Recorded, annals::StoreError>> + Unpin)) -> Vec<i64> {
    let positions = replayed.map_ok(|event| event.position.0).try_collect();
    timeout(PROMPTLY, positions).await.expect("the rest comes").unwrap()
}

/// A consumer that receives an event and then pauses must not keep a snapshot open on the server.
#[tokio::test(flavor = "multi_thread")]
async fn slow_replay_keeps_no_transaction_open() {
    let bed = Bed::new().await;
    bed.fill(60_000, 500).await;
    let mut replayed = bed.store.replay(Replay::all());
    replayed.try_next().await.unwrap().unwrap();
    assert_eq!(bed.sessions("xact_start IS NOT NULL").await, 1);
    eventually("the replay ends early", async || (bed.sessions("xact_start IS NOT NULL").await == 0).then_some(()))
        .await;
    assert_eq!(rest(&mut replayed).await, Vec::from_iter(2..=60_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_connection_loses_no_replayed_event() {
    let bed = Bed::new().await;
    // There are more events than the replay can read ahead before the test cuts the last connection.
    bed.fill(120_000, 500).await;
    let mut replayed = bed.store.replay(Replay::all());
    let mut taken = 0;
    let mut killer = bed.schema.connection().await;
    let mut killed = 0;
    for _ in 0..5 {
        for _ in 0..9_000 {
            taken += 1;
            assert_eq!(replayed.try_next().await.unwrap().unwrap().position.0, taken);
        }
        let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                     WHERE application_name = $1 AND query ILIKE '%COPY%'";
        killed += sqlx::query_scalar::<_, i64>(kill).bind(bed.schema.name()).fetch_one(&mut killer).await.unwrap();
    }
    // Between two pages, the replay holds no session.
    assert!(killed > 0, "no session was ended under it");
    assert_eq!(rest(&mut replayed).await, Vec::from_iter(taken + 1..=120_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_store_replays_nothing() {
    let bed = Bed::new().await;
    bed.fill(10, 10).await;
    bed.store.close().await.unwrap();
    let mut replayed = bed.store.replay(Replay::all());
    replayed.try_next().await.unwrap_err();
    assert!(replayed.try_next().await.unwrap().is_none());
}
