//! Returns: customers send goods back and get their money back.

use annals::{Aggregate, Event};
use rust_decimal::Decimal;

use super::line::{CURRENCY, Line, OrderRefusal, total};

/// What happens to a return.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "return")]
pub enum ReturnEvent {
    /// A customer sends goods back.
    Opened { return_id: String, customer: Option<String>, lines: Vec<Line>, total: Decimal, currency: String },
    /// The goods are back in stock, and the money is refunded.
    Completed { return_id: String },
}

/// The commands for a return.
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
                Ok(vec![ReturnEvent::Opened {
                    return_id: return_id.clone(),
                    customer: customer.clone(),
                    lines: lines.clone(),
                    total,
                    currency: CURRENCY.into(),
                }])
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
