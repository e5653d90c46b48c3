//! When the timers of a saga want to be looked at.

use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, TimeDelta, Utc};

/// How long after a timer was due it is still looked for: until then the index has written it down.
const OVERDUE: TimeDelta = TimeDelta::seconds(2);

/// The earliest timer that this process knows of, so that a store in which nothing is due is seldom asked. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timers(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    earliest: Option<DateTime<Utc>>,
    /// The next one that was set when that was due.
    next: Option<DateTime<Utc>>,
}

impl Timers {
    /// There is one at this time.
    pub(crate) fn set(&self, due: DateTime<Utc>, now: DateTime<Utc>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { earliest, next } = &mut *known;
        let place = if earliest.is_some_and(|earliest| earliest <= now) { next } else { earliest };
        *place = Some(place.map_or(due, |known| known.min(due)));
    }

    /// Whether one is due, or was a moment ago.
    pub(crate) fn are_due(&self, now: DateTime<Utc>) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.earliest.is_some_and(|earliest| earliest + OVERDUE < now) {
            known.earliest = known.next.take();
        }
        known.earliest.is_some_and(|earliest| earliest <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_counts_and_then_the_next() {
        let (timers, start) = (Timers::default(), Utc::now());
        let after = |seconds| start + TimeDelta::seconds(seconds);
        assert!(!timers.are_due(start));
        for seconds in [7, 5, 9] {
            timers.set(after(seconds), start);
        }
        assert_eq!([4, 5, 7].map(|seconds| timers.are_due(after(seconds))), [false, true, true]);
        for seconds in [12, 11] {
            timers.set(after(seconds), after(7));
        }
        assert_eq!([8, 11, 13, 14].map(|seconds| timers.are_due(after(seconds))), [false, true, true, false]);
    }
}
