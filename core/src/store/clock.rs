//! The clock of a store, which all processes on the store use for timers and delays.

use std::{
    fmt,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};

/// The last moment at which anything can be due, which is the end of the year 9999. Every store, and every format for
/// documents or messages, can represent all earlier moments. A timer after this moment never fires.
pub const LAST_DUE_MILLISECONDS: i64 = 253_402_300_799_999;

/// The clock of a store. Clones share the same clock.
///
/// Timers, deadlines and retry delays compare a time written by one process with the current time of another process.
/// Therefore they all use the clock of the shared store, and never the clock of the machine. Between two readings of
/// the store's time, this clock follows the steady time of the machine, which neither an operator nor NTP adjusts.
///
/// A test controls a clock [by hand](Clock::by_hand):
///
/// ```
/// use std::time::Duration;
///
/// use annals::{Clock, MemoryStore};
///
/// let clock = Clock::by_hand(chrono::DateTime::UNIX_EPOCH);
/// let store = MemoryStore::with_clock(clock.clone());
/// clock.advance(Duration::from_secs(3 * 24 * 3_600));
/// assert_eq!(clock.now().to_rfc3339(), "1970-01-04T00:00:00+00:00");
/// # drop(store);
/// ```
#[derive(Clone)]
pub struct Clock(Arc<Hands>);

struct Hands {
    /// The offset added to the steady time of the machine, in microseconds.
    offset: AtomicI64,
    /// Whether the clock runs. A clock that is controlled by hand does not run.
    runs: bool,
}

/// The moment just before a store was asked for its time.
#[derive(Clone, Copy, Debug)]
pub struct Asked(i64);

/// The clock of this machine, shared by all stores without a clock of their own.
static MACHINE: LazyLock<Clock> = LazyLock::new(Clock::of_the_machine);

impl Clock {
    /// Returns a clock that reads the time of this machine only once. A later change of the machine's time does not
    /// affect this clock.
    pub fn machine() -> Self {
        MACHINE.clone()
    }

    /// Creates a separate clock for a store that reports its time. Until the first report, this clock shows the time of
    /// the machine.
    pub fn of_the_machine() -> Self {
        let offset = wall_microseconds().saturating_sub(steady_microseconds());
        Self(Arc::new(Hands { offset: offset.into(), runs: true }))
    }

    /// Creates a clock that stands still at `start` until a test advances the clock.
    pub fn by_hand(start: DateTime<Utc>) -> Self {
        Self(Arc::new(Hands { offset: start.timestamp_micros().into(), runs: false }))
    }

    /// Moves the clock forward. Timers that become due fire within a tenth of a second.
    pub fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_micros()).unwrap_or(i64::MAX);
        let moved = |offset: i64| Some(offset.saturating_add(by).min(LAST_DUE_MILLISECONDS * 1_000));
        // The closure always returns a value, so there is no error to handle.
        _ = self.0.offset.fetch_update(Ordering::SeqCst, Ordering::SeqCst, moved);
    }

    /// Returns the current time.
    pub fn now(&self) -> DateTime<Utc> {
        let steady = if self.0.runs { steady_microseconds() } else { 0 };
        let now = steady.saturating_add(self.0.offset.load(Ordering::SeqCst));
        DateTime::from_timestamp_micros(now).unwrap_or_default()
    }

    /// Returns the time after this delay; `None` if that time is beyond the end of the calendar and therefore never
    /// comes.
    pub fn due_in(&self, delay: Duration) -> Option<DateTime<Utc>> {
        later(self.now().timestamp_millis(), delay).and_then(DateTime::from_timestamp_millis)
    }

    /// Marks the moment before a store is asked for its time.
    pub fn ask(&self) -> Asked {
        Asked(steady_microseconds())
    }

    /// Applies the answer of the store, whose time was `server_time` at some moment since [`ask`](Clock::ask). The
    /// clock moves only as far as needed to agree with the answer, so a slow answer does not move a correct clock.
    pub fn answered(&self, asked: Asked, server_time: DateTime<Utc>) {
        self.correct(asked.0, steady_microseconds(), server_time.timestamp_micros());
    }

    fn correct(&self, asked: i64, answered: i64, server_time: i64) {
        if !self.0.runs {
            return;
        }
        let least = server_time.saturating_sub(answered);
        let most = server_time.saturating_sub(asked).max(least);
        let offset = self.0.offset.load(Ordering::SeqCst);
        if offset < least || offset > most {
            self.0.offset.store(offset.clamp(least, most), Ordering::SeqCst);
        }
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::machine()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Clock").field(&self.now()).finish()
    }
}

