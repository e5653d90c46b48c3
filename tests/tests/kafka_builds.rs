//! Two builds of a service run side by side, two instances each, on one PostgreSQL and one Kafka. The builds differ in
//! the plan of the saga, the version of an event, the shape of the views and the commands that the participant knows.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{collections::BTreeMap, marker::PhantomData, ops::Range, sync::Arc, time::Duration};

use annals::{
    Answer, DeadLetters, DocumentKey, Event, EventStore, Expected, Group, Handler, HandlerError, Message, Metadata,
    NewEvent, Participant, Projection, ReadModel, Runtime, Saga, Service, StepError, StreamId, Subscription, Version,
    Views, Work,
    saga::{Runner, Status, StepRequest},
};
use annals_kafka::{KafkaBus, Settings};
use annals_tests::{
    kafka::brokers,
    tally::{becomes_fine, documents, eventually},
    trip::{Act, Clerk, Play, Script, Trip, World, ask, starts, take_back, tallies},
};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const DRAIN: Duration = Duration::from_secs(60);
/// The timeout of each step. The timeout is longer than the test, so that no timer causes progress.
const PATIENT: Duration = Duration::from_secs(120);
/// The number of trips in a round.
const ROUND: usize = 8;
/// The amount in the second event of a tally, which only newer builds can read.
const MORE: i64 = 10;

/// Builds the plan of a trip, with these steps after the pivot.
macro_rules! plan {
    ($($step:literal => $request:expr),*) => {
        Saga::<Trip>::named("trip")
            .compensatable("book", |trip| ask("shop", "book", trip))
            .undo(|trip| take_back("shop", "book", trip))
            .timeout(PATIENT)
            .pivot("confirm", |trip| ask("shop", "confirm", trip))
            .timeout(PATIENT)
            $(.retriable($step, $request).timeout(PATIENT).attempts(1_000))*
            .build()
    };
}

fn old_plan() -> Saga<Trip> {
    plan!("announce" => |trip| ask("shop", "announce", trip))
}

fn new_plan() -> Saga<Trip> {
    plan!("announce" => |trip| ask("shop", "announce", trip), "thank" => |trip| ask("shop", "thank", trip))
}

/// A plan that sends the new command.
fn next_plan() -> Saga<Trip> {
    plan!(
        "announce" => |trip| ask("shop", "announce", trip),
        "greet" => |trip| StepRequest::to("shop", &NewAct::Greet { trip: trip.id.clone() })
    )
}

/// The events of a tally, as the old build knows them.
#[derive(Event, Clone, Debug)]
#[event(prefix = "tally")]
enum OldTally {
    Added { amount: i64 },
}

fn without_note(mut old: serde_json::Value) -> Result<serde_json::Value, std::convert::Infallible> {
    old["note"] = "".into();
    Ok(old)
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "tally")]
enum NewTally {
    #[event(version = 2, upcasters(without_note))]
    Added { amount: i64, note: String },
}

/// An event of one of the builds.
trait HasAmount: Event {
    fn amount(&self) -> i64;
}

impl HasAmount for OldTally {
    fn amount(&self) -> i64 {
        let Self::Added { amount } = self;
        *amount
    }
}

impl HasAmount for NewTally {
    fn amount(&self) -> i64 {
        let Self::Added { amount, .. } = self;
        *amount
    }
}

/// The commands of the newer builds.
#[derive(Event, Clone, Debug)]
#[event(prefix = "act")]
enum NewAct {
    Do { step: String, trip: String },
    Undo { step: String, trip: String },
    Greet { trip: String },
}

struct NewClerk(Script);

#[async_trait]
impl Participant for NewClerk {
    type Command = NewAct;

    async fn perform(&self, act: NewAct, work: &mut Work) -> Result<Answer, StepError> {
        let act = match act {
            NewAct::Do { step, trip } => Act::Do { step, trip },
            NewAct::Undo { step, trip } => Act::Undo { step, trip },
            NewAct::Greet { trip } => Act::Do { step: "greet".into(), trip },
        };
        Clerk(self.0.clone()).perform(act, work).await
    }
}

/// Follows tallies with the events `E` of one build, and records the amounts in a collection.
struct Follower<E>(&'static str, PhantomData<fn() -> E>);

#[async_trait]
impl<E: HasAmount> Handler for Follower<E> {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(event) = message.decode::<E>()? else { return Ok(()) };
        let key = DocumentKey::new(self.0, &*message.subject);
        let mut amounts: Vec<i64> = work.document(&key).await?.unwrap_or_default();
        amounts.push(event.amount());
        work.put(&key, &amounts)?;
        Ok(())
    }
}

/// The views of the old build.
struct OldSums;

impl ReadModel for OldSums {
    const NAME: &'static str = "sums";
    type Event = OldTally;
    type View = i64;

    fn keys(&self, _: &OldTally, message: &Message) -> Vec<String> {
        vec![message.subject.to_string()]
    }

