//! The interface of the model checker: checks one saga in a test.

use std::{
    any::TypeId,
    collections::BTreeMap,
    fmt::{self, Debug},
    hash::Hash,
    time::{Duration, Instant},
};

use serde_json::Value;
use stateright::{Checker, Model};

use super::{
    history,
    machine::{Machine, Migrate},
    model::{Act, Always, AtEnd, Protocol, RULES, Troubles},
};
use crate::{
    base::panic::caught_now,
    event::Event,
    saga::{Progress, Saga, SagaState, Status, StepError},
};

/// The default number of attempts at a step before the checked saga gives the step up. Two attempts are enough to cover
/// repeated attempts, late attempts and the last attempt.
pub const ATTEMPTS: u32 = 2;
/// The maximum number of states that a check explores. A state counts once for each move that leads to the state. If a
/// check needs more states, the world or the data of the saga contains too much: leave out everything that no invariant
/// needs.
pub const STATES_MAX: usize = 5_000_000;

/// A check of one saga; see [`check`].
#[must_use = "a check does nothing before `ends_clean` or `run`"]
pub struct Check<C, W> {
    saga: Saga<C>,
    earlier: Option<(Saga<C>, Migrate)>,
    context: C,
    protocol: CheckParts<W>,
    attempts: u32,
    states_max: usize,
}

debug_fields!([C, W] Check<C, W> { saga, attempts, states_max });

struct CheckParts<W> {
    world: W,
    services: BTreeMap<String, Act<W>>,
    always: Vec<Always<W>>,
    at_end: Vec<AtEnd<W>>,
    troubles: Troubles,
}

/// The figures of a completed check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The number of distinct combined states of the saga, the services, the messages and the world.
    pub states: usize,
    /// The number of moves on the shortest path to the state that is farthest from the start.
    pub depth: usize,
    /// The duration of the check.
    pub took: Duration,
}

/// A shortest history that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The broken rule, or the name of the broken invariant.
    pub broken: String,
    /// The moves, one per line.
    pub history: Vec<String>,
    /// The world after the last move.
    pub world: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.broken)?;
        for (line, number) in self.history.iter().zip(1..) {
            writeln!(f, "  {number:>2}. {line}")?;
        }
        write!(f, "  the world then: {}", self.world)
    }
}

impl std::error::Error for Violation {}

/// Checks everything that can happen to a saga that starts with `context`, including the faults that are switched on:
///
/// - [`every_step_fails`](Check::every_step_fails): any step that may be refused is refused; any call and any undo may
///   fail again and again, or may be done with an unknown outcome, until the saga gives up; then an operator retries;
/// - [`every_message_repeats`](Check::every_message_repeats): any message arrives twice, late, out of order, or never;
/// - [`every_timer_fires`](Check::every_timer_fires): any step times out, no matter whether its command is still in
///   flight, has been carried out or is lost; and the deadline of the saga passes at any moment.
///
/// [`everything`](Check::everything) switches on all three.
///
/// Every history covers crashes: after each move the saga is rebuilt from its events as a store returns them, and the
/// rebuilt saga must equal the saga in memory. A message that is delivered again after a crash is a repeated message.
///
/// The checked code is the code that runs in production: the saga's transition function, and the barrier of its
/// participants. The work of the participants is a model: a `world`, and a function for each service that carries out
/// a command in that world. The checker visits every combined state, breadth first, and shows the shortest history that
/// breaks a rule. In addition to your own invariants, [`always`](Check::always) and [`at_end`](Check::at_end), these
/// rules must hold:
///
/// - no call is done twice or done after its undo; no call is undone twice, and only a call that was done is undone;
/// - a step begins only when all earlier steps are done; undos run in reverse order; nothing is undone once the pivot
///   is done;
/// - in a completed saga every step is done and no step is undone; in a compensated saga every step that was done is
///   undone;
/// - late or repeated replies change nothing;
/// - a saga ends; it may get stuck only at the pivot, at a later step or in an undo, and must then end after an
///   operator's retry;
/// - a step that is attempted again has the same id and the same content, even after the saga was
///   [moved](Check::moved_from) to another plan.
///
/// ```
/// use annals::{Event, Saga, SagaState, saga, testing::check};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Event, Clone, Debug)]
/// #[event(prefix = "seat")]
/// enum Seat { Hold {}, Free {} }
/// #[derive(Event, Clone, Debug)]
/// #[event(prefix = "ticket")]
/// enum Ticket { Issue {} }
///
/// #[derive(Clone, Serialize, Deserialize)]
/// struct Booking;
/// impl SagaState for Booking {}
///
/// fn booking() -> Saga<Booking> {
///     Saga::named("booking")
///         .compensatable("hold seat", |_| saga::StepRequest::to("seats", &Seat::Hold {}))
///         .undo(|_| saga::StepRequest::to("seats", &Seat::Free {}))
///         .pivot("issue ticket", |_| saga::StepRequest::to("tickets", &Ticket::Issue {}))
///         .build()
/// }
///
/// #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
/// struct Hall { held: i32, tickets: i32 }
///
/// check(booking(), Booking)
///     .world(Hall::default())
///     .service("seats", |hall, command: Seat| {
///         hall.held += match command { Seat::Hold {} => 1, Seat::Free {} => -1 };
///         Ok(().into())
///     })
///     .service("tickets", |hall, Ticket::Issue {}: Ticket| {
///         hall.tickets += 1;
///         Ok(().into())
///     })
///     .always("a ticket has a seat", |hall| hall.tickets <= hall.held)
///     .at_end("a seat has a ticket", |hall, _| hall.tickets == hall.held)
///     .everything()
///     .ends_clean();
/// ```
pub fn check<C: SagaState>(saga: Saga<C>, context: C) -> Check<C, ()> {
    Check { saga, earlier: None, context, protocol: CheckParts::of(()), attempts: ATTEMPTS, states_max: STATES_MAX }
}

