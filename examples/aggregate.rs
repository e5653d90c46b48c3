//! Step 1 of 8. An account decides on commands, its events are stored, and a repeated command changes nothing.
//!
//!     cargo run -p annals-examples --example aggregate

use std::{error::Error, sync::Arc};

use annals::{Aggregate, Event, ExecuteError, MemoryStore, Repository};
use uuid::Uuid;

// ANCHOR: event
/// The events of an account. The names of events are stored: `account.deposited` and `account.withdrawn`.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "account")]
enum AccountEvent {
    Deposited { pence: u64 },
    Withdrawn { pence: u64 },
}
// ANCHOR_END: event

enum AccountCommand {
    Deposit(u64),
    Withdraw(u64),
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("the account holds only {balance} pence")]
struct Overdrawn {
    balance: u64,
}

#[derive(Clone, Default)]
struct Account {
    balance: u64,
}

// ANCHOR: aggregate
impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    type Command = AccountCommand;
    type Event = AccountEvent;
    type Refusal = Overdrawn;

    fn decide(&self, command: &AccountCommand) -> Result<Vec<AccountEvent>, Overdrawn> {
        match *command {
            AccountCommand::Deposit(pence) => Ok(vec![AccountEvent::Deposited { pence }]),
            AccountCommand::Withdraw(pence) if pence > self.balance => Err(Overdrawn { balance: self.balance }),
            AccountCommand::Withdraw(pence) => Ok(vec![AccountEvent::Withdrawn { pence }]),
        }
    }

    fn evolve(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Deposited { pence } => self.balance += pence,
            AccountEvent::Withdrawn { pence } => self.balance -= pence,
        }
    }
}
// ANCHOR_END: aggregate

// ANCHOR: run
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let accounts = Repository::<Account>::new(Arc::new(MemoryStore::new()));

    let request = Uuid::new_v4();
    let decided = accounts.execute("ada", AccountCommand::Deposit(250), request).await?;
    println!("first request:  {:?}", decided.events);
    let decided = accounts.execute("ada", AccountCommand::Deposit(250), request).await?;
    println!("the same again: {:?}, repeated: {}", decided.events, decided.repeated);

    match accounts.execute("ada", AccountCommand::Withdraw(1_000), Uuid::new_v4()).await {
        Err(ExecuteError::Refused(reason)) => println!("refused: {reason}"),
        answer => println!("not expected: {answer:?}"),
    }
    println!("balance: {} pence", accounts.state("ada").await?.balance);
    Ok(())
}
// ANCHOR_END: run
