use std::sync::Arc;

use annals::{Aggregate, Event, EventStore, Group, Handler, HandlerError, Message, Repository, Service, Work};
use async_trait::async_trait;
use rust_decimal::Decimal;

/// The events of the order service that this service reads.
#[derive(Event)]
#[event(prefix = "order", unknown = "skip")]
enum OrderEvent {
    Placed { customer: Option<String>, total: Decimal },
}

#[derive(Event)]
#[event(prefix = "points")]
pub enum PointsEvent {
    Earned { points: Decimal },
    Spent { points: Decimal },
}

pub enum PointsCommand {
    Earn(Decimal),
    Spend(Decimal),
}

#[derive(Debug, thiserror::Error)]
#[error("there are only {0} points")]
pub struct TooFew(Decimal);

/// A customer's points.
#[derive(Clone, Default)]
pub struct Points(pub Decimal);

// README: from here
impl Aggregate for Points {
    const CATEGORY: &'static str = "points";
    type Command = PointsCommand;
    type Event = PointsEvent;
    type Refusal = TooFew;

    fn decide(&self, command: &PointsCommand) -> Result<Vec<PointsEvent>, TooFew> {
        match *command {
            PointsCommand::Earn(points) => Ok(vec![PointsEvent::Earned { points }]),
            PointsCommand::Spend(points) if points > self.0 => Err(TooFew(self.0)),
            PointsCommand::Spend(points) => Ok(vec![PointsEvent::Spent { points }]),
        }
    }

    fn evolve(&mut self, event: &PointsEvent) {
        match event {
            PointsEvent::Earned { points } => self.0 += points,
            PointsEvent::Spent { points } => self.0 -= points,
        }
    }
}
// README: up to here

/// Awards one point for each pound that a known customer spends.
struct Award(Repository<Points>);

// README: from here
#[async_trait]
impl Handler for Award {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if let Some(OrderEvent::Placed { customer: Some(customer), total }) = message.decode()? {
            work.execute(&self.0, &customer, &PointsCommand::Earn(total.floor())).await?;
        }
        Ok(())
    }
}
// README: up to here

pub fn service(store: Arc<dyn EventStore>, points: Repository<Points>) -> Service {
    let award = Group::new("loyalty.orders", &["order.events"], Award(points));
    Service::new("loyalty", store).publish(&["points"]).consume(award)
}
