//! The queue of commands for one aggregate, and the future that executes them.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    task::Context,
};

use tokio::{runtime::Handle, sync::oneshot};

/// The waiting commands, in the order of their arrival.
pub(crate) struct CommandQueue<W> {
    pub(crate) waiting: VecDeque<W>,
    driver: Arc<Driver>,
}

/// The future that executes a queue until the queue is empty. The caller that started the queue polls the future, so
/// that no separate task is needed for each command. Once other commands wait behind the command of that caller, or the
/// caller drops its future, a separate task takes over. The execution of a command therefore never depends on another
/// caller.
pub(crate) struct Driver {
    /// `None` once the work is done or was handed to a separate task.
    work: Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>,
    wanted: AtomicBool,
    runtime: Handle,
}

impl<W> CommandQueue<W> {
    /// Starts a queue. No work happens until the driver of the queue is polled.
    pub(crate) fn begin(first: W, work: impl Future<Output = ()> + Send + 'static) -> (Self, Arc<Driver>) {
        let work = Mutex::new(Some(Box::pin(work) as _));
        let wanted = AtomicBool::new(false);
        let driver = Arc::new(Driver { work, wanted, runtime: Handle::current() });
        (Self { waiting: VecDeque::from([first]), driver: driver.clone() }, driver)
    }

    /// Appends a command to the queue. The caller must then call [`Driver::leave`], so that the work does not depend
    /// on the caller that started the queue.
    pub(crate) fn join(&mut self, next: W) -> Arc<Driver> {
        self.waiting.push_back(next);
        self.driver.clone()
    }
}

impl Driver {
    /// Polls the work on behalf of the caller that started the queue, until that caller's answer arrives.
    pub(crate) async fn until<T>(
        self: Arc<Self>,
        mut answered: oneshot::Receiver<T>,
    ) -> Result<T, oneshot::error::RecvError> {
        let driver = HandOff(self);
        std::future::poll_fn(|context| {
            driver.0.poll(context);
            Pin::new(&mut answered).poll(context)
        })
        .await
    }

    fn poll(&self, context: &mut Context<'_>) {
        let mut slot = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        // Work that panics is dropped, because the slot is empty during the poll.
        if let Some(mut work) = slot.take()
            && work.as_mut().poll(context).is_pending()
        {
            *slot = Some(work);
        }
        drop(slot);
        if self.wanted.load(Ordering::SeqCst) {
            self.leave();
        }
    }

    /// Hands the remaining work to a separate task. The caller must not hold a lock that the work acquires, because the
    /// work is dropped inside this call if the runtime has ended.
    pub(crate) fn leave(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        let mut work = match self.work.try_lock() {
            Ok(work) => work,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Another caller is polling the work, and checks `wanted` afterwards.
            Err(TryLockError::WouldBlock) => return,
        };
        if let Some(work) = work.take() {
            drop(self.runtime.spawn(work));
        }
    }
}

/// Calls [`Driver::leave`] when the caller that started the queue returns or is dropped, because other commands may
/// still wait.
struct HandOff(Arc<Driver>);

impl Drop for HandOff {
    fn drop(&mut self) {
        self.0.leave();
    }
}
