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
    told: Arc<Notify>,
}

impl Stop {
    /// Starts to listen for Ctrl-C. A second Ctrl-C ends the process at once.
    pub fn on_ctrl_c() -> Self {
        let stop = Self::default();
        let told = stop.clone();
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
                told.asked.store(true, Ordering::Release);
                told.told.notify_waiters();
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
        let told = self.told.notified();
        if !self.is_asked() {
            told.await;
        }
    }
}
