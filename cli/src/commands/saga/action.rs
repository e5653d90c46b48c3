//! Actions of an operator on a stuck saga. The request is appended to the saga's own stream, and the saga's service
//! appends its answer to the same stream.

use annals::{
    Operator, StreamId,
    saga::{self, SagaEvent},
};
use clap::{Args, Subcommand};
use tokio::time::{Instant, timeout_at};

use super::timeline::{state, word};
use crate::{
    confirm::ActionArgs,
    failure::{Failure, Verdict},
    moment::Span,
    output::{Output, shown},
    store::Store,
};

#[derive(Debug, Subcommand)]
pub(crate) enum SagaAction {
    /// Send again the commands of the step at which the saga is stuck.
    Retry(SagaActionArgs),
    /// Treat the step at which the saga is stuck as done, and continue.
    SkipStep(SagaActionArgs),
    /// Compensate the saga. Only possible up to the pivot. Make sure first that the pivot did not happen.
    Compensate(SagaActionArgs),
    /// Leave the saga as it is, for good.
    Abandon(SagaActionArgs),
}

#[derive(Debug, Args)]
pub(crate) struct SagaActionArgs {
    #[command(flatten)]
    act: ActionArgs,
    /// How long to wait for an answer from the service that runs the saga.
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    wait: Span,
}

pub(crate) async fn run(
    verb: SagaAction,
    stream: &StreamId,
    store: &Store,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let (verb, SagaActionArgs { act, wait }) = match verb {
        SagaAction::Retry(arguments) => (saga::OperatorAction::Retry, arguments),
        SagaAction::SkipStep(arguments) => (saga::OperatorAction::SkipStep, arguments),
        SagaAction::Compensate(arguments) => (saga::OperatorAction::Compensate, arguments),
        SagaAction::Abandon(arguments) => (saga::OperatorAction::Abandon, arguments),
    };
    let operator = Operator::new(store.port(), &act.by()?);
    if verb != saga::OperatorAction::Retry {
        act.confirm(&format!("{} {stream}? The action cannot be undone.", word(&verb)))?;
    }
    let version = operator.ask(stream, verb, &act.reason).await?;
    let until = Instant::now() + wait.0;
    match timeout_at(until, operator.answer(stream, version)).await {
        Ok(answer) => match answer? {
            SagaEvent::Declined { why, .. } => {
                output.line(&shown(&format!("{stream}: declined: {why}")))?;
                Ok(Verdict::Fault)
            }
            carried_out => {
                output.line(&shown(&format!("{stream}: {}", state(carried_out.progress()))))?;
                Ok(Verdict::Fine)
            }
        },
        Err(_) => {
            output.line(&format!(
                "{stream}: requested; the service of the saga carries out the action when the service runs"
            ))?;
            Ok(Verdict::Fine)
        }
    }
}
