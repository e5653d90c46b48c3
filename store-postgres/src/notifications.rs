//! Wakes the tasks that wait for events. Events of this process wake the tasks directly; events of other processes wake
//! them through `NOTIFY`.
//!
//! The `NOTIFY` is not part of the transaction that appends the events. When a transaction with a `NOTIFY` commits, it
//! takes a lock of the whole cluster, so all such transactions would have to commit one after another.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use annals::Position;
use sqlx::{PgConnection, Row, postgres::PgListener};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use uuid::Uuid;

use crate::{
    open::{Database, Purpose},
    writer::{ANSWER_SECONDS_MAX, Reconnect},
};

/// The shortest interval between two notifications to other processes, even if more groups of commits are written.
const NOTIFY_MS_MIN: u64 = 3;

/// The interval at which the store polls for events of other processes if their notifications cannot be received.
const LOOK_MS: u64 = 100;

/// Signals that there are new events. Clones share the same signals.
#[derive(Clone, Debug)]
pub(crate) struct Notifications {
    /// Counts the signals from this process and from other processes.
    signals: watch::Sender<u64>,
    /// The last position that this process has written, with the number of the history.
    written: watch::Sender<(u64, Position)>,
    /// Counts the signals from other processes.
    heard: Arc<AtomicU64>,
    /// The value of `heard` before the last query that found no new events.
    looked_at: Arc<AtomicU64>,
    /// Whether this process learns of the events of other processes, by notifications or by polling.
    listening: watch::Sender<bool>,
    /// The name of this process as the sender of notifications. The process skips its own notifications, because its
    /// tasks have already been woken.
    name: Arc<str>,
}