    fn apply(&self, _: &str, sum: &mut i64, event: &OldTally, _: &Message) {
        *sum += event.amount();
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sum {
    sum: i64,
    count: usize,
}

struct NewSums;

impl ReadModel for NewSums {
    const NAME: &'static str = "sums";
    const VERSION: u32 = 2;
    type Event = NewTally;
    type View = Sum;

    fn keys(&self, _: &NewTally, message: &Message) -> Vec<String> {
        vec![message.subject.to_string()]
    }

    fn apply(&self, _: &str, sum: &mut Sum, event: &NewTally, _: &Message) {
        sum.sum += event.amount();
        sum.count += 1;
    }
}

#[derive(Clone, Copy)]
enum Build {
    Old,
    /// The build with a new plan, event and view. The participant of this build knows the new command, but the saga
    /// does not send the command.
    New,
    /// The build whose saga sends the new command.
    Next,
}

/// The service, and what the test has requested of it.
struct Shop {
    schema: postgres::Schema,
    bus: Settings,
    world: World,
    /// The amounts of each tally.
    amounts: BTreeMap<String, Vec<i64>>,
}

impl Shop {
    async fn open() -> Self {
        // The log output helps people to debug a failed test.
        if std::env::var_os("RUST_LOG").is_some() {
            let filter = tracing_subscriber::EnvFilter::from_default_env();
            _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        }
        let schema = postgres::Schema::new();
        let bus = Settings::new(&brokers()).prefix(&format!("builds{}.", Uuid::new_v4().simple())).partitions(4);
        let world = World::new(Arc::new(schema.store().await), old_plan());
        Self { schema, bus, world, amounts: BTreeMap::new() }
    }

    fn service<E: HasAmount>(&self, store: &Arc<dyn EventStore>, clerk: impl Participant) -> Service {
        let log = Subscription::new("log", Follower::<E>("followed.log", PhantomData)).query(tallies()).lanes(4);
        let topic = Group::new("topic", &["shop.events"], Follower::<E>("followed.topic", PhantomData));
        Service::new("shop", store.clone()).publish(&["tally"]).participant(clerk).subscribe(log).consume(topic)
    }

    async fn start(&self, build: Build, instance: &str) -> Runtime {
        let store: Arc<dyn EventStore> = Arc::new(self.schema.store().await);
        let runner = |plan| Runner::new(plan, tallies(), starts);
        let script = self.world.script.clone();
        let old = || {
            let sums = Projection::new(OldSums, tallies());
            self.service::<OldTally>(&store, Clerk(script.clone())).saga(runner(old_plan())).project(sums)
        };
        let newer = |runner: Runner<Trip>| {
            let sums = Projection::new(NewSums, tallies());
            self.service::<NewTally>(&store, NewClerk(script.clone())).saga(runner.older(old_plan())).project(sums)
        };
        let service = match build {
            Build::Old => old(),
            Build::New => newer(runner(new_plan())),
            Build::Next => newer(runner(next_plan()).older(new_plan())),
        };
        let mut runtime = Runtime::shared(instance);
        let bus = KafkaBus::connect(self.bus.clone()).await.unwrap();
        runtime.start(vec![service], Arc::new(bus)).await.unwrap();
        runtime
    }

    async fn start_two(&self, build: Build, instances: [&str; 2]) -> [Runtime; 2] {
        let [one, other] = instances.map(|instance| self.start(build, instance));
        tokio::join!(one, other).into()
    }

    /// Requests a round of trips.
    async fn request(&mut self, round: usize) {
        for trip in trips(round) {
            self.world.request(&trip, Uuid::new_v4(), None).await;
            self.amounts.insert(trip, vec![1]);
        }
    }

    /// Records a further event of each tally of a round, in the version of the newer builds.
    async fn add_more(&mut self, round: usize) {
        for trip in trips(round) {
            let event = NewTally::Added { amount: MORE, note: "more".into() };
            let id = Uuid::new_v4();
            let event = NewEvent {
                id,
                type_name: event.type_name().into(),
                schema_version: event.schema_version(),
                data: event.encode().unwrap(),
                metadata: Metadata::of_request(id),
            };
            let stream = StreamId::new("tally", &trip).unwrap();
            let append = annals::Append { stream, expected: Expected::Version(Version(1)), events: vec![event] };
            self.world.store.commit(annals::Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
            self.amounts.get_mut(&trip).unwrap().push(MORE);
        }
    }

    /// Waits until all sagas of these rounds have ended well.
    async fn all_end(&self, rounds: Range<usize>) {
        for trip in rounds.flat_map(trips) {
            let ended = async || self.world.status(&trip).await.filter(|status| status.ended_at.is_some());
            let status = eventually(&format!("trip {trip} ends"), ended).await;
            assert_eq!(status.status, Status::Completed, "{trip}: {:?}", status.last_error);
            let steps: &[&str] = match &status.definition_hash {
                hash if hash == old_plan().hash() => &["book", "confirm", "announce"],
                hash if hash == new_plan().hash() => &["book", "confirm", "announce", "thank"],
                _ => &["book", "confirm", "announce", "greet"],
            };
            assert_eq!(self.world.ledger(&trip).await, steps, "{trip}");
        }
    }

    /// The hashes of the definitions of a round's sagas.
    async fn hashes(&self, round: usize) -> Vec<String> {
        let mut hashes = Vec::new();
        for trip in trips(round) {
            let status = eventually("the saga has started", async || self.world.status(&trip).await).await;
            hashes.push(status.definition_hash);
        }
        hashes
    }

    /// Waits until both followers have handled all events, in order and once.
    async fn all_followed(&self) {
        let expected: BTreeMap<String, Vec<i64>> =
            self.amounts.iter().map(|(trip, amounts)| (format!("tally-{trip}"), amounts.clone())).collect();
        for collection in ["followed.log", "followed.topic"] {
            let followed = async || {
                let found = documents(&self.world.store, collection).await;
                let found = found.into_iter().map(|(id, body)| (id.to_string(), serde_json::from_str(&body).unwrap()));
                (found.collect::<BTreeMap<_, _>>() == expected).then_some(())
            };
            eventually(&format!("all events are in {collection}"), followed).await;
        }
    }

    /// Waits until the views of the newer builds show all events.
    async fn all_viewed(&self) {
        let views = Views::<NewSums>::new(self.world.store.clone());
        for (trip, amounts) in &self.amounts {
            let expected = Sum { sum: amounts.iter().sum(), count: amounts.len() };
            let viewed = async || {
                // The views of the old build have another shape.
                let view = views.get(&format!("tally-{trip}")).await.ok().flatten();
                (view.as_ref() == Some(&expected)).then_some(())
            };
            eventually(&format!("the view of {trip} is {expected:?}"), viewed).await;
        }
    }

    async fn nothing_is_parked(&self) {
        let mut connection = self.schema.connection().await;
        let nothing = async || {
            let sql = self.schema.sql("SELECT count(*) FROM annals.dead_letters");
            let parked: i64 = sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap();
            (parked == 0).then_some(())
        };
        eventually("nothing is parked", nothing).await;
    }
}

fn trips(round: usize) -> impl Iterator<Item = String> {
    (0..ROUND).map(move |number| format!("{round}.{number}"))
}

async fn stop(instances: [Runtime; 2]) {
    let [one, other] = instances.map(|instance| instance.drain(DRAIN));
    let (one, other) = tokio::join!(one, other);
    one.and(other).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_two_instances_forward_and_back_strands_nothing() {
    let mut shop = Shop::open().await;
    let old = shop.start_two(Build::Old, ["a", "b"]).await;
    shop.request(0).await;
    shop.all_end(0..1).await;

    // All sagas end and all views are right while both builds run.
    let new = shop.start_two(Build::New, ["c", "d"]).await;
    shop.request(1).await;
    shop.add_more(1).await;
    shop.all_end(1..2).await;
    shop.all_followed().await;
    shop.all_viewed().await;

    // The deployment is rolled back: the new build stops while its sagas run. Messages and events that only the new
    // build can handle wait for that build.
    shop.world.script.play("announce", Play::Fail, ROUND as u32);
    shop.request(2).await;
    stop(new).await;
    shop.request(3).await;
    shop.all_end(3..4).await;
    assert_eq!(shop.hashes(3).await, vec![old_plan().hash(); ROUND]);
    shop.add_more(3).await;
    for follower in ["log", "topic"] {
        let letters = DeadLetters::new(shop.world.store.clone());
        let waits = async || {
            let letters = letters.list(follower).await.unwrap();
            letters.into_iter().find(|letter| letter.parked.reason.starts_with("waits for a newer build"))
        };
        assert!(eventually("an event waits visibly", waits).await.retries_at.is_some());
    }

    let new = shop.start_two(Build::New, ["c", "d"]).await;
    stop(old).await;
    shop.request(4).await;
    shop.add_more(4).await;
    shop.all_end(0..5).await;
    assert_eq!(shop.hashes(4).await, vec![new_plan().hash(); ROUND]);

    // Both builds know the new command now, so a saga can send it.
    let next = shop.start_two(Build::Next, ["a", "b"]).await;
    shop.request(5).await;
    shop.all_end(5..6).await;
    stop(new).await;
    shop.request(6).await;
    shop.all_end(0..7).await;
    assert_eq!(shop.hashes(6).await, vec![next_plan().hash(); ROUND]);
    shop.all_followed().await;
    shop.all_viewed().await;
    shop.nothing_is_parked().await;
    for instance in &next {
        becomes_fine(&instance.health()).await;
    }
    stop(next).await;
}
