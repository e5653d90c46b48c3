//! The checker of one saga, as a test writes it.

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
    event::Event,
    panic::caught_now,
    saga::{Progress, Saga, SagaState, Status, StepError},
};

/// How often a step is asked for before the checked saga gives it up: often enough for a repeated, a late and a last one.
pub const ATTEMPTS: u32 = 2;
/// How many states a check explores at most, each counted as often as a move leads to it. A saga that needs more has too
/// much in its world or its state: leave out of them what does not matter to an invariant.
pub const STATES_MAX: usize = 5_000_000;

/// A check of one saga; see [`check`].
#[must_use = "a check does nothing before `ends_clean` or `run`"]
pub struct Check<C, W> {
    saga: Saga<C>,
    earlier: Option<(Saga<C>, Migrate)>,
    context: C,
    protocol: Parts<W>,
    attempts: u32,
    states_max: usize,
}

struct Parts<W> {
    world: W,
    services: BTreeMap<String, Act<W>>,
    always: Vec<Always<W>>,
    at_end: Vec<AtEnd<W>>,
    troubles: Troubles,
}

/// What a check has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// States of saga, services, messages and world that differ.
    pub states: usize,
    /// The longest of the shortest ways to a state.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
}

/// A history that breaks a rule: there is no shorter one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The rule, or the name of the invariant.
    pub broken: String,
    /// What happened, a move each.
    pub history: Vec<String>,
    /// The world after it.
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

/// Checks everything that can happen to a saga that starts with `context`, at most as much as is switched on:
///
/// - [`every_step_fails`](Check::every_step_fails): a step is refused where it may be; any call and any undo fails, or is
///   done without anybody knowing, again and again, until the saga gives up; then an operator retries;
/// - [`every_message_repeats`](Check::every_message_repeats): any message comes twice, late, out of order, or never;
/// - [`every_timer_fires`](Check::every_timer_fires): any step times out while it is under way, done, or lost, and the
///   deadline of the saga passes at any moment.
///
/// [`everything`](Check::everything) switches on all three.
///
/// A crash is in every history: after each move the saga is rebuilt from its events as a store has them, and must be what
/// it was in memory; and a message delivered again is a message that repeats.
///
/// The code that is checked is the code that runs: the saga's transition function, and the barrier of its participants.
/// What the participants do is a model: a `world` and a function for each service that carries out a command in it. The
/// checker finds every state of all this together, breadth first, and shows the shortest history to one that breaks a
/// rule. The rules, beside your own [`always`](Check::always) and [`at_end`](Check::at_end):
///
/// - no call is done twice, or after its undo; none is undone twice, or without having been done;
/// - a step begins when all before it are done; undos go in reverse order; nothing is undone once the pivot is done;
/// - a saga that completed has every step done and none undone; one that was compensated has none done;
/// - replies that are late or repeated change nothing;
/// - a saga ends, or is stuck where it may be (at the pivot, at what follows it, or in an undo), and then ends after a retry;
/// - a step that is asked for again has the same id and the same content, also after the saga was
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
///         .compensatable("hold seat", |_| saga::Request::to("seats", &Seat::Hold {}))
///         .undo(|_| saga::Request::to("seats", &Seat::Free {}))
///         .pivot("issue ticket", |_| saga::Request::to("tickets", &Ticket::Issue {}))
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
    Check { saga, earlier: None, context, protocol: Parts::of(()), attempts: ATTEMPTS, states_max: STATES_MAX }
}

impl<W> Parts<W> {
    fn of(world: W) -> Self {
        let (services, always, at_end) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { world, services, always, at_end, troubles: Troubles::default() }
    }
}

impl<C: SagaState> Check<C, ()> {
    /// Gives the saga's services a world to act in, as it is when the saga starts. Comes before everything else. The smaller
    /// it is, the faster the check: what matters to an invariant, and no more.
    pub fn world<W>(self, world: W) -> Check<C, W> {
        let Self { saga, earlier, context, attempts, states_max, .. } = self;
        Check { saga, earlier, context, protocol: Parts::of(world), attempts, states_max }
    }
}

