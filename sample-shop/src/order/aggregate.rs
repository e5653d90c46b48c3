//! The order service: accepts orders and returns, and confirms or cancels them as their sagas decide.

use annals::{Aggregate, Answer, Event, Participant, Repository, StepError, Work};
use async_trait::async_trait;
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use crate::{
    books::{Bookkeeper, Books},
    card::Card,
    closing::{Closing, ClosingCommand},
};

/// The currency of every amount in the shop.
pub const CURRENCY: &str = "GBP";

/// A number of units of one SKU at one price.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The stock keeping unit.
    pub sku: String,
    /// The number of units.
    pub quantity: u32,
    /// The price of one unit.
    pub unit_price: Decimal,
}

/// What happens to an order.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "order")]
pub enum OrderEvent {
    /// A customer ordered.
    Placed {
        order_id: String,
        customer: Option<String>,
        lines: Vec<Line>,
        total: Decimal,
        currency: String,
        #[serde(default, skip_serializing_if = "Card::is_good")]
        card: Card,
    },
    /// The order will be delivered.
    Confirmed { order_id: String },
    /// The order will not be delivered.
    Cancelled { order_id: String, reason: String },
}

/// The commands to an order.
#[derive(Clone, Debug)]
pub enum OrderCommand {
    Place { order_id: String, customer: Option<String>, lines: Vec<Line>, card: Card },
    Confirm,
    Cancel { reason: String },
}

/// Why an order refuses a command.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OrderRefusal {
    #[error("an order needs at least one line")]
    NoLines,
    #[error("line {line}, {sku}: the quantity is 0")]
    NoQuantity { line: usize, sku: String },
    #[error("line {line}, {sku}: the price {price} {}", wrong_with(price))]
    Price { line: usize, sku: String, price: Decimal },
    #[error("the order is too large: its units or its total are beyond the limits")]
    TooLarge,
    #[error("there is no such order")]
    NotPlaced,
    #[error("the order is cancelled: {0}")]
    Cancelled(String),
    #[error("the order is confirmed; send the goods back instead")]
    Confirmed,
}

/// The maximum number of decimals of a price. Prices in the source data have up to three; more than four are a mistake
/// in the input.
pub const PRICE_DECIMALS_MAX: u32 = 4;

fn wrong_with(price: &Decimal) -> String {
    if price.is_sign_negative() {
        return "is negative".into();
    }
    format!("has more than {PRICE_DECIMALS_MAX} decimals")
}

/// The maximum number of lines of an order or return, from any kind of input. All lines are reserved in one commit.
pub const LINES_MAX: usize = 5_000;

/// An order.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Order {
    #[default]
    Unknown,
    Placed {
        order_id: String,
    },
    Confirmed,
    Cancelled(String),
}

impl Aggregate for Order {
    const CATEGORY: &'static str = "order";
    type Command = OrderCommand;
    type Event = OrderEvent;
    type Refusal = OrderRefusal;

    fn decide(&self, command: &OrderCommand) -> Result<Vec<OrderEvent>, OrderRefusal> {
        use {Order as Is, OrderCommand as Do};
        match (self, command) {
            (Is::Unknown, Do::Place { order_id, customer, lines, card }) => {
                let total = total(lines)?;
                let (order_id, customer, lines) = (order_id.clone(), customer.clone(), lines.clone());
                let currency = CURRENCY.into();
                Ok(vec![OrderEvent::Placed { order_id, customer, lines, total, currency, card: *card }])
            }
            (Is::Unknown, _) => Err(OrderRefusal::NotPlaced),
            (_, Do::Place { .. }) | (Is::Confirmed, Do::Confirm) | (Is::Cancelled(_), Do::Cancel { .. }) => Ok(vec![]),
            (Is::Placed { order_id }, Do::Confirm) => Ok(vec![OrderEvent::Confirmed { order_id: order_id.clone() }]),
            (Is::Placed { order_id }, Do::Cancel { reason }) => {
                Ok(vec![OrderEvent::Cancelled { order_id: order_id.clone(), reason: reason.clone() }])
            }
            (Is::Cancelled(reason), Do::Confirm) => Err(OrderRefusal::Cancelled(reason.clone())),
            (Is::Confirmed, Do::Cancel { .. }) => Err(OrderRefusal::Confirmed),
        }
    }

