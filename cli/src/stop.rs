//! Ctrl-C: the first one asks for an end at the next good place.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::FutureExt;
use tokio::sync::Notify;

/// Whether somebody wants it to end. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Stop {
    asked: Arc<AtomicBool>,
    told: Arc<Notify>,
}

impl Stop {
    /// Listens from now on. A second Ctrl-C ends the process as it always does.
    pub fn on_ctrl_c() -> Self {
        let stop = Self::default();
        let told = stop.clone();
        let mut first = Box::pin(tokio::signal::ctrl_c());
        // It listens once it is asked, and its task may be asked late: until then, Ctrl-C would end the process without a word.
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

    /// Resolves when it is.
    pub async fn asked(&self) {
        let told = self.told.notified();
        if !self.is_asked() {
            told.await;
        }
    }
}
