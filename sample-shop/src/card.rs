//! The cards with which customers pay. Real payment providers offer such test cards: the card decides what the
//! simulated provider does. The client that places an order chooses the card at random, so no service needs to know the
//! seed.

use serde::{Deserialize, Serialize};

/// What happens to a payment with this card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Card {
    /// The card is charged.
    #[default]
    Good,
    /// The issuer declines.
    Declined,
    /// The card is charged, and the customer cancels the order while the checkout runs: after the charge and before the
    /// confirmation.
    Withdrawn,
}

impl Card {
    /// Returns whether this is the default card, which the events of an order leave out.
    pub fn is_good(&self) -> bool {
        *self == Self::Good
    }
}
