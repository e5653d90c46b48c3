//! How the parts of a running service are doing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::bus::Message;

/// How long a handler may have a message before health names it: longer than a sound handler takes, and short for a person who
/// wonders why nothing goes on.
pub const IN_HAND_MAX: Duration = Duration::from_secs(10);

/// The state of one part.
#[derive(Clone, Debug, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum State {
    /// Not working yet.
    #[default]
    Starting,
    /// Working.
    Fine,
    /// Working, but a person is needed: why, and what can be done. A restart or another instance does not help.
    NeedsAttention(String),
    /// Idle, because another instance does this; who or why.
    Elsewhere(String),
    /// Trying again after this.
    Trouble(String),
    /// Ended as asked.
    Stopped,
    /// Ended by an error.
    Failed(String),
}

/// What is counted under which labels. No label carries an id, so there are only as many counters as names in the program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Counter {
    /// Such as `annals_dead_letters_total`.
    pub name: &'static str,
    /// Such as `subscription`, with the name of one.
    pub labels: Vec<(&'static str, String)>,
}

impl Counter {
    /// What is counted, in words.
    pub fn help(&self) -> &'static str {
        match self.name {
            "annals_messages_failed_total" => "Attempts at messages that failed and are made again.",
            "annals_dead_letters_total" => "Messages that became dead letters.",
            "annals_handlers_hung_total" => "Messages whose handler did not return within ten seconds.",
            "annals_saga_steps_failed_total" => "Steps of sagas that failed and were asked for again.",
            "annals_saga_steps_timed_out_total" => {
                "Steps of sagas that were not answered in time and were asked for again."
            }
            "annals_saga_steps_given_up_total" => {
                "Steps of sagas that were given up, so that the saga was compensated."
            }
            "annals_sagas_stuck_total" => "Sagas that got stuck.",
            "annals_parts_cut_off_total" => "Parts that did not end in time when the process drained.",
            _ => "Counted since the process started.",
        }
    }
}

/// The states of all parts, by name. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Health {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    parts: Mutex<BTreeMap<String, Part>>,
    counters: Mutex<BTreeMap<Counter, u64>>,
}

#[derive(Debug, Default)]
struct Part {
    state: State,
    hand: Option<Hand>,
}

/// The message that a worker has given to its handler. A mutex that only its worker takes, but for those who ask for health.
type Hand = Arc<Mutex<Option<InHand>>>;

#[derive(Clone, Debug)]
struct InHand {
    id: Uuid,
    key: Arc<str>,
    type_name: Arc<str>,
    position: i64,
    /// Since when.
    since: Instant,
}

/// A message that its handler has had for too long.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub part: String,
    pub id: Uuid,
    pub key: Arc<str>,
    pub type_name: Arc<str>,
    pub position: i64,
    pub since: Instant,
}

impl Held {
    fn reason(&self) -> String {
        let Self { id, key, type_name, position, since, .. } = self;
        let seconds = since.elapsed().as_secs();
        format!(
            "the handler has not returned for {seconds} s from message {id} ({type_name}, key {key}, position {position})"
        )
    }
}

fn held(part: &str, hand: &Hand) -> Option<Held> {
    let in_hand = locked(hand).clone()?;
    let InHand { id, key, type_name, position, since } = in_hand;
    (since.elapsed() >= IN_HAND_MAX).then(|| Held { part: part.to_owned(), id, key, type_name, position, since })
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Health {
    /// A snapshot of all parts. A part whose handler has not returned for [`IN_HAND_MAX`] is in trouble, and names the message.
    pub fn parts(&self) -> BTreeMap<String, State> {
        let state = |(name, part): (&String, &Part)| {
            let held = part.hand.as_ref().and_then(|hand| held(name, hand));
            let state = held.map_or_else(|| part.state.clone(), |held| State::Trouble(held.reason()));
            (name.clone(), state)
        };
        locked(&self.shared.parts).iter().map(state).collect()
    }

    /// Whether every part works, here or elsewhere, and none needs a person. Before the first one reports, nothing does.
    pub fn is_fine(&self) -> bool {
        let parts = self.parts();
        !parts.is_empty() && parts.values().all(|state| matches!(state, State::Fine | State::Elsewhere(_)))
    }

    /// Whether every part works, here or elsewhere, also where a person is needed for what it has put aside.
    pub fn is_working(&self) -> bool {
        let works = |state: &State| matches!(state, State::Fine | State::Elsewhere(_) | State::NeedsAttention(_));
        let parts = self.parts();
        !parts.is_empty() && parts.values().all(works)
    }

    /// What was counted since the process started.
    pub fn counters(&self) -> BTreeMap<Counter, u64> {
        locked(&self.shared.counters).clone()
    }

    pub(crate) fn count(&self, name: &'static str, labels: &[(&'static str, &str)]) {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        *locked(&self.shared.counters).entry(Counter { name, labels }).or_default() += 1;
    }

    /// The messages that their handlers have had for too long.
    pub(crate) fn held(&self) -> Vec<Held> {
        let parts = locked(&self.shared.parts);
        parts.iter().filter_map(|(name, part)| held(name, part.hand.as_ref()?)).collect()
    }

    pub(crate) fn set(&self, part: &str, state: State) {
        let mut parts = locked(&self.shared.parts);
        match parts.get_mut(part) {
            Some(known) if known.state == state => {}
            Some(known) => known.state = state,
            None => _ = parts.insert(part.to_owned(), Part { state, hand: None }),
        }
    }

    /// The part is no more.
    pub(crate) fn remove(&self, part: &str) {
        locked(&self.shared.parts).remove(part);
    }

    /// For a part that ends with `shutdown`.
    pub(crate) fn reporter(&self, part: &str, shutdown: &CancellationToken) -> Reporter {
        let hand = Hand::default();
        let starting = Part { state: State::Starting, hand: Some(hand.clone()) };
        locked(&self.shared.parts).insert(part.to_owned(), starting);
        let (health, shutdown) = (self.clone(), shutdown.clone());
        Reporter { health, part: part.into(), fine: false, fault: None, shutdown, attention: None, hand }
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
    /// Why a person is needed although it works.
    attention: Option<String>,
    hand: Hand,
}

impl Reporter {
    pub fn health(&self) -> &Health {
        &self.health
    }

    pub fn fine(&mut self) {
        if !self.fine {
            self.fine = true;
            self.show();
        }
    }

    /// A part with a fault is in trouble, however well it works.
    pub fn fault(&mut self, fault: Option<Arc<str>>) {
        if self.fault != fault {
            (self.fault, self.fine) = (fault, false);
        }
    }

    /// Says why a person is needed, if one is; shown while the part works.
    pub fn attention(&mut self, attention: Option<String>) {
        if self.attention != attention {
            self.attention = attention;
            if self.fine {
                self.show();
            }
        }
    }

    fn show(&self) {
        let state = match (&self.fault, &self.attention) {
            (Some(fault), _) => State::Trouble(fault.to_string()),
            (None, Some(attention)) => State::NeedsAttention(attention.clone()),
            (None, None) => State::Fine,
        };
        self.health.set(&self.part, state);
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

    /// The handler is given this message.
    pub fn take_in_hand(&self, message: &Message) {
        let Message { id, key, type_name, position, .. } = message;
        let (key, type_name, since) = (key.clone(), type_name.clone(), Instant::now());
        *locked(&self.hand) = Some(InHand { id: *id, key, type_name, position: position.0, since });
    }

    /// The handler has returned from its last message.
    pub fn hands_free(&self) {
        *locked(&self.hand) = None;
    }
}
