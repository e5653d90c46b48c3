//! The notification service: notifies the customer once of the outcome of an order or a return.

use std::{collections::BTreeSet, sync::Arc};

use annals::{Aggregate, Answer, Event, EventStore, Participant, Repository, StepError, Work};
use async_trait::async_trait;

/// What happens to the notifications about an order or a return.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "notification")]
pub enum NotificationEvent {
    /// The customer was notified.
    Sent {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        order_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        return_id: Option<String>,
        subject: String,
        customer: Option<String>,
    },
}

/// The notifications about one order or return.
#[derive(Clone, Debug, Default)]
pub struct Notifications {
    sent: BTreeSet<String>,
}

impl Aggregate for Notifications {
    const CATEGORY: &'static str = "notification";
    type Command = NotificationEvent;
    type Event = NotificationEvent;
    type Refusal = std::convert::Infallible;

    fn decide(&self, fact: &NotificationEvent) -> Result<Vec<NotificationEvent>, Self::Refusal> {
        let NotificationEvent::Sent { subject, .. } = fact;
        Ok(if self.sent.contains(subject) { vec![] } else { vec![fact.clone()] })
    }

    fn evolve(&mut self, NotificationEvent::Sent { subject, .. }: &NotificationEvent) {
        self.sent.insert(subject.clone());
    }
}

/// The steps that sagas ask the notification service to carry out.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "notification")]
pub enum NotificationStep {
    OrderEnded { order_id: String, customer: Option<String>, subject: String },
    ReturnEnded { return_id: String, customer: Option<String> },
}

/// Carries out the steps of the notification service.
pub struct NotificationDesk {
    notifications: Repository<Notifications>,
}

impl NotificationDesk {
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { notifications: Repository::new(store) }
    }
}

#[async_trait]
impl Participant for NotificationDesk {
    type Command = NotificationStep;

    async fn perform(&self, step: NotificationStep, work: &mut Work) -> Result<Answer, StepError> {
        let (id, fact) = match step {
            NotificationStep::OrderEnded { order_id, customer, subject } => (
                order_id.clone(),
                NotificationEvent::Sent { order_id: Some(order_id), return_id: None, subject, customer },
            ),
            NotificationStep::ReturnEnded { return_id, customer } => {
                let subject = "return completed".to_owned();
                (
                    return_id.clone(),
                    NotificationEvent::Sent { order_id: None, return_id: Some(return_id), subject, customer },
                )
            }
        };
        work.create(&self.notifications, &id, &fact).await?;
        Ok(Answer::DONE)
    }
}
