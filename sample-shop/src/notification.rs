//! The notification service: notifies the customer once of the outcome of an order or a return.

mod aggregate;
mod participant;

pub use self::{
    aggregate::{NotificationEvent, Notifications},
    participant::{NotificationParticipant, NotificationStep},
};
