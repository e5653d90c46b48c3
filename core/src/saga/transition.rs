//! The next move of a saga: a pure function of its plan, its progress and one input.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{
    definition::{Kind, PlannedStep, RETRY_DELAY_MAX, RETRY_DELAY_MIN, Saga, SagaState, StepRequest},
    progress::{
        CallState, Command, Failure, Fault, FaultKind, OperatorAction, Outcome, Progress, Reply, Status, StepRef,
    },
};
use crate::{
    base::{name::is_service_name, panic::caught_now, reason},
    commit::{NESTING_MAX, check_json_within},
    event::{EVENT_BYTES_MAX, named_id},
    store::clock::later,
};

/// The maximum total size of the commands in one saga event, in bytes of JSON: the maximum size of an event, minus room
/// for the progress and the reasons in the event.
pub const COMMANDS_BYTES_MAX: usize = EVENT_BYTES_MAX - 60_000;
/// The nesting depth at which a command's content begins within the event that sends the command.
const COMMAND_DEPTH: usize = 4;

/// The maximum number of characters of the reason in a `Fault`. The process prints faults as log lines (`tracing`),
/// where a reason should take no more than a line or two.
const FAULT_REASON_CHARS_MAX: usize = 300;

/// An input to a running saga.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A participant replied.
    Reply(Reply),
    /// Time has passed: a timer may be due.
    Due,
    /// An operator acts.
    Operate(OperatorAction),
}

/// The result of an input.
#[derive(Clone, Debug)]
pub struct Transition<C> {
    /// The data of the saga after the transition.
    pub context: C,
    /// The progress after the transition.
    pub progress: Progress,
    /// The commands to send.
    pub send: Vec<Command>,
    /// The step that the saga gave up, and why.
    pub gave_up: Option<Failure>,
    /// The number of bytes by which the commands of the next step exceed the limit.
    pub(crate) too_large_by: Option<usize>,
    /// The fault at the step.
    pub fault: Option<Fault>,
}

struct Move<'a, C> {
    plan: &'a Saga<C>,
    saga_id: Uuid,
    now: i64,
    context: C,
    progress: Progress,
    send: Vec<Command>,
    gave_up: Option<Failure>,
    /// The size in bytes of the event that records this move, without its commands.
    recorded: usize,
    too_large_by: Option<usize>,
    fault: Option<Fault>,
}

/// Returns the size of a value as JSON.
pub(crate) fn json_bytes(value: &impl Serialize) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // A value that cannot be written as JSON is refused later, when it is encoded.
    _ = serde_json::to_writer(&mut count, value);
    count.0
}

/// Passes the failure of a step that the saga gave up to the saga's state. If the state panics, the state stays
/// unchanged, because the panic must not keep the saga from going back.
pub(crate) fn learn_given_up<C: SagaState>(context: &mut C, failure: &Failure) {
    let before = context.clone();
    if caught_now(|| context.learn(&failure.step, &Outcome::Failed(failure.reason.clone()))).is_err() {
        *context = before;
    }
}

/// Returns the first move of a saga. The ids of its commands derive from `saga_id`; `now` is in milliseconds since
/// 1970.
///
/// A command that cannot be made or sent counts as a failure of its step.
///
/// # Errors
/// Never returns an error, because only an operator's action can cause an error.
pub fn begin<C: SagaState>(plan: &Saga<C>, saga_id: Uuid, context: C, now: i64) -> Result<Transition<C>, String> {
    let progress = Progress {
        status: Status::Running,
        at: StepRef::Forward(0),
        step: String::new(),
        calls: Vec::new(),
        attempt: 0,
        retrying: false,
        due: None,
        deadline: plan.deadline.and_then(|deadline| later(now, deadline)),
        failure: None,
        trouble: None,
        definition: plan.hash.clone(),
        numbers: BTreeMap::new(),
        started: now,
        ended: None,
    };
    let recorded = json_bytes(&context);
    let mut step = Move::new(plan, saga_id, now, context, progress, recorded);
    step.enter(StepRef::Forward(0))?;
    Ok(step.end())
}

