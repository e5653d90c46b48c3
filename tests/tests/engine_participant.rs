//! The barrier of a participant: each step and each compensation takes effect once, no matter in which order and how
//! often the bus delivers the commands.
#![allow(clippy::unwrap_used)]

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use annals::{
    Answer, Commit, DocumentKey, Event, EventStore, LocalBus, MemoryStore, Message, Metadata, Participant, Position,
    Publisher, Put, Repository, Runtime, Service, StepError, Version, Work,
    archive::Stored,
    bus::Outgoing,
    health::State,
    repository::REMEMBERED_COMMANDS,
    saga::{Outcome, Owed, Reply, StepEvent, StepKey, StepRef},
};
use annals_conformance::bus::{Member, within};
use annals_sqlite::SqliteStore;
use annals_tests::{
    faulty::{Fault, FaultyStore},
    tally::{Tally, TallyCommand, add, becomes_fine, documents, eventually, touches},
    trip::{Act, Clerk, Play, Script},
};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

struct Desk {
    store: Arc<dyn EventStore>,
    bus: LocalBus,
    script: Script,
    replies: Member,
    runtime: Runtime,
    step: Uuid,
}

impl Desk {
    async fn open() -> Self {
        Self::on(Arc::new(MemoryStore::new())).await
    }

    async fn on(store: Arc<dyn EventStore>) -> Self {
        let bus = LocalBus::default();
        let script = Script::default();
        let replies = Member::join(&bus, "spy", "shop.commands").await;
        let mut runtime = Runtime::new();
        let bank = Service::new("bank", store.clone()).participant(Clerk(script.clone()));
        runtime.start(vec![bank], Arc::new(bus.clone())).await.unwrap();
        Self { store, bus, script, replies, runtime, step: Uuid::new_v4() }
    }

    /// Returns a command as the relay would send it. `sent` identifies the event of the saga that contains the command.
    fn command(&self, at: StepRef, attempt: u32, sent: u128) -> Message {
        self.command_of("a", at, attempt, sent)
    }

    fn command_of(&self, trip: &str, at: StepRef, attempt: u32, sent: u128) -> Message {
        let act = match at {
            StepRef::Undo(_) => Act::Undo { step: "charge".into(), trip: trip.into() },
            StepRef::Forward(_) | StepRef::Closing(_) => Act::Do { step: "charge".into(), trip: trip.into() },
        };
        let saga = format!("saga.trip-{trip}");
        let attributes = [
            ("sagastep", at.to_string()),
            ("sagacall", "0".into()),
            ("sagaattempt", attempt.to_string()),
            ("sagamustsucceed", matches!(at, StepRef::Undo(_)).to_string()),
            ("sagareplyto", "shop".into()),
        ];
        Message {
            id: Uuid::new_v5(&self.step, format!("{trip} {at}").as_bytes()),
            type_name: act.type_name().into(),
            schema_version: 1,
            source: "shop".into(),
            subject: saga.as_str().into(),
            key: saga.into(),
            data: act.encode().unwrap().into(),
            metadata: Metadata { causation_id: Uuid::from_u128(sent), ..Metadata::default() },
            time: chrono::Utc::now(),
            position: Position(1),
            version: Version::START,
            lane: None,
            extensions: attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        }
    }

    /// Starts the bank again on the same store. The bank's work on these steps was lost, but its answers were not.
    async fn restart_owing(&mut self, steps: &[(StepRef, Outcome)]) {
        drop(std::mem::take(&mut self.runtime));
        for (at, outcome) in steps {
            self.lose("a", *at, outcome).await;
        }
        self.restart().await;
    }

    /// Removes the ledger of a trip, and records that the bank answered a step with this outcome but must do the work
    /// of the step again.
    async fn lose(&self, trip: &str, at: StepRef, outcome: &Outcome) {
        let reply = Reply { at, call: 0, attempt: 1, outcome: outcome.clone() };
        let answered_at = self.answered_at(trip, at).await;
        let owed = Owed { message: self.command_of(trip, at, 1, 1), reply, answered_at }.document("bank");
        let lost = Put { key: DocumentKey::new("ledger", trip), expected: None, body: None, due: None };
        let owed = Put { key: owed.key, expected: None, body: Some(owed.body), due: None };
        self.store.commit(Commit { appends: Vec::new(), puts: vec![lost, owed] }).await.unwrap();
    }

