//! Handles Ctrl-C: the first Ctrl-C asks the command to stop at its next safe point.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::FutureExt;
use tokio::sync::Notify;

/// Whether the user asked the command to stop. Clones share the state.
#[derive(Clone, Default)]
pub(crate) struct Stop {
    asked: Arc<AtomicBool>,
    notify: Arc<Notify>,
}

impl Stop {
    /// Starts to listen for Ctrl-C. A second Ctrl-C ends the process at once.
    pub fn on_ctrl_c() -> Self {
        let stop = Self::default();
        let listener = stop.clone();
        let mut first = Box::pin(tokio::signal::ctrl_c());
        // The listener is installed by the first poll, and the task may be polled late. Until the first poll, Ctrl-C
        // would end the process without a message.
        let pressed = (&mut first).now_or_never();
        tokio::spawn(async move {
            let pressed = match pressed {
                Some(pressed) => pressed,
                None => first.await,
            };
            if pressed.is_ok() {
                listener.asked.store(true, Ordering::Release);
                listener.notify.notify_waiters();
                if tokio::signal::ctrl_c().await.is_ok() {
                    std::process::exit(130);
                }
            }
        });
        stop
    }

    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Resolves once the user has asked the command to stop.
    pub async fn asked(&self) {
        let notified = self.notify.notified();
        if !self.is_asked() {
            notified.await;
        }
    }

    /// Runs a future. Returns `None` if the user asks the command to stop before the future is ready.
    pub async fn unless<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = work => Some(done),
            () = self.asked() => None,
        }
    }
}
