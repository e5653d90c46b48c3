//! The sessions that read.
//!
//! Not a pool of sqlx's: that asks a session for a sign of life each time it comes back, and a read would take two round trips.
//! A read whose session died while nobody used it is repeated on another.

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

/// The sessions, opened as they are needed and kept; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Readers(Arc<Sessions>);

#[derive(Debug)]
struct Sessions {
    database: Arc<Database>,
    permits: Arc<Semaphore>,
    /// Each with the number of the history that it was opened under: under another one, it may be on another server.
    idle: Mutex<Vec<(u64, PgConnection)>>,
    /// When the next one may be opened.
    reconnect: Mutex<Reconnect>,
}

/// A session, until this is dropped.
pub(crate) struct Reader {
    /// `None` once it is given up.
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

    /// What each of them is held against.
    pub(crate) fn history(&self) -> &History {
        &self.0.database.history
    }

    /// A session, as soon as one is free.
    pub(crate) async fn get(&self) -> Result<Reader, sqlx::Error> {
        let deadline = Instant::now() + Duration::from_secs(WAIT_SECONDS_MAX);
        let permit = timeout_at(deadline, self.0.permits.clone().acquire_owned()).await;
        let permit = permit.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(|_| sqlx::Error::PoolClosed)?;
        let mut reader = match self.0.take_idle() {
            Some((history, connection)) => {
                Reader { connection: Some(connection), history, sessions: self.0.clone(), _permit: permit }
            }
            None => {
                // In a task of its own. A burst of reads shares a few sessions, so most of those that began to connect are
                // answered before they are through; a session that is half made then is finished, and kept.
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

    /// Nobody gets one from now on; who has one may finish.
    pub(crate) async fn close(&self) {
        self.0.permits.close();
        let idle = std::mem::take(&mut *self.0.idle());
        for (_, connection) in idle {
            // It holds nothing.
            sqlx::Connection::close(connection).await.ok();
        }
    }
}

impl Sessions {
    fn idle(&self) -> MutexGuard<'_, Vec<(u64, PgConnection)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session of the history as it is now; those of an older one are dropped.
    fn take_idle(&self) -> Option<(u64, PgConnection)> {
        let mut idle = self.idle();
        if !self.database.pooled {
            let number = self.database.history.number();
            idle.retain(|(history, _)| *history == number);
        }
        idle.pop()
    }

    /// Opens a session in a place of the pool. A server that restarts is waited for, by all readers in the same rhythm.
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

    /// It is of no more use to anybody.
    pub(crate) fn give_up(&mut self) {
        self.connection = None;
    }

    /// Takes it away for good; another one may be opened in its place.
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
        // The session behind the pooler is kept for as long as the transaction.
        if let Ok(runtime) = Handle::try_current() {
            let (history, sessions) = (self.history, self.sessions.clone());
            runtime.spawn(async move {
                if sqlx::raw_sql("COMMIT").execute(&mut connection).await.is_ok() {
                    sessions.take_back(history, connection);
                }
            });
        }
    }
}