    /// Returns the recorded answers of the bank to a trip.
    async fn answers(&self, trip: &str) -> Vec<annals::Recorded> {
        let stream = annals::StreamId::from_stored(&format!("step.bank-saga.trip-{trip}"));
        self.store.read_stream(&stream, Version::START, 100).await.unwrap()
    }

    /// The position of the last answer to a step.
    async fn answered_at(&self, trip: &str, at: StepRef) -> Position {
        let answers = self.answers(trip).await;
        let is_of = |event: &&annals::Recorded| {
            let StepEvent::Replied { reply, .. } = event.decode().unwrap().unwrap();
            reply.at == at
        };
        answers.iter().rfind(is_of).unwrap().position
    }

    async fn restart(&mut self) {
        self.restart_as(Clerk(self.script.clone())).await;
    }

    async fn restart_as(&mut self, participant: impl Participant) {
        drop(std::mem::take(&mut self.runtime));
        let bank = Service::new("bank", self.store.clone()).participant(participant);
        self.runtime.start(vec![bank], Arc::new(self.bus.clone())).await.unwrap();
    }

    async fn owed(&self) -> usize {
        documents(&self.store, "owed.bank").await.len()
    }

    async fn send(&self, messages: Vec<Message>) {
        let outgoing = messages.into_iter().map(|message| Outgoing { topic: "bank.commands".into(), message });
        // The receipt resolves once the participant has committed its effects.
        let receipt = self.bus.publish(outgoing.collect()).await.unwrap();
        within("the bank", receipt).await.unwrap();
    }

    async fn reply(&mut self) -> Outcome {
        let delivery = self.replies.collect(1).await.remove(0);
        let StepEvent::Replied { reply, .. } = delivery.message.unwrap().decode().unwrap().unwrap();
        reply.outcome
    }

    async fn ledger(&self) -> Vec<String> {
        let found = documents(&self.store, "ledger").await;
        found.first().map(|(_, body)| serde_json::from_str(body).unwrap()).unwrap_or_default()
    }

    /// Asserts that nothing is parked, and that the bank has recorded this many answers to the trip.
    async fn close(mut self, replies: usize) {
        assert_eq!(documents(&self.store, "parked.bank.commands").await, []);
        let answers = self.answers("a").await;
        assert_eq!(answers.len(), replies);
        let health = self.runtime.health();
        self.script.behave();
        becomes_fine(&health).await;
        drop(std::mem::take(&mut self.runtime));
    }
}

#[tokio::test]
async fn repeated_step_and_undo_are_carried_out_once_and_answered_for_each_attempt() {
    let mut desk = Desk::open().await;
    let done = || Outcome::Done(serde_json::json!({ "charged": 12 }));
    let answer = done();
    desk.script.answer("charge", move |_| match &answer {
        Outcome::Done(value) => Ok(annals::Answer::Done(value.clone())),
        _ => unreachable!(),
    });
    let step = StepRef::Forward(1);
    let undo = StepRef::Undo(1);
    let once = desk.command(step, 1, 1);
    // A repeat of the same attempt, in the same batch or later, gets no reply, because the first reply is already sent.
    desk.send(vec![once.clone(), once.clone()]).await;
    desk.send(vec![once]).await;
    assert_eq!(desk.reply().await, done());
    // A new attempt shows that the reply has not arrived. An attempt that an operator requests repeats an earlier
    // number.
    let again = desk.command(step, 2, 2);
    desk.send(vec![again.clone(), again]).await;
    desk.send(vec![desk.command(step, 1, 3)]).await;
    assert_eq!((desk.reply().await, desk.reply().await), (done(), done()));
    assert_eq!(desk.ledger().await, ["charge"]);
    let once = desk.command(undo, 1, 4);
    desk.send(vec![once.clone(), desk.command(undo, 2, 5), once]).await;
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    // The step arrives again, far too late. The participant refuses the step, so the effect of the undo remains.
    desk.send(vec![desk.command(step, 3, 6)]).await;
    assert_eq!(desk.reply().await, Outcome::Refused("the step was undone, or its undo arrived first".into()));
    desk.send(vec![desk.command(undo, 3, 7)]).await;
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    assert_eq!(desk.ledger().await, ["charge", "undo charge"]);
    desk.close(7).await;
}

#[tokio::test]
async fn early_undo_blocks_its_step() {
    let mut desk = Desk::open().await;
    desk.send(vec![desk.command(StepRef::Undo(1), 1, 2)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1), desk.command(StepRef::Forward(1), 2, 3)]).await;
    for _ in 0..2 {
        assert!(matches!(desk.reply().await, Outcome::Refused(_)));
    }
    assert_eq!((desk.ledger().await, desk.script.asked()), (vec![], vec![]));
    desk.close(3).await;
}

