//! The cards that customers pay with. As real payment providers have them, these are test cards: the card itself says
//! what the simulated provider does with it, so whoever places an order draws its luck, and no service needs to know a seed.

use annals::event::named_id;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What becomes of a payment with this card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Card {
    /// It is charged.
    #[default]
    Good,
    /// Its issuer says no.
    Declined,
    /// It is charged, and its holder cancels the order while the checkout runs: after the charge, before the confirmation.
    Withdrawn,
}

/// How often customers have no luck, or change their minds; from 0 to 1.
#[derive(Clone, Copy, Debug)]
pub struct Chances {
    /// All chance comes from it.
    pub seed: u64,
    /// Share of cards that are declined.
    pub decline_rate: f64,
    /// Share of customers who cancel while their checkout runs.
    pub cancel_rate: f64,
}

impl Chances {
    /// The card that an order is paid with: the same on every run.
    pub fn card(&self, order_id: &str) -> Card {
        if draw(self.seed, "decline", order_id) < self.decline_rate {
            Card::Declined
        } else if draw(self.seed, "cancel", order_id) < self.cancel_rate {
            Card::Withdrawn
        } else {
            Card::Good
        }
    }
}

impl Card {
    /// Whether there is nothing to say about it. Events of such orders do not mention their cards.
    pub fn is_good(&self) -> bool {
        *self == Self::Good
    }
}

/// A number from 0 to 1 that depends on nothing but its arguments, so that chance is the same on every run and in every
/// order of events.
pub fn draw(seed: u64, what: &str, id: &str) -> f64 {
    let hash = named_id(Uuid::from_u64_pair(seed, 0), &format!("{what}/{id}"));
    (hash.as_u64_pair().0 >> 11) as f64 / (1u64 << 53) as f64
}
