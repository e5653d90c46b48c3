//! What a service's own binary knows of its events and sagas, for checks that need it.

use std::{collections::HashMap, sync::Arc};

use annals::{
    Event, EventError, Recorded, Saga, SagaState, StreamId,
    event::named_id,
    operator::OperatorEvent,
    saga::{Command, Input, Moved, Progress, SagaEvent, StepEvent, begin, transition},
};
use uuid::Uuid;

/// Whether a payload can be read; `false` for one that its enum skips.
type Read = fn(&str, i32, &str) -> Result<bool, EventError>;
type NewReplay = Arc<dyn Fn() -> Box<dyn Replay> + Send + Sync>;

/// Event enums by the types that they know, and sagas by their categories.
#[derive(Clone)]
pub(crate) struct Domain {
    events: HashMap<&'static str, Read>,
    sagas: HashMap<String, NewReplay>,
}

impl Default for Domain {
    fn default() -> Self {
        let mut domain = Self { events: HashMap::new(), sagas: HashMap::new() };
        domain.add_events::<SagaEvent>();
        domain.add_events::<StepEvent>();
        domain.add_events::<OperatorEvent>();
        domain
    }
}

impl Domain {
    pub fn add_events<E: Event>(&mut self) {
        let read: Read = |name, version, data| E::decode(name, version, data).map(|decoded| decoded.is_some());
        self.events.extend(E::TYPES.iter().map(|known| (known.name, read)));
    }

    pub fn add_saga<C: SagaState>(&mut self, saga: Saga<C>) {
        let (category, saga) = (saga.category(), Arc::new(saga));
        self.sagas.insert(category, Arc::new(move || Box::new(OfSaga { saga: saga.clone(), stands: None })));
    }

    /// What is wrong with an event's payload.
    pub fn unreadable(&self, event: &Recorded) -> Option<String> {
        let Some(read) = self.events.get(&*event.type_name) else {
            return Some(format!("no event of this build is called {}", event.type_name));
        };
        read(&event.type_name, event.schema_version, &event.data).err().map(|error| error.to_string())
    }

    /// The beginning of a saga's history, if this build runs such sagas.
    pub fn replay(&self, stream: &StreamId) -> Option<Box<dyn Replay>> {
        self.sagas.get(stream.category()).map(|replay| replay())
    }
}

/// The history of one saga, gone through again.
pub(crate) trait Replay: Send {
    /// What the definition of this build would have done otherwise.
    fn event(&mut self, recorded: &Recorded, event: &SagaEvent) -> Result<(), String>;
}

struct OfSaga<C> {
    saga: Arc<Saga<C>>,
    stands: Option<(C, Progress)>,
}

impl<C: SagaState> Replay for OfSaga<C> {
    fn event(&mut self, recorded: &Recorded, event: &SagaEvent) -> Result<(), String> {
        let saga_id = named_id(named_id(Uuid::NAMESPACE_OID, &self.saga.category()), recorded.stream.id());
        let recorded_at = recorded.recorded_at.timestamp_millis();
        if let SagaEvent::Started { context, progress, send, .. } = event {
            let read = serde_json::from_value(context.clone());
            let context: C = read.map_err(|error| format!("what it was started with cannot be read: {error}"))?;
            let moved = begin(&self.saga, saga_id, context.clone(), progress.started)?;
            self.stands = Some((context, progress.clone()));
            if progress.definition != self.saga.hash() {
                return Err(format!(
                    "it keeps to definition {}, and this build has {}: register that one as older, or a migration",
                    progress.definition,
                    self.saga.hash()
                ));
            }
            return same(&moved, progress, send);
        }
        let Some((context, before)) = self.stands.take() else {
            return Err("its history does not begin with saga.started".into());
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
        // Its clock and the store's may differ: a timer that fired was due.
        let now = recorded_at.max(before.wakes().unwrap_or(recorded_at));
        let moved = transition(&self.saga, saga_id, &context, &before, &input, now)?;
        let Some(moved) = moved else {
            self.stands = Some((context, after));
            return Err("this build would have let it go by".into());
        };
        let outcome = same(&moved, &after, send);
        self.stands = Some((moved.context, after));
        outcome
    }
}

/// Compares what this build does with what was done; not when, because nobody recorded by which clock.
fn same<C>(moved: &Moved<C>, progress: &Progress, send: &[Command]) -> Result<(), String> {
    let place = |progress: &Progress| (progress.at, progress.step.clone(), progress.status, progress.calls.clone());
    if place(&moved.progress) != place(progress) {
        let told = |progress: &Progress| format!("{:?} at {} ({})", progress.status, progress.at, progress.step);
        return Err(format!("it was {}, and would be {}", told(progress), told(&moved.progress)));
    }
    let told = |command: &Command| format!("{} to {}: {}", command.type_name, command.to, command.data.get());
    let (was, now): (Vec<_>, Vec<_>) = (send.iter().map(told).collect(), moved.send.iter().map(told).collect());
    if was != now {
        return Err(format!("it sent [{}], and would send [{}]", was.join(", "), now.join(", ")));
    }
    Ok(())
}
