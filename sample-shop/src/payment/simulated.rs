//! A simulated payment provider.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use annals::event::named_id;
use async_trait::async_trait;
use rust_decimal::Decimal;
use uuid::Uuid;

use super::provider::{Provider, ProviderError};
use crate::card::Card;

/// The share of requests to the simulated provider that fail at the first attempt. Half of those requests get the
/// answer `Busy`; the other half time out after the money has moved.
pub const TROUBLE_RATE: f64 = 0.002;

/// A simulated provider that does what the [card](Card) says. A seed decides which requests fail at the first attempt.
pub struct SimulatedProvider {
    seed: u64,
    trouble_rate: f64,
    /// Requests that have already failed once.
    troubled: Mutex<HashSet<Uuid>>,
}

impl SimulatedProvider {
    pub fn new(seed: u64, trouble_rate: f64) -> Self {
        Self { seed, trouble_rate, troubled: Mutex::default() }
    }

    fn trouble(&self, key: Uuid, id: &str) -> Result<(), ProviderError> {
        let draw = draw(self.seed, "trouble", id);
        if draw >= self.trouble_rate {
            return Ok(());
        }
        let mut troubled = self.troubled.lock().unwrap_or_else(PoisonError::into_inner);
        if troubled.remove(&key) {
            return Ok(());
        }
        troubled.insert(key);
        Err(if draw < self.trouble_rate / 2.0 { ProviderError::Busy } else { ProviderError::TimedOut })
    }
}

#[async_trait]
impl Provider for SimulatedProvider {
    async fn charge(&self, key: Uuid, order_id: &str, card: Card, _amount: Decimal) -> Result<(), ProviderError> {
        self.trouble(key, order_id)?;
        match card {
            Card::Declined => Err(ProviderError::Declined("insufficient funds".into())),
            Card::Good | Card::Withdrawn => Ok(()),
        }
    }

    async fn refund(&self, key: Uuid, id: &str, _amount: Decimal) -> Result<(), ProviderError> {
        self.trouble(key, id)
    }
}

/// Returns a pseudo-random number from 0 to 1 that depends only on the arguments, so that the number is the same on
/// every run, regardless of the order of the events.
fn draw(seed: u64, what: &str, id: &str) -> f64 {
    let hash = named_id(Uuid::from_u64_pair(seed, 0), &format!("{what}/{id}"));
    (hash.as_u64_pair().0 >> 11) as f64 / (1u64 << 53) as f64
}