#[tokio::test]
async fn redelivered_failed_attempt_does_nothing() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Fail, 1);
    let failed = desk.command(StepRef::Forward(1), 1, 1);
    desk.send(vec![failed.clone()]).await;
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    // The step would succeed now, but its reply was already sent, so the saga would never learn of the success.
    desk.send(vec![failed]).await;
    assert_eq!((desk.ledger().await, desk.script.asked().len()), (vec![], 1));
    // An operator's retry starts counting attempts at 1 again.
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 2)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    assert_eq!(desk.ledger().await, ["charge"]);
    desk.close(2).await;
}

#[tokio::test]
async fn step_with_an_unknown_outcome_is_undone() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Vanish, 1);
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1)]).await;
    assert!(matches!(desk.reply().await, Outcome::Unknown(_)));
    // The second attempt certainly fails, but this says nothing about the outcome of the first attempt.
    desk.script.play("charge", Play::Fail, 1);
    desk.send(vec![desk.command(StepRef::Forward(1), 2, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    desk.script.play("undo charge", Play::Vanish, 1);
    desk.send(vec![desk.command(StepRef::Undo(1), 1, 3)]).await;
    assert!(matches!(desk.reply().await, Outcome::Unknown(_)));
    desk.send(vec![desk.command(StepRef::Undo(1), 2, 4)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    // The step arrives again, too late.
    desk.send(vec![desk.command(StepRef::Forward(1), 3, 5)]).await;
    assert!(matches!(desk.reply().await, Outcome::Refused(_)));
    assert_eq!(desk.ledger().await, ["undo charge"]);
    desk.close(5).await;
}

#[tokio::test]
async fn step_that_only_failed_has_nothing_to_undo() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Fail, 2);
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1), desk.command(StepRef::Forward(1), 2, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    desk.send(vec![desk.command(StepRef::Undo(1), 1, 3)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    assert_eq!((desk.ledger().await, desk.script.asked().len()), (vec![], 2));
    desk.close(3).await;
}

#[tokio::test]
async fn refused_step_stays_refused_and_has_nothing_to_undo() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Refuse, 1);
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1)]).await;
    desk.send(vec![desk.command(StepRef::Forward(1), 2, 2)]).await;
    for _ in 0..2 {
        assert_eq!(desk.reply().await, Outcome::Refused("no charge today".into()));
    }
    desk.send(vec![desk.command(StepRef::Undo(1), 1, 3)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    assert_eq!((desk.ledger().await, desk.script.asked().len()), (vec![], 1));
    desk.close(3).await;
}

#[tokio::test]
async fn invalid_command_is_parked() {
    let desk = Desk::open().await;
    let mut without = desk.command(StepRef::Forward(1), 1, 1);
    without.extensions.remove("sagaattempt");
    desk.send(vec![without]).await;
    let parked =
        eventually("the message is parked", async || documents(&desk.store, "parked.bank.commands").await.pop()).await;
    assert!(parked.1.contains("lacks the attribute sagaattempt"), "{}", parked.1);
}

#[tokio::test]
async fn answered_but_lost_work_is_repeated_before_new_commands() {
    let mut desk = Desk::open().await;
    let step = desk.command(StepRef::Forward(1), 1, 1);
    desk.send(vec![step.clone()]).await;
    let answered = desk.reply().await;
    desk.restart_owing(&[(StepRef::Forward(1), answered)]).await;
    // An inbox that is read again from a restored offset contains the command a second time.
    desk.send(vec![step]).await;
    assert_eq!((desk.ledger().await, desk.owed().await), (vec!["charge".to_owned()], 0));
    desk.restart().await;
    desk.send(vec![desk.command(StepRef::Undo(1), 1, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    assert_eq!(desk.ledger().await, ["charge", "undo charge"]);
    desk.close(2).await;
}

#[tokio::test]
async fn step_refused_before_a_restore_is_not_owed() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Refuse, 1);
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1), desk.command(StepRef::Forward(2), 1, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Refused(_)));
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    let answers = desk.answers("a").await;
    let owed: Vec<StepRef> =
        answers.iter().filter_map(|event| Some(StepKey::answered(&Stored::from(event))?.0.at)).collect();
    assert_eq!(owed, [StepRef::Forward(2)], "carried out now, the refused step would be one that no saga undoes");
    desk.close(2).await;
}

