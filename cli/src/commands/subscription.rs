//! `subscription`: pauses, resumes or resets a subscription.

use annals::{Operator, Position, operator::OperatorError};
use clap::{Args, Subcommand};

use crate::{
    confirm::ActionArgs,
    failure::{Failure, Verdict},
    moment::Moment,
    output::{Output, grouped},
    place::position_at,
    store::Store,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals subscription order.mailer pause --reason \"the mail server is being moved\"
  annals subscription order.mailer resume --reason \"it is back\"
  annals subscription order.statistics reset --to beginning --reason \"counted twice before 1.4\"
      its handler sees everything again, also while the service runs

SubscriptionCommand a handler did stays done. One that calls others (mails, payments) does so again for each event that it sees again,
unless it asks by the event's id whether it did. A read model is built anew by `read-model NAME rebuild`, beside the live one.

SubscriptionCommand a service consumes from the bus has offsets of topics, not a place in the log. It is held up where its messages come from:
`subscription SERVICE.relay pause` on the store of the service that sends. SubscriptionCommand it could not handle is in `dead-letters`.")]
pub(crate) struct SubscriptionArgs {
    /// The name of the subscription, as `subscriptions` shows it.
    name: String,
    #[command(subcommand)]
    what: SubscriptionCommand,
}

#[derive(Debug, Subcommand)]
enum SubscriptionCommand {
    /// Continue from another position of the log.
    Reset {
        /// A position, after which the subscription continues; or `beginning`, `now`, or a time, which means the first
        /// event recorded at that time or later.
        #[arg(long, value_name = "PLACE")]
        to: String,
        #[command(flatten)]
        act: ActionArgs,
    },
    /// Pause the subscription.
    Pause {
        #[command(flatten)]
        act: ActionArgs,
    },
    /// Resume the subscription from where it was paused.
    Resume {
        #[command(flatten)]
        act: ActionArgs,
    },
}

pub(crate) async fn run(arguments: SubscriptionArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let name = arguments.name.as_str();
    match arguments.what {
        SubscriptionCommand::Reset { to, act } => {
            let to = place(&to, store).await?;
            let operator = Operator::new(store.port(), &act.by()?);
            act.confirm(&format!("Have {name} see everything after position {} again?", grouped(to.0)))?;
            let reset = operator.reset(name, to, &act.reason).await;
            let instead = "what it has handled it knows: `replay --bus … --topic` sends events once more to a topic of their own, \
                           and `dead-letters redrive` has it try again what it could not handle";
            reset.map_err(|error| of_bus(error, instead))?;
            output.line(&format!("{name}: goes on after position {}", grouped(to.0)))?;
        }
        SubscriptionCommand::Pause { act } => {
            hold_up(name, true, &act, store).await?;
            output.line(&format!("{name}: paused"))?;
        }
        SubscriptionCommand::Resume { act } => {
            hold_up(name, false, &act, store).await?;
            output.line(&format!("{name}: goes on"))?;
        }
    }
    Ok(Verdict::Fine)
}

async fn hold_up(name: &str, paused: bool, act: &ActionArgs, store: &Store) -> Result<(), Failure> {
    let done = Operator::new(store.port(), &act.by()?).pause(name, paused, &act.reason).await;
    let instead = "`subscription SERVICE.relay pause`, on the store of the service that sends, holds up what is sent there; and \
                   a service that is stopped goes on from its offsets";
    done.map_err(|error| of_bus(error, instead))
}

/// Adds a remedy to the error for a subscription that reads topics.
fn of_bus(error: OperatorError, instead: &str) -> Failure {
    match error {
        OperatorError::OfBus { .. } => Failure::new(format!("{error}: {instead}")),
        other => other.into(),
    }
}

async fn place(text: &str, store: &Store) -> Result<Position, Failure> {
    match text {
        "beginning" => return Ok(Position::START),
        "now" => return Ok(store.port().status().await?.head),
        _ => {}
    }
    if let Ok(position) = text.parse() {
        return Ok(Position(position));
    }
    let Ok(Moment(time)) = text.parse() else {
        return Err(Failure::new(
            "--to is a position, `beginning`, `now`, or a time such as 2026-11-21T15:04:05Z or 2h",
        ));
    };
    Ok(position_at(&*store.port(), time).await?)
}