/// Returns the move that `input` causes. Returns `None` if the input changes nothing, because it is late, repeated or
/// early, or because the saga has ended.
///
/// # Errors
/// Returns an error if an operator's action does not apply.
pub fn transition<C: SagaState>(
    plan: &Saga<C>,
    saga_id: Uuid,
    context: &C,
    progress: &Progress,
    input: &Input,
    now: i64,
) -> Result<Option<Transition<C>>, String> {
    if progress.ended.is_some() {
        return match input {
            Input::Operate(verb) => Err(format!("the saga has ended: {verb:?} does nothing")),
            Input::Reply(_) | Input::Due => Ok(None),
        };
    }
    let context = context.clone();
    let progress = progress.clone();
    let recorded = match input {
        Input::Reply(Reply { outcome: Outcome::Done(answer), .. }) => json_bytes(answer),
        Input::Reply(_) | Input::Due | Input::Operate(_) => 0,
    };
    let mut step = Move::new(plan, saga_id, now, context, progress, recorded);
    let changed = match input {
        Input::Reply(reply) => step.reply(reply)?,
        Input::Due => step.due()?,
        Input::Operate(verb) => {
            step.operate(*verb)?;
            true
        }
    };
    Ok(changed.then(|| step.end()))
}

impl<'a, C: SagaState> Move<'a, C> {
    fn new(plan: &'a Saga<C>, saga_id: Uuid, now: i64, context: C, progress: Progress, recorded: usize) -> Self {
        let send = Vec::new();
        let gave_up = None;
        Self { plan, saga_id, now, context, progress, send, gave_up, recorded, too_large_by: None, fault: None }
    }

    fn end(self) -> Transition<C> {
        let Self { context, progress, send, gave_up, too_large_by, fault, .. } = self;
        Transition { context, progress, send, gave_up, too_large_by, fault }
    }

    fn planned(&self) -> &PlannedStep<C> {
        match self.progress.at {
            StepRef::Forward(step) | StepRef::Undo(step) => &self.plan.steps[step],
            StepRef::Closing(step) => &self.plan.closing[step],
        }
    }

    fn reply(&mut self, reply: &Reply) -> Result<bool, String> {
        let known = self.progress.calls.get(reply.call).copied();
        if reply.at != self.progress.known_as() || matches!(known, None | Some(CallState::Done | CallState::Refused)) {
            return Ok(false);
        }
        let stale = reply.attempt < self.progress.attempt || self.progress.retrying;
        let state = match &reply.outcome {
            Outcome::Done(_) => CallState::Done,
            // For a step that must succeed, a refusal counts as a failure.
            Outcome::Refused(_) if self.may_refuse() => CallState::Refused,
            Outcome::Refused(_) | Outcome::Failed(_) | Outcome::Unknown(_) if stale => return Ok(false),
            Outcome::Refused(_) | Outcome::Failed(_) | Outcome::Unknown(_) => CallState::Failed,
        };
        if known == Some(state) {
            return Ok(false);
        }
        if state == CallState::Failed && self.progress.status != Status::Stuck {
            let (Outcome::Refused(reason) | Outcome::Failed(reason) | Outcome::Unknown(reason)) = &reply.outcome else {
                return Ok(false);
            };
            self.blame(FaultKind::Failed, reason, Vec::new());
        }
        self.progress.calls[reply.call] = state;
        let is_final = matches!(reply.outcome, Outcome::Done(_) | Outcome::Refused(_));
        if is_final && !matches!(self.progress.at, StepRef::Undo(_)) {
            self.context.learn(self.planned().name, &reply.outcome);
        }
        if self.progress.status != Status::Stuck {
            let reason = reply.outcome.reason();
            if state == CallState::Failed {
                self.progress.trouble = Some(self.failure(reason));
            }
            self.settle(reason)?;
        }
        Ok(true)
    }

    fn may_refuse(&self) -> bool {
        matches!(self.progress.at, StepRef::Forward(_))
            && matches!(self.planned().kind, Kind::Compensatable | Kind::Pivot)
    }

