//! A replay needs no more memory for a longer log. This test is alone in its file, because it measures the whole
//! process.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::time::Duration;

use annals::Event;
use annals_postgres::Replay;
use futures::TryStreamExt;
use tokio::time::sleep;

use self::postgres::Schema;

#[derive(Event)]
#[event(prefix = "number")]
enum NumberEvent {
    Drawn { n: i64 },
}

/// Returns the resident memory of this process in kilobytes.
fn resident() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Replays 300 MB of events in a tenth of that amount of memory, even if the consumer is slower than the database.
#[tokio::test(flavor = "multi_thread")]
async fn replay_memory_does_not_grow_with_the_log() {
    const EVENTS: i64 = 300_000;
    const GROWTH_KB_MAX: i64 = 30_000;
    let schema = Schema::new();
    let store = schema.store().await;
    let fill = "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data)
        SELECT 'number-1', n, gen_random_uuid(), 'number.drawn', 1, json_build_object('n', n, 'ballast', repeat('x', 1000))
          FROM generate_series(1, $1) AS n";
    sqlx::query(schema.sql(fill)).bind(EVENTS).execute(&mut schema.connection().await).await.unwrap();
    let before = resident();
    let mut typed = 0;
    let mut untyped = 0;
    let mut replayed = store.replay_as::<NumberEvent>(Replay::all());
    while let Some(event) = replayed.try_next().await.unwrap() {
        typed += 1;
        let NumberEvent::Drawn { n } = event.event;
        assert_eq!(n, typed);
        if typed % 5_000 == 0 {
            assert!(resident() - before < GROWTH_KB_MAX, "{} kB more", resident() - before);
        }
    }
    let mut replayed = store.replay(Replay::all());
    while let Some(event) = replayed.try_next().await.unwrap() {
        untyped += 1;
        assert_eq!(event.position.0, untyped);
        if untyped % 5_000 == 0 {
            assert!(resident() - before < GROWTH_KB_MAX, "{} kB more", resident() - before);
            sleep(Duration::from_millis(5)).await;
        }
    }
    assert_eq!((typed, untyped), (EVENTS, EVENTS));
}
