//! The payment service: charges cards and refunds money.

mod aggregate;
mod books;
mod participant;
mod provider;
mod simulated;

pub use self::{
    aggregate::{Payment, PaymentEvent},
    books::MoneyBooks,
    participant::{PaymentParticipant, PaymentStep},
    provider::{Provider, ProviderError},
    simulated::{SimulatedProvider, TROUBLE_RATE},
};
