//! A travel agency whose store the tests inspect: some trips went well, one was refused, one is stuck, and one message
//! is parked. Also runs the command as people do.
#![allow(dead_code)]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use annals::{
    Answer, Bus, DeadLetters, Event, EventStore, Handler, HandlerError, LocalBus, LogQuery, Message, Participant,
    Repository, Runtime, Saga, SagaState, Scan, Service, StepError, Subscription, Terminal, Work,
    saga::{Runner, SagaStatus, Status, StepRequest},
};
use annals_sqlite::SqliteStore;
use async_trait::async_trait;
use tempfile::TempDir;
use uuid::Uuid;

#[derive(Event, Clone, Debug)]
#[event(prefix = "trip", unknown = "skip")]
pub enum TripEvent {
    Ordered { trip_id: String, price: u32 },
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "agency")]
pub enum Step {
    Book { trip_id: String },
    Cancel { trip_id: String },
    Charge { trip_id: String },
    Announce { trip_id: String },
}

#[derive(Clone, Default)]
pub struct Trip(bool);

impl annals::Aggregate for Trip {
    const CATEGORY: &'static str = "trip";
    type Command = TripEvent;
    type Event = TripEvent;
    type Refusal = std::convert::Infallible;

    fn decide(&self, command: &TripEvent) -> Result<Vec<TripEvent>, Self::Refusal> {
        Ok(if self.0 { Vec::new() } else { vec![command.clone()] })
    }

    fn evolve(&mut self, _: &TripEvent) {
        self.0 = true;
    }
}

#[derive(Clone, serde::Serialize, serde::Deserialize)]
pub struct Journey {
    pub trip_id: String,
}

impl SagaState for Journey {}

/// Returns a plan that books a room, charges the card and announces the guest.
pub fn journey() -> Saga<Journey> {
    planned("charge card", |j| StepRequest::to("agency", &Step::Charge { trip_id: j.trip_id.clone() }))
}

/// Returns the plan with a different pivot.
pub fn planned(name: &'static str, pivot: fn(&Journey) -> StepRequest) -> Saga<Journey> {
    let patience = Duration::from_secs(30);
    Saga::<Journey>::named("journey")
        .compensatable("book room", |j| StepRequest::to("agency", &Step::Book { trip_id: j.trip_id.clone() }))
        .undo(|j| StepRequest::to("agency", &Step::Cancel { trip_id: j.trip_id.clone() }))
        .timeout(patience)
        .pivot(name, pivot)
        .timeout(patience)
        .retriable("announce guest", |j| StepRequest::to("agency", &Step::Announce { trip_id: j.trip_id.clone() }))
        .timeout(patience)
        .attempts(2)
        .build()
}

/// Carries out each step, except that trips with certain names fail until the agency is repaired.
pub struct Agency {
    pub repaired: bool,
}

#[async_trait]
impl Participant for Agency {
    type Command = Step;

    async fn perform(&self, command: Step, _: &mut Work) -> Result<Answer, StepError> {
        match command {
            Step::Charge { trip_id } if trip_id.starts_with("poor") => {
                Err(StepError::Refused("the card is declined".into()))
            }
            Step::Announce { trip_id } if trip_id.starts_with("lost") && !self.repaired => {
                Err(StepError::Failed("nobody answers the phone".into()))
            }
            _ => Ok(Answer::DONE),
        }
    }
}

/// A handler that fails at some trips until it is repaired.
pub struct Brochure {
    pub repaired: bool,
}

#[async_trait]
impl Handler for Brochure {
    async fn handle(&self, message: &Message, _: &mut Work) -> Result<(), HandlerError> {
        match message.decode()? {
            Some(TripEvent::Ordered { trip_id, .. }) if trip_id.starts_with("odd") && !self.repaired => {
                Err("no such place on the map").terminal()
            }
            _ => Ok(()),
        }
    }
}

fn starts(message: &Message) -> Result<Option<(String, Journey)>, HandlerError> {
    let Some(TripEvent::Ordered { trip_id, .. }) = message.decode()? else { return Ok(None) };
    Ok(Some((trip_id.clone(), Journey { trip_id })))
}

/// Starts the agency.
pub async fn agency(store: &Arc<dyn EventStore>, repaired: bool) -> Runtime {
    agency_on(store, repaired, Arc::new(LocalBus::default())).await
}

