//! The notifications about orders and returns.

use std::collections::BTreeSet;

use annals::{Aggregate, Event};

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
