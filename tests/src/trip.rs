//! A small saga for tests of the engine: a trip is booked at a hotel, charged by a bank, confirmed and announced.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use annals::{
    Answer, Bus, DocumentKey, Event, EventStore, HandlerError, LocalBus, LogQuery, Message, Metadata, Operator,
    Participant, Recorded, Repository, Runtime, Saga, SagaState, Service, StepError, StreamId, TraceContext, Version,
    Work,
    saga::{OperatorAction, Outcome, Runner, SagaEvent, SagaStatus, Sagas, Status, StepRequest},
};
use async_trait::async_trait;
use tokio::sync::watch;
use uuid::Uuid;

use crate::tally::{Tally, TallyCommand, document, eventually};

/// The state of a trip's saga.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Trip {
    /// The id of the trip.
    pub id: String,
    /// The outcomes of the steps so far.
    #[serde(default)]
    pub heard: Vec<String>,
}

impl SagaState for Trip {
    fn learn(&mut self, step: &str, outcome: &Outcome) {
        let heard = match outcome {
            Outcome::Done(_) => "done",
            Outcome::Refused(_) => "refused",
            Outcome::Failed(_) | Outcome::Unknown(_) => "given up",
        };
        self.heard.push(format!("{step} {heard}"));
    }
}

/// A command to a participant.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "act")]
pub enum Act {
    /// Carries out a step.
    Do {
        /// The step.
        step: String,
        /// The trip.
        trip: String,
    },
    /// Undoes a step.
    Undo {
        /// The step that is undone.
        step: String,
        /// The trip.
        trip: String,
    },
}

/// Requests a step.
pub fn ask(service: &str, step: &str, trip: &Trip) -> StepRequest {
    StepRequest::to(service, &Act::Do { step: step.to_owned(), trip: trip.id.clone() })
}

/// Requests the compensation of a step.
pub fn take_back(service: &str, step: &str, trip: &Trip) -> StepRequest {
    StepRequest::to(service, &Act::Undo { step: step.to_owned(), trip: trip.id.clone() })
}

/// Returns the plan, with the same timeout and the same number of attempts for each step.
pub fn trip(timeout: Duration, attempts: u32) -> Saga<Trip> {
    Saga::named("trip")
        .compensatable("book", |trip| ask("hotel", "book", trip))
        .undo(|trip| take_back("hotel", "book", trip))
        .timeout(timeout)
        .attempts(attempts)
        .compensatable("charge", |trip| ask("bank", "charge", trip))
        .undo(|trip| take_back("bank", "charge", trip))
        .timeout(timeout)
        .attempts(attempts)
        .pivot("confirm", |trip| ask("shop", "confirm", trip))
        .timeout(timeout)
        .attempts(attempts)
        .retriable("announce", |trip| ask("hotel", "announce", trip))
        .timeout(timeout)
        .attempts(attempts)
        .build()
}

/// How a participant deviates from its request at a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Play {
    /// The participant refuses.
    Refuse,
    /// The participant fails.
    Fail,
    /// The participant reports an unknown outcome.
    Vanish,
    /// The participant panics.
    Panic,
}

/// Decides the answer to each request to a participant.
type Answers = Arc<dyn Fn(&mut Work) -> Result<Answer, StepError> + Send + Sync>;

/// The script of the participants: their deviations and answers by request, such as `book` or `undo book`.
#[derive(Clone, Default)]
pub struct Script {
    plays: Arc<Mutex<HashMap<String, (Play, u32)>>>,
    answers: Arc<Mutex<HashMap<String, Answers>>>,
    asked: watch::Sender<Vec<(String, Uuid)>>,
}

impl Script {
    /// Sets the deviation for the next `times` requests with this name.
    pub fn play(&self, name: &str, play: Play, times: u32) -> &Self {
        self.plays().insert(name.to_owned(), (play, times));
        self
    }