    /// Moves the saga on if the states of the calls allow it.
    fn settle(&mut self, reason: &str) -> Result<(), String> {
        let has = |state| self.progress.calls.contains(&state);
        if has(CallState::Refused) {
            self.compensate(reason)
        } else if has(CallState::Failed) && !has(CallState::Waiting) {
            // The last participant to reply may have succeeded. The reason is then the failure that another participant
            // reported earlier.
            let said = self.progress.trouble.as_ref().map_or("", |trouble| &trouble.reason).to_owned();
            self.fail(if reason.is_empty() { &said } else { reason })
        } else if has(CallState::Failed) || has(CallState::Waiting) {
            Ok(())
        } else {
            self.advance()
        }
    }

    fn advance(&mut self) -> Result<(), String> {
        match self.progress.at {
            StepRef::Forward(step) if step + 1 < self.plan.steps.len() => self.enter(StepRef::Forward(step + 1)),
            StepRef::Forward(_) => self.finish(Status::Completed),
            StepRef::Undo(0) => self.close(),
            StepRef::Undo(step) => self.enter(StepRef::Undo(step - 1)),
            StepRef::Closing(step) if step + 1 < self.plan.closing.len() => self.enter(StepRef::Closing(step + 1)),
            StepRef::Closing(_) => self.finish(Status::Compensated),
        }
    }

    fn close(&mut self) -> Result<(), String> {
        if self.plan.closing.is_empty() {
            return self.finish(Status::Compensated);
        }
        self.enter(StepRef::Closing(0))
    }

    fn finish(&mut self, status: Status) -> Result<(), String> {
        let progress = &mut self.progress;
        (progress.status, progress.ended) = (status, Some(self.now));
        (progress.due, progress.deadline, progress.retrying) = (None, None, false);
        progress.trouble = None;
        Ok(())
    }

    fn enter(&mut self, at: StepRef) -> Result<(), String> {
        self.progress.at = at;
        let calls = self.planned().calls.len();
        self.enter_with(at, vec![CallState::Waiting; calls])
    }

    fn enter_with(&mut self, at: StepRef, calls: Vec<CallState>) -> Result<(), String> {
        self.progress.at = at;
        self.progress.step = self.planned().name.to_owned();
        self.progress.calls = calls;
        self.progress.attempt = 0;
        self.progress.trouble = None;
        if matches!(at, StepRef::Forward(step) if self.plan.steps[step].kind != Kind::Compensatable) {
            self.progress.deadline = None;
        }
        if self.progress.calls.iter().all(|call| *call == CallState::Done) { self.advance() } else { self.ask() }
    }

    /// Returns a request for each participant that is not done, or the reason why the request cannot be made.
    fn requests(&self) -> impl Iterator<Item = (usize, Result<StepRequest, String>)> {
        let planned = self.planned();
        let at = self.progress.at;
        let open = (0..planned.calls.len()).filter(|call| self.progress.calls[*call] != CallState::Done);
        open.map(move |call| {
            let make = match at {
                StepRef::Undo(_) => planned.calls[call].undo.unwrap_or(planned.calls[call].perform),
                StepRef::Forward(_) | StepRef::Closing(_) => planned.calls[call].perform,
            };
            (call, caught_now(|| make(&self.context)).map_err(|panic| format!("the command of the step {panic}")))
        })
    }

    /// Returns the command of a call, or the reason why no store would accept the command.
    fn command(&self, call: usize, request: Result<StepRequest, String>, attempt: u32) -> Result<Command, String> {
        let at = self.progress.known_as();
        let StepRequest { to, type_name, schema_version, data } = request?;
        if !is_service_name(&to) {
            return Err(format!("{to:?} cannot be the name of a service"));
        }
        let data = data.map_err(|error| format!("{type_name} has no JSON form: {error}"))?;
        check_json_within(&data, NESTING_MAX - COMMAND_DEPTH)
            .map_err(|reason| format!("{type_name} cannot be stored: {reason}"))?;
        Ok(Command {
            id: named_id(self.saga_id, &format!("{at}/{call}")),
            to,
            type_name: type_name.to_owned(),
            schema_version,
            at,
            call,
            attempt,
            must_succeed: !self.may_refuse(),
            data: RawValue::from_string(data).map_err(|error| format!("{type_name} has no JSON form: {error}"))?,
        })
    }

