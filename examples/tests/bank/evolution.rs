use std::{convert::Infallible, sync::Arc, time::Duration};

use annals::{
    Aggregate, Clock, Event, EventStore, HandlerError, LocalBus, LogQuery, MemoryStore, Message, Repository, Runtime,
    Saga, SagaState, Service, Views,
    saga::{Runner, STEP_TIMEOUT, StepRequest},
};
use bank::{
    balances::{Balance, Balances},
    transfer::{Transfer, plan_without_limit},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Outcome, ended};

// ANCHOR: last_year
/// The events of last year's build, which knows only pounds.
#[derive(Event, Clone, Debug)]
#[event(prefix = "account")]
enum LastYearsAccount {
    Opened { owner: String },
    Deposited { owner: String, pence: u64 },
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "transfer")]
enum LastYearsTransfer {
    Requested { from: String, to: String, pence: u64 },
}

/// The data and the commands of last year's saga.
#[derive(Clone, Serialize, Deserialize)]
struct LastYearsState {
    id: String,
    from: String,
    to: String,
    pence: u64,
}

impl SagaState for LastYearsState {}

#[derive(Event, Clone, Debug)]
#[event(prefix = "accounts")]
enum LastYearsStep {
    Debit { account: String, transfer: String, pence: u64 },
    Refund { account: String, transfer: String, pence: u64 },
    Credit { account: String, transfer: String, pence: u64 },
}
// ANCHOR_END: last_year

fn last_years_plan() -> Saga<LastYearsState> {
    fn debit(state: &LastYearsState) -> StepRequest {
        let account = state.from.clone();
        let transfer = state.id.clone();
        StepRequest::to("accounts", &LastYearsStep::Debit { account, transfer, pence: state.pence })
    }
    fn refund(state: &LastYearsState) -> StepRequest {
        let account = state.from.clone();
        let transfer = state.id.clone();
        StepRequest::to("accounts", &LastYearsStep::Refund { account, transfer, pence: state.pence })
    }
    fn credit(state: &LastYearsState) -> StepRequest {
        let account = state.to.clone();
        let transfer = state.id.clone();
        StepRequest::to("accounts", &LastYearsStep::Credit { account, transfer, pence: state.pence })
    }
    // The commands of the last steps do not matter, because no test in this file reaches these steps with this plan.
    Saga::named("transfer")
        .compensatable("debit sender", debit)
        .undo(refund)
        .pivot("credit recipient", credit)
        .retriable("complete transfer", credit)
        .when_compensated("reject transfer", refund)
        .build()
}

fn last_years_start(message: &Message) -> Result<Option<(String, LastYearsState)>, HandlerError> {
    let Some(LastYearsTransfer::Requested { from, to, pence }) = message.decode()? else { return Ok(None) };
    let id = message.subject.replace("transfer-", "");
    Ok(Some((id.clone(), LastYearsState { id, from, to, pence })))
}

/// Appends events exactly as they are given.
#[derive(Clone, Default)]
struct AccountLog;

impl Aggregate for AccountLog {
    const CATEGORY: &'static str = "account";
    type Command = Vec<LastYearsAccount>;
    type Event = LastYearsAccount;
    type Refusal = Infallible;

    fn decide(&self, events: &Vec<LastYearsAccount>) -> Result<Vec<LastYearsAccount>, Infallible> {
        Ok(events.clone())
    }

    fn evolve(&mut self, _: &LastYearsAccount) {}
}

#[derive(Clone, Default)]
struct TransferLog;

impl Aggregate for TransferLog {
    const CATEGORY: &'static str = "transfer";
    type Command = LastYearsTransfer;
    type Event = LastYearsTransfer;
    type Refusal = Infallible;

    fn decide(&self, event: &LastYearsTransfer) -> Result<Vec<LastYearsTransfer>, Infallible> {
        Ok(vec![event.clone()])
    }

    fn evolve(&mut self, _: &LastYearsTransfer) {}
}

/// Lets last year's build open two accounts and begin a transfer. The service `accounts` does not answer, so the
/// transfer waits for its first step.
async fn leave_a_transfer_under_way(store: &Arc<dyn EventStore>) -> Outcome {
    let accounts = Repository::<AccountLog>::new(store.clone());
    for (account, owner, pence) in [("a", "Ada", 900), ("b", "Bob", 0)] {
        let owner = owner.to_owned();
        let opened = LastYearsAccount::Opened { owner: owner.clone() };
        let deposited = LastYearsAccount::Deposited { owner, pence };
        accounts.execute(account, vec![opened, deposited], Uuid::new_v4()).await?;
    }
    let requested = LogQuery::types(["transfer.requested"]);
    let runner = Runner::new(last_years_plan(), requested, last_years_start);
    let mut runtime = Runtime::new();
    let sagas = runner.on(store.clone());
    let transfers = Service::new("transfers", store.clone()).saga(runner);
    runtime.start(vec![transfers], Arc::new(LocalBus::default())).await?;
    let requested = LastYearsTransfer::Requested { from: "a".to_owned(), to: "b".to_owned(), pence: 250 };
    Repository::<TransferLog>::new(store.clone()).execute("old", requested, Uuid::new_v4()).await?;
    while sagas.saga("old").await?.is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(runtime.drain(Duration::from_secs(10)).await?)
}

// ANCHOR: moves
#[tokio::test]
async fn transfer_of_last_year_is_completed_by_this_build() -> Outcome {
    let clock = Clock::by_hand("2026-11-30T12:00:00Z".parse()?);
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::with_clock(clock.clone()));
    leave_a_transfer_under_way(&store).await?;

    let mut runtime = Runtime::new();
    runtime.start(bank::services(&store), Arc::new(LocalBus::default())).await?;
    // The saga asks again for the step that nobody answered.
    clock.advance(STEP_TIMEOUT);
    let transfers = Repository::<Transfer>::new(store.clone());
    let ended = tokio::time::timeout(Duration::from_secs(60), ended(&transfers, "old")).await??;
    assert_eq!(ended, Transfer::Completed);
    runtime.drain(Duration::from_secs(10)).await?;

    let views = Views::<Balances>::new(store);
    let ada = views.get("Ada").await?.unwrap_or_default();
    // The events of last year name no currency; the upcaster adds it.
    assert_eq!(ada.accounts["a"], Balance { pence: 650, currency: "GBP".to_owned() });
    Ok(())
}
// ANCHOR_END: moves

#[test]
fn plan_without_limit_is_the_plan_of_last_year() {
    assert_eq!(plan_without_limit().hash(), last_years_plan().hash());
}
