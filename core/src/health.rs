//! How the parts of a running service are doing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// The state of one part.
#[derive(Clone, Debug, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum State {
    /// Not working yet.
    #[default]
    Starting,
    /// Working.
    Fine,
    /// Idle, because another instance does this; who or why.
    Elsewhere(String),
    /// Trying again after this.
    Trouble(String),
    /// Ended as asked.
    Stopped,
    /// Ended by an error.
    Failed(String),
}

/// The states of all parts, by name. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Health {
    parts: Arc<Mutex<BTreeMap<String, State>>>,
}

impl Health {
    /// A snapshot of all parts.
    pub fn parts(&self) -> BTreeMap<String, State> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether every part works, here or elsewhere. Before the first one reports, nothing does.
    pub fn is_fine(&self) -> bool {
        let parts = self.parts();
        !parts.is_empty() && parts.values().all(|state| matches!(state, State::Fine | State::Elsewhere(_)))
    }

    pub(crate) fn set(&self, part: &str, state: State) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        match parts.get_mut(part) {
            Some(known) if *known == state => {}
            Some(known) => *known = state,
            None => _ = parts.insert(part.to_owned(), state),
        }
    }

    /// For a part that ends with `shutdown`.
    pub(crate) fn reporter(&self, part: &str, shutdown: &CancellationToken) -> Reporter {
        self.set(part, State::Starting);
        Reporter { health: self.clone(), part: part.into(), fine: false, fault: None, shutdown: shutdown.clone() }
    }
}

/// One part's own voice.
#[derive(Clone, Debug)]
pub(crate) struct Reporter {
    health: Health,
    part: Arc<str>,
    fine: bool,
    /// What is wrong although the part works, until somebody repairs it.
    fault: Option<Arc<str>>,
    shutdown: CancellationToken,
}

impl Reporter {
    pub fn fine(&mut self) {
        if !self.fine {
            self.fine = true;
            let state = self.fault.as_deref().map_or(State::Fine, |fault| State::Trouble(fault.to_owned()));
            self.health.set(&self.part, state);
        }
    }

    /// A part with a fault is in trouble, however well it works.
    pub fn fault(&mut self, fault: Option<Arc<str>>) {
        if self.fault != fault {
            (self.fault, self.fine) = (fault, false);
        }
    }

    pub fn elsewhere(&mut self, reason: &str) {
        self.fine = false;
        self.health.set(&self.part, State::Elsewhere(reason.to_owned()));
    }

    pub fn trouble(&mut self, reason: String) {
        // A part that is asked to stop tries nothing again: what it meets while others end is no fault.
        if self.shutdown.is_cancelled() {
            return tracing::debug!(part = %self.part, %reason, "stopping");
        }
        self.fine = false;
        tracing::warn!(part = %self.part, %reason, "trying again");
        self.health.set(&self.part, State::Trouble(reason));
    }
}