    /// Sends the commands of all calls that are not done. A command that cannot be sent counts as failed.
    fn ask(&mut self) -> Result<(), String> {
        let attempt = self.progress.attempt + 1;
        let made: Vec<_> =
            self.requests().map(|(call, request)| (call, self.command(call, request, attempt))).collect();
        let bytes: usize =
            made.iter().filter_map(|(_, made)| made.as_ref().ok()).map(|made| made.data.get().len()).sum();
        if bytes <= COMMANDS_BYTES_MAX && bytes + self.recorded > COMMANDS_BYTES_MAX {
            // This event has no room for the commands, so they are sent with the next event.
            self.progress.retrying = true;
            self.progress.due = later(self.now, RETRY_DELAY_MIN);
            return Ok(());
        }
        self.progress.attempt = attempt;
        self.progress.retrying = false;
        self.progress.due = later(self.now, self.planned().timeout);
        let mut unsent = None;
        for (call, made) in made {
            let made = made.and_then(|command| match bytes.checked_sub(COMMANDS_BYTES_MAX) {
                None | Some(0) => Ok(command),
                Some(too_many) => {
                    self.too_large_by = Some(too_many);
                    Err(format!("the commands of the step have {bytes} bytes; the limit is {COMMANDS_BYTES_MAX}"))
                }
            });
            match made {
                Ok(command) => {
                    self.progress.calls[call] = CallState::Waiting;
                    self.send.push(command);
                }
                Err(reason) => {
                    self.progress.calls[call] = CallState::Failed;
                    unsent = Some(reason::storable(&format!("the step cannot be requested: {reason}")));
                }
            }
        }
        let Some(reason) = unsent else { return Ok(()) };
        self.progress.trouble = Some(self.failure(&reason));
        self.blame(FaultKind::Failed, &reason, Vec::new());
        self.settle(&reason)
    }

    /// Handles a failed step when no reply is outstanding: attempts the step again later, or gives up the step.
    fn fail(&mut self, reason: &str) -> Result<(), String> {
        if self.progress.attempt >= self.planned().attempts_max {
            return self.give_up(reason);
        }
        self.progress.trouble = Some(self.failure(reason));
        self.progress.retrying = true;
        self.progress.due = later(self.now, retry_delay(self.saga_id, self.progress.attempt));
        Ok(())
    }

    /// Records the fault at the current step.
    fn blame(&mut self, kind: FaultKind, reason: &str, silent: Vec<String>) {
        let step = self.planned().name.to_owned();
        let attempt = self.progress.attempt;
        let reason = reason.chars().take(FAULT_REASON_CHARS_MAX).collect();
        self.fault = Some(Fault { kind, step, attempt, reason, silent });
    }

    fn failure(&self, reason: &str) -> Failure {
        Failure { step: self.planned().name.to_owned(), reason: reason.to_owned() }
    }

    fn give_up(&mut self, reason: &str) -> Result<(), String> {
        let failure = self.failure(reason);
        let compensatable =
            self.planned().kind == Kind::Compensatable && matches!(self.progress.at, StepRef::Forward(_));
        let kind = if compensatable { FaultKind::GaveUp } else { FaultKind::Stuck };
        let silent = self.fault.take().map(|fault| fault.silent).unwrap_or_default();
        self.blame(kind, reason, silent);
        if compensatable {
            learn_given_up(&mut self.context, &failure);
            self.gave_up = Some(failure);
            return self.compensate(reason);
        }
        // The pivot may have happened. Steps after the pivot, undos and closing steps must succeed. In each of these
        // cases only an operator can decide how the saga continues.
        self.progress.status = Status::Stuck;
        self.progress.trouble = Some(failure);
        (self.progress.due, self.progress.deadline, self.progress.retrying) = (None, None, false);
        Ok(())
    }

    /// Goes back: first undoes what this step may have done, then the steps before it.
    fn compensate(&mut self, reason: &str) -> Result<(), String> {
        let StepRef::Forward(step) = self.progress.at else { return Ok(()) };
        self.progress.failure = Some(self.failure(reason));
        self.progress.status = Status::Compensating;
        self.progress.deadline = None;
        if self.plan.steps[step].kind == Kind::Compensatable {
            // A participant that was asked and has not refused may have done its part, or may do it later.
            let undone =
                |call: &CallState| if *call == CallState::Refused { CallState::Done } else { CallState::Waiting };
            let calls = self.progress.calls.iter().map(undone).collect();
            return self.enter_with(StepRef::Undo(step), calls);
        }
        match self.plan.compensatable() {
            0 => self.close(),
            steps => self.enter(StepRef::Undo(steps - 1)),
        }
    }

