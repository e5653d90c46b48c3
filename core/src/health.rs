//! How the parts of a running service are doing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

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

    pub(crate) fn reporter(&self, part: &str) -> Reporter {
        self.set(part, State::Starting);
        Reporter { health: self.clone(), part: part.into(), fine: false }
    }
}

/// One part's own voice.
#[derive(Clone, Debug)]
pub(crate) struct Reporter {
    health: Health,
    part: Arc<str>,
    fine: bool,
}

impl Reporter {
    pub fn fine(&mut self) {
        if !self.fine {
            self.fine = true;
            self.health.set(&self.part, State::Fine);
        }
    }

    pub fn elsewhere(&mut self, reason: &str) {
        self.fine = false;
        self.health.set(&self.part, State::Elsewhere(reason.to_owned()));
    }

    pub fn trouble(&mut self, reason: String) {
        self.fine = false;
        tracing::warn!(part = %self.part, %reason, "trying again");
        self.health.set(&self.part, State::Trouble(reason));
    }
}
