//! Transfers, and the saga that carries them out.

use std::sync::Arc;

use annals::{
    Aggregate, Answer, Event, EventStore, HandlerError, LogQuery, Message, Participant, Repository, Saga, SagaState,
    StepError, StreamId, Work,
    saga::{Outcome, Progress, Runner, StepRef, StepRequest},
};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    account::AccountStep,
    currency::{in_pounds, pounds},
    limit::LimitStep,
};

/// The events of a transfer.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "transfer")]
pub enum TransferEvent {
    #[event(version = 2, upcasters(in_pounds))]
    Requested {
        from: String,
        to: String,
        pence: u64,
        currency: String,
    },
    Completed {},
    Rejected {
        reason: String,
    },
}

/// The commands of a transfer. The saga requests the last two commands as steps of the service `transfers`.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "transfers")]
pub enum TransferCommand {
    Request { from: String, to: String, pence: u64, currency: String },
    Complete { transfer: String },
    Reject { transfer: String, reason: String },
}

/// The transfer was never requested.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("there is no such transfer")]
pub struct NotRequested;

/// The state of a transfer.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Transfer {
    #[default]
    Unknown,
    UnderWay,
    Completed,
    Rejected(String),
}

impl Aggregate for Transfer {
    const CATEGORY: &'static str = "transfer";
    type Command = TransferCommand;
    type Event = TransferEvent;
    type Refusal = NotRequested;

    fn decide(&self, command: &TransferCommand) -> Result<Vec<TransferEvent>, NotRequested> {
        use TransferCommand as Do;
        match (self, command.clone()) {
            (Self::Unknown, Do::Request { from, to, pence, currency }) => {
                Ok(vec![TransferEvent::Requested { from, to, pence, currency }])
            }
            (Self::Unknown, Do::Complete { .. } | Do::Reject { .. }) => Err(NotRequested),
            (Self::UnderWay, Do::Complete { .. }) => Ok(vec![TransferEvent::Completed {}]),
            (Self::UnderWay, Do::Reject { reason, .. }) => Ok(vec![TransferEvent::Rejected { reason }]),
            (Self::UnderWay | Self::Completed | Self::Rejected(_), _) => Ok(vec![]),
        }
    }

    fn evolve(&mut self, event: &TransferEvent) {
        *self = match event {
            TransferEvent::Requested { .. } => Self::UnderWay,
            TransferEvent::Completed {} => Self::Completed,
            TransferEvent::Rejected { reason } => Self::Rejected(reason.clone()),
        }
    }
}

// ANCHOR: state
/// The data of the saga of one transfer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransferState {
    pub id: String,
    pub from: String,
    pub to: String,
    pub pence: u64,
    #[serde(default = "pounds")]
    pub currency: String,
    /// The day whose limit counts; empty for transfers that were requested before the bank had a limit.
    #[serde(default)]
    pub day: String,
    /// The reason for the rejection, once it is known.
    #[serde(default)]
    pub rejected: Option<String>,
}

impl SagaState for TransferState {
    fn learn(&mut self, step: &str, outcome: &Outcome) {
        match outcome {
            Outcome::Done(_) => {}
            Outcome::Refused(reason) => self.rejected = Some(reason.clone()),
            Outcome::Failed(_) | Outcome::Unknown(_) => self.rejected = Some(format!("{step}: no answer")),
        }
    }
}

impl TransferState {
    fn reserve(&self) -> StepRequest {
        let account = self.from.clone();
        let day = self.day.clone();
        let transfer = self.id.clone();
        StepRequest::to("limits", &LimitStep::Reserve { account, day, transfer, pence: self.pence })
    }

    fn release(&self) -> StepRequest {
        let account = self.from.clone();
        let day = self.day.clone();
        let transfer = self.id.clone();
        StepRequest::to("limits", &LimitStep::Release { account, day, transfer, pence: self.pence })
    }

    fn debit(&self) -> StepRequest {
        let account = self.from.clone();
        let transfer = self.id.clone();
        let currency = self.currency.clone();
        StepRequest::to("accounts", &AccountStep::Debit { account, transfer, pence: self.pence, currency })
    }