    fn due(&mut self) -> Result<bool, String> {
        if self.progress.status == Status::Running
            && self.progress.deadline.is_some_and(|deadline| deadline <= self.now)
        {
            let failure = self.failure("deadline");
            self.blame(FaultKind::GaveUp, "deadline", Vec::new());
            learn_given_up(&mut self.context, &failure);
            self.gave_up = Some(failure);
            self.compensate("deadline")?;
            return Ok(true);
        }
        if self.progress.due.is_none_or(|due| due > self.now) {
            return Ok(false);
        }
        if self.progress.retrying {
            self.ask()?;
            return Ok(true);
        }
        let silent = self.silent();
        let unanswered = self.unanswered(&silent);
        self.blame(FaultKind::TimedOut, &unanswered, silent);
        if self.progress.attempt < self.planned().attempts_max {
            self.progress.trouble = Some(self.failure(&unanswered));
            self.ask()?;
        } else {
            self.give_up(&unanswered)?;
        }
        Ok(true)
    }

    /// Returns the services that were asked and have not replied in time.
    fn silent(&self) -> Vec<String> {
        let waiting = self.requests().filter(|(call, _)| self.progress.calls[*call] == CallState::Waiting);
        let silent: BTreeSet<String> = waiting.filter_map(|(_, request)| Some(request.ok()?.to)).collect();
        silent.into_iter().collect()
    }

    /// Returns the error text that names the services that have not replied, and the failure that another participant
    /// reported, if there is one.
    fn unanswered(&self, silent: &[String]) -> String {
        let silent = silent.join(" and ");
        let unanswered = format!("timeout: no answer from {silent} within {:?}", self.planned().timeout);
        match &self.progress.trouble {
            Some(said) if self.progress.calls.contains(&CallState::Failed) => {
                reason::storable(&format!("{}; {unanswered}", said.reason))
            }
            _ => unanswered,
        }
    }

    fn operate(&mut self, verb: OperatorAction) -> Result<(), String> {
        if self.progress.status != Status::Stuck {
            return Err(format!("the saga is {:?}, not stuck: {verb:?} does not apply", self.progress.status));
        }
        let (back, past_pivot) = match self.progress.at {
            StepRef::Forward(step) => (false, self.plan.steps[step].kind == Kind::Retriable),
            StepRef::Undo(_) | StepRef::Closing(_) => (true, true),
        };
        if verb == OperatorAction::Compensate && past_pivot {
            return Err(format!("step {:?} only goes forward: it cannot be compensated", self.progress.step));
        }
        if verb == OperatorAction::Abandon {
            self.progress.ended = Some(self.now);
            return Ok(());
        }
        self.progress.status = if back { Status::Compensating } else { Status::Running };
        self.progress.attempt = 0;
        let all_done = self.progress.calls.iter().all(|call| *call == CallState::Done);
        // A refused step would be refused again, so it is compensated instead of attempted again.
        let refused = self.progress.calls.contains(&CallState::Refused);
        match verb {
            OperatorAction::Compensate => self.compensate("an operator compensated the saga"),
            OperatorAction::Retry if refused => self.compensate("the step was refused while the saga was stuck"),
            OperatorAction::Retry if !all_done => self.ask(),
            OperatorAction::SkipStep | OperatorAction::Retry | OperatorAction::Abandon => self.advance(),
        }
    }
}

/// Returns the delay before the next attempt, which doubles with each attempt. The jitter comes from the saga's id, so
/// that the function stays pure.
fn retry_delay(saga_id: Uuid, attempt: u32) -> Duration {
    let doubled = RETRY_DELAY_MIN.saturating_mul(2u32.saturating_pow(attempt.saturating_sub(1).min(20)));
    let jitter = saga_id.as_bytes()[attempt as usize % 16];
    doubled.min(RETRY_DELAY_MAX).mul_f64(0.5 + f64::from(jitter) / 512.0)
}
