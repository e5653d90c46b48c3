//! The plan of a saga. A wrong order of steps, or a compensatable step without an undo, does not compile.

use std::{marker::PhantomData, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::progress::Outcome;
use crate::{
    decide::categories,
    event::{Event, named_id},
};

/// The default time that a step waits for replies before the saga asks the participants again.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// The default number of attempts before a step is given up.
pub const ATTEMPTS_MAX: u32 = 8;
/// The longest delay before the second attempt at a failed step. The delay doubles with each further attempt, up to
/// [`RETRY_DELAY_MAX`]. Jitter shortens each delay by up to a half.
pub const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
/// The longest delay before a failed step is attempted again.
pub const RETRY_DELAY_MAX: Duration = Duration::from_secs(60);

/// The data of a saga. The saga starts with this data, and the outcomes of its steps add to the data.
pub trait SagaState: Clone + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Updates the data with the outcome of a step. The method must be pure, like
    /// [`Aggregate::evolve`](crate::Aggregate::evolve).
    fn learn(&mut self, _step: &str, _outcome: &Outcome) {}
}

/// The command that a step sends to a service. Every attempt sends the command with the same id.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRequest {
    pub(crate) to: String,
    pub(crate) type_name: &'static str,
    pub(crate) schema_version: i32,
    pub(crate) data: Result<String, String>,
}

impl StepRequest {
    /// Returns a request that asks `service` to carry out `command`.
    pub fn to<E: Event>(service: &str, command: &E) -> Self {
        Self {
            to: service.to_owned(),
            type_name: command.type_name(),
            schema_version: command.schema_version(),
            data: command.encode().map_err(|error| error.to_string()),
        }
    }
}

/// The kind of a step, which determines what the saga does when the step fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The step can be undone.
    Compensatable,
    /// The point of no return: until this step succeeds, the saga can still go back; afterwards, the saga only goes
    /// forward.
    Pivot,
    /// The step is repeated until it succeeds.
    Retriable,
    /// The step runs once all earlier steps are undone, and is repeated until it succeeds.
    Closing,
}

type Make<C> = fn(&C) -> StepRequest;

#[derive(Clone)]
pub(crate) struct Call<C> {
    pub perform: Make<C>,
    pub undo: Option<Make<C>>,
}

/// One step. The participants of the step (one or more) are asked at the same time.
#[derive(Clone)]
pub(crate) struct PlannedStep<C> {
    pub name: &'static str,
    pub kind: Kind,
    pub calls: Vec<Call<C>>,
    pub timeout: Duration,
    pub attempts_max: u32,
}

/// A saga definition.
///
/// ```
/// use annals::{Event, Saga, SagaState, saga::StepRequest};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Event)]
/// #[event(prefix = "hotel")]
/// enum HotelCommand {
///     Hold { guest: String },
///     Release { guest: String },
/// }
///
/// #[derive(Event)]
/// #[event(prefix = "bank")]
/// enum BankCommand {
///     Pay { guest: String },
/// }
///
/// /// The data of the saga.
/// #[derive(Clone, Serialize, Deserialize)]
/// struct Trip {
///     guest: String,
/// }
/// impl SagaState for Trip {}
///
/// fn trip() -> Saga<Trip> {
///     Saga::named("trip")
///         .compensatable("hold room", |trip: &Trip| StepRequest::to("hotel", &HotelCommand::Hold { guest: trip.guest.clone() }))
///         .undo(|trip| StepRequest::to("hotel", &HotelCommand::Release { guest: trip.guest.clone() }))
///         .pivot("pay", |trip| StepRequest::to("bank", &BankCommand::Pay { guest: trip.guest.clone() }))
///         .build()
/// }
///
/// // The plan can be drawn.
/// assert!(trip().mermaid().contains("hold room"));
/// ```
///
/// A [`Runner`](super::Runner) runs the sagas of a plan.
#[derive(Clone)]
pub struct Saga<C> {
    pub(crate) name: &'static str,
    pub(crate) steps: Vec<PlannedStep<C>>,
    pub(crate) closing: Vec<PlannedStep<C>>,
    pub(crate) deadline: Option<Duration>,
    pub(crate) revision: u32,
    pub(crate) hash: String,
}

debug_fields!([C] Saga<C> { name, deadline, revision, hash });

impl<C: SagaState> Saga<C> {
    /// Begins a plan for the saga with this name. The name is stored, so a saga must never be renamed.
    pub fn named(name: &'static str) -> Plan<C, Open> {
        let saga =
            Self { name, steps: Vec::new(), closing: Vec::new(), deadline: None, revision: 0, hash: String::new() };
        Plan { saga, place: PhantomData }
    }

    /// Returns the name of the saga.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Returns the hash of the plan's shape: names, kinds and order of the steps, number of participants, and the
    /// [revision](Plan::revision). A running saga keeps the definition that has the same hash as the definition with
    /// which the saga started. The hash does not cover the code that makes the requests and their undos.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Returns the category of the streams that record these sagas.
    pub fn category(&self) -> String {
        format!("saga.{}", self.name)
    }