#[tokio::test]
async fn work_of_a_step_and_of_its_undo_is_done_again_in_order() {
    let mut desk = Desk::open().await;
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1)]).await;
    let done = desk.reply().await;
    desk.send(vec![desk.command(StepRef::Undo(1), 1, 2)]).await;
    let undone = desk.reply().await;
    desk.restart_owing(&[(StepRef::Undo(1), undone), (StepRef::Forward(1), done)]).await;
    eventually("the bank to settle", async || (desk.owed().await == 0).then_some(())).await;
    assert_eq!(desk.ledger().await, ["charge", "undo charge"]);
    desk.close(2).await;
}

#[tokio::test]
async fn answers_without_work_are_not_repeated() {
    let mut desk = Desk::open().await;
    // The compensation of a failed step has nothing to undo. A second attempt at a completed step gets the first
    // answer.
    desk.script.play("charge", Play::Fail, 1);
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1), desk.command(StepRef::Undo(1), 1, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    let nothing = desk.reply().await;
    desk.send(vec![desk.command(StepRef::Forward(2), 1, 3)]).await;
    let first = desk.reply().await;
    desk.send(vec![desk.command(StepRef::Forward(2), 2, 4)]).await;
    let again = desk.reply().await;
    assert_eq!(first, again);
    let asked = desk.script.asked().len();
    // The answer to the second attempt is recorded as owed; the answer to the first attempt is in the restored log.
    desk.restart_owing(&[(StepRef::Undo(1), nothing), (StepRef::Forward(2), again)]).await;
    eventually("the bank to settle", async || (desk.owed().await == 0).then_some(())).await;
    assert_eq!((desk.ledger().await, desk.script.asked().len()), (vec![], asked));
    desk.close(4).await;
}

#[tokio::test]
async fn unrepeatable_work_is_reported_and_retried_at_the_next_start() {
    let mut desk = Desk::open().await;
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1)]).await;
    let done = desk.reply().await;
    desk.script.play("charge", Play::Refuse, u32::MAX);
    desk.restart_owing(&[(StepRef::Forward(1), done)]).await;
    let health = desk.runtime.health();
    let needs_attention = || matches!(health.parts().get("bank.owed"), Some(State::NeedsAttention(_)));
    eventually("the bank to say so", async || needs_attention().then_some(())).await;
    assert_eq!((desk.ledger().await, desk.owed().await), (vec![], 1));
    desk.script.behave();
    desk.restart().await;
    eventually("the bank to settle", async || (desk.owed().await == 0).then_some(())).await;
    assert_eq!(desk.ledger().await, ["charge"]);
    desk.close(1).await;
}

/// A participant whose work is a command to an aggregate that others use too.
struct Cashier(Repository<Tally>);

#[async_trait]
impl Participant for Cashier {
    type Command = Act;

    async fn perform(&self, _: Act, work: &mut Work) -> Result<Answer, StepError> {
        work.execute(&self.0, "till", &TallyCommand::Add(7)).await?;
        Ok(Answer::DONE)
    }
}

#[tokio::test]
async fn work_that_a_busy_stream_has_already_is_not_done_again() {
    let mut desk = Desk::open().await;
    let tallies = Repository::<Tally>::new(desk.store.clone());
    desk.restart_as(Cashier(tallies.clone())).await;
    desk.send(vec![desk.command(StepRef::Forward(1), 1, 1)]).await;
    let done = desk.reply().await;
    // The till has executed so many commands since then that it has forgotten this command.
    let later = REMEMBERED_COMMANDS as i64 + 1;
    add(&desk.store, "till", 1..=later).await;
    drop(std::mem::take(&mut desk.runtime));
    desk.lose("a", StepRef::Forward(1), &done).await;
    desk.restart_as(Cashier(tallies.clone())).await;
    eventually("the bank to settle", async || (desk.owed().await == 0).then_some(())).await;
    let amounts = tallies.state("till").await.unwrap().amounts;
    assert_eq!((amounts.len() as i64, amounts.iter().filter(|amount| **amount == 7).count()), (later + 1, 2));
    desk.close(1).await;
}

/// The moment at which to kill a process that repeats lost work. The field is the number of pieces of work that the
/// process finishes before the piece at which it is killed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Kill {
    /// The participant is working.
    AtWork(usize),
    /// The work is staged, but its commit is not applied.
    BeforeCommit(usize),
    /// The commit is applied, but the process does not know that.
    AfterCommit(usize),
}

