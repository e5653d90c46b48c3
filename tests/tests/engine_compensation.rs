//! A failure of a forward step never keeps a saga from compensating. The step fails with a reason, and the
//! compensations run. This holds for every answer of a participant and every mistake in the saga's own code.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{sync::Arc, time::Duration};

use annals::{
    Answer, DocumentKey, Event, EventStore, MemoryStore, Saga, SagaState, Service, StepError, Work,
    saga::{ANSWER_BYTES_MAX, OperatorAction, Outcome, Runner, SagaStatus, Status, StepRequest},
};
use annals_sqlite::SqliteStore;
use annals_tests::{
    tally::{becomes_fine, documents, eventually},
    trip::{Act, Clerk, Play, Trip, World, ask, take_back, tallies, trip},
};
use uuid::Uuid;

const ALL: [&str; 3] = ["shop", "hotel", "bank"];
const PATIENT: Duration = Duration::from_secs(60);
const DRAIN: Duration = Duration::from_secs(60);

/// Runs the same test on every store.
async fn on_every_store(test: impl AsyncFn(&str, Arc<dyn EventStore>)) {
    test("memory", Arc::new(MemoryStore::new())).await;
    let folder = tempfile::tempdir().unwrap();
    let sqlite = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    test("SQLite", Arc::new(sqlite.clone())).await;
    sqlite.close().await.unwrap();
    let schema = postgres::Schema::new();
    test("PostgreSQL", Arc::new(schema.store().await)).await;
}

async fn nothing_is_parked(world: &World, case: &str) {
    for service in ALL {
        let parked = documents(&world.store, &format!("parked.{service}.commands")).await;
        assert_eq!(parked, [], "{case}: {service}");
    }
}

type Says = fn(&mut Work) -> Result<Answer, StepError>;

/// For each case: a name, the bank's answer to the charge, the error that an operator reads, and whether the bank may
/// have charged.
const SAYS: [(&str, Says, &str, bool); 12] = [
    ("failure with a NUL", |_| Err(StepError::Failed("errno\0 5".into())), "charge: errno\u{fffd} 5", false),
    ("refusal with a NUL", |_| Ok(Answer::Refused("no\0pe".into())), "charge: no\u{fffd}pe", false),
    ("refusal by error", |_| Err(StepError::Refused("no\u{1b}[31m".into())), "charge: no\u{fffd}[31m", false),
    ("unknown with a NUL", |_| Err(StepError::Unknown("\0".into())), "charge: \u{fffd}", true),
    ("panic with a NUL", |_| panic!("bad \0 thing"), "charge: panicked: bad \u{fffd} thing", true),
    ("failure of 310 kB", |_| Err(StepError::Failed("x".repeat(310_000))), "(310000 characters)", false),
    ("failure of 4 MB", |_| Err(StepError::Failed("é".repeat(2_000_000))), "(2000000 characters)", false),
    ("refusal of 1 MB", |_| Ok(Answer::Refused("x".repeat(1_000_000))), "(1000000 characters)", false),
    (
        "answer of 1 MB",
        |_| Ok(Answer::Done("x".repeat(1_000_000).into())),
        "answer too large: 1000002 bytes, limit 450000",
        true,
    ),
    ("answer with a NUL", |_| Ok(Answer::Done("a\0b".into())), "a string contains \\u0000", true),
    (
        "answer nested too deep",
        |_| Ok(Answer::Done((0..125).fold(1.into(), |inner, _| vec![inner].into()))),
        "nested",
        true,
    ),
    ("document too large", too_large, "the effects of the step cannot be stored: ", true),
];