impl Notifications {
    pub(crate) fn new() -> Self {
        Self {
            signals: watch::Sender::new(0),
            written: watch::Sender::new((0, Position::START)),
            heard: Arc::new(AtomicU64::new(1)),
            looked_at: Arc::default(),
            listening: watch::Sender::new(false),
            name: Uuid::new_v4().to_string().into(),
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.signals.subscribe()
    }

    /// Records that this process has written up to a position, under this number of the history.
    pub(crate) fn written(&self, history: u64, position: Position) {
        // There are several writers, and the writer that finishes last may have written the lower positions.
        self.written.send_modify(|last| *last = (history, position).max(*last));
        self.signal();
    }

    /// Returns the last position that this process has written under this number of the history.
    pub(crate) fn last_written(&self, history: u64) -> Position {
        let (of, position) = *self.written.borrow();
        if of == history { position } else { Position::START }
    }

    pub(crate) fn is_listening(&self) -> bool {
        *self.listening.borrow()
    }

    /// Returns the number of signals from other processes.
    pub(crate) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Acquire)
    }

    /// Records that a query found no new events; `heard` is the number of signals from other processes before the
    /// query.
    pub(crate) fn nothing_at(&self, heard: u64) {
        self.looked_at.store(heard, Ordering::Release);
    }

    /// Returns whether no events are known after this position: this process has written nothing after the position,
    /// and no signal has come from other processes since the last query that found nothing. Rows that are inserted by
    /// hand send no signal.
    pub(crate) fn ends_at(&self, history: u64, position: Position, heard: u64) -> bool {
        self.is_listening() && self.last_written(history) == position && self.looked_at.load(Ordering::Acquire) == heard
    }

    /// Records a signal from another process.
    fn hear(&self) {
        self.heard.fetch_add(1, Ordering::AcqRel);
        self.signal();
    }

    fn signal(&self) {
        self.signals.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Notifies other processes and receives their notifications, or polls for their events if notifications cannot be
    /// received. This method runs until its task is aborted.
    pub(crate) async fn spread(self, database: Arc<Database>) {
        if database.pooled {
            tokio::join!(self.look(&database), self.notify_others(&database));
        }
        let mut written = self.written.subscribe();
        let mut reconnect = Reconnect::default();
        loop {
            reconnect.wait().await;
            let ended = self.converse(&database, &mut written, &mut reconnect).await;
            self.listening.send_replace(false);
            if let Err(error) = ended {
                tracing::debug!(%error, "no notifications to or from other processes; polling instead");
            }
            reconnect.failed();
        }
    }

    /// Sends and receives notifications on one connection, until the connection ends.
    async fn converse(
        &self,
        database: &Database,
        written: &mut watch::Receiver<(u64, Position)>,
        reconnect: &mut Reconnect,
    ) -> Result<(), sqlx::Error> {
        let channel = database.channel();
        let mut listener = PgListener::connect_with(&database.listener()).await?;
        // With this check, even a process that does nothing else notices that the log has changed.
        database.check(&mut listener, Purpose::Notify).await?;
        listener.listen(&channel).await?;
        database.statements.attend.query().execute(&mut listener).await?;
        reconnect.succeeded();
        self.listening.send_replace(true);
        // Notifications may have been missed before the connection was open, so waiting tasks query the store once.
        self.hear();
        let mut next = Instant::now();
        loop {
            let something_new = async {
                sleep_until(next).await;
                written.changed().await
            };
            tokio::select! {
                heard = listener.try_recv() => match heard? {
                    Some(heard) if heard.payload() == &*self.name => {}
                    Some(_) => self.hear(),
                    None => return Ok(()),
                },
                // `self` holds the sender, so the channel never closes.
                _ = something_new => {
                    let notify = database.statements.notify.query().bind(&channel).bind(&*self.name);
                    let answer = timeout(Duration::from_secs(ANSWER_SECONDS_MAX), notify.execute(&mut listener));
                    answer.await.unwrap_or_else(|elapsed| Err(sqlx::Error::Io(elapsed.into())))?;
                    next = Instant::now() + Duration::from_millis(NOTIFY_MS_MIN);
                }
            }
        }
    }

    /// Notifies other processes through a pooler.
    async fn notify_others(&self, database: &Database) {
        let channel = database.channel();
        let mut written = self.written.subscribe();
        let mut reconnect = Reconnect::default();
        let mut connection: Option<PgConnection> = None;
        // `self` holds the sender, so the channel never closes.
        while written.changed().await.is_ok() {
            reconnect.wait().await;
            let notified = async {
                let open = match connection.take() {
                    Some(open) => open,
                    None => database.connect(Purpose::Notify).await?.1,
                };
                let session = connection.insert(open);
                database.begin(session, Purpose::Notify).await?;
                let notify = database.statements.notify.query().bind(&channel).bind(&*self.name);
                notify.execute(&mut *session).await?;
                sqlx::raw_sql("COMMIT").execute(session).await.map(drop)
            };
            match notified.await {
                Ok(()) => reconnect.succeeded(),
                Err(error) => {
                    // Other processes find these events by polling. The next write tries to notify again.
                    tracing::debug!(%error, "other processes could not be notified of new events");
                    connection = None;
                    reconnect.failed();
                }
            }
            sleep(Duration::from_millis(NOTIFY_MS_MIN)).await;
        }
    }

    /// Polls for new events, on behalf of all waiting tasks.
    async fn look(&self, database: &Database) {
        let mut connection = None::<PgConnection>;
        let mut reconnect = Reconnect::default();
        let mut last = None;
        loop {
            reconnect.wait().await;
            let looked = async {
                let open = match connection.take() {
                    Some(open) => open,
                    None => database.connect(Purpose::Read).await?.1,
                };
                let session = connection.insert(open);
                // The statements have no binds, so each statement is sent in a single protocol message. Even behind a
                // pooler, such a statement needs no transaction around it.
                database.check(&mut *session, Purpose::Read).await?;
                let newest = sqlx::raw_sql(database.statements.newest.sql()).fetch_optional(session).await?;
                newest.map_or(Ok(0), |newest| newest.try_get::<i64, _>(0))
            };
            match looked.await {
                Ok(newest) => {
                    reconnect.succeeded();
                    self.listening.send_replace(true);
                    if last.replace(newest) != Some(newest) {
                        self.hear();
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "no notifications from other processes; waiting readers poll instead");
                    self.listening.send_replace(false);
                    connection = None;
                    reconnect.failed();
                }
            }
            sleep(Duration::from_millis(LOOK_MS)).await;
        }
    }
}
