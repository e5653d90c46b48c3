//! A user's SQL runs in the transaction that moves the checkpoint, while sessions are terminated, tasks are dropped and
//! answers are lost.
#![allow(clippy::unwrap_used)]

mod postgres;
mod sql_rows;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use annals::EventStore;
use annals_postgres::{PostgresStore, SqlStore};
use annals_tests::tally::eventually;
use sqlx::postgres::PgConnectOptions;
use tokio::{task::JoinSet, time::sleep};

use self::{
    postgres::{append, url},
    sql_rows::{Bed, Trouble},
};

#[tokio::test(flavor = "multi_thread")]
async fn ended_session_is_not_blamed_on_the_handler() {
    let bed = Bed::new().await;
    bed.trouble(2, Trouble::KillOnce);
    bed.add("a", 1..=3).await;
    let running = bed.start(1);
    bed.exactly_once(3).await;
    assert_eq!(bed.letters().await, []);
    running.stop().await;
}

/// Terminates all sessions again and again, at any point: within a handler, between two messages, or within the commit.
#[tokio::test(flavor = "multi_thread")]
async fn ended_sessions_lose_and_duplicate_nothing() {
    const KEYS: usize = 8;
    const KILLS: usize = 60;
    for lanes in [1, 3] {
        let mut bed = Bed::new().await;
        bed.rows.micros_max = 700;
        let watch = (lanes == 1).then(|| bed.watch());
        let running = bed.start(lanes);
        let mut killer = bed.schema.connection().await;
        let mut killed = 0;
        let mut added = 0;
        for kill in 0..KILLS {
            let mut writers = JoinSet::new();
            let other = bed.schema.store().await;
            for key in 0..KEYS {
                let other = other.clone();
                let before = added / KEYS as i64;
                let mut commit = append(&format!("tally-{key}"), before, 3);
                for (event, amount) in commit.appends[0].events.iter_mut().zip(before..) {
                    (event.type_name, event.data) = ("tally.added".into(), format!(r#"{{"amount":{amount}}}"#));
                }
                writers.spawn(async move { other.commit(commit).await.unwrap() });
            }
            writers.join_all().await;
            other.close().await.unwrap();
            added += 3 * KEYS as i64;
            sleep(Duration::from_millis(kill as u64 % 7 * 3)).await;
            let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                        WHERE application_name = $1 AND xact_start IS NOT NULL";
            let ended: i64 = sqlx::query_scalar(sql).bind(bed.schema.name()).fetch_one(&mut killer).await.unwrap();
            killed += ended;
        }
        bed.exactly_once(added).await;
        assert_eq!(bed.letters().await, []);
        assert!(killed > 5, "{killed} sessions ended: this tested nothing");
        if let Some(watch) = watch {
            assert!(!watch.is_finished(), "{:?}", watch.await);
            watch.abort();
        }
        running.stop().await;
        bed.nothing_is_open().await;
    }
}

/// Drops the tasks of the subscription at any point of their work, as if the process had died.
#[tokio::test(flavor = "multi_thread")]
async fn dropped_tasks_lose_and_duplicate_nothing() {
    let mut bed = Bed::new().await;
    bed.rows.micros_max = 2_000;
    let watch = bed.watch();
    let mut amidst = 0;
    for life in 0..40 {
        bed.add("a", life * 10..life * 10 + 10).await;
        let running = bed.start(1);
        sleep(Duration::from_micros(life.unsigned_abs() * 3_571 % 30_000)).await;
        amidst += bed.open_transactions().await;
        running.kill().await;
        bed.nothing_is_open().await;
    }
    assert!(amidst > 5, "only {amidst} transactions were open: this tested nothing");
    let running = bed.start(1);
    bed.exactly_once(400).await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    running.stop().await;
}

/// The session ends during the `COMMIT` of its transaction. The transaction did not commit, but the store cannot know
/// that.
#[tokio::test(flavor = "multi_thread")]
async fn session_that_ends_during_its_commit_is_resolved() {
    let bed = Bed::new().await;
    let trap = "CREATE SEQUENCE annals.traps;
        CREATE FUNCTION annals.trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('annals.traps') <= 2 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER trap AFTER INSERT ON annals.seen DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION annals.trap()";
    sqlx::raw_sql(bed.schema.sql(trap)).execute(&mut bed.schema.connection().await).await.unwrap();
    let watch = bed.watch();
    bed.add("a", 1..=5).await;
    let running = bed.start(1);
    bed.exactly_once(5).await;
    let traps = bed.schema.sql("SELECT last_value FROM annals.traps");
    let traps: i64 = sqlx::query_scalar(traps).fetch_one(&mut bed.schema.connection().await).await.unwrap();
    assert!(traps > 2, "this tested nothing");
    assert_eq!(bed.letters().await, []);
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    running.stop().await;
}

/// Forwards all bytes, but cuts this many connections after their `COMMIT`: the server commits, and its answer is lost.
fn deaf_to_commits(server: String, cuts: Arc<AtomicU64>) -> std::net::SocketAddr {
    const COMMIT: &[u8] = b"Q\0\0\0\x0bCOMMIT\0";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            let server = TcpStream::connect(&server).unwrap();
            let mut answers = server.try_clone().unwrap();
            let mut back = client.try_clone().unwrap();
            std::thread::spawn(move || {
                std::io::copy(&mut answers, &mut back).ok();
                back.shutdown(Shutdown::Both).ok();
            });
            let mut client = client;
            let mut server = server;
            let cuts = cuts.clone();
            std::thread::spawn(move || {
                let mut bytes = vec![0; 1 << 16];
                while let Some(count) = client.read(&mut bytes).ok().filter(|count| *count > 0) {
                    let one_less = |cuts: u64| cuts.checked_sub(1);
                    let cut = bytes[..count] == *COMMIT
                        && cuts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok();
                    if cut {
                        client.shutdown(Shutdown::Both).ok();
                    }
                    if server.write_all(&bytes[..count]).is_err() || cut {
                        break;
                    }
                }
                server.shutdown(Shutdown::Write).ok();
            });
        }
    });
    address
}

/// The commit succeeds, but its answer is lost.
#[tokio::test(flavor = "multi_thread")]
async fn commit_with_a_lost_answer_is_resolved() {
    const CUTS: u64 = 3;
    let mut bed = Bed::new().await;
    let direct: PgConnectOptions = url().parse().unwrap();
    let server = format!("{}:{}", direct.get_host(), direct.get_port());
    let cuts = Arc::new(AtomicU64::new(0));
    let through = url().replacen(&server, &deaf_to_commits(server.clone(), cuts.clone()).to_string(), 1);
    assert_ne!(through, url(), "the URL of the server names host and port");
    let store = PostgresStore::connect(&through, bed.schema.settings()).await.unwrap();
    // Sets the number of cuts only now, because opening a store ends with a commit too.
    cuts.store(CUTS, Ordering::SeqCst);
    bed.store = SqlStore::new(store);
    let watch = bed.watch();
    let running = bed.start(1);
    bed.add("a", 1..=3).await;
    eventually("the session was ended that often", async || {
        bed.add("b", [1]).await;
        (cuts.load(Ordering::SeqCst) == 0).then_some(())
    })
    .await;
    bed.add("c", [1]).await;
    let count: i64 = sqlx::query_scalar(bed.schema.sql("SELECT count(*) FROM annals.events"))
        .fetch_one(&mut bed.schema.connection().await)
        .await
        .unwrap();
    bed.exactly_once(count).await;
    assert_eq!(bed.letters().await, []);
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    running.stop().await;
}