/// The environment variables of the process to kill: its store, and the moment of the kill.
const FILE: &str = "ANNALS_OWED_FILE";
const KILL: &str = "ANNALS_OWED_KILL";

/// The work of the process that another test kills. Without the environment variables, this test does nothing.
#[tokio::test(flavor = "multi_thread")]
async fn process_that_owes_work() {
    let Some(file) = env::var_os(FILE) else { return };
    // The process ends together with the test, no matter how the test ends.
    std::thread::spawn(|| {
        _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    let say = || std::io::stdout().lock().write_all(b"reached\n").unwrap();
    let store = FaultyStore::new(Arc::new(SqliteStore::open(file).await.unwrap()));
    let script = Script::default();
    let done = AtomicUsize::new(0);
    let kill = serde_json::from_str(&env::var(KILL).unwrap()).unwrap();
    if let Kill::AtWork(after) = kill {
        script.answer("charge", move |_| {
            if done.fetch_add(1, Ordering::Relaxed) == after {
                say();
                loop {
                    std::thread::park();
                }
            }
            Ok(Answer::DONE)
        });
    } else if let Kill::BeforeCommit(after) | Kill::AfterCommit(after) = kill {
        let fault = if matches!(kill, Kill::AfterCommit(_)) { Fault::CrashAfter } else { Fault::CrashBefore };
        let is_next =
            move |commit: &Commit| touches(commit, "owed.bank") && done.fetch_add(1, Ordering::Relaxed) == after;
        store.when(is_next, fault);
    }
    let bank = Service::new("bank", Arc::new(store.clone())).participant(Clerk(script));
    let mut runtime = Runtime::new();
    runtime.start(vec![bank], Arc::new(LocalBus::default())).await.unwrap();
    store.crashed().await;
    say();
    std::future::pending::<()>().await;
}

/// Runs the process until it reaches the moment `kill`, and then kills it with SIGKILL.
fn run_and_kill(file: &Path, kill: Kill) {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "process_that_owes_work", "--nocapture"])
        .env(FILE, file)
        .env(KILL, serde_json::to_string(&kill).unwrap())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("reached")), "{kill:?}: the process has ended");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn process_killed_in_owed_work_continues_with_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bank.db");
    let trips: Vec<String> = (0..12).map(|number| format!("t{number:02}")).collect();
    let is_undone = |trip: &str| trip.ends_with('3') || trip.ends_with('7');
    let store = SqliteStore::open(&file).await.unwrap();
    let mut desk = Desk::on(Arc::new(store.clone())).await;
    for trip in &trips {
        let steps = [StepRef::Forward(1), StepRef::Undo(1)];
        for at in &steps[..if is_undone(trip) { 2 } else { 1 }] {
            desk.send(vec![desk.command_of(trip, *at, 1, 1)]).await;
            assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
            desk.lose(trip, *at, &Outcome::Done(serde_json::Value::Null)).await;
        }
    }
    assert_eq!(desk.owed().await, 14);
    drop(desk);
    store.close().await.unwrap();

    for (kill, left) in [(Kill::AtWork(2), 12), (Kill::BeforeCommit(2), 10), (Kill::AfterCommit(2), 7)] {
        run_and_kill(&file, kill);
        let store = SqliteStore::open(&file).await.unwrap();
        let found = documents(&(Arc::new(store.clone()) as Arc<dyn EventStore>), "owed.bank").await;
        assert_eq!(found.len(), left, "{kill:?}");
        store.close().await.unwrap();
    }

    let store = SqliteStore::open(&file).await.unwrap();
    let mut desk = Desk::on(Arc::new(store.clone())).await;
    eventually("the bank to settle", async || (desk.owed().await == 0).then_some(())).await;
    let health = desk.runtime.health();
    becomes_fine(&health).await;
    let ledgers = documents(&desk.store, "ledger").await;
    assert_eq!(ledgers.len(), trips.len());
    for (trip, ledger) in ledgers {
        let expected = if is_undone(&trip) { r#"["charge","undo charge"]"# } else { r#"["charge"]"# };
        assert_eq!(&*ledger, expected, "{trip}");
    }
    for trip in &trips {
        assert_eq!(desk.answers(trip).await.len(), if is_undone(trip) { 2 } else { 1 }, "{trip} has a second answer");
    }
    drop(std::mem::take(&mut desk.runtime));
    store.close().await.unwrap();
}
