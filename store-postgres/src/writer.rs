//! The writer: takes the waiting commits as a group, and writes the group in one round trip.

use std::{
    io,
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    thread,
    time::Duration,
};

use annals::{CommitError, Position};
use sqlx::{Connection, PgConnection};
use tokio::{
    runtime,
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    append::{advance, append_alone},
    error::{Fault, fault, not_written, write_error},
    group::{GroupPlan, Prepared, Written},
    history::Seen,
    notifications::Notifications,
    open::{Database, Purpose},
    queue::{Outcome, Queue},
};

/// How many races against other processes a whole group may lose before the group is split into halves.
const RACES_MAX: u32 = 4;
/// How many races a single commit may lose. Each loss means that a commit of another process succeeded.
const RACES_ALONE_MAX: u32 = 50;
/// How many times a single commit is attempted while another transaction holds a lock. A group of several commits is
/// not attempted again, but split at once.
const WAITS_ALONE_MAX: u32 = 3;
/// How long to wait for the server's answer. The server gives up on a group after half of this time, so a later answer
/// will never come.
pub(crate) const ANSWER_SECONDS_MAX: u64 = 60;
/// The shortest and the longest wait after a failed attempt to connect; the wait doubles with each failure.
const RECONNECT_MS_MIN: u64 = 20;
const RECONNECT_MS_MAX: u64 = 1_000;

#[derive(Debug)]
pub(crate) struct Writer {
    database: Arc<Database>,
    /// The connection, with the number of the history to which it writes. `None` after a failure, because a connection
    /// in an unclear state is replaced instead of examined.
    connection: Option<(u64, PgConnection)>,
    notifications: Notifications,
    reconnect: Reconnect,
}

/// When to connect again.
#[derive(Debug)]
pub(crate) struct Reconnect {
    not_before: Instant,
    delay: Duration,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self { not_before: Instant::now(), delay: Duration::from_millis(RECONNECT_MS_MIN) }
    }
}

impl Reconnect {
    pub(crate) async fn wait(&self) {
        sleep_until(self.not_before).await;
    }

    pub(crate) fn not_before(&self) -> Instant {
        self.not_before
    }

    /// Several failures at the same time double the delay only once.
    pub(crate) fn failed(&mut self) {
        if self.not_before > Instant::now() {
            return;
        }
        self.not_before = Instant::now() + self.delay;
        self.delay = (self.delay * 2).min(Duration::from_millis(RECONNECT_MS_MAX));
    }

    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }
}

/// The failure of an attempt to write a group.
enum Failure {
    /// Other processes committed first on every attempt, or the server rejects a value. Parts of the group may succeed.
    OfSome(CommitError),
    /// No part of the group can succeed.
    OfAll(CommitError),
}

/// Starts two writers that serve the queue on a separate thread. If the writers were tasks on the callers' runtime,
/// they would wait for hundreds of other tasks at each step while the server is idle. When the writers have ended, this
/// function reports how they ended, even after a panic.
pub(crate) fn start(
    writers: [Writer; 2],
    queue: Queue,
    end: watch::Sender<Option<Result<(), String>>>,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let run = move || {
        let [first, second] = writers;
        let both = async { tokio::try_join!(first.serve(&queue, false), second.serve(&queue, true)) };
        let result = match panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(both))) {
            Ok(ended) => ended.map(drop).map_err(|error| error.to_string()),
            Err(_) => Err("it panicked".to_owned()),
        };
        if let Err(reason) = &result {
            tracing::error!(reason, "the writer of a store has failed");
        }
        end.send_replace(Some(result));
    };
    thread::Builder::new().name("annals-postgres".into()).spawn(run).map(drop)
}

impl Writer {
    pub(crate) fn new(database: &Arc<Database>, notifications: &Notifications) -> Self {
        let database = database.clone();
        let notifications = notifications.clone();
        Self { database, connection: None, notifications, reconnect: Reconnect::default() }
    }

    /// Writes the queued commits until the last sender is gone and the queue is empty. With `second`, this writer takes
    /// commits only when too many commits wait for the first writer.
    async fn serve(mut self, queue: &Queue, second: bool) -> Result<(), sqlx::Error> {
        while let Some(group) = if second { queue.overflow().await } else { queue.next().await } {
            let (commits, answers): (Vec<_>, Vec<_>) =
                group.into_iter().map(|submission| (submission.commit, (submission.answer, submission.guard))).unzip();
            for ((answer, guard), outcome) in answers.into_iter().zip(self.write(&commits).await) {
                drop(guard);
                // A caller that gave up needs no answer.
                drop(answer.send(outcome));
            }
            // Callers that have just been answered often submit their next commit at once. Without this yield, the next
            // group would contain only the commits that were queued during this group. The callers would then form two
            // halves that alternate, with twice as many round trips.
            tokio::task::yield_now().await;
        }
        self.close().await
    }

    /// Drops the connection. The next group opens a new connection.
    pub(crate) fn disconnect(&mut self) {
        self.connection = None;
    }

    pub(crate) async fn close(self) -> Result<(), sqlx::Error> {
        match self.connection {
            Some((_, connection)) => connection.close().await,
            None => Ok(()),
        }
    }

