//! The events, sagas, handlers and read models of one service. Only the service's own binary knows them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use annals::{
    Event, EventError, Handler, Projection, ReadModel, Recorded, Saga, SagaState, StreamId,
    event::named_id,
    operator::OperatorEvent,
    saga::{Command, Input, Progress, SagaEvent, StepEvent, Transition, begin, transition},
};
use uuid::Uuid;

use crate::{failure::Failure, model::Model};

/// Reads a payload. Returns `false` if the event enum skips events of this type.
type Decode = fn(&str, i32, &str) -> Result<bool, EventError>;
type NewSagaReplay = Arc<dyn Fn() -> Box<dyn SagaReplay> + Send + Sync>;

/// Event enums by the types of their events, sagas by category, and handlers and read models by name.
#[derive(Clone)]
pub(crate) struct Domain {
    events: HashMap<&'static str, Decode>,
    sagas: HashMap<String, NewSagaReplay>,
    handlers: BTreeMap<&'static str, Arc<dyn Handler>>,
    read_models: BTreeMap<&'static str, Arc<dyn Model>>,
}

impl Default for Domain {
    fn default() -> Self {
        let mut domain = Self::nothing();
        domain.add_events::<SagaEvent>();
        domain.add_events::<StepEvent>();
        domain.add_events::<OperatorEvent>();
        domain
    }
}

impl Domain {
    fn nothing() -> Self {
        Self { events: HashMap::new(), sagas: HashMap::new(), handlers: BTreeMap::new(), read_models: BTreeMap::new() }
    }

    pub fn add_handler(&mut self, name: &'static str, handler: impl Handler) {
        self.handlers.insert(name, Arc::new(handler));
    }

    pub fn add_read_model<R: ReadModel>(&mut self, projection: Projection<R>) {
        self.read_models.insert(R::NAME, Arc::new(projection));
    }

    /// Returns the handler with this name. Services register only handlers that may safely handle an event twice.
    pub fn handler(&self, name: &str) -> Result<Arc<dyn Handler>, Failure> {
        let found = self.handlers.get(name).cloned();
        found.ok_or_else(|| unknown("replayable handler", name, self.handlers.keys()))
    }

    pub fn read_model(&self, name: &str) -> Result<Arc<dyn Model>, Failure> {
        let found = self.read_models.get(name).cloned();
        found.ok_or_else(|| unknown("read model", name, self.read_models.keys()))
    }

    pub fn add_events<E: Event>(&mut self) {
        let read: Decode = |name, version, data| E::decode(name, version, data).map(|decoded| decoded.is_some());
        self.events.extend(E::TYPES.iter().map(|known| (known.name, read)));
    }

    pub fn add_saga<C: SagaState>(&mut self, saga: Saga<C>) {
        let category = saga.category();
        let saga = Arc::new(saga);
        self.sagas.insert(category, Arc::new(move || Box::new(TypedReplay { saga: saga.clone(), stands: None })));
    }

    /// Returns the error in an event's payload, or `None` if the payload can be read.
    pub fn unreadable(&self, event: &Recorded) -> Option<String> {
        let Some(read) = self.events.get(&*event.type_name) else {
            return Some(format!("event type {} is unknown to this build", event.type_name));
        };
        read(&event.type_name, event.schema_version, &event.data).err().map(|error| error.to_string())
    }

    /// Returns a replay that starts at the first event of the saga, or `None` if this build does not define the saga.
    pub fn replay(&self, stream: &StreamId) -> Option<Box<dyn SagaReplay>> {
        self.sagas.get(stream.category()).map(|replay| replay())
    }
}

fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a &'static str>) -> Failure {
    let known: Vec<_> = known.copied().collect();
    Failure::new(match known.as_slice() {
        [] => format!(
            "this binary has no {what}: use the binary of the service, which registers its own with `annals_cli::Ops`"
        ),
        known => format!("there is no {what} named {name:?}; known: {}", known.join(", ")),
    })
}

/// Replays the history of one saga.
pub(crate) trait SagaReplay: Send {
    /// Compares the next event with the event that this build's definition would write. The error describes the
    /// difference.
    fn event(&mut self, recorded: &Recorded, event: &SagaEvent) -> Result<(), String>;
}

struct TypedReplay<C> {
    saga: Arc<Saga<C>>,
    stands: Option<(C, Progress)>,
}

impl<C: SagaState> SagaReplay for TypedReplay<C> {
    fn event(&mut self, recorded: &Recorded, event: &SagaEvent) -> Result<(), String> {
        let saga_id = named_id(named_id(Uuid::NAMESPACE_OID, &self.saga.category()), recorded.stream.id());
        let recorded_at = recorded.recorded_at.timestamp_millis();
        if let SagaEvent::Started { context, progress, send, .. } = event {
            let read = serde_json::from_value(context.clone());
            let context: C = read.map_err(|error| format!("the context of saga.started cannot be read: {error}"))?;
            let moved = begin(&self.saga, saga_id, context.clone(), progress.started)?;
            self.stands = Some((context, progress.clone()));
            if progress.definition != self.saga.hash() {
                return Err(format!(
                    "the saga follows definition {}, and this build has definition {}: register the older definition, or a migration",
                    progress.definition,
                    self.saga.hash()
                ));
            }
            return same(&moved, progress, send);
        }
        let Some((context, before)) = self.stands.take() else {
            return Err("the history does not begin with saga.started".into());
        };
        let after = event.progress().clone();
        let (input, send) = match event {
            SagaEvent::Replied { reply, send, .. } => (Input::Reply(reply.clone()), send.as_slice()),
            SagaEvent::Timed { send, .. } => (Input::Due, send.as_slice()),
            SagaEvent::Operated { verb, send, .. } => (Input::Operate(*verb), send.as_slice()),
            SagaEvent::Started { .. }
            | SagaEvent::Requested { .. }
            | SagaEvent::Declined { .. }
            | SagaEvent::Migrated { .. } => {
                self.stands = Some((context, after));
                return Ok(());
            }
        };
        // The clock of the saga's runner and the clock of the store may differ. A timer that fired was due, whatever
        // the store's clock said.
        let now = recorded_at.max(before.wakes().unwrap_or(recorded_at));
        let moved = transition(&self.saga, saga_id, &context, &before, &input, now)?;
        let Some(moved) = moved else {
            self.stands = Some((context, after));
            return Err("this build would ignore the event".into());
        };
        let outcome = same(&moved, &after, send);
        self.stands = Some((moved.context, after));
        outcome
    }
}

/// Compares the transition that this build makes with the recorded transition. Ignores times: the log does not say
/// which clock measured them.
fn same<C>(moved: &Transition<C>, progress: &Progress, send: &[Command]) -> Result<(), String> {
    let place = |progress: &Progress| (progress.at, progress.step.clone(), progress.status, progress.calls.clone());
    if place(&moved.progress) != place(progress) {
        let state = |progress: &Progress| format!("{:?} at {} ({})", progress.status, progress.at, progress.step);
        return Err(format!(
            "the recorded state is {}, and this build would reach {}",
            state(progress),
            state(&moved.progress)
        ));
    }
    let text = |command: &Command| format!("{} to {}: {}", command.type_name, command.to, command.data.get());
    let was: Vec<_> = send.iter().map(text).collect();
    let now: Vec<_> = moved.send.iter().map(text).collect();
    if was != now {
        return Err(format!(
            "the recorded commands are [{}], and this build would send [{}]",
            was.join(", "),
            now.join(", ")
        ));
    }
    Ok(())
}
