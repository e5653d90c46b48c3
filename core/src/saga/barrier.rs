//! The barrier at a participant rejects late and repeated steps. This module holds the recorded steps of each saga, and
//! decides what to do with the next command.

use std::collections::BTreeMap;

use super::{
    progress::{Outcome, Reply, StepRef},
    step_command::StepCommand,
};
use crate::{Event, decide::aggregate::Aggregate};

/// An event about the steps of one saga at a service.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "step")]
pub enum StepEvent {
    /// A step was done, was refused, or failed.
    Replied {
        /// The saga's stream.
        saga: String,
        /// The service that runs the saga.
        reply_to: String,
        /// The outcome of the step.
        reply: Reply,
        /// Whether the commit that stored this event also passed the reply to the saga, so that the relay does not send
        /// the reply.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        passed: bool,
    },
}

/// The state of one step at its participant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StepState {
    /// The step may have been done: an attempt had an unknown outcome.
    Unknown,
    /// The step was done.
    Done,
    /// The step was refused, and the refusal is final.
    Refused,
    /// The step was undone, or its undo arrived first. The step will never be done.
    Undone,
}

/// The steps of one saga at one service. The stream of this aggregate is the barrier that rejects late and repeated
/// steps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Participation {
    slots: BTreeMap<(StepRef, usize), StepState>,
}

/// What the barrier decides about a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Carry out the step.
    Perform,
    /// There is nothing to undo, or the step is undone already. Record the undo, so that a late step is refused.
    Bar,
    /// The step was done or refused before: send the recorded answer again.
    Repeat,
    /// The step was undone, or its undo arrived first: refuse the step.
    Refuse,
}

/// Decides what to do with a step command. This pure function is the logic of the barrier.
pub fn decide_step(participation: &Participation, command: &StepCommand) -> Step {
    let slot = |at| participation.slots.get(&(at, command.call));
    match command.at {
        StepRef::Forward(_) | StepRef::Closing(_) => match slot(command.at) {
            None | Some(StepState::Unknown) => Step::Perform,
            Some(StepState::Done | StepState::Refused) => Step::Repeat,
            Some(StepState::Undone) => Step::Refuse,
        },
        StepRef::Undo(step) => match slot(StepRef::Forward(step)) {
            Some(StepState::Done | StepState::Unknown) => Step::Perform,
            None | Some(StepState::Refused | StepState::Undone) => Step::Bar,
        },
    }
}

impl Participation {
    /// Returns the recorded state of a step, if there is one.
    pub fn slot(&self, at: StepRef, call: usize) -> Option<&StepState> {
        self.slots.get(&(at, call))
    }
}

impl Aggregate for Participation {
    const CATEGORY: &'static str = "step";
    type Command = StepEvent;
    type Event = StepEvent;
    type Refusal = std::convert::Infallible;

    fn decide(&self, command: &StepEvent) -> Result<Vec<StepEvent>, Self::Refusal> {
        Ok(vec![command.clone()])
    }

    fn evolve(&mut self, StepEvent::Replied { reply, .. }: &StepEvent) {
        let (at, slot) = match (reply.at, &reply.outcome) {
            // A failed attempt does not change the recorded state.
            (_, Outcome::Failed(_)) | (StepRef::Undo(_), Outcome::Unknown(_)) => return,
            (at, Outcome::Unknown(_)) => (at, StepState::Unknown),
            (StepRef::Undo(step), _) => (StepRef::Forward(step), StepState::Undone),
            (at, Outcome::Done(_)) => (at, StepState::Done),
            (at, Outcome::Refused(_)) => (at, StepState::Refused),
        };
        let known = self.slots.entry((at, reply.call)).or_insert_with(|| slot.clone());
        // An undone step stays undone: a late step gets an answer, but is never carried out.
        if *known != StepState::Undone {
            *known = slot;
        }
    }
}

pub(super) fn step_category(service: &str) -> String {
    format!("step.{service}")
}

/// Returns the stream that records the answers of a service to a saga.
pub(super) fn step_stream(service: &str, saga: &str) -> String {
    format!("{}-{saga}", step_category(service))
}