    fn refund(&self) -> StepRequest {
        let account = self.from.clone();
        let transfer = self.id.clone();
        StepRequest::to("accounts", &AccountStep::Refund { account, transfer, pence: self.pence })
    }

    fn credit(&self) -> StepRequest {
        let account = self.to.clone();
        let transfer = self.id.clone();
        let currency = self.currency.clone();
        StepRequest::to("accounts", &AccountStep::Credit { account, transfer, pence: self.pence, currency })
    }

    fn complete(&self) -> StepRequest {
        StepRequest::to("transfers", &TransferCommand::Complete { transfer: self.id.clone() })
    }

    fn reject(&self) -> StepRequest {
        let reason = self.rejected.clone().unwrap_or_default();
        StepRequest::to("transfers", &TransferCommand::Reject { transfer: self.id.clone(), reason })
    }
}
// ANCHOR_END: state

// ANCHOR: plan
/// The plan of a transfer. The credit is the pivot: it fails if the recipient's account is closed.
pub fn plan() -> Saga<TransferState> {
    Saga::named("transfer")
        .compensatable("reserve limit", TransferState::reserve)
        .undo(TransferState::release)
        .compensatable("debit sender", TransferState::debit)
        .undo(TransferState::refund)
        .pivot("credit recipient", TransferState::credit)
        .retriable("complete transfer", TransferState::complete)
        .when_compensated("reject transfer", TransferState::reject)
        .build()
}
// ANCHOR_END: plan

// ANCHOR: earlier
/// The plan that was in use before the bank had a limit. Transfers under way may still follow it.
pub fn plan_without_limit() -> Saga<TransferState> {
    Saga::named("transfer")
        .compensatable("debit sender", TransferState::debit)
        .undo(TransferState::refund)
        .pivot("credit recipient", TransferState::credit)
        .retriable("complete transfer", TransferState::complete)
        .when_compensated("reject transfer", TransferState::reject)
        .build()
}

/// Moves a transfer from the earlier plan to the present plan, which has one more step at its beginning.
pub fn with_limit(progress: &Progress) -> Progress {
    let at = match progress.at {
        StepRef::Forward(place) => StepRef::Forward(place + 1),
        StepRef::Undo(place) => StepRef::Undo(place + 1),
        StepRef::Closing(place) => StepRef::Closing(place),
    };
    Progress { at, ..progress.clone() }
}

/// Runs the sagas of transfers. Transfers under way move to the present plan, although no limit was reserved for them.
pub fn runner() -> Runner<TransferState> {
    let requested = LogQuery::types(["transfer.requested"]);
    Runner::new(plan(), requested, starts).migrate(plan_without_limit().hash(), with_limit)
}
// ANCHOR_END: earlier

fn starts(message: &Message) -> Result<Option<(String, TransferState)>, HandlerError> {
    let Some(TransferEvent::Requested { from, to, pence, currency }) = message.decode()? else { return Ok(None) };
    let id = StreamId::from_stored(&message.subject).id().to_owned();
    let day = message.time.date_naive().to_string();
    Ok(Some((id.clone(), TransferState { id, from, to, pence, currency, day, rejected: None })))
}

/// Carries out the last step of a transfer.
pub struct Clerk(Repository<Transfer>);

impl Clerk {
    /// Creates a clerk for the transfers in this store.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self(Repository::new(store))
    }
}

#[async_trait]
impl Participant for Clerk {
    type Command = TransferCommand;

    async fn perform(&self, command: TransferCommand, work: &mut Work) -> Result<Answer, StepError> {
        let transfer = match &command {
            TransferCommand::Complete { transfer } | TransferCommand::Reject { transfer, .. } => transfer,
            TransferCommand::Request { .. } => return Err(StepError::Refused("a request is not a step".to_owned())),
        };
        work.execute(&self.0, transfer, &command).await?;
        Ok(Answer::DONE)
    }
}
