use annals::{StepError, saga::Status, testing::check};
use bank::{
    account::AccountStep,
    limit::LimitStep,
    transfer::{TransferCommand, TransferState, plan, plan_without_limit, with_limit},
};

/// The data of a saga that transfers 100 pence.
fn state() -> TransferState {
    TransferState {
        id: "t".to_owned(),
        from: "a".to_owned(),
        to: "b".to_owned(),
        pence: 100,
        currency: "GBP".to_owned(),
        day: "2026-11-30".to_owned(),
        rejected: None,
    }
}

// ANCHOR: check
/// The places where the money may be, and whether the limit counts the transfer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    sender: bool,
    recipient: bool,
    counted: bool,
    ended: Option<&'static str>,
}

const BEFORE: World = World { sender: true, recipient: false, counted: false, ended: None };

fn accounts(world: &mut World, step: AccountStep) -> Result<serde_json::Value, StepError> {
    match step {
        AccountStep::Debit { .. } => world.sender = false,
        AccountStep::Refund { .. } => world.sender = true,
        AccountStep::Credit { .. } => world.recipient = true,
    }
    Ok(().into())
}

fn limits(world: &mut World, step: LimitStep) -> Result<serde_json::Value, StepError> {
    world.counted = matches!(step, LimitStep::Reserve { .. });
    Ok(().into())
}

fn transfers(world: &mut World, command: TransferCommand) -> Result<serde_json::Value, StepError> {
    world.ended = match command {
        TransferCommand::Complete { .. } => Some("completed"),
        TransferCommand::Reject { .. } => Some("rejected"),
        TransferCommand::Request { .. } => None,
    };
    Ok(().into())
}

#[test]
fn money_is_never_lost_or_doubled_whatever_fails() {
    check(plan(), state())
        .world(BEFORE)
        .service("accounts", accounts)
        .service("limits", limits)
        .service("transfers", transfers)
        .always("the money is in one place at most", |world| !(world.sender && world.recipient))
        .at_end("the money has moved, or is back", |world, status| match status {
            Status::Completed => world.recipient && world.counted && world.ended == Some("completed"),
            _ => world.sender && !world.counted && world.ended == Some("rejected"),
        })
        .everything()
        .ends_clean();
}
// ANCHOR_END: check

// ANCHOR: moved
#[test]
fn transfer_under_way_moves_to_the_plan_with_a_limit_at_any_step() {
    check(plan(), state())
        .world(BEFORE)
        .service("accounts", accounts)
        .service("limits", limits)
        .service("transfers", transfers)
        .at_end("the money has moved, or is back", |world, status| match status {
            Status::Completed => world.recipient,
            _ => world.sender && !world.counted,
        })
        .moved_from(plan_without_limit(), with_limit)
        .every_step_fails()
        .every_timer_fires()
        .ends_clean();
}
// ANCHOR_END: moved