pub async fn agency_on(store: &Arc<dyn EventStore>, repaired: bool, bus: Arc<dyn Bus>) -> Runtime {
    let runner = Runner::new(journey(), LogQuery::types(["trip.ordered"]), starts);
    let brochure = Subscription::new("brochure", Brochure { repaired }).query(LogQuery::categories(["trip"]));
    let service = Service::new("agency", store.clone())
        .publish(&["trip"])
        .participant(Agency { repaired })
        .saga(runner)
        .subscribe(brochure);
    let mut runtime = Runtime::new();
    runtime.start(vec![service], bus).await.unwrap();
    runtime
}

/// Lets the agency process these orders, and waits until it can do nothing more for them.
pub async fn travel(store: Arc<dyn EventStore>, trips: &[&str]) {
    travel_on(store, trips, Arc::new(LocalBus::default())).await;
}

pub async fn travel_on(store: Arc<dyn EventStore>, trips: &[&str], bus: Arc<dyn Bus>) {
    let runtime = agency_on(&store, false, bus).await;
    let orders = Repository::<Trip>::new(store.clone());
    for trip in trips {
        let order = TripEvent::Ordered { trip_id: (*trip).to_owned(), price: 100 };
        orders.execute(trip, order, Uuid::new_v4()).await.unwrap();
    }
    until("all sagas have come to rest", || async {
        let sagas = sagas(&store).await;
        let at_rest = |saga: &SagaStatus| saga.ended_at.is_some() || saga.status == Status::Stuck;
        trips.iter().all(|trip| sagas.iter().any(|saga| saga.saga_id == *trip && at_rest(saga)))
    })
    .await;
    let odd: Vec<_> = trips.iter().filter(|trip| trip.starts_with("odd")).map(|trip| format!("trip-{trip}")).collect();
    until("what fails is parked", || async {
        let letters = DeadLetters::new(store.clone()).list("brochure").await.unwrap();
        odd.iter().all(|key| letters.iter().any(|letter| *letter.parked.key == **key))
    })
    .await;
    runtime.drain(Duration::from_secs(30)).await.unwrap();
}

pub async fn sagas(store: &Arc<dyn EventStore>) -> Vec<SagaStatus> {
    let documents = store.scan("saga.journey", &Scan::After("".into()), 1_000).await.unwrap();
    documents.iter().map(|document| serde_json::from_str(&document.body).unwrap()).collect()
}

/// Polls until the condition holds. Fails after a time limit.
pub async fn until<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let started = std::time::Instant::now();
    while !holds().await {
        assert!(started.elapsed() < Duration::from_secs(60), "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The trips in every store of these tests.
pub const TRIPS: [&str; 5] = ["fine-1", "fine-2", "lost-1", "odd-1", "poor-1"];

/// A folder with a store.
pub struct Place {
    pub folder: TempDir,
}

impl Place {
    pub fn empty() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    /// Creates a folder with a SQLite store of trips.
    pub async fn with_trips() -> Self {
        let place = Self::empty();
        let store = SqliteStore::open(place.file("travel.db")).await.unwrap();
        travel(Arc::new(store.clone()), &TRIPS).await;
        store.close().await.unwrap();
        place
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Opens the store `travel.db`, as a service does.
    pub async fn open(&self) -> SqliteStore {
        SqliteStore::open(self.file("travel.db")).await.unwrap()
    }

    /// Runs the command on the store `travel.db`.
    pub fn annals(&self, words: &[&str]) -> Ended {
        ended(self.command(words))
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = command(words);
        command.env("ANNALS_STORE", url(&self.file("travel.db"))).current_dir(self.folder.path());
        command
    }
}

pub fn url(path: &Path) -> String {
    format!("sqlite:{}", path.display())
}

/// Returns the command, without the environment of the user who runs the tests.
pub fn command(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_annals"));
    command.args(words).stdin(Stdio::null());
    command.env_remove("ANNALS_STORE").env_remove("ANNALS_SCHEMA").env_remove("RUST_LOG").env("USER", "tester");
    command
}

/// The output of a command, and its exit code.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

pub fn ended(mut command: Command) -> Ended {
    command.output().unwrap().into()
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Ended {
    /// Returns the output, and asserts that the command succeeded.
    pub fn fine(self) -> String {
        assert_eq!((self.code, &*self.err), (0, ""), "{}", self.out);
        self.out
    }

    /// Returns the output as lines of JSON.
    pub fn json(self) -> Vec<serde_json::Value> {
        self.fine().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Returns the error, and asserts that the command failed.
    pub fn refused(self) -> String {
        assert_eq!((self.code, &*self.out), (2, ""), "{}", self.err);
        self.err
    }
}
