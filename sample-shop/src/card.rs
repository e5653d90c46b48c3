//! The cards that customers pay with. They are test cards, as real payment providers offer them: the card itself tells
//! the simulated provider what to do. The client that places an order draws the card, and no service needs to know a
//! seed.

use annals::event::named_id;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What happens to a payment with this card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Card {
    /// The card is charged.
    #[default]
    Good,
    /// The issuer declines.
    Declined,
    /// The card is charged, and its holder cancels the order while the checkout runs: after the charge, before the
    /// confirmation.
    Withdrawn,
}

/// How often cards are declined or customers change their minds, from 0 to 1.
#[derive(Clone, Copy, Debug)]
pub struct Chances {
    /// The seed of all random choices.
    pub seed: u64,
    /// Share of cards that are declined.
    pub decline_rate: f64,
    /// Share of customers who cancel while their checkout runs.
    pub cancel_rate: f64,
}

impl Chances {
    /// Returns the card that an order is paid with: the same on every run.
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
    /// Returns whether this is the default card. Events of orders with it do not mention the card.
    pub fn is_good(&self) -> bool {
        *self == Self::Good
    }
}

/// Returns a number from 0 to 1 that depends on the arguments alone, so that chance is the same on every run and in
/// every order of events.
pub fn draw(seed: u64, what: &str, id: &str) -> f64 {
    let hash = named_id(Uuid::from_u64_pair(seed, 0), &format!("{what}/{id}"));
    (hash.as_u64_pair().0 >> 11) as f64 / (1u64 << 53) as f64
}
