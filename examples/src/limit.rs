//! How much an account may transfer on one day.

use std::{collections::BTreeMap, sync::Arc};

use annals::{Aggregate, Answer, Event, EventStore, Participant, Repository, StepError, Work};
use async_trait::async_trait;

/// The maximum amount that an account may transfer on one day, in pence.
pub const DAILY_LIMIT: u64 = 50_000;

// ANCHOR: limit
/// The events of the daily limit of an account.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "limit")]
pub enum LimitEvent {
    Reserved { day: String, transfer: String, pence: u64 },
    Released { day: String, transfer: String, pence: u64 },
}

/// The steps that transfers request from the service `limits`.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "limits")]
pub enum LimitStep {
    Reserve { account: String, day: String, transfer: String, pence: u64 },
    Release { account: String, day: String, transfer: String, pence: u64 },
}

/// The amount is more than what is left of the daily limit.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("only {0} pence of the daily limit are left")]
pub struct LimitReached(pub u64);

/// The amounts that an account transfers, by day.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Limit {
    used: BTreeMap<String, u64>,
}

impl Aggregate for Limit {
    const CATEGORY: &'static str = "limit";
    type Command = LimitStep;
    type Event = LimitEvent;
    type Refusal = LimitReached;

    fn decide(&self, step: &LimitStep) -> Result<Vec<LimitEvent>, LimitReached> {
        match step.clone() {
            LimitStep::Reserve { day, transfer, pence, .. } => {
                let left = DAILY_LIMIT - self.used.get(&day).copied().unwrap_or_default();
                if pence > left {
                    return Err(LimitReached(left));
                }
                Ok(vec![LimitEvent::Reserved { day, transfer, pence }])
            }
            LimitStep::Release { day, transfer, pence, .. } => Ok(vec![LimitEvent::Released { day, transfer, pence }]),
        }
    }

    fn evolve(&mut self, event: &LimitEvent) {
        match event {
            LimitEvent::Reserved { day, pence, .. } => *self.used.entry(day.clone()).or_default() += pence,
            LimitEvent::Released { day, pence, .. } => *self.used.entry(day.clone()).or_default() -= pence,
        }
    }
}
// ANCHOR_END: limit

/// Carries out the steps on limits.
pub struct Guard(Repository<Limit>);

impl Guard {
    /// Creates a guard for the limits in this store.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self(Repository::new(store))
    }
}

#[async_trait]
impl Participant for Guard {
    type Command = LimitStep;

    async fn perform(&self, step: LimitStep, work: &mut Work) -> Result<Answer, StepError> {
        let (LimitStep::Reserve { account, .. } | LimitStep::Release { account, .. }) = &step;
        work.execute(&self.0, account, &step).await?;
        Ok(Answer::DONE)
    }
}