fn too_large(work: &mut Work) -> Result<Answer, StepError> {
    work.put(&DocumentKey::new("large", "a"), &"x".repeat(5_000_000))?;
    Ok(Answer::DONE)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_of_a_participant_lets_the_saga_compensate() {
    on_every_store(async |store_name, store| {
        let world = World::new(store, trip(PATIENT, 2));
        let runtime = world.start(&ALL).await;
        for (number, (says, bank, error, may_be_done)) in SAYS.into_iter().enumerate() {
            let id = number.to_string();
            let case = format!("{says} on {store_name}");
            world.script.behave();
            world.script.answer("charge", bank);
            world.request(&id, Uuid::new_v4(), None).await;
            let status = world.becomes(&id, Status::Compensated).await;
            let last_error = status.last_error.unwrap();
            assert!(last_error.contains(error), "{case}: {last_error}");
            assert!(last_error.chars().count() < 5_000, "{case}");
            // If the bank's answer was a refusal, the ledger also has the entry of the charge.
            let mut ledger = world.ledger(&id).await;
            ledger.retain(|done| done != "charge");
            let undone: &[&str] =
                if may_be_done { &["book", "undo charge", "undo book"] } else { &["book", "undo book"] };
            assert_eq!(ledger, undone, "{case}");
            nothing_is_parked(&world, &case).await;
        }
        becomes_fine(&runtime.health()).await;
        runtime.drain(DRAIN).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn undo_and_last_step_fail_with_a_reason() {
    on_every_store(async |store_name, store| {
        let world = World::new(store, trip(PATIENT, 2));
        let runtime = world.start(&ALL).await;
        // The compensation first fails with a reason that no store can keep, and then succeeds.
        world.script.play("confirm", Play::Refuse, 1);
        let tries = std::sync::atomic::AtomicU32::new(0);
        world.script.answer("undo charge", move |_| match tries.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => Err(StepError::Failed("x\0y".into())),
            _ => Ok(Answer::DONE),
        });
        world.request("undo", Uuid::new_v4(), None).await;
        world.becomes("undo", Status::Compensated).await;
        assert_eq!(world.ledger("undo").await, ["book", "charge", "undo charge", "undo book"], "{store_name}");
        // A step after the pivot gets stuck with the error, and an operator resolves it.
        world.script.answer("announce", |_| Ok(Answer::Done("x".repeat(ANSWER_BYTES_MAX).into())));
        world.request("stuck", Uuid::new_v4(), None).await;
        let status = world.becomes("stuck", Status::Stuck).await;
        assert!(status.last_error.unwrap().starts_with("announce: answer too large: 450002 bytes"), "{store_name}");
        world.script.behave();
        world.act("stuck", OperatorAction::Retry, "mended").await;
        world.becomes("stuck", Status::Completed).await;
        nothing_is_parked(&world, store_name).await;
        runtime.drain(DRAIN).await.unwrap();
    })
    .await;
}

/// The commands of the bank's next build.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "act")]
enum Newer {
    Insure {
        trip: String,
    },
    #[event(version = 2, upcasters(as_it_is))]
    Do {
        step: String,
        trip: String,
        of: String,
    },
}

fn as_it_is(value: serde_json::Value) -> Result<serde_json::Value, std::convert::Infallible> {
    Ok(value)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_command_fails_and_its_undo_runs() {
    fn plan(insure: fn(&Trip) -> StepRequest) -> Saga<Trip> {
        Saga::named("trip")
            .compensatable("book", |trip| ask("hotel", "book", trip))
            .undo(|trip| take_back("hotel", "book", trip))
            .compensatable("insure", insure)
            // The bank cannot decode the compensation either.
            .undo(|trip| StepRequest::to("bank", &Newer::Insure { trip: trip.id.clone() }))
            .attempts(2)
            .pivot("confirm", |trip| ask("shop", "confirm", trip))
            .build()
    }
    let unknown: fn(&Trip) -> StepRequest = |trip| StepRequest::to("bank", &Newer::Insure { trip: trip.id.clone() });
    let future: fn(&Trip) -> StepRequest = |trip| {
        let step = "insure".to_owned();
        let of = "all".to_owned();
        StepRequest::to("bank", &Newer::Do { step, trip: trip.id.clone(), of })
    };
    on_every_store(async |store_name, store| {
        for (id, insure, reason) in
            [("a", unknown, "unknown command act.insure"), ("b", future, "unknown command act.do version 2")]
        {
            let world = World::new(store.clone(), plan(insure));
            let runtime = world.start(&ALL).await;
            world.request(id, Uuid::new_v4(), None).await;
            let status = world.becomes(id, Status::Compensated).await;
            let last_error = status.last_error.unwrap();
            assert!(
                last_error.contains(reason) && last_error.contains("deploy a build of bank"),
                "{store_name}: {last_error}"
            );
            assert_eq!(world.ledger(id).await, ["book", "undo book"], "{store_name}");
            nothing_is_parked(&world, store_name).await;
            runtime.drain(DRAIN).await.unwrap();
        }
    })
    .await;
}

/// A saga that keeps all answers and sends all of them in its commands.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Hoard {
    id: String,
    kept: Vec<String>,
}

impl SagaState for Hoard {
    fn learn(&mut self, _: &str, outcome: &Outcome) {
        if let Outcome::Done(serde_json::Value::String(answer)) = outcome {
            assert!(answer != "unbearable", "too much to bear");
            self.kept.push(answer.clone());
        }
    }
}

impl Hoard {
    fn act(&self, step: &str) -> Act {
        Act::Do { step: step.to_owned(), trip: self.id.clone() }
    }

    fn starts(message: &annals::Message) -> Result<Option<(String, Self)>, annals::HandlerError> {
        let id = message.subject.split_once('-').map_or("", |(_, id)| id).to_owned();
        Ok((&*message.type_name == "tally.added").then(|| (id.clone(), Self { id, kept: Vec::new() })))
    }
}

/// A command that carries the saga's state. A store may reject the content of that state.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "hoard")]
enum Carry {
    All { all: Vec<String> },
}

fn hoarder() -> Saga<Hoard> {
    fn carry(hoard: &Hoard) -> StepRequest {
        assert!(!hoard.kept.iter().any(|kept| kept == "unspeakable"), "not to be said");
        let nul = hoard.kept.iter().any(|kept| kept == "nul").then(|| "\0".to_owned());
        StepRequest::to("hotel", &Carry::All { all: hoard.kept.iter().cloned().chain(nul).collect() })
    }
    Saga::named("hoard")
        .compensatable("book", |hoard: &Hoard| StepRequest::to("hotel", &hoard.act("book")))
        .undo(|hoard: &Hoard| StepRequest::to("hotel", &Act::Undo { step: "book".into(), trip: hoard.id.clone() }))
        .attempts(2)
        .compensatable("charge", |hoard: &Hoard| StepRequest::to("bank", &hoard.act("charge")))
        .undo(|hoard: &Hoard| StepRequest::to("bank", &Act::Undo { step: "charge".into(), trip: hoard.id.clone() }))
        .attempts(2)
        .compensatable("carry", carry)
        .undo(carry)
        .attempts(2)
        .pivot("confirm", |hoard: &Hoard| StepRequest::to("shop", &hoard.act("confirm")))
        .build()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_in_the_saga_code_is_a_failed_step() {
    on_every_store(async |store_name, store| {
        let world = World::new(store.clone(), trip(PATIENT, 2));
        let runner = Runner::new(hoarder(), tallies(), Hoard::starts);
        let services = ALL.map(|name| {
            let service = Service::new(name, store.clone()).participant(Clerk(world.script.clone()));
            if name == "shop" { service.saga(runner.clone()) } else { service }
        });
        let mut runtime = annals::Runtime::new();
        runtime.start(services.into(), world.bus.clone()).await.unwrap();
        let large = || Answer::Done("x".repeat(ANSWER_BYTES_MAX - 10).into());
        for (id, answer, status, reason, ledger) in [
            // A command can hold each answer alone, but not both. The second answer makes the command too large, and
            // counts as the failure of its step.
            (
                "large",
                large(),
                Status::Compensated,
                "charge: answer too large",
                ["book", "charge", "undo charge", "undo book"],
            ),
            (
                "state",
                Answer::Done("unbearable".into()),
                Status::Compensated,
                "charge: applying the answer to the saga's state failed: panicked: too much to bear",
                ["book", "charge", "undo charge", "undo book"],
            ),
        ] {
            world.script.behave();
            world.script.answer("book", move |_| Ok(Answer::Done("x".repeat(ANSWER_BYTES_MAX - 10).into())));
            world.script.answer("charge", move |_| Ok(answer.clone()));
            world.request(id, Uuid::new_v4(), None).await;
            let found = ended(&store, id).await;
            assert_eq!(found.status, status, "{id} on {store_name}: {:?}", found.last_error);
            assert!(
                found.last_error.as_ref().unwrap().contains(reason),
                "{id} on {store_name}: {:?}",
                found.last_error
            );
            assert_eq!(world.ledger(id).await, ledger, "{id} on {store_name}");
        }
        for (id, answer, reason) in [
            (
                "panic",
                "unspeakable",
                "carry: the step cannot be requested: the command of the step panicked: not to be said",
            ),
            (
                "nul",
                "nul",
                "carry: the step cannot be requested: hoard.all cannot be stored: a string contains \\u0000",
            ),
        ] {
            world.script.behave();
            world.script.answer("charge", move |_| Ok(Answer::Done(answer.into())));
            world.request(id, Uuid::new_v4(), None).await;
            // The compensation cannot be sent either. The saga gets stuck, and an operator reads the reason and
            // decides.
            let found = ended(&store, id).await;
            assert_eq!(found.status, Status::Stuck, "{id} on {store_name}");
            assert!(
                found.last_error.as_ref().unwrap().contains(reason),
                "{id} on {store_name}: {:?}",
                found.last_error
            );
            let saga = format!("saga.hoard-{id}");
            annals_tests::trip::act(&store, &saga, OperatorAction::SkipStep, "nothing was carried").await;
            let found = eventually("the saga is compensated", async || {
                status_of(&store, id).await.filter(|status| status.status == Status::Compensated)
            })
            .await;
            assert!(found.last_error.unwrap().contains(reason), "{id} on {store_name}");
            assert_eq!(world.ledger(id).await, ["book", "charge", "undo charge", "undo book"], "{id} on {store_name}");
        }
        nothing_is_parked(&world, store_name).await;
        runtime.drain(DRAIN).await.unwrap();
    })
    .await;
}

async fn status_of(store: &Arc<dyn EventStore>, id: &str) -> Option<SagaStatus> {
    let body = annals_tests::tally::document(store, &DocumentKey::new("saga.hoard", id)).await?;
    serde_json::from_str(&body).ok()
}

async fn ended(store: &Arc<dyn EventStore>, id: &str) -> SagaStatus {
    let ended = |status: &SagaStatus| status.ended_at.is_some() || status.status == Status::Stuck;
    eventually("the saga has ended or is stuck", async || status_of(store, id).await.filter(ended)).await
}
