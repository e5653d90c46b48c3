//! The timers of sagas that this process remembers. A timer is the time at which the document of a saga becomes due,
//! because of a step, of the saga's deadline or of an operator's request.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use chrono::{DateTime, TimeDelta, Utc};

use super::progress::Fault;

/// The maximum number of timers that a process remembers, at about 200 bytes each. The store holds all timers. A timer
/// that is not remembered fires in the store's order, after the timers that were due before it.
const KNOWN_MAX: usize = 20_000;
/// The maximum number of sagas per service that are remembered because the service has not answered them.
const SILENT_MAX: usize = 1_000;
/// The maximum number of sagas that are remembered because they accept no input. Health names one of them.
const REFUSED_MAX: usize = 100;

/// The timers that this process remembers. Clones share the same timers.
/// With the remembered timers, the process need not query a store in which no timer is due. Also, a timer that has just
/// become due does not wait behind a backlog: after downtime, the store may return thousands of timers that were due
/// earlier.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timers(Arc<Mutex<KnownTimers>>);

#[derive(Debug, Default)]
struct KnownTimers {
    by_due: BTreeSet<(DateTime<Utc>, Arc<str>)>,
    due_of: HashMap<Arc<str>, DateTime<Utc>>,
    /// The time of the earliest future timer that the last query of the store found.
    ahead: Option<DateTime<Utc>>,
    /// The sagas that each service has not answered in time.
    silent: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// The sagas whose timers were refused, with the reasons.
    refused: BTreeMap<Arc<str>, String>,
}

impl Timers {
    fn known(&self) -> MutexGuard<'_, KnownTimers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the timer of this saga; `None` removes it.
    pub(crate) fn set(&self, id: &str, due: Option<DateTime<Utc>>) {
        let mut known = self.known();
        let KnownTimers { by_due, due_of, .. } = &mut *known;
        if let Some((id, before)) = due_of.remove_entry(id) {
            by_due.remove(&(before, id));
        }
        let Some(due) = due else { return };
        let id: Arc<str> = id.into();
        due_of.insert(id.clone(), due);
        by_due.insert((due, id));
        if by_due.len() > KNOWN_MAX
            && let Some((_, last)) = by_due.pop_last()
        {
            due_of.remove(&last);
        }
    }

    /// Removes and returns the timers that are due, the latest first, so that a timer that has just become due does not
    /// wait behind a backlog.
    pub(super) fn take_due(&self, now: DateTime<Utc>, limit: usize) -> Vec<(DateTime<Utc>, Arc<str>)> {
        let mut known = self.known();
        let KnownTimers { by_due, due_of, .. } = &mut *known;
        let mut taken = Vec::new();
        let end = (now + TimeDelta::microseconds(1), Arc::from(""));
        while taken.len() < limit {
            let Some(latest) = by_due.range(..end.clone()).next_back().cloned() else { break };
            by_due.remove(&latest);
            due_of.remove(&latest.1);
            taken.push(latest);
        }
        taken
    }

    /// Returns whether the last query of the store found a timer that is due at `now`.
    pub(super) fn is_ahead(&self, now: DateTime<Utc>) -> bool {
        self.known().ahead.is_some_and(|ahead| ahead <= now)
    }

    /// Records that a saga has changed: either `fault` names services that have not answered the saga, or the saga no
    /// longer waits for an answer.
    pub(crate) fn heard(&self, id: &str, fault: Option<&Fault>) {
        let mut known = self.known();
        known.silent.retain(|_, sagas| {
            sagas.remove(id);
            !sagas.is_empty()
        });
        for service in fault.into_iter().flat_map(|fault| &fault.silent) {
            let sagas = known.silent.entry(service.clone()).or_default();
            if sagas.len() < SILENT_MAX {
                sagas.insert(id.into());
            }
        }
    }

    /// Returns a message that names the services that do not answer.
    pub(super) fn silence(&self) -> Option<String> {
        let known = self.known();
        let one = |(service, sagas): (&String, &BTreeSet<Arc<str>>)| {
            format!(
                "no answer from {service:?} to {} sagas: check that a service of that name runs and has a participant",
                sagas.len()
            )
        };
        let all: Vec<_> = known.silent.iter().map(one).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Records that a saga has refused its timer for this reason. Returns whether the reason is new.
    pub(super) fn refuse(&self, id: &str, reason: &str) -> bool {
        let mut known = self.known();
        if known.refused.get(id).is_some_and(|refused| refused == reason) || known.refused.len() >= REFUSED_MAX {
            return false;
        }
        known.refused.insert(id.into(), reason.to_owned());
        true
    }

    /// Records that a saga no longer refuses its timer.
    pub(super) fn accept(&self, id: &str) {
        self.known().refused.remove(id);
    }

    /// Returns the sagas that have refused their timers, with the reasons.
    pub(super) fn refused(&self) -> Vec<(Arc<str>, String)> {
        self.known().refused.clone().into_iter().collect()
    }

    pub(super) fn look_again_at(&self, ahead: Option<DateTime<Utc>>) {
        self.known().ahead = ahead;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds)
    }

    fn ids(taken: Vec<(DateTime<Utc>, Arc<str>)>) -> Vec<String> {
        taken.into_iter().map(|(_, id)| id.to_string()).collect()
    }

    #[test]
    fn due_timers_are_sorted_latest_first() {
        let timers = Timers::default();
        for (id, due) in [("a", 7), ("b", 5), ("c", 9), ("d", 6)] {
            timers.set(id, Some(at(due)));
        }
        assert!(timers.take_due(at(4), 10).is_empty());
        assert_eq!(ids(timers.take_due(at(7), 2)), ["a", "d"]);
        timers.set("b", Some(at(8)));
        timers.set("c", None);
        assert!(timers.take_due(at(7), 10).is_empty());
        assert_eq!(ids(timers.take_due(at(9), 10)), ["b"]);
        assert!(timers.known().due_of.is_empty());
    }

    #[test]
    fn remembered_timers_are_limited_and_the_furthest_is_dropped() {
        let timers = Timers::default();
        for number in 0..=KNOWN_MAX {
            timers.set(&number.to_string(), Some(at(number as i64)));
        }
        assert_eq!(timers.known().due_of.len(), KNOWN_MAX);
        assert_eq!(ids(timers.take_due(at(i64::from(u32::MAX)), 1)), [(KNOWN_MAX - 1).to_string()]);
    }
}
