//! Chooses the card with which each order is paid.

use serde::Serialize;
use uuid::Uuid;

/// A test card. The card decides what the simulated payment provider of the shop does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Card {
    /// The card is charged.
    #[default]
    Good,
    /// The issuer declines.
    Declined,
    /// The card is charged, and the customer cancels the order before it is confirmed.
    Withdrawn,
}

/// The probabilities that a card is declined or that a customer cancels, from 0 to 1.
#[derive(Clone, Copy, Debug)]
pub struct Chances {
    /// The seed of all random choices.
    pub seed: u64,
    /// The share of declined cards.
    pub decline_rate: f64,
    /// The share of customers who cancel while their checkout runs.
    pub cancel_rate: f64,
}

impl Chances {
    /// Returns the card for an order. Every run returns the same card.
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

/// Returns a pseudo-random number from 0 to 1 that depends only on the arguments, so that the number is the same on
/// every run, regardless of the order in which the invoices are submitted.
fn draw(seed: u64, what: &str, id: &str) -> f64 {
    let hash = Uuid::new_v5(&Uuid::from_u64_pair(seed, 0), format!("{what}/{id}").as_bytes());
    (hash.as_u64_pair().0 >> 11) as f64 / (1u64 << 53) as f64
}