impl<W> CheckParts<W> {
    fn of(world: W) -> Self {
        let services = BTreeMap::new();
        let always = Vec::new();
        let at_end = Vec::new();
        Self { world, services, always, at_end, troubles: Troubles::default() }
    }
}

impl<C: SagaState> Check<C, ()> {
    /// Sets the initial state of the world in which the saga's services act. Call this method before all other methods.
    /// The smaller the world, the faster the check, so include only data that an invariant needs.
    pub fn world<W>(self, world: W) -> Check<C, W> {
        let Self { saga, earlier, context, attempts, states_max, .. } = self;
        Check { saga, earlier, context, protocol: CheckParts::of(world), attempts, states_max }
    }
}

impl<C, W> Check<C, W>
where
    C: SagaState,
    W: Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    /// Sets the function that carries out a service's commands in the world. The function models the service's
    /// [`Participant`](crate::Participant), and returns results with the same meaning. If the function returns an
    /// error, the world stays unchanged.
    pub fn service<E: Event>(
        mut self,
        name: &str,
        act: impl Fn(&mut W, E) -> Result<Value, StepError> + Send + Sync + 'static,
    ) -> Self {
        let service = name.to_owned();
        let act = move |world: &mut W, type_name: &str, schema_version: i32, data: &str| match E::decode(
            type_name,
            schema_version,
            data,
        ) {
            Ok(Some(command)) => caught_now(|| act(world, command))
                .map_err(|panic| format!("the service {service:?}, asked for {type_name} {data}, {panic}")),
            Ok(None) => Err(format!("the service {service:?} does not know {type_name}")),
            Err(error) => Err(format!("the service {service:?} cannot read {type_name} {data}: {error}")),
        };
        self.protocol.services.insert(name.to_owned(), Box::new(act));
        self
    }

    /// Adds an invariant that must hold in the world after every move.
    pub fn always(mut self, name: &'static str, holds: impl Fn(&W) -> bool + Send + Sync + 'static) -> Self {
        self.protocol.always.push((name, Box::new(holds)));
        self
    }

    /// Adds an invariant that must hold in the world after the saga has ended as [`Completed`](Status::Completed) or
    /// [`Compensated`](Status::Compensated). Messages that arrive after the end must not break the invariant either.
    pub fn at_end(mut self, name: &'static str, holds: impl Fn(&W, Status) -> bool + Send + Sync + 'static) -> Self {
        self.protocol.at_end.push((name, Box::new(holds)));
        self
    }

    /// Lets steps be refused, and lets calls and undos fail or be done with an unknown outcome.
    pub fn every_step_fails(mut self) -> Self {
        self.protocol.troubles.steps_fail = true;
        self
    }

    /// Lets messages arrive again, late, out of order, or never.
    pub fn every_message_repeats(mut self) -> Self {
        self.protocol.troubles.messages_repeat = true;
        self
    }

    /// Lets steps time out, and lets the saga's deadline pass.
    pub fn every_timer_fires(mut self) -> Self {
        self.protocol.troubles.timers_fire = true;
        self
    }

    /// Starts the saga under an earlier plan. A build that moves the saga to this plan, as
    /// [`Runner::migrate`](crate::saga::Runner::migrate) does, may take over at any moment. The check reports a broken
    /// rule if the migration is refused at any place.
    pub fn moved_from(mut self, earlier: Saga<C>, migrate: fn(&Progress) -> Progress) -> Self {
        self.earlier = Some((earlier, migrate));
        self
    }

    /// Switches on every fault.
    pub fn everything(self) -> Self {
        self.every_step_fails().every_message_repeats().every_timer_fires()
    }

    /// Sets the maximum number of attempts at a step; the default is [`ATTEMPTS`]. This limit overrides a higher limit
    /// in the plan, because further attempts would behave like the earlier ones.
    pub fn attempts(mut self, attempts_max: u32) -> Self {
        self.attempts = attempts_max.max(1);
        self
    }

    /// Sets the number of states after which the check gives up; the default is [`STATES_MAX`].
    pub fn states_max(mut self, states_max: usize) -> Self {
        self.states_max = states_max;
        self
    }

    /// Runs the check.
    ///
    /// # Panics
    /// Panics if a rule or an invariant can be broken. The message contains a shortest history that breaks the rule.
    #[track_caller]
    #[allow(clippy::must_use_candidate, reason = "the report is for the curious")]
    pub fn ends_clean(self) -> Report {
        let name = self.saga.name();
        match self.run() {
            Ok(report) => report,
            Err(violation) => panic!("saga {name:?}: {violation}"),
        }
    }

    /// Runs the check.
    ///
    /// # Errors
    /// Returns a shortest history that breaks a rule or an invariant. Returns a violation without a history if there
    /// are too many states, or if the world has no services.
    pub fn run(self) -> Result<Report, Violation> {
        let Self { mut saga, mut earlier, context, protocol, attempts, states_max } = self;
        for plan in [&mut saga].into_iter().chain(earlier.as_mut().map(|(plan, _)| plan)) {
            for step in plan.steps.iter_mut().chain(&mut plan.closing) {
                step.attempts_max = step.attempts_max.min(attempts);
            }
        }
        let CheckParts { world, services, always, at_end, troubles } = protocol;
        if services.is_empty() && TypeId::of::<W>() != TypeId::of::<()>() {
            let broken = "the world has no services: add them with `service`".to_owned();
            return Err(Violation { broken, history: Vec::new(), world: format!("{world:?}") });
        }
        let protocol =
            Protocol { machine: Machine::new(saga, earlier, context), world, services, always, at_end, troubles };
        let start = Instant::now();
        // With one thread, the first history found is a shortest one, and is the same in every run.
        let checker = protocol.checker().threads(1).target_state_count(states_max).spawn_bfs().join();
        let protocol = checker.model();
        if let Some(path) = checker.discovery(RULES) {
            let path = path.into_vec();
            let last = path.last().map(|(state, _)| state);
            return Err(Violation {
                broken: last.and_then(|state| protocol.fault(state)).unwrap_or_default(),
                history: history::tell(protocol, &path),
                world: last.map(|state| format!("{:?}", state.world)).unwrap_or_default(),
            });
        }
        let report = Report { states: checker.unique_state_count(), depth: checker.max_depth(), took: start.elapsed() };
        if checker.state_count() >= states_max {
            let broken = format!(
                "more than {states_max} states: remove from the world and from the saga's state whatever does not \
                 matter"
            );
            return Err(Violation { broken, history: Vec::new(), world: String::new() });
        }
        Ok(report)
    }
}
