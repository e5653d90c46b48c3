//! The health of the parts of a running service.

pub(crate) mod notice;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::bus::Message;

/// How long a handler may work on a message before the health report names the message. This time is longer than a
/// healthy handler needs, but short enough for an operator who looks for the cause of a standstill.
pub const IN_HAND_MAX: Duration = Duration::from_secs(10);

/// The state of one part.
#[derive(Clone, Debug, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum State {
    /// The part is starting, and has not reported any other state yet.
    #[default]
    Starting,
    /// The part works.
    Fine,
    /// The part works, but needs an operator. The string gives the reason and the remedy. Neither a restart nor another
    /// instance would help.
    NeedsAttention(String),
    /// The part is idle because another instance does its work. The string names the instance or gives the reason.
    Elsewhere(String),
    /// The part retries after this failure.
    Trouble(String),
    /// The part ended as requested.
    Stopped,
    /// The part ended with an error.
    Failed(String),
}

/// A counter with its labels. No label contains an id, so the number of counters is bounded by the number of names in
/// the program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Counter {
    /// The name, such as `annals_dead_letters_total`.
    pub name: &'static str,
    /// The labels, such as `subscription` with a subscription's name.
    pub labels: Vec<(&'static str, String)>,
}

impl Counter {
    /// Returns a description of what the counter counts.
    pub fn help(&self) -> &'static str {
        match self.name {
            "annals_messages_failed_total" => "Failed attempts at messages that will be retried.",
            "annals_dead_letters_total" => "Messages that became dead letters.",
            "annals_handlers_hung_total" => "Messages whose handler did not return within ten seconds.",
            "annals_saga_steps_failed_total" => "Saga steps that failed and were retried.",
            "annals_saga_steps_timed_out_total" => "Saga steps that timed out and were retried.",
            "annals_saga_steps_given_up_total" => "Saga steps that failed for good, so that the saga was compensated.",
            "annals_sagas_stuck_total" => "Sagas that got stuck.",
            "annals_parts_cut_off_total" => "Parts that did not stop in time when the process drained.",
            _ => "Counted since the process started.",
        }
    }
}

/// The states of all parts, by name. Clones share the states.
#[derive(Clone, Debug, Default)]
pub struct Health {
    shared: Arc<SharedHealth>,
}

#[derive(Debug, Default)]
struct SharedHealth {
    parts: Mutex<BTreeMap<String, PartState>>,
    counters: Mutex<BTreeMap<Counter, u64>>,
}

#[derive(Debug, Default)]
struct PartState {
    state: State,
    hand: Option<Hand>,
}

/// The message that a worker has passed to its handler. Only the worker and the readers of [`Health`] lock the mutex.
type Hand = Arc<Mutex<Option<InHand>>>;

#[derive(Clone, Debug)]
struct InHand {
    id: Uuid,
    key: Arc<str>,
    type_name: Arc<str>,
    position: i64,
    /// When the handler received the message.
    since: Instant,
}

/// A message on which a handler has worked for too long.
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
    /// Returns a snapshot of the states of all parts. A part whose handler has not returned for [`IN_HAND_MAX`] is in
    /// trouble, and its state names the message.
    pub fn parts(&self) -> BTreeMap<String, State> {
        let state = |(name, part): (&String, &PartState)| {
            let held = part.hand.as_ref().and_then(|hand| held(name, hand));
            let state = held.map_or_else(|| part.state.clone(), |held| State::Trouble(held.reason()));
            (name.clone(), state)
        };
        locked(&self.shared.parts).iter().map(state).collect()
    }

    /// Returns whether every part works, in this process or in another instance, and no part needs an operator. Returns
    /// false until the first part reports a state.
    pub fn is_fine(&self) -> bool {
        let parts = self.parts();
        !parts.is_empty() && parts.values().all(|state| matches!(state, State::Fine | State::Elsewhere(_)))
    }

    /// Returns whether every part works, in this process or in another instance. A part that needs an operator, for
    /// example because of parked messages, still counts as working.
    pub fn is_working(&self) -> bool {
        let works = |state: &State| matches!(state, State::Fine | State::Elsewhere(_) | State::NeedsAttention(_));
        let parts = self.parts();
        !parts.is_empty() && parts.values().all(works)
    }

    /// Returns the counters since the start of the process.
    pub fn counters(&self) -> BTreeMap<Counter, u64> {
        locked(&self.shared.counters).clone()
    }

    pub(crate) fn count(&self, name: &'static str, labels: &[(&'static str, &str)]) {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        *locked(&self.shared.counters).entry(Counter { name, labels }).or_default() += 1;
    }

    /// Returns the messages on which handlers have worked for too long.
    pub(crate) fn held(&self) -> Vec<Held> {
        let parts = locked(&self.shared.parts);
        parts.iter().filter_map(|(name, part)| held(name, part.hand.as_ref()?)).collect()
    }

    pub(crate) fn set(&self, part: &str, state: State) {
        let mut parts = locked(&self.shared.parts);
        match parts.get_mut(part) {
            Some(known) if known.state == state => {}
            Some(known) => known.state = state,
            None => _ = parts.insert(part.to_owned(), PartState { state, hand: None }),
        }
    }

    /// Removes a part that no longer exists.
    pub(crate) fn remove(&self, part: &str) {
        locked(&self.shared.parts).remove(part);
    }

    /// Returns a reporter for a part that ends when `shutdown` is cancelled.
    pub(crate) fn reporter(&self, part: &str, shutdown: &CancellationToken) -> Reporter {
        let hand = Hand::default();
        let starting = PartState { state: State::Starting, hand: Some(hand.clone()) };
        locked(&self.shared.parts).insert(part.to_owned(), starting);
        let health = self.clone();
        let shutdown = shutdown.clone();
        Reporter { health, part: part.into(), fine: false, fault: None, shutdown, attention: None, hand }
    }
}

/// Lets one part report its own state.
#[derive(Clone, Debug)]
pub(crate) struct Reporter {
    health: Health,
    part: Arc<str>,
    fine: bool,
    /// A fault that lasts until an operator repairs the cause. The part keeps working during the fault.
    fault: Option<Arc<str>>,
    shutdown: CancellationToken,
    /// Why the part needs an operator although it works.
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

    /// Sets or clears a fault. A part with a fault is reported as in trouble, even while the part keeps working.
    pub fn fault(&mut self, fault: Option<Arc<str>>) {
        if self.fault != fault {
            (self.fault, self.fine) = (fault, false);
        }
    }

    /// Sets or clears the reason why the part needs an operator. The reason is shown only while the part works.
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
        // A part that is stopping does not retry. Its errors are caused by other parts that end, and are not faults.
        if self.shutdown.is_cancelled() {
            return tracing::debug!(part = %self.part, %reason, "stopping");
        }
        self.fine = false;
        tracing::warn!(part = %self.part, %reason, "trying again");
        self.health.set(&self.part, State::Trouble(reason));
    }

    /// Records that the handler has received this message.
    pub fn take_in_hand(&self, message: &Message) {
        let Message { id, key, type_name, position, .. } = message;
        let key = key.clone();
        let type_name = type_name.clone();
        let since = Instant::now();
        *locked(&self.hand) = Some(InHand { id: *id, key, type_name, position: position.0, since });
    }

    /// Records that the handler has finished with the message.
    pub fn hands_free(&self) {
        *locked(&self.hand) = None;
    }
}
