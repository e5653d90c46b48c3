//! The payment service: sends each charge and each refund to a provider, once.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use annals::{Aggregate, Answer, Event, EventStore, Participant, Repository, StepError, Work};
use async_trait::async_trait;
use rust_decimal::Decimal;
use uuid::Uuid;

use crate::{
    books::Bookkeeper,
    card::{Card, draw},
};

/// What happens to a payment.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "payment")]
pub enum PaymentEvent {
    /// The card was charged.
    Charged { order_id: String, amount: Decimal, currency: String },
    /// The provider declined the charge.
    Declined { order_id: String, amount: Decimal, currency: String, reason: String },
    /// Money was refunded for an order or a return.
    Refunded {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        order_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        return_id: Option<String>,
        amount: Decimal,
        currency: String,
    },
}

/// The payment of an order or a return.
#[derive(Clone, Debug, Default)]
pub struct Payment {
    charged: bool,
    refunded: bool,
}

/// A payment accepts every command, because the saga and the provider decide what may happen.
impl Aggregate for Payment {
    const CATEGORY: &'static str = "payment";
    type Command = PaymentEvent;
    type Event = PaymentEvent;
    type Refusal = std::convert::Infallible;

    fn decide(&self, fact: &PaymentEvent) -> Result<Vec<PaymentEvent>, Self::Refusal> {
        let known = match fact {
            PaymentEvent::Charged { .. } => self.charged,
            // A charge of unknown outcome was never in the books, so its refund is not booked either.
            PaymentEvent::Refunded { order_id: Some(_), .. } if !self.charged => true,
            PaymentEvent::Refunded { .. } => self.refunded,
            PaymentEvent::Declined { .. } => false,
        };
        Ok(if known { vec![] } else { vec![fact.clone()] })
    }

    fn evolve(&mut self, event: &PaymentEvent) {
        match event {
            PaymentEvent::Charged { .. } => self.charged = true,
            PaymentEvent::Refunded { .. } => self.refunded = true,
            PaymentEvent::Declined { .. } => {}
        }
    }
}

/// The steps that sagas ask the payment service to carry out.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "payment")]
pub enum PaymentStep {
    Charge {
        order_id: String,
        amount: Decimal,
        currency: String,
        #[serde(default, skip_serializing_if = "Card::is_good")]
        card: Card,
    },
    Refund {
        order_id: String,
        amount: Decimal,
        currency: String,
    },
    RefundReturn {
        return_id: String,
        amount: Decimal,
        currency: String,
    },
    /// Returns the books of the payments: the amounts charged and refunded.
    Count,
}

/// Why a provider did not move the money.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProviderError {
    /// The issuer of the card declined.
    #[error("declined: {0}")]
    Declined(String),
    /// The charge did not happen. The caller can try again.
    #[error("the provider is busy")]
    Busy,
    /// The outcome is unknown. The caller must try again with the same key.
    #[error("the provider did not answer in time")]
    TimedOut,
}

impl From<ProviderError> for StepError {
    fn from(error: ProviderError) -> Self {
        let reason = error.to_string();
        match error {
            ProviderError::Declined(_) => Self::Refused(reason),
            ProviderError::Busy => Self::Failed(reason),
            ProviderError::TimedOut => Self::Unknown(reason),
        }
    }
}

/// Moves money. Requests with the same key move the money once, however often they are repeated.
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    async fn charge(&self, key: Uuid, order_id: &str, card: Card, amount: Decimal) -> Result<(), ProviderError>;
    /// Refunds at most the amount that was charged for `id`. If nothing was charged, refunds nothing.
    async fn refund(&self, key: Uuid, id: &str, amount: Decimal) -> Result<(), ProviderError>;
}

/// Carries out the steps of the payment service.
pub struct PaymentDesk {
    payments: Repository<Payment>,
    provider: Arc<dyn Provider>,
    bookkeeper: Bookkeeper,
}

impl PaymentDesk {
    pub fn new(store: Arc<dyn EventStore>, provider: Arc<dyn Provider>) -> Self {
        let bookkeeper = Bookkeeper::new("payment", &[Payment::CATEGORY], store.clone());
        Self { payments: Repository::new(store), provider, bookkeeper }
    }

    async fn refund(
        &self,
        id: &str,
        amount: Decimal,
        fact: PaymentEvent,
        work: &mut Work,
    ) -> Result<Answer, StepError> {
        self.provider.refund(work.cause_id(), id, amount).await?;
        work.execute(&self.payments, id, &fact).await?;
        Ok(Answer::DONE)
    }
}

#[async_trait]
impl Participant for PaymentDesk {
    type Command = PaymentStep;

    async fn perform(&self, step: PaymentStep, work: &mut Work) -> Result<Answer, StepError> {
        match step {
            PaymentStep::Charge { order_id, amount, currency, card } => {
                match self.provider.charge(work.cause_id(), &order_id, card, amount).await {
                    Ok(()) => {
                        let charged = PaymentEvent::Charged { order_id: order_id.clone(), amount, currency };
                        work.create(&self.payments, &order_id, &charged).await?;
                        Ok(Answer::DONE)
                    }
                    Err(ProviderError::Declined(reason)) => {
                        let (id, why) = (order_id.clone(), reason.clone());
                        let declined = PaymentEvent::Declined { order_id: id, amount, currency, reason: why };
                        work.create(&self.payments, &order_id, &declined).await?;
                        Ok(Answer::Refused(reason))
                    }
                    Err(error) => Err(error.into()),
                }
            }
            PaymentStep::Refund { order_id, amount, currency } => {
                let fact =
                    PaymentEvent::Refunded { order_id: Some(order_id.clone()), return_id: None, amount, currency };
                self.refund(&order_id, amount, fact, work).await
            }
            PaymentStep::RefundReturn { return_id, amount, currency } => {
                let fact =
                    PaymentEvent::Refunded { order_id: None, return_id: Some(return_id.clone()), amount, currency };
                self.refund(&return_id, amount, fact, work).await
            }
            PaymentStep::Count => self.bookkeeper.count(work).await,
        }
    }
}

/// The share of requests to the simulated provider that fail at the first attempt. Half of those requests are answered
/// as busy; the other half time out after the money has moved.
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
