//! The requests of a customer to a shop.

use async_trait::async_trait;

use crate::{
    card::Card,
    input::{Change, Line},
};

/// A shop that accepts submissions: the shop in this process, or a shop behind HTTP. A caller may repeat a submission
/// any number of times; the shop accepts it once.
#[async_trait]
pub trait Shop: Clone + Send + Sync + 'static {
    /// Accepts an order, a return, a delivery or a stock count. The error is the reason for a rejection.
    async fn submit(&self, submission: Submission) -> Result<Accepted, String>;
    /// Waits until the saga of an accepted submission ends. Called only if the saga had not ended when the submission
    /// was accepted.
    async fn wait_for_end(&self, kind: SubmissionKind, id: &str) -> Result<SagaEnd, String>;
}

/// What a customer or a supplier submits.
#[derive(Clone, Debug)]
pub enum Submission {
    /// A customer orders.
    Order {
        /// The number of the invoice.
        id: String,
        /// The customer; `None` is a guest.
        customer: Option<String>,
        /// The goods and their prices.
        lines: Vec<Line>,
        /// The card that pays.
        card: Card,
    },
    /// A customer sends goods back.
    Return {
        /// The number of the invoice.
        id: String,
        /// The customer; `None` is a guest.
        customer: Option<String>,
        /// The goods that come back, and the prices to refund.
        lines: Vec<Line>,
    },
    /// A supplier delivers goods.
    Delivery {
        /// The name of the delivery.
        id: String,
        /// The units of each SKU.
        units: Vec<Change>,
    },
    /// A stock count found more or fewer units.
    Adjustment {
        /// The number of the invoice.
        id: String,
        /// The difference of each SKU.
        units: Vec<Change>,
    },
}

/// The kind of a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubmissionKind {
    /// An order.
    Order,
    /// A return.
    Return,
    /// A delivery or a stock count.
    Supply,
}

impl SubmissionKind {
    /// The word that people use for an invoice of this kind.
    pub fn name(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Return => "return",
            Self::Supply => "adjustment",
        }
    }
}

/// The state of a submission that was accepted.
#[derive(Clone, Debug, Default)]
pub struct Accepted {
    /// Whether an earlier run made the same submission.
    pub repeated: bool,
    /// The changes of stock in a delivery or in a stock count, as the shop first accepted the changes.
    pub units: Vec<Change>,
    /// How the saga of the submission ended, if it has ended.
    pub end: Option<SagaEnd>,
}

/// How the saga of a submission ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SagaEnd {
    /// The saga completed, or was compensated.
    Ended,
    /// The saga is waiting for an operator.
    Stuck,
}