/// Returns the moment `delay` after `now`, in milliseconds since 1970; `None` if the moment is beyond the calendar.
pub(crate) fn later(now: i64, delay: Duration) -> Option<i64> {
    let delay = i64::try_from(delay.as_millis()).ok()?;
    now.checked_add(delay).filter(|due| *due <= LAST_DUE_MILLISECONDS)
}

/// Returns the steady time of the operating system in microseconds. A change of the machine's clock does not affect the
/// steady time. The steady time also advances while the machine sleeps.
#[cfg(target_os = "linux")]
fn steady_microseconds() -> i64 {
    microseconds(rustix::time::clock_gettime(rustix::time::ClockId::Boottime))
}

#[cfg(target_os = "linux")]
fn wall_microseconds() -> i64 {
    microseconds(rustix::time::clock_gettime(rustix::time::ClockId::Realtime))
}

#[cfg(target_os = "linux")]
fn microseconds(time: rustix::time::Timespec) -> i64 {
    time.tv_sec.saturating_mul(1_000_000).saturating_add(time.tv_nsec / 1_000)
}

#[cfg(not(target_os = "linux"))]
fn steady_microseconds() -> i64 {
    static START: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);
    i64::try_from(START.elapsed().as_micros()).unwrap_or(i64::MAX)
}

#[cfg(not(target_os = "linux"))]
fn wall_microseconds() -> i64 {
    Utc::now().timestamp_micros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurement_moves_the_clock_only_as_far_as_needed() {
        let clock = Clock(Arc::new(Hands { offset: 1_000.into(), runs: true }));
        let offset = || clock.0.offset.load(Ordering::SeqCst);
        // The clock agrees with the answer: the time of the store was 1,050 at some moment between 40 and 60.
        clock.correct(40, 60, 1_050);
        assert_eq!(offset(), 1_000);
        // The store is an hour ahead, then an hour behind.
        clock.correct(100, 120, 3_600_001_100);
        assert_eq!(offset(), 3_600_000_980);
        clock.correct(200, 220, -3_599_999_000);
        assert_eq!(offset(), -3_599_999_200);
        // A slow answer carries little information.
        clock.correct(0, 10_000_000, -3_599_000_000);
        assert_eq!(offset(), -3_599_999_200);
    }

    #[test]
    fn times_beyond_the_calendar_are_never_due() {
        assert_eq!(later(5, Duration::from_millis(7)), Some(12));
        for delay in [Duration::MAX, Duration::from_secs(u64::MAX / 1_000), Duration::from_secs(9_000 * 366 * 86_400)] {
            assert_eq!(later(1_800_000_000_000, delay), None, "{delay:?}");
        }
        let clock = Clock::by_hand(DateTime::UNIX_EPOCH);
        assert_eq!(clock.due_in(Duration::MAX), None);
        clock.advance(Duration::MAX);
        assert_eq!(clock.now().timestamp_millis(), LAST_DUE_MILLISECONDS);
        assert_eq!(clock.due_in(Duration::from_secs(1)), None);
    }

    #[test]
    fn machine_clock_is_shared_and_advances() {
        let machine = Clock::machine();
        let before = machine.now();
        std::thread::sleep(Duration::from_millis(2));
        assert!(Clock::machine().now() > before);
        assert!((machine.now() - Utc::now()).num_seconds().abs() < 60);
    }
}
