//! The commands that wait for one aggregate, and who carries them out.

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

/// Those who wait, in the order in which they came.
pub(crate) struct Line<W> {
    pub(crate) waiting: VecDeque<W>,
    carrier: Arc<Carrier>,
}

/// The carrying out of what waits in a line, until nothing does. The caller who began the line does it, which saves a task for
/// each command, as long as nobody else depends on it: once others wait behind that caller, or it goes away, a task of its own
/// does the rest.
pub(crate) struct Carrier {
    /// `None` once it is done, or somebody else's.
    work: Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>,
    wanted: AtomicBool,
    runtime: Handle,
}

impl<W> Line<W> {
    /// Begins a line. Nothing happens before somebody polls its carrier.
    pub(crate) fn begin(first: W, work: impl Future<Output = ()> + Send + 'static) -> (Self, Arc<Carrier>) {
        let (work, wanted) = (Mutex::new(Some(Box::pin(work) as _)), AtomicBool::new(false));
        let carrier = Arc::new(Carrier { work, wanted, runtime: Handle::current() });
        (Self { waiting: VecDeque::from([first]), carrier: carrier.clone() }, carrier)
    }

    /// Waits behind others. Whoever does so tells the carrier to leave: it must not depend on the caller who began the line.
    pub(crate) fn join(&mut self, next: W) -> Arc<Carrier> {
        self.waiting.push_back(next);
        self.carrier.clone()
    }
}

impl Carrier {
    /// Gives the answer to the caller who began the line, and carries it out meanwhile.
    pub(crate) async fn until<T>(
        self: Arc<Self>,
        mut answered: oneshot::Receiver<T>,
    ) -> Result<T, oneshot::error::RecvError> {
        let carrier = Leaving(self);
        std::future::poll_fn(|context| {
            carrier.0.poll(context);
            Pin::new(&mut answered).poll(context)
        })
        .await
    }

    fn poll(&self, context: &mut Context<'_>) {
        let mut slot = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        // Should it panic, it is gone.
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

    /// Gives what is left to a task of its own. Not to be called with a lock that the work takes: a runtime that has ended drops
    /// it here.
    pub(crate) fn leave(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        let mut work = match self.work.try_lock() {
            Ok(work) => work,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // It is being polled, and looks at `wanted` after that.
            Err(TryLockError::WouldBlock) => return,
        };
        if let Some(work) = work.take() {
            drop(self.runtime.spawn(work));
        }
    }
}

/// The caller who began the line; when it goes, be it with its answer or without, others may wait.
struct Leaving(Arc<Carrier>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.leave();
    }
}
