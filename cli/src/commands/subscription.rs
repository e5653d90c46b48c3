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
  annals subscription order.mailer resume --reason \"the mail server is back\"
  annals subscription order.statistics reset --to beginning --reason \"counted twice before 1.4\"
      make the handler see every event again, also while the service runs

A reset undoes nothing. A handler that calls other systems (mails, payments) calls them again for each event that it sees again,
unless the handler checks by event id whether it has done so. `read-model NAME rebuild` builds a read model again.

A group that consumes topics has offsets, not a position in the log. To hold up such a group, pause the relay that sends its
messages: `subscription SERVICE.relay pause` on the store of the sending service. `dead-letters` shows messages that the group
could not handle.")]
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
            act.confirm(&format!(
                "Reset {name}, so that its handler sees every event after position {} again?",
                grouped(to.0)
            ))?;
            let reset = operator.reset(name, to, &act.reason).await;
            let instead = "the group skips messages that it has handled. `replay --bus … --topic` sends events again to a \
                           separate topic, and `dead-letters redrive` makes the group handle parked messages again";
            reset.map_err(|error| of_bus(error, instead))?;
            output.line(&format!("{name}: continues after position {}", grouped(to.0)))?;
        }
        SubscriptionCommand::Pause { act } => {
            set_paused(name, true, &act, store).await?;
            output.line(&format!("{name}: paused"))?;
        }
        SubscriptionCommand::Resume { act } => {
            set_paused(name, false, &act, store).await?;
            output.line(&format!("{name}: resumed"))?;
        }
    }
    Ok(Verdict::Fine)
}

async fn set_paused(name: &str, paused: bool, act: &ActionArgs, store: &Store) -> Result<(), Failure> {
    let done = Operator::new(store.port(), &act.by()?).pause(name, paused, &act.reason).await;
    let instead = "`subscription SERVICE.relay pause`, on the store of the sending service, holds up its messages; a service \
                   that was stopped continues from its offsets";
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
            "--to takes a position, `beginning`, `now`, or a time such as 2026-11-21T15:04:05Z or 2h",
        ));
    };
    Ok(position_at(&*store.port(), time).await?)
}