impl<C, W> Check<C, W>
where
    C: SagaState,
    W: Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    /// What a service does with a command in the world; the counterpart of its [`Participant`](crate::Participant), with
    /// the same meaning of what it returns. On an error the world stays as it was.
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

    /// An invariant of the world that holds after every move.
    pub fn always(mut self, name: &'static str, holds: impl Fn(&W) -> bool + Send + Sync + 'static) -> Self {
        self.protocol.always.push((name, Box::new(holds)));
        self
    }

    /// An invariant of the world once the saga has ended: [`Completed`](Status::Completed) or
    /// [`Compensated`](Status::Compensated). What comes late after the end must not break it either.
    pub fn at_end(mut self, name: &'static str, holds: impl Fn(&W, Status) -> bool + Send + Sync + 'static) -> Self {
        self.protocol.at_end.push((name, Box::new(holds)));
        self
    }

    /// Steps are refused, and calls and undos fail, or are done without anybody knowing.
    pub fn every_step_fails(mut self) -> Self {
        self.protocol.troubles.steps_fail = true;
        self
    }

    /// Messages come again, late, out of order, or never.
    pub fn every_message_repeats(mut self) -> Self {
        self.protocol.troubles.messages_repeat = true;
        self
    }

    /// Steps time out, and the saga's deadline passes.
    pub fn every_timer_fires(mut self) -> Self {
        self.protocol.troubles.timers_fire = true;
        self
    }

    /// The saga starts under an earlier plan, and a build that moves it to this one, as
    /// [`Runner::migrate`](crate::saga::Runner::migrate) does, may take over at any moment. A migration that is refused anywhere breaks a
    /// rule.
    pub fn moved_from(mut self, earlier: Saga<C>, migrate: fn(&Progress) -> Progress) -> Self {
        self.earlier = Some((earlier, migrate));
        self
    }

    /// All that can go wrong.
    pub fn everything(self) -> Self {
        self.every_step_fails().every_message_repeats().every_timer_fires()
    }

    /// How often a step is asked for at most, instead of [`ATTEMPTS`] times; whatever the plan says, as most of its
    /// attempts are alike.
    pub fn attempts(mut self, attempts_max: u32) -> Self {
        self.attempts = attempts_max.max(1);
        self
    }

    /// Gives up after this many states, instead of [`STATES_MAX`].
    pub fn states_max(mut self, states_max: usize) -> Self {
        self.states_max = states_max;
        self
    }

    /// Runs the check.
    ///
    /// # Panics
    /// If a rule or an invariant can be broken, with the shortest history that does.
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
    /// The shortest history that breaks a rule or an invariant; without a history, if there are too many
    /// states.
    pub fn run(self) -> Result<Report, Violation> {
        let Self { mut saga, mut earlier, context, protocol, attempts, states_max } = self;
        for plan in [&mut saga].into_iter().chain(earlier.as_mut().map(|(plan, _)| plan)) {
            for step in plan.steps.iter_mut().chain(&mut plan.closing) {
                step.attempts_max = step.attempts_max.min(attempts);
            }
        }
        let Parts { world, services, always, at_end, troubles } = protocol;
        if services.is_empty() && TypeId::of::<W>() != TypeId::of::<()>() {
            let broken = "the world has no services: say with `service` what commands do in it".to_owned();
            return Err(Violation { broken, history: Vec::new(), world: format!("{world:?}") });
        }
        let protocol =
            Protocol { machine: Machine::new(saga, earlier, context), world, services, always, at_end, troubles };
        let start = Instant::now();
        // One thread, so that the first history found is a shortest one, and the same each time.
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
                "more than {states_max} states: leave out of the world and the saga's state what does not matter"
            );
            return Err(Violation { broken, history: Vec::new(), world: String::new() });
        }
        Ok(report)
    }
}
