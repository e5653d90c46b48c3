//! The steps that sagas ask the notification service to carry out.

use std::sync::Arc;

use annals::{Answer, Event, EventStore, Participant, Repository, StepError, Work};
use async_trait::async_trait;

use super::aggregate::{NotificationEvent, Notifications};

/// A step of a saga, as a command to the notification service.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "notification")]
pub enum NotificationStep {
    OrderEnded { order_id: String, customer: Option<String>, subject: String },
    ReturnEnded { return_id: String, customer: Option<String> },
}

/// Carries out the steps of the notification service.
pub struct NotificationParticipant {
    notifications: Repository<Notifications>,
}

impl NotificationParticipant {
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { notifications: Repository::new(store) }
    }
}

#[async_trait]
impl Participant for NotificationParticipant {
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