    /// Writes a group. If the group fails as a whole, each half is written separately.
    pub(crate) async fn write(&mut self, commits: &[Prepared]) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(commits.len());
        let whole = 0..commits.len();
        let mut parts = Vec::from([whole]);
        while let Some(part) = parts.pop() {
            match self.attempt(&commits[part.clone()]).await {
                Ok(written) => outcomes.extend(written),
                Err(Failure::OfSome(_)) if part.len() > 1 => {
                    let middle = part.start + part.len() / 2;
                    parts.extend([middle..part.end, part.start..middle]);
                }
                Err(Failure::OfSome(error) | Failure::OfAll(error)) => {
                    tracing::warn!(%error, commits = part.len(), "a group of commits failed");
                    outcomes.extend(std::iter::repeat_n(Err(error), part.len()));
                }
            }
        }
        outcomes
    }

    async fn attempt(&mut self, commits: &[Prepared]) -> Result<Vec<Outcome>, Failure> {
        let mut known = None;
        let mut races = 0;
        let mut waits = 0;
        loop {
            let plan = GroupPlan::new(commits, known.as_ref());
            let (history, mut connection) = self.connect().await.map_err(Failure::OfAll)?;
            if let Err(failure) = are_of(commits, history) {
                self.connection = Some((history, connection));
                return Err(failure);
            }
            let seen = self.database.history.last();
            let appended = timeout(
                Duration::from_secs(ANSWER_SECONDS_MAX),
                append_alone(&self.database, &mut connection, &plan, history),
            )
            .await;
            let appended = appended.unwrap_or_else(|elapsed| Err(sqlx::Error::Io(elapsed.into())));
            let error = match appended {
                Ok((written, versions)) => {
                    if let Some(written) = &written {
                        self.wrote(&mut connection, history, seen, written, &plan).await;
                    }
                    self.connection = Some((history, connection));
                    let Some(written) = written else {
                        // A guess was wrong. If this attempt used versions that the database had reported instead of
                        // guesses, another process has written in the meantime.
                        races += u32::from(known.is_some());
                        if races > RACES_ALONE_MAX {
                            return Err(Failure::OfSome(CommitError::Unavailable(
                                "other processes committed first on every attempt".into(),
                            )));
                        }
                        known = Some(versions);
                        continue;
                    };
                    return Ok(plan.outcomes(&written, &versions));
                }
                Err(error) => error,
            };
            let fault = fault(&error);
            if !matches!(fault, Fault::Lost | Fault::NotPrimary) {
                self.connection = Some((history, connection));
            }
            match fault {
                Fault::Refused => return Err(Failure::OfSome(write_error(&error))),
                Fault::Race | Fault::PositionTaken => {
                    races += 1;
                    let most = if commits.len() > 1 { RACES_MAX } else { RACES_ALONE_MAX };
                    if races > most {
                        return Err(Failure::OfSome(write_error(&error)));
                    }
                    if fault == Fault::PositionTaken {
                        self.advance().await.map_err(Failure::OfAll)?;
                    }
                    // With a random delay, this process does not collide with the other process again and again.
                    sleep(Duration::from_micros(fastrand::u64(0..500 << races.min(6)))).await;
                    known = None;
                }
                Fault::Held => {
                    waits += 1;
                    if commits.len() > 1 || waits > WAITS_ALONE_MAX {
                        return Err(Failure::OfSome(write_error(&error)));
                    }
                }
                Fault::Forbidden | Fault::Unavailable | Fault::NotPrimary | Fault::Lost => {
                    return Err(Failure::OfAll(write_error(&error)));
                }
            }
        }
    }

    /// Records the written positions. A position is drawn after the statement was sent, so the position is above every
    /// position that was seen before, unless the log on this same server has lost its last events.
    async fn wrote(
        &self,
        connection: &mut PgConnection,
        history: u64,
        seen: Option<Seen>,
        written: &Written,
        plan: &GroupPlan<'_>,
    ) {
        let Some((first, last)) = written.positions.first().zip(written.positions.last()) else { return };
        if seen.is_some_and(|(seen, _)| *first <= seen) {
            // If this check fails, the next read or write reports the problem.
            self.database.check(connection, Purpose::Write).await.ok();
        }
        if let Some(id) = plan.last_event() {
            self.database.history.saw(history, (*last, id));
        }
        self.notifications.written(history, Position(*last));
    }

    async fn connect(&mut self) -> Result<(u64, PgConnection), CommitError> {
        if let Some((history, connection)) = self.connection.take() {
            let number = self.database.history.number();
            if history == number {
                return Ok((history, connection));
            }
            if self.database.pooled {
                // Behind a pooler, each transaction checks its session.
                return Ok((number, connection));
            }
        }
        self.reconnect.wait().await;
        match self.database.connect(Purpose::Write).await {
            Ok(session) => {
                self.reconnect.succeeded();
                Ok(session)
            }
            Err(error) => {
                self.reconnect.failed();
                Err(not_written(&error))
            }
        }
    }

    async fn advance(&mut self) -> Result<(), CommitError> {
        let (history, mut connection) = self.connect().await?;
        advance(&self.database, &mut connection).await.map_err(|error| not_written(&error))?;
        self.connection = Some((history, connection));
        Ok(())
    }
}

/// Checks that the commits were submitted under this number of the history. A commit that was decided under an earlier
/// number may depend on events that are gone.
fn are_of(commits: &[Prepared], history: u64) -> Result<(), Failure> {
    let older = commits.iter().filter(|commit| commit.history != history).count();
    let error = || {
        CommitError::Unavailable(
            "the log changed (failover or restore) before the commit was written: decide again".into(),
        )
    };
    match older {
        0 => Ok(()),
        older if older == commits.len() => Err(Failure::OfAll(error())),
        _ => Err(Failure::OfSome(error())),
    }
}
