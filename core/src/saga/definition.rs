//! The plan of a saga. A wrong order of steps, or a compensatable one without an undo, does not compile.

use std::{marker::PhantomData, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::progress::Outcome;
use crate::{
    categories,
    event::{Event, named_id},
};

/// How long a step waits for its participants before it asks again.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a step is asked for before it is given up, by default.
pub const ATTEMPTS_MAX: u32 = 8;
/// The delay before a failed step is asked for again: doubled each time, up to [`RETRY_DELAY_MAX`].
pub const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
/// The longest delay before a failed step is asked for again.
pub const RETRY_DELAY_MAX: Duration = Duration::from_secs(60);

/// What a saga knows: given when it starts, and enriched by what its steps report.
pub trait SagaState: Clone + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Takes note of how a step ended. Pure, as [`Aggregate::evolve`](crate::Aggregate::evolve) is.
    fn learn(&mut self, _step: &str, _outcome: &Outcome) {}
}

/// What a step asks of a service. The command keeps its id however often it is sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub(crate) to: String,
    pub(crate) type_name: &'static str,
    pub(crate) schema_version: i32,
    pub(crate) data: Result<String, String>,
}

impl Request {
    /// Asks `service` to carry out `command`.
    pub fn to<E: Event>(service: &str, command: &E) -> Self {
        Self {
            to: service.to_owned(),
            type_name: command.type_name(),
            schema_version: command.schema_version(),
            data: command.encode().map_err(|error| error.to_string()),
        }
    }
}

/// What may become of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Can be undone.
    Compensatable,
    /// Decides: before it the saga can still go back, after it only forward.
    Pivot,
    /// Is repeated until it succeeds.
    Retriable,
    /// Is repeated until it succeeds, after everything was undone.
    Closing,
}

type Make<C> = fn(&C) -> Request;

#[derive(Clone)]
pub(crate) struct Call<C> {
    pub perform: Make<C>,
    pub undo: Option<Make<C>>,
}

/// One step: one or several participants, asked at the same time.
#[derive(Clone)]
pub(crate) struct PlannedStep<C> {
    pub name: &'static str,
    pub kind: Kind,
    pub calls: Vec<Call<C>>,
    pub timeout: Duration,
    pub attempts_max: u32,
}

/// A saga definition.
#[derive(Clone)]
pub struct Saga<C> {
    pub(crate) name: &'static str,
    pub(crate) steps: Vec<PlannedStep<C>>,
    pub(crate) closing: Vec<PlannedStep<C>>,
    pub(crate) deadline: Option<Duration>,
    pub(crate) revision: u32,
    pub(crate) hash: String,
}

impl<C: SagaState> Saga<C> {
    /// Starts a plan. The name is stored: never rename.
    pub fn named(name: &'static str) -> Plan<C, Open> {
        let saga =
            Self { name, steps: Vec::new(), closing: Vec::new(), deadline: None, revision: 0, hash: String::new() };
        Plan { saga, place: PhantomData }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Identifies the shape of the plan: names, kinds and order of the steps, number of participants, and its
    /// [revision](Plan::revision). A running saga keeps to the definition with the hash it was started under. What a step
    /// asks for and how it is undone is code, of which the hash says nothing.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The category of the streams that record these sagas.
    pub fn category(&self) -> String {
        format!("saga.{}", self.name)
    }

    /// How many of the first steps can be undone.
    pub(crate) fn compensatable(&self) -> usize {
        self.steps.iter().take_while(|step| step.kind == Kind::Compensatable).count()
    }

    fn shape(&self) -> String {
        let mut shape = self.name.to_owned();
        if self.revision > 0 {
            shape += &format!("\nrevision {}", self.revision);
        }
        for step in self.steps.iter().chain(&self.closing) {
            shape += &format!("\n{:?} {} x{}", step.kind, step.name, step.calls.len());
        }
        shape
    }
}

/// A plan in the making. `P` says what may come next.
#[must_use = "a plan does nothing before `build`"]
pub struct Plan<C, P> {
    saga: Saga<C>,
    place: PhantomData<P>,
}

/// Nothing is planned yet.
pub struct Open;
/// The last step lacks its undo.
pub struct NeedsUndo;
/// The last step can be undone.
pub struct Undoable;
/// From here the saga only goes forward.
pub struct AfterPivot;
/// The forward path is complete; what follows ends a compensated saga.
pub struct Closing;

/// Where a compensatable step may stand.
pub trait BeforePivot {}
impl BeforePivot for Open {}
impl BeforePivot for Undoable {}
/// Where a retriable step may stand.
pub trait BeforeClosing {}
impl BeforeClosing for Open {}
impl BeforeClosing for Undoable {}
impl BeforeClosing for AfterPivot {}
/// Where a plan may end.
pub trait Complete {}
impl Complete for Undoable {}
impl Complete for AfterPivot {}
impl Complete for Closing {}

impl<C: SagaState, P> Plan<C, P> {
    fn now<Q>(self) -> Plan<C, Q> {
        Plan { saga: self.saga, place: PhantomData }
    }

