//! The steps that sagas ask the payment service to carry out. Each charge and each refund is sent to the provider once.

use std::sync::Arc;

use annals::{Aggregate, Answer, Event, EventStore, Participant, Repository, StepError, Work};
use async_trait::async_trait;
use rust_decimal::Decimal;

use super::{
    aggregate::{Payment, PaymentEvent},
    books::MoneyBooks,
    provider::{Provider, ProviderError},
};
use crate::{books::Bookkeeper, card::Card};

/// A step of a saga, as a command to the payment service.
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

/// Carries out the steps of the payment service.
pub struct PaymentParticipant {
    payments: Repository<Payment>,
    provider: Arc<dyn Provider>,
    bookkeeper: Bookkeeper<MoneyBooks>,
}

impl PaymentParticipant {
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
impl Participant for PaymentParticipant {
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
                        let declined = PaymentEvent::Declined {
                            order_id: order_id.clone(),
                            amount,
                            currency,
                            reason: reason.clone(),
                        };
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