    fn evolve(&mut self, event: &OrderEvent) {
        *self = match event {
            OrderEvent::Placed { order_id, .. } => Self::Placed { order_id: order_id.clone() },
            OrderEvent::Confirmed { .. } => Self::Confirmed,
            OrderEvent::Cancelled { reason, .. } => Self::Cancelled(reason.clone()),
        };
    }
}

/// Returns the sum of the lines. The error says what is wrong with the lines.
pub fn total(lines: &[Line]) -> Result<Decimal, OrderRefusal> {
    if lines.is_empty() {
        return Err(OrderRefusal::NoLines);
    }
    let (mut total, mut units) = (Decimal::ZERO, 0_u32);
    for (line, Line { sku, quantity, unit_price }) in (1..).zip(lines) {
        if *quantity == 0 {
            return Err(OrderRefusal::NoQuantity { line, sku: sku.clone() });
        }
        units = units.checked_add(*quantity).ok_or(OrderRefusal::TooLarge)?;
        if unit_price.is_sign_negative() || unit_price.scale() > PRICE_DECIMALS_MAX {
            return Err(OrderRefusal::Price { line, sku: sku.clone(), price: *unit_price });
        }
        let amount = unit_price.checked_mul(Decimal::from(*quantity)).and_then(|amount| total.checked_add(amount));
        total = amount.ok_or(OrderRefusal::TooLarge)?;
    }
    Ok(total)
}

/// What happens to a return.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "return")]
pub enum ReturnEvent {
    /// A customer sends goods back.
    Opened { return_id: String, customer: Option<String>, lines: Vec<Line>, total: Decimal, currency: String },
    /// The goods are back in stock, and the money is refunded.
    Completed { return_id: String },
}

/// The commands to a return.
#[derive(Clone, Debug)]
pub enum ReturnCommand {
    Open { return_id: String, customer: Option<String>, lines: Vec<Line> },
    Complete,
}

/// A return.
#[derive(Clone, Debug, Default)]
pub struct Return {
    opened: Option<String>,
    completed: bool,
}

impl Aggregate for Return {
    const CATEGORY: &'static str = "return";
    type Command = ReturnCommand;
    type Event = ReturnEvent;
    type Refusal = OrderRefusal;

    fn decide(&self, command: &ReturnCommand) -> Result<Vec<ReturnEvent>, OrderRefusal> {
        match (command, &self.opened) {
            (ReturnCommand::Open { return_id, customer, lines }, None) => {
                let total = total(lines)?;
                let (return_id, customer, lines) = (return_id.clone(), customer.clone(), lines.clone());
                Ok(vec![ReturnEvent::Opened { return_id, customer, lines, total, currency: CURRENCY.into() }])
            }
            (ReturnCommand::Open { .. }, Some(_)) => Ok(vec![]),
            (ReturnCommand::Complete, Some(_)) if self.completed => Ok(vec![]),
            (ReturnCommand::Complete, Some(id)) => Ok(vec![ReturnEvent::Completed { return_id: id.clone() }]),
            (ReturnCommand::Complete, None) => Err(OrderRefusal::NotPlaced),
        }
    }

    fn evolve(&mut self, event: &ReturnEvent) {
        match event {
            ReturnEvent::Opened { return_id, .. } => self.opened = Some(return_id.clone()),
            ReturnEvent::Completed { .. } => self.completed = true,
        }
    }
}

/// The steps that sagas ask the order service to carry out.
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
    /// Completes a closing with the books of the other services.
    Close {
        closing_id: String,
        books: Books,
    },
}

/// The cancellation reason of an order that its customer cancelled.
pub const BY_CUSTOMER: &str = "by_customer";

/// Carries out the steps of the order service.
pub struct OrderDesk {
    orders: Repository<Order>,
    returns: Repository<Return>,
    closings: Repository<Closing>,
    bookkeeper: Bookkeeper,
}

impl OrderDesk {
    pub fn new(
        orders: Repository<Order>,
        returns: Repository<Return>,
        closings: Repository<Closing>,
        bookkeeper: Bookkeeper,
    ) -> Self {
        Self { orders, returns, closings, bookkeeper }
    }
}

#[async_trait]
impl Participant for OrderDesk {
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
                books.add(&self.bookkeeper.books(work).await?);
                work.execute(&self.closings, &closing_id, &ClosingCommand::Close(books)).await?;
            }
        }
        Ok(Answer::DONE)
    }
}