    fn step<Q>(mut self, name: &'static str, kind: Kind, perform: Make<C>) -> Plan<C, Q> {
        let calls = vec![Call { perform, undo: None }];
        let step = PlannedStep { name, kind, calls, timeout: STEP_TIMEOUT, attempts_max: ATTEMPTS_MAX };
        if kind == Kind::Closing {
            self.saga.closing.push(step)
        } else {
            self.saga.steps.push(step)
        }
        self.now()
    }

    fn last(&mut self) -> Option<&mut PlannedStep<C>> {
        if self.saga.closing.is_empty() { self.saga.steps.last_mut() } else { self.saga.closing.last_mut() }
    }

    /// Tells this plan from an earlier one of the same shape, whose steps ask for something else or are undone in another
    /// way: raise it then, and register the earlier plan as [older](super::Runner::older). 0 by default.
    pub fn revision(mut self, revision: u32) -> Self {
        self.saga.revision = revision;
        self
    }

    /// How long the whole saga may take to reach its pivot; after that it is compensated.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.saga.deadline = Some(deadline);
        self
    }
}

impl<C: SagaState, P: BeforePivot> Plan<C, P> {
    /// A step that can be undone. [`undo`](Plan::undo) must follow.
    pub fn compensatable(self, name: &'static str, perform: Make<C>) -> Plan<C, NeedsUndo> {
        self.step(name, Kind::Compensatable, perform)
    }

    /// The step that decides. If its participant refuses, what came before is undone; once it is done, the saga only goes
    /// forward.
    pub fn pivot(self, name: &'static str, perform: Make<C>) -> Plan<C, AfterPivot> {
        self.step(name, Kind::Pivot, perform)
    }
}

impl<C: SagaState> Plan<C, NeedsUndo> {
    /// What takes the step back. It may arrive for a step that never ran, and then does nothing.
    pub fn undo(mut self, undo: Make<C>) -> Plan<C, Undoable> {
        if let Some(call) = self.last().and_then(|step| step.calls.last_mut()) {
            call.undo = Some(undo);
        }
        self.now()
    }
}

impl<C: SagaState> Plan<C, Undoable> {
    /// One more participant in the same step, asked at the same time. Its [`undo`](Plan::undo) must follow.
    pub fn and(mut self, perform: Make<C>) -> Plan<C, NeedsUndo> {
        if let Some(step) = self.last() {
            step.calls.push(Call { perform, undo: None });
        }
        self.now()
    }
}

impl<C: SagaState, P: BeforeClosing> Plan<C, P> {
    /// A step that is repeated until it succeeds.
    pub fn retriable(self, name: &'static str, perform: Make<C>) -> Plan<C, AfterPivot> {
        self.step(name, Kind::Retriable, perform)
    }
}

impl<C: SagaState, P: Complete> Plan<C, P> {
    /// A step at the end of a saga that was compensated, repeated until it succeeds.
    pub fn when_compensated(self, name: &'static str, perform: Make<C>) -> Plan<C, Closing> {
        self.step(name, Kind::Closing, perform)
    }

    /// How long the last step waits for its participants before it asks again; [`STEP_TIMEOUT`] by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        if let Some(step) = self.last() {
            step.timeout = timeout;
        }
        self
    }

    /// How often the last step is asked for before it is given up; [`ATTEMPTS_MAX`] by default.
    pub fn attempts(mut self, attempts_max: u32) -> Self {
        if let Some(step) = self.last() {
            step.attempts_max = attempts_max.max(1);
        }
        self
    }

    /// The definition.
    ///
    /// # Panics
    /// On a mistake in the program text: if two steps have the same name, or if the name of the saga cannot be part of a category,
    /// which is lower-case letters, digits, `.` and `_`.
    pub fn build(mut self) -> Saga<C> {
        let fault = categories::check(&self.saga.category()).map_err(|error| error.to_string());
        let fault = if self.saga.name.is_empty() { Err("it is empty".to_owned()) } else { fault };
        if let Err(reason) = fault {
            panic!("saga {:?} cannot have this name: {reason}", self.saga.name);
        }
        let mut names: Vec<_> = self.saga.steps.iter().chain(&self.saga.closing).map(|step| step.name).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            panic!("saga {:?} has two steps named {:?}", self.saga.name, twice[0]);
        }
        self.saga.hash = named_id(Uuid::NAMESPACE_OID, &self.saga.shape()).simple().to_string()[..12].to_owned();
        self.saga
    }
}