    /// Sets the answer to every request with this name.
    pub fn answer(
        &self,
        name: &str,
        answer: impl Fn(&mut Work) -> Result<Answer, StepError> + Send + Sync + 'static,
    ) -> &Self {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), Arc::new(answer));
        self
    }

    /// From now on, every participant does what is requested.
    pub fn behave(&self) {
        self.plays().clear();
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Returns all requests, each with its id.
    pub fn asked(&self) -> Vec<(String, Uuid)> {
        self.asked.borrow().clone()
    }

    /// Resolves once this request has been made this many times.
    pub async fn asked_for(&self, name: &str, times: usize) {
        let enough = |asked: &Vec<(String, Uuid)>| asked.iter().filter(|(asked, _)| asked == name).count() >= times;
        _ = self.asked.subscribe().wait_for(enough).await;
    }

    fn plays(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Play, u32)>> {
        self.plays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answers(&self, name: &str) -> Option<Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    fn next(&self, name: &str, id: Uuid) -> Option<Play> {
        self.asked.send_modify(|asked| asked.push((name.to_owned(), id)));
        let mut plays = self.plays();
        let (play, times) = plays.get_mut(name)?;
        *times = times.checked_sub(1)?;
        Some(*play)
    }
}

/// A participant that records its work in the trip's ledger. One commit writes both the ledger and the reply.
pub struct Clerk(pub Script);

#[async_trait]
impl Participant for Clerk {
    type Command = Act;

    async fn perform(&self, act: Act, work: &mut Work) -> Result<Answer, StepError> {
        let (name, trip) = match act {
            Act::Do { step, trip } => (step, trip),
            Act::Undo { step, trip } => (format!("undo {step}"), trip),
        };
        let key = DocumentKey::new("ledger", &*trip);
        let mut ledger: Vec<String> = work.document(&key).await?.unwrap_or_default();
        ledger.push(name.clone());
        // Stages the write before a failure, so that a test can see whether any of it is kept.
        work.put(&key, &ledger)?;
        match self.0.next(&name, work.cause_id()) {
            None => self.0.answers(&name).map_or(Ok(Answer::DONE), |answer| answer(work)),
            Some(Play::Refuse) => Err(StepError::Refused(format!("no {name} today"))),
            Some(Play::Fail) => Err(StepError::Failed(format!("{name} does not work"))),
            Some(Play::Vanish) => Err(StepError::Unknown(format!("the participant does not know {name}"))),
            Some(Play::Panic) => panic!("{name} is too much"),
        }
    }
}

/// Starts a trip when an amount is added to a tally. The trip has the id of the tally.
pub fn starts(message: &Message) -> Result<Option<(String, Trip)>, HandlerError> {
    let id = message.subject.split_once('-').map_or("", |(_, id)| id).to_owned();
    Ok((&*message.type_name == "tally.added").then(|| (id.clone(), Trip { id, heard: Vec::new() })))
}

/// The query for the events of tallies.
pub fn tallies() -> LogQuery {
    LogQuery::categories(["tally"])
}

/// Asks the service of a stuck saga for an action on behalf of the operator `ann`, and returns the answer of the
/// service.
pub async fn act(store: &Arc<dyn EventStore>, saga: &str, verb: OperatorAction, reason: &str) -> SagaEvent {
    let operator = Operator::new(store.clone(), "ann");
    let saga = StreamId::from_stored(saga);
    let answer = async {
        let request = operator.ask(&saga, verb, reason).await?;
        operator.answer(&saga, request).await
    };
    let answer = tokio::time::timeout(Duration::from_secs(120), answer).await;
    let answer = answer.unwrap_or_else(|_| panic!("no service answers the request to {saga}"));
    answer.unwrap_or_else(|error| panic!("{saga}: {error}"))
}

/// The services of a trip, all on one store.
pub struct World {
    /// The store, which outlives all processes of the test.
    pub store: Arc<dyn EventStore>,
    /// The bus between the processes.
    pub bus: Arc<LocalBus>,
    /// The script that the participants follow.
    pub script: Script,
    /// The plan of the saga.
    pub plan: Saga<Trip>,
}

impl World {
    /// Creates a world with this plan, on this store.
    pub fn new(store: Arc<dyn EventStore>, plan: Saga<Trip>) -> Self {
        Self { store, bus: Arc::new(LocalBus::default()), script: Script::default(), plan }
    }

    /// Returns the saga's runner.
    pub fn runner(&self) -> Runner<Trip> {
        Runner::new(self.plan.clone(), tallies(), starts)
    }

    /// Returns the sagas in the world's own store.
    pub fn sagas(&self) -> Sagas<Trip> {
        self.runner().on(self.store.clone())
    }

    /// Returns a service on this store. The service `shop` runs the saga.
    pub fn service(&self, name: &str, store: &Arc<dyn EventStore>) -> Service {
        let service = Service::new(name, store.clone()).participant(Clerk(self.script.clone()));
        if name == "shop" { service.saga(self.runner()) } else { service }
    }

    /// Starts a process with these services, on the world's own store.
    pub async fn start(&self, names: &[&str]) -> Runtime {
        self.start_on(&self.store, names).await
    }

    /// Starts a process that shares the world's own store with other processes.
    pub async fn start_shared(&self, instance: &str, names: &[&str]) -> Runtime {
        self.start_in(Runtime::shared(instance), &self.store, self.bus.clone(), names).await
    }

    /// Starts a process with these services, on this store.
    pub async fn start_on(&self, store: &Arc<dyn EventStore>, names: &[&str]) -> Runtime {
        self.start_in(Runtime::new(), store, self.bus.clone(), names).await
    }

    /// Starts a process with these services, on the world's own store but on another bus.
    pub async fn start_over(&self, bus: Arc<dyn Bus>, names: &[&str]) -> Runtime {
        self.start_in(Runtime::new(), &self.store, bus, names).await
    }

    async fn start_in(
        &self,
        mut runtime: Runtime,
        store: &Arc<dyn EventStore>,
        bus: Arc<dyn Bus>,
        names: &[&str],
    ) -> Runtime {
        let services = names.iter().map(|name| self.service(name, store)).collect();
        runtime.start(services, bus).await.unwrap_or_else(|error| panic!("start: {error}"));
        runtime
    }

    /// Requests a trip within this trace.
    pub async fn request(&self, id: &str, request: Uuid, traceparent: Option<&str>) {
        let metadata = Metadata { trace: TraceContext::parse(traceparent, None), ..Metadata::of_request(request) };
        let tallies = Repository::<Tally>::new(self.store.clone());
        let asked = annals::Request::new(request, metadata);
        let added = tallies.execute(id, TallyCommand::Add(1), asked).await;
        added.unwrap_or_else(|error| panic!("request {id}: {error}"));
    }

    /// Returns the saga's status, as operators see it.
    pub async fn status(&self, id: &str) -> Option<SagaStatus> {
        let body = document(&self.store, &DocumentKey::new("saga.trip", id)).await?;
        Some(serde_json::from_str(&body).unwrap_or_else(|error| panic!("{body}: {error}")))
    }

    /// Waits until operators see this status. Returns the state of the saga.
    pub async fn becomes(&self, id: &str, status: Status) -> SagaStatus {
        let is_so = async || self.status(id).await.filter(|found| found.status == status);
        eventually(&format!("trip {id} is {status:?}"), is_so).await
    }

    /// Asks the service of a stuck trip for an action, and returns the answer of the service.
    pub async fn act(&self, id: &str, verb: OperatorAction, reason: &str) -> SagaEvent {
        act(&self.store, &format!("saga.trip-{id}"), verb, reason).await
    }

    /// Returns the entries in the trip's ledger, which the participants wrote.
    pub async fn ledger(&self, id: &str) -> Vec<String> {
        let found = document(&self.store, &DocumentKey::new("ledger", id)).await;
        found.map(|body| serde_json::from_str(&body).unwrap_or_default()).unwrap_or_default()
    }

    /// Returns the events of the saga.
    pub async fn history(&self, id: &str) -> Vec<Recorded> {
        let stream = annals::StreamId::from_stored(&format!("saga.trip-{id}"));
        let found = self.store.read_stream(&stream, Version::START, 1_000).await;
        found.unwrap_or_else(|error| panic!("{stream}: {error}"))
    }
}
