//! Writers and readers that keep running, no matter what happens to the server. At the end, these tasks check that the
//! server kept every promise.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use annals::{CommitError, DocumentKey, EventStore, LogQuery, Position, Put, StoreError};
use annals_postgres::{PostgresStore, Settings};
use sqlx::PgConnection;
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::timeout,
};

use super::append;

/// The longest time that the server may take to recover from any fault.
const RECOVERY: Duration = Duration::from_secs(180);
/// After this many pages, a new reader that knows only the position replaces the old reader.
const PAGES_UNTIL_RESTART: usize = 40;

pub struct Load {
    stop: watch::Sender<bool>,
    /// Signals that the last writer has ended.
    written: watch::Sender<bool>,
    writers: JoinSet<Promise>,
    readers: Vec<JoinHandle<Vec<i64>>>,
    acknowledged: Arc<AtomicU64>,
}

/// The state that one writer knows to be stored: its stream has `standing` versions, and its document has half as many
/// versions.
struct Promise {
    name: String,
    standing: i64,
    unknown: u64,
    unavailable: u64,
}

/// The result of a load.
#[derive(Debug)]
pub struct Summary {
    pub acknowledged: u64,
    /// Commits that were sent again because their outcome was unknown.
    pub unknown: u64,
    pub unavailable: u64,
}

impl Load {
    /// Starts a load on a store. One reader uses that store; another reader opens a new store at the URL again and
    /// again.
    pub fn start(store: &PostgresStore, url: &str, settings: &Settings, writers: usize) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (written, all_written) = watch::channel(false);
        let acknowledged = Arc::<AtomicU64>::default();
        let writers = (0..writers)
            .map(|number| write(store.clone(), format!("load-{number}"), stopped.clone(), acknowledged.clone()))
            .collect();
        let readers = vec![
            tokio::spawn(follow(Some(store.clone()), url.to_owned(), settings.clone(), all_written.clone())),
            tokio::spawn(follow(None, url.to_owned(), settings.clone(), all_written)),
        ];
        Self { stop, written, writers, readers, acknowledged }
    }

    /// Waits until this many more commits have been acknowledged.
    pub async fn goes_on(&self, more: u64) {
        let wanted = self.acknowledged.load(Ordering::SeqCst) + more;
        let reached = async {
            while self.acknowledged.load(Ordering::SeqCst) < wanted {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(RECOVERY, reached).await.expect("commits must be acknowledged again");
    }

    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Stops the load, and compares the knowledge of each task with what plain SQL finds. `sql` inserts the name of the
    /// schema.
    pub async fn ends_well(
        self,
        outside: &mut PgConnection,
        sql: impl Fn(&str) -> sqlx::AssertSqlSafe<String>,
    ) -> Summary {
        self.stop.send_replace(true);
        let promises = timeout(RECOVERY, self.writers.join_all()).await.expect("every outcome must become known");
        self.written.send_replace(true);
        let mut summary =
            Summary { acknowledged: self.acknowledged.load(Ordering::SeqCst), unknown: 0, unavailable: 0 };
        for Promise { name, standing, unknown, unavailable } in promises {
            let query = "SELECT count(*), coalesce(max(version), 0), count(DISTINCT event_id),
                                (SELECT coalesce(max(version), 0) FROM annals.documents WHERE collection = 'load' AND id = $1)
                           FROM annals.events WHERE stream_id = $1";
            let found: (i64, i64, i64, i64) =
                sqlx::query_as(sql(query)).bind(&name).fetch_one(&mut *outside).await.unwrap();
            assert_eq!(found, (standing, standing, standing, standing / 2), "{name}: count, version, ids, document");
            summary.unknown += unknown;
            summary.unavailable += unavailable;
        }
        let held: Vec<i64> = sqlx::query_scalar(sql("SELECT position FROM annals.events ORDER BY position"))
            .fetch_all(outside)
            .await
            .unwrap();
        for reader in self.readers {
            let seen = timeout(RECOVERY, reader).await.expect("the reader must get to the end").unwrap();
            let missed = held.iter().filter(|position| seen.binary_search(position).is_err()).count();
            assert_eq!((missed, seen.len()), (0, held.len()), "events missed, events seen");
            assert!(seen == held, "events came twice or out of order");
        }
        summary
    }
}

/// Repeatedly writes two events and a counter. If the outcome of a commit is unknown, sends the same commit again.
async fn write(
    store: PostgresStore,
    name: String,
    stopped: watch::Receiver<bool>,
    acknowledged: Arc<AtomicU64>,
) -> Promise {
    let mut promise = Promise { name, standing: 0, unknown: 0, unavailable: 0 };
    while !*stopped.borrow() {
        let mut commit = append(&promise.name, promise.standing, 2);
        let key = DocumentKey::new("load", &*promise.name);
        let expected = Some(promise.standing / 2);
        commit.puts.push(Put { key, expected, body: Some("{}".into()), due: None });
        let mut sent_before = false;
        loop {
            match store.commit(commit.clone()).await {
                Ok(committed) => {
                    assert_eq!(committed.versions[0].0, promise.standing + 2);
                    break;
                }
                Err(CommitError::Unknown(_)) => (promise.unknown, sent_before) = (promise.unknown + 1, true),
                Err(CommitError::Unavailable(_)) => promise.unavailable += 1,
                // This conflict resolves the unknown outcome: the earlier attempt was stored.
                Err(CommitError::Conflict { actual, .. }) if sent_before && actual.0 == promise.standing + 2 => break,
                Err(other) => panic!("{}: {other}", promise.name),
            }
        }
        promise.standing += 2;
        acknowledged.fetch_add(1, Ordering::SeqCst);
    }
    promise
}

/// Reads until the writers have ended and everything that they have written has been read. Returns the positions.
async fn follow(
    own: Option<PostgresStore>,
    url: String,
    settings: Settings,
    written: watch::Receiver<bool>,
) -> Vec<i64> {
    let mut seen = Vec::new();
    let mut after = Position::START;
    loop {
        let store = match &own {
            Some(own) => own.clone(),
            None => match PostgresStore::connect(&url, settings.clone()).await {
                Ok(store) => store,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
        };
        for _ in 0..PAGES_UNTIL_RESTART {
            let ends = *written.borrow();
            match read(&store, &mut seen, &mut after, ends).await {
                Ok(true) => return seen,
                Ok(false) => {}
                Err(StoreError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Reads one page. Returns whether it was the last page.
async fn read(
    store: &PostgresStore,
    seen: &mut Vec<i64>,
    after: &mut Position,
    ends: bool,
) -> Result<bool, StoreError> {
    let page = store.read_log(&LogQuery::all(), *after, 37).await?;
    if page.next == *after {
        if ends && store.status().await?.head <= *after {
            return Ok(true);
        }
        timeout(Duration::from_millis(50), store.wait(*after)).await.ok();
    }
    *after = page.next;
    seen.extend(page.events.iter().map(|event| event.position.0));
    Ok(false)
}
