//! Accounts, and the steps of transfers that change them.

use std::sync::Arc;

use annals::{Aggregate, Answer, Event, EventStore, Participant, Repository, StepError, Work};
use async_trait::async_trait;

use crate::currency::in_pounds;

// ANCHOR: events
/// The events of an account. Every event names the owner, so that the read model finds the owner's view.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "account")]
pub enum AccountEvent {
    #[event(version = 2, upcasters(in_pounds))]
    Opened {
        owner: String,
        currency: String,
    },
    Deposited {
        owner: String,
        pence: u64,
    },
    Debited {
        owner: String,
        transfer: String,
        pence: u64,
    },
    Refunded {
        owner: String,
        transfer: String,
        pence: u64,
    },
    Credited {
        owner: String,
        transfer: String,
        pence: u64,
    },
    Closed {
        owner: String,
    },
}
// ANCHOR_END: events

/// The commands of an account.
#[derive(Clone, Debug)]
pub enum AccountCommand {
    Open { owner: String, currency: String },
    Deposit { pence: u64 },
    Debit { transfer: String, pence: u64, currency: String },
    Refund { transfer: String, pence: u64 },
    Credit { transfer: String, pence: u64, currency: String },
    Close,
}

/// The reasons for which an account refuses a command.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AccountRefusal {
    /// The account was never opened, or is closed.
    #[error("there is no open account")]
    NotOpen,
    /// The account belongs to someone else.
    #[error("the account belongs to {0}")]
    Taken(String),
    /// The account holds less than the amount.
    #[error("the account holds only {0} pence")]
    Overdrawn(u64),
    /// The account is in another currency.
    #[error("the account is in {0}")]
    OtherCurrency(String),
    /// The account still holds money.
    #[error("the account still holds {0} pence")]
    NotEmpty(u64),
}

/// An account.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Account {
    owner: Option<String>,
    currency: String,
    /// The balance in pence.
    pub balance: u64,
}

// ANCHOR: aggregate
impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    type Command = AccountCommand;
    type Event = AccountEvent;
    type Refusal = AccountRefusal;

    fn decide(&self, command: &AccountCommand) -> Result<Vec<AccountEvent>, AccountRefusal> {
        use AccountCommand as Do;
        if let Do::Open { owner, currency } = command {
            return match &self.owner {
                None => Ok(vec![AccountEvent::Opened { owner: owner.clone(), currency: currency.clone() }]),
                Some(known) if known == owner => Ok(vec![]),
                Some(other) => Err(AccountRefusal::Taken(other.clone())),
            };
        }
        let owner = self.owner.clone().ok_or(AccountRefusal::NotOpen)?;
        let event = match command.clone() {
            Do::Debit { currency, .. } | Do::Credit { currency, .. } if currency != self.currency => {
                return Err(AccountRefusal::OtherCurrency(self.currency.clone()));
            }
            Do::Debit { pence, .. } if pence > self.balance => return Err(AccountRefusal::Overdrawn(self.balance)),
            Do::Close if self.balance > 0 => return Err(AccountRefusal::NotEmpty(self.balance)),
            Do::Open { .. } => return Ok(vec![]),
            Do::Deposit { pence } => AccountEvent::Deposited { owner, pence },
            Do::Debit { transfer, pence, .. } => AccountEvent::Debited { owner, transfer, pence },
            Do::Refund { transfer, pence } => AccountEvent::Refunded { owner, transfer, pence },
            Do::Credit { transfer, pence, .. } => AccountEvent::Credited { owner, transfer, pence },
            Do::Close => AccountEvent::Closed { owner },
        };
        Ok(vec![event])
    }

    fn evolve(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Opened { owner, currency } => {
                self.owner = Some(owner.clone());
                self.currency = currency.clone();
            }
            AccountEvent::Deposited { pence, .. }
            | AccountEvent::Refunded { pence, .. }
            | AccountEvent::Credited { pence, .. } => self.balance += pence,
            AccountEvent::Debited { pence, .. } => self.balance -= pence,
            AccountEvent::Closed { .. } => self.owner = None,
        }
    }
}
// ANCHOR_END: aggregate

// ANCHOR: steps
/// The steps that transfers request from the service `accounts`.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "accounts")]
pub enum AccountStep {
    #[event(version = 2, upcasters(in_pounds))]
    Debit {
        account: String,
        transfer: String,
        pence: u64,
        currency: String,
    },
    Refund {
        account: String,
        transfer: String,
        pence: u64,
    },
    #[event(version = 2, upcasters(in_pounds))]
    Credit {
        account: String,
        transfer: String,
        pence: u64,
        currency: String,
    },
}

/// Carries out the steps on accounts. A refusal of the account becomes a refusal of the step.
pub struct Teller(Repository<Account>);

impl Teller {
    /// Creates a teller for the accounts in this store.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self(Repository::new(store))
    }
}

#[async_trait]
impl Participant for Teller {
    type Command = AccountStep;

    async fn perform(&self, step: AccountStep, work: &mut Work) -> Result<Answer, StepError> {
        let (account, command) = match step {
            AccountStep::Debit { account, transfer, pence, currency } => {
                (account, AccountCommand::Debit { transfer, pence, currency })
            }
            AccountStep::Refund { account, transfer, pence } => (account, AccountCommand::Refund { transfer, pence }),
            AccountStep::Credit { account, transfer, pence, currency } => {
                (account, AccountCommand::Credit { transfer, pence, currency })
            }
        };
        work.execute(&self.0, &account, &command).await?;
        Ok(Answer::DONE)
    }
}
// ANCHOR_END: steps
