//! The pool of sessions that serve reads.
//!
//! This module replaces sqlx's pool. That pool pings a session each time the session is returned, so each read would take
//! two round trips. If a session has died while idle, the read is repeated on another session.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sqlx::PgConnection;
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    error::is_for_a_moment,
    history::History,
    open::{Database, Purpose},
    writer::Reconnect,
};

/// How long a read waits for a session before it gives up.
pub(crate) const WAIT_SECONDS_MAX: u64 = 30;

/// The sessions for reads. A session is opened on demand and kept. Clones share the same sessions.
#[derive(Clone, Debug)]
pub(crate) struct Readers(Arc<Sessions>);

#[derive(Debug)]
struct Sessions {
    database: Arc<Database>,
    permits: Arc<Semaphore>,
    /// The idle sessions, each with the number of the history in which the session was opened. If that number is no
    /// longer current, the session may be on another server.
    idle: Mutex<Vec<(u64, PgConnection)>>,
    /// When the next session may be opened.
    reconnect: Mutex<Reconnect>,
}

/// A session, until this guard is dropped.
pub(crate) struct Reader {
    /// `None` once the session is given up.
    connection: Option<PgConnection>,
    history: u64,
    sessions: Arc<Sessions>,
    _permit: OwnedSemaphorePermit,
}

impl Readers {
    pub(crate) fn new(database: Arc<Database>) -> Self {
        let permits = Arc::new(Semaphore::new(database.connections()));
        Self(Arc::new(Sessions { database, permits, idle: Mutex::default(), reconnect: Mutex::default() }))
    }

    /// Returns the history against which each session is checked.
    pub(crate) fn history(&self) -> &History {
        &self.0.database.history
    }

    /// Returns a session as soon as one is free.
    pub(crate) async fn get(&self) -> Result<Reader, sqlx::Error> {
        let deadline = Instant::now() + Duration::from_secs(WAIT_SECONDS_MAX);
        let permit = timeout_at(deadline, self.0.permits.clone().acquire_owned()).await;
        let permit = permit.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(|_| sqlx::Error::PoolClosed)?;
        let mut reader = match self.0.take_idle() {
            Some((history, connection)) => {
                Reader { connection: Some(connection), history, sessions: self.0.clone(), _permit: permit }
            }
            None => {
                // The session is opened in a separate task, because a read that starts to connect is often answered by
                // another session before its own connection is open. In that case, the task still opens the new session
                // and keeps it.
                let opening = tokio::spawn(self.0.clone().open(permit, deadline));
                opening.await.unwrap_or(Err(sqlx::Error::PoolClosed))?
            }
        };
        if self.0.database.pooled {
            let begun = self.0.database.begin(reader.connection()?, Purpose::Read).await;
            begun.inspect_err(|_| reader.give_up())?;
        }
        Ok(reader)
    }

    /// Closes the pool, which then returns no more sessions. Reads that already have a session may finish.
    pub(crate) async fn close(&self) {
        self.0.permits.close();
        let idle = std::mem::take(&mut *self.0.idle());
        for (_, connection) in idle {
            // The session has no open transaction, so an error does not matter.
            sqlx::Connection::close(connection).await.ok();
        }
    }
}

impl Sessions {
    fn idle(&self) -> MutexGuard<'_, Vec<(u64, PgConnection)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes and returns an idle session. Without a pooler, first drops the sessions of older histories; behind a
    /// pooler, each transaction is checked instead.
    fn take_idle(&self) -> Option<(u64, PgConnection)> {
        let mut idle = self.idle();
        if !self.database.pooled {
            let number = self.database.history.number();
            idle.retain(|(history, _)| *history == number);
        }
        idle.pop()
    }

    /// Opens a session; `permit` is the right to one more session. If the server is restarting, this method waits for
    /// the server; all readers share one delay between attempts.
    async fn open(self: Arc<Self>, permit: OwnedSemaphorePermit, deadline: Instant) -> Result<Reader, sqlx::Error> {
        loop {
            let not_before = self.reconnect().not_before();
            sleep_until(not_before.min(deadline)).await;
            let connected = timeout_at(deadline, self.database.connect(Purpose::Read)).await;
            match connected.unwrap_or_else(|elapsed| Err(sqlx::Error::Io(io::Error::from(elapsed)))) {
                Ok((history, connection)) => {
                    self.reconnect().succeeded();
                    return Ok(Reader { connection: Some(connection), history, sessions: self, _permit: permit });
                }
                Err(error) => {
                    self.reconnect().failed();
                    if !is_for_a_moment(&error) || Instant::now() >= deadline {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn reconnect(&self) -> MutexGuard<'_, Reconnect> {
        self.reconnect.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_back(&self, history: u64, connection: PgConnection) {
        if !self.permits.is_closed() {
            self.idle().push((history, connection));
        }
    }
}

impl Reader {
    pub(crate) fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.connection.as_mut().ok_or(sqlx::Error::PoolClosed)
    }

    /// Discards the session because it cannot be used any more.
    pub(crate) fn give_up(&mut self) {
        self.connection = None;
    }

    /// Removes the session from the pool for good, so that another session may be opened instead.
    pub(crate) fn detach(mut self) -> Option<PgConnection> {
        self.connection.take()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if !self.sessions.database.pooled {
            return self.sessions.take_back(self.history, connection);
        }
        // The pooler keeps a server session for as long as the transaction lasts, so the transaction is ended first.
        if let Ok(runtime) = Handle::try_current() {
            let history = self.history;
            let sessions = self.sessions.clone();
            runtime.spawn(async move {
                if sqlx::raw_sql("COMMIT").execute(&mut connection).await.is_ok() {
                    sessions.take_back(history, connection);
                }
            });
        }
    }
}