    /// Returns the number of compensatable steps, which all come first in the plan.
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

/// A plan under construction. The type parameter `P` determines which step may come next.
#[must_use = "a plan does nothing before `build`"]
pub struct Plan<C, P> {
    saga: Saga<C>,
    place: PhantomData<P>,
}

debug_fields!([C, P] Plan<C, P> { saga });

/// The plan has no step yet.
#[derive(Debug)]
pub struct Open;
/// The last step has no undo yet.
#[derive(Debug)]
pub struct NeedsUndo;
/// The last step can be undone.
#[derive(Debug)]
pub struct Undoable;
/// The saga only goes forward from here.
#[derive(Debug)]
pub struct AfterPivot;
/// The forward path is complete. The steps that follow run at the end of a compensated saga.
#[derive(Debug)]
pub struct Closing;

/// The states of a plan in which a compensatable step may be added.
pub trait BeforePivot {}
impl BeforePivot for Open {}
impl BeforePivot for Undoable {}
/// The states of a plan in which a retriable step may be added.
pub trait BeforeClosing {}
impl BeforeClosing for Open {}
impl BeforeClosing for Undoable {}
impl BeforeClosing for AfterPivot {}
/// The states of a plan in which the plan may be complete.
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

    /// Sets the revision, which distinguishes this plan from an earlier plan of the same shape. The default is 0. When
    /// the requests or the undos of steps change, raise the revision, and register the earlier plan as
    /// [older](super::Runner::older).
    pub fn revision(mut self, revision: u32) -> Self {
        self.saga.revision = revision;
        self
    }

    /// Sets how long the saga may take to reach its pivot. A saga that takes longer is compensated.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.saga.deadline = Some(deadline);
        self
    }
}

impl<C: SagaState, P: BeforePivot> Plan<C, P> {
    /// Adds a step that can be undone. [`undo`](Plan::undo) must follow.
    pub fn compensatable(self, name: &'static str, perform: Make<C>) -> Plan<C, NeedsUndo> {
        self.step(name, Kind::Compensatable, perform)
    }

    /// Adds the pivot, the saga's point of no return. If the participant refuses the pivot, the earlier steps are
    /// undone; once the pivot is done, the saga only goes forward.
    pub fn pivot(self, name: &'static str, perform: Make<C>) -> Plan<C, AfterPivot> {
        self.step(name, Kind::Pivot, perform)
    }
}

impl<C: SagaState> Plan<C, NeedsUndo> {
    /// Sets the request that undoes the step. The request may arrive for a step that never ran; the undo then does
    /// nothing.
    pub fn undo(mut self, undo: Make<C>) -> Plan<C, Undoable> {
        if let Some(call) = self.last().and_then(|step| step.calls.last_mut()) {
            call.undo = Some(undo);
        }
        self.now()
    }
}

impl<C: SagaState> Plan<C, Undoable> {
    /// Adds another participant to the same step. All participants of a step are asked at the same time. A call of
    /// [`undo`](Plan::undo) for the new participant must follow.
    pub fn and(mut self, perform: Make<C>) -> Plan<C, NeedsUndo> {
        if let Some(step) = self.last() {
            step.calls.push(Call { perform, undo: None });
        }
        self.now()
    }
}

impl<C: SagaState, P: BeforeClosing> Plan<C, P> {
    /// Adds a step that is repeated until it succeeds.
    pub fn retriable(self, name: &'static str, perform: Make<C>) -> Plan<C, AfterPivot> {
        self.step(name, Kind::Retriable, perform)
    }
}

impl<C: SagaState, P: Complete> Plan<C, P> {
    /// Adds a step at the end of a compensated saga. The step is repeated until it succeeds.
    pub fn when_compensated(self, name: &'static str, perform: Make<C>) -> Plan<C, Closing> {
        self.step(name, Kind::Closing, perform)
    }

    /// Sets how long the last step waits for replies before the saga asks the participants again. The default is
    /// [`STEP_TIMEOUT`].
    pub fn timeout(mut self, timeout: Duration) -> Self {
        if let Some(step) = self.last() {
            step.timeout = timeout;
        }
        self
    }

    /// Sets the number of attempts before the last step is given up. The default is [`ATTEMPTS_MAX`].
    pub fn attempts(mut self, attempts_max: u32) -> Self {
        if let Some(step) = self.last() {
            step.attempts_max = attempts_max.max(1);
        }
        self
    }

    /// Returns the definition.
    ///
    /// # Panics
    /// Panics if the plan contains a mistake: two steps have the same name, the name of a step is empty or contains
    /// U+0000, or the name of the saga is empty, is too long for a category, or contains anything other than
    /// the characters of a category (lower-case letters, digits, `.` and `_`).
    pub fn build(mut self) -> Saga<C> {
        let fault = categories::check(&self.saga.category()).map_err(|error| error.to_string());
        let fault = if self.saga.name.is_empty() { Err("the name is empty".to_owned()) } else { fault };
        if let Err(reason) = fault {
            panic!("saga {:?} cannot have this name: {reason}", self.saga.name);
        }
        let mut names: Vec<_> = self.saga.steps.iter().chain(&self.saga.closing).map(|step| step.name).collect();
        // The events of the saga hold the name, and no store accepts U+0000.
        if let Some(name) = names.iter().find(|name| name.is_empty() || name.contains('\0')) {
            panic!("saga {:?} has a step named {name:?}: the name is empty or contains U+0000", self.saga.name);
        }
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            panic!("saga {:?} has two steps named {:?}", self.saga.name, twice[0]);
        }
        self.saga.hash = named_id(Uuid::NAMESPACE_OID, &self.saga.shape()).simple().to_string()[..12].to_owned();
        self.saga
    }
}
