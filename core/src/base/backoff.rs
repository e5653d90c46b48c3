//! Growing delays after failures. The delays have jitter, so that many clients do not retry at the same moment.

use std::time::Duration;

/// Delays that double from a lower to an upper bound. Each actual delay is a random value from the upper half of the
/// nominal delay.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
    longest: Duration,
}

impl Backoff {
    /// Returns the backoff for writers that compete for one stream. The delays last about as long as a few commits.
    pub fn short() -> Self {
        Self::between(Duration::from_micros(200), Duration::from_millis(50))
    }

    /// Returns the backoff for a store or a bus that is unavailable.
    pub fn long() -> Self {
        Self::between(Duration::from_millis(50), Duration::from_secs(5))
    }

    pub fn between(first: Duration, longest: Duration) -> Self {
        Self { next: first, first, longest }
    }

    pub fn next(&mut self) -> Duration {
        let delay = self.next / 2 + (self.next / 2).mul_f64(fastrand::f64());
        self.next = self.next.saturating_mul(2).min(self.longest);
        delay
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    pub fn reset(&mut self) {
        self.next = self.first;
    }
}
