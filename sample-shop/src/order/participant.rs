//! The steps that sagas ask the order service to carry out.

use annals::{Answer, Event, Participant, Repository, StepError, Work};
use async_trait::async_trait;

use super::{
    aggregate::{Order, OrderCommand},
    books::OrderBooks,
    closing::{Closing, ClosingCommand, ShopBooks},
    repositories::Repositories,
    returns::{Return, ReturnCommand},
};
use crate::books::Bookkeeper;

/// A step of a saga, as a command to the order service.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "order")]
pub enum OrderStep {
    Confirm {
        order_id: String,
    },
    /// Sent instead of `Confirm` if the customer cancels while the checkout runs.
    Withdraw {
        order_id: String,
    },
    Cancel {
        order_id: String,
        reason: String,
    },
    CompleteReturn {
        return_id: String,
    },
    /// Completes a closing (a request for the totals of the whole shop) with the totals of the other services.
    Close {
        closing_id: String,
        books: ShopBooks,
    },
}

/// The cancellation reason of an order that its customer cancelled.
pub const BY_CUSTOMER: &str = "by_customer";

/// Carries out the steps of the order service.
pub struct OrderParticipant {
    orders: Repository<Order>,
    returns: Repository<Return>,
    closings: Repository<Closing>,
    bookkeeper: Bookkeeper<OrderBooks>,
}

impl OrderParticipant {
    pub fn new(repositories: Repositories, bookkeeper: Bookkeeper<OrderBooks>) -> Self {
        let Repositories { orders, returns, closings, .. } = repositories;
        Self { orders, returns, closings, bookkeeper }
    }
}

#[async_trait]
impl Participant for OrderParticipant {
    type Command = OrderStep;

    async fn perform(&self, step: OrderStep, work: &mut Work) -> Result<Answer, StepError> {
        match step {
            OrderStep::Confirm { order_id } => {
                work.execute(&self.orders, &order_id, &OrderCommand::Confirm).await?;
            }
            OrderStep::Withdraw { order_id } => {
                let cancel = OrderCommand::Cancel { reason: BY_CUSTOMER.into() };
                work.execute(&self.orders, &order_id, &cancel).await?;
                return Ok(Answer::Refused("the customer has cancelled".into()));
            }
            OrderStep::Cancel { order_id, reason } => {
                work.execute(&self.orders, &order_id, &OrderCommand::Cancel { reason }).await?;
            }
            OrderStep::CompleteReturn { return_id } => {
                work.execute(&self.returns, &return_id, &ReturnCommand::Complete).await?;
            }
            OrderStep::Close { closing_id, mut books } => {
                books.add_orders(&self.bookkeeper.books(work).await?);
                work.execute(&self.closings, &closing_id, &ClosingCommand::Close(books)).await?;
            }
        }
        Ok(Answer::DONE)
    }
}
