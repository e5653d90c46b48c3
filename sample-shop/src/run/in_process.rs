//! The shop in this process, for the customers of the load driver.

use std::sync::Arc;

use annals::{Aggregate, EventStore, Repository, Transaction, Version, service::PartError};
use async_trait::async_trait;
use shop_driver::{
    card, input,
    shop::{Accepted, SagaEnd, Shop, Submission, SubmissionKind},
};

use super::ledger::{Ledger, saga_stream};
use crate::{
    card::Card,
    inventory::{Change, Stock, bookings},
    order::{Line, OrderCommand, Repositories, ReturnCommand, Supply, SupplyEvent, request},
};

/// Why an invoice of an earlier run does not match the invoice of this run.
const OTHER: &str = "the store has an invoice of this name with other content: run the same file with the same \
                     options, or name another --store";

/// The shop in this process.
#[derive(Clone)]
pub struct InProcess {
    pub store: Arc<dyn EventStore>,
    pub ledger: Ledger,
    repositories: Repositories,
    stock: Repository<Stock>,
}

#[async_trait]
impl Shop for InProcess {
    async fn submit(&self, submission: Submission) -> Result<Accepted, String> {
        match submission {
            Submission::Order { id, customer, lines, card } => {
                let lines = lines_of(lines);
                let place = OrderCommand::Place { order_id: id.clone(), customer, lines, card: card_of(card) };
                self.create(&self.repositories.orders, &id, place).await
            }
            Submission::Return { id, customer, lines } => {
                let open = ReturnCommand::Open { return_id: id.clone(), customer, lines: lines_of(lines) };
                self.create(&self.repositories.returns, &id, open).await
            }
            Submission::Delivery { id, units } => self.book(SupplyEvent::new(id, true, changes_of(units))).await,
            Submission::Adjustment { id, units } => self.book(SupplyEvent::new(id, false, changes_of(units))).await,
        }
    }

    async fn wait_for_end(&self, kind: SubmissionKind, id: &str) -> Result<SagaEnd, String> {
        let saga = match kind {
            SubmissionKind::Order => "checkout",
            SubmissionKind::Return => "return",
            // A supply is booked in the same commit that accepts it, so there is nothing to wait for.
            SubmissionKind::Supply => return Ok(SagaEnd::Ended),
        };
        self.ledger.ended(&saga_stream(saga, id)).await;
        Ok(SagaEnd::Ended)
    }
}

impl InProcess {
    /// Returns the shop on this store. The caller must also run [`Ledger::follow`] for `ledger` on this store;
    /// otherwise `wait_for_end` never returns for an order or a return.
    pub fn new(store: Arc<dyn EventStore>, repositories: Repositories, ledger: Ledger) -> Self {
        let stock = Repository::new(store.clone());
        Self { store, ledger, repositories, stock }
    }

    /// Accepts an order or a return once, even if it is submitted several times.
    async fn create<A>(&self, repository: &Repository<A>, id: &str, command: A::Command) -> Result<Accepted, String>
    where
        A: Aggregate<Command: Clone, Event: PartialEq>,
    {
        let decided = repository.create(id, command.clone(), request(A::CATEGORY, id)).await;
        let decided = decided.map_err(|error| error.to_string())?;
        let repeated = decided.repeated || decided.events.is_empty();
        if repeated {
            let stream = repository.stream(id).map_err(|error| error.to_string())?;
            let recorded =
                self.store.read_stream(&stream, Version::START, 1).await.map_err(|error| error.to_string())?;
            let first = recorded.first().map(|event| event.decode::<A::Event>()).transpose();
            let first = first.map_err(|error| error.to_string())?.flatten();
            let now = A::default().decide(&command).map_err(|error| error.to_string())?;
            if first != now.into_iter().next() {
                return Err(OTHER.into());
            }
        }
        Ok(Accepted { repeated, ..Accepted::default() })
    }

    /// Accepts a supply and books it in one commit, which is possible because the order and inventory services share a
    /// store here.
    async fn book(&self, supply: SupplyEvent) -> Result<Accepted, String> {
        let transaction = Transaction::new(self.store.clone(), request(Supply::CATEGORY, supply.id()));
        let supply = &supply;
        let booked = transaction.run(|mut work| async move {
            let decided = work.execute(&self.repositories.supplies, supply.id(), supply).await;
            let decided = decided.map_err(|error| error.to_string())?;
            let repeated = decided.repeated || decided.events.is_empty();
            if !repeated {
                for of_sku in bookings(supply.id(), supply.is_delivered(), supply.clone().units()) {
                    let booked = work.execute(&self.stock, &of_sku.sku, &of_sku).await;
                    booked.map_err(|error| format!("{}: {error}", of_sku.sku))?;
                }
            }
            let units = decided.events.into_iter().flat_map(SupplyEvent::units).map(driver_change).collect();
            Ok::<_, PartError>((work, Accepted { repeated, units, end: None }))
        });
        booked.await.map(|(accepted, _)| accepted).map_err(|error| error.to_string())
    }
}

fn lines_of(lines: Vec<input::Line>) -> Vec<Line> {
    lines.into_iter().map(|line| Line { sku: line.sku, quantity: line.quantity, unit_price: line.unit_price }).collect()
}

fn changes_of(changes: Vec<input::Change>) -> Vec<Change> {
    changes.into_iter().map(|input::Change { sku, quantity }| Change { sku, quantity }).collect()
}

fn driver_change(Change { sku, quantity }: Change) -> input::Change {
    input::Change { sku, quantity }
}

fn card_of(card: card::Card) -> Card {
    match card {
        card::Card::Good => Card::Good,
        card::Card::Declined => Card::Declined,
        card::Card::Withdrawn => Card::Withdrawn,
    }
}

// The driver and the shop must have the same maximum number of lines per invoice.
const _: () = assert!(input::LINES_MAX == crate::order::LINES_MAX);
