//! The barrier of a participant: each step and each compensation takes effect once, in whatever order and however often
//! the bus delivers.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use annals::{
    Commit, DocumentKey, Event, EventStore, LocalBus, MemoryStore, Message, Metadata, Position, Publisher, Put,
    Runtime, Service, Version,
    archive::Stored,
    bus::Outgoing,
    health::State,
    saga::{At, Outcome, Owed, Reply, StepEvent, StepKey},
};
use annals_conformance::bus::{Member, within};
use annals_tests::{
    tally::{documents, eventually},
    trip::{Act, Clerk, Play, Script},
};
use uuid::Uuid;

const TRIP: &str = "saga.trip-a";

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
        let (store, bus, script): (Arc<dyn EventStore>, _, _) =
            (Arc::new(MemoryStore::new()), LocalBus::default(), Script::default());
        let replies = Member::join(&bus, "spy", "shop.commands").await;
        let mut runtime = Runtime::new();
        let bank = Service::new("bank", store.clone()).participant(Clerk(script.clone()));
        runtime.start(vec![bank], Arc::new(bus.clone())).await.unwrap();
        Self { store, bus, script, replies, runtime, step: Uuid::new_v4() }
    }

    /// Returns a command as the relay would send it. `sent` identifies the saga's event that sent the command.
    fn command(&self, at: At, attempt: u32, sent: u128) -> Message {
        let act = match at {
            At::Undo(_) => Act::Undo { step: "charge".into(), trip: "a".into() },
            At::Forward(_) | At::Closing(_) => Act::Do { step: "charge".into(), trip: "a".into() },
        };
        let attributes = [
            ("sagastep", at.to_string()),
            ("sagacall", "0".into()),
            ("sagaattempt", attempt.to_string()),
            ("sagamustsucceed", matches!(at, At::Undo(_)).to_string()),
            ("sagareplyto", "shop".into()),
        ];
        Message {
            id: Uuid::new_v5(&self.step, at.to_string().as_bytes()),
            type_name: act.type_name().into(),
            schema_version: 1,
            source: "shop".into(),
            subject: TRIP.into(),
            key: TRIP.into(),
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
    async fn restart_owing(&mut self, steps: &[(At, Outcome)]) {
        drop(std::mem::take(&mut self.runtime));
        let mut puts = vec![Put { key: DocumentKey::new("ledger", "a"), expected: None, body: None, due: None }];
        for (at, outcome) in steps {
            let reply = Reply { at: *at, call: 0, attempt: 1, outcome: outcome.clone() };
            let answered_at = self.answered_at(*at).await;
            let document = Owed { message: self.command(*at, 1, 1), reply, answered_at }.document("bank");
            puts.push(Put { key: document.key, expected: None, body: Some(document.body), due: None });
        }
        self.store.commit(Commit { appends: Vec::new(), puts }).await.unwrap();
        self.restart().await;
    }

    /// Returns the recorded answers of the bank to the trip.
    async fn answers(&self) -> Vec<annals::Recorded> {
        let stream = annals::StreamId::from_stored(&format!("step.bank-{TRIP}"));
        self.store.read_stream(&stream, Version::START, 100).await.unwrap()
    }

    /// The position of the last answer to a step.
    async fn answered_at(&self, at: At) -> Position {
        let answers = self.answers().await;
        let is_of = |event: &&annals::Recorded| {
            let StepEvent::Replied { reply, .. } = event.decode().unwrap().unwrap();
            reply.at == at
        };
        answers.iter().rfind(is_of).unwrap().position
    }

    async fn restart(&mut self) {
        drop(std::mem::take(&mut self.runtime));
        let bank = Service::new("bank", self.store.clone()).participant(Clerk(self.script.clone()));
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

    /// Asserts that nothing is parked, and that each reply belongs to a request.
    async fn close(mut self, replies: usize) {
        assert_eq!(documents(&self.store, "parked.bank.commands").await, []);
        let answers = self.answers().await;
        assert_eq!(answers.len(), replies);
        let health = self.runtime.health();
        self.script.behave();
        assert!(health.is_fine(), "{:?}", health.parts());
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
    let (step, undo) = (At::Forward(1), At::Undo(1));
    let once = desk.command(step, 1, 1);
    // A repeat of the same attempt, in the same batch or later, gets no reply, because the first reply is already sent.
    desk.send(vec![once.clone(), once.clone()]).await;
    desk.send(vec![once]).await;
    assert_eq!(desk.reply().await, done());
    // A new attempt shows that the reply has not arrived. An attempt that an operator requests has an old number.
    let again = desk.command(step, 2, 2);
    desk.send(vec![again.clone(), again]).await;
    desk.send(vec![desk.command(step, 1, 3)]).await;
    assert_eq!((desk.reply().await, desk.reply().await), (done(), done()));
    assert_eq!(desk.ledger().await, ["charge"]);
    let once = desk.command(undo, 1, 4);
    desk.send(vec![once.clone(), desk.command(undo, 2, 5), once]).await;
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    // The step arrives again, far too late. The participant refuses it, and the step stays undone.
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
    desk.send(vec![desk.command(At::Undo(1), 1, 2)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    desk.send(vec![desk.command(At::Forward(1), 1, 1), desk.command(At::Forward(1), 2, 3)]).await;
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
    let failed = desk.command(At::Forward(1), 1, 1);
    desk.send(vec![failed.clone()]).await;
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    // The step would succeed now, but its reply was already sent, so the saga would never learn of the success.
    desk.send(vec![failed]).await;
    assert_eq!((desk.ledger().await, desk.script.asked().len()), (vec![], 1));
    // An operator's retry starts counting attempts at 1 again.
    desk.send(vec![desk.command(At::Forward(1), 1, 2)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    assert_eq!(desk.ledger().await, ["charge"]);
    desk.close(2).await;
}

#[tokio::test]
async fn step_with_an_unknown_outcome_is_undone() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Vanish, 1);
    desk.send(vec![desk.command(At::Forward(1), 1, 1)]).await;
    assert!(matches!(desk.reply().await, Outcome::Unknown(_)));
    // The second attempt certainly fails, but this says nothing about the outcome of the first attempt.
    desk.script.play("charge", Play::Fail, 1);
    desk.send(vec![desk.command(At::Forward(1), 2, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    desk.script.play("undo charge", Play::Vanish, 1);
    desk.send(vec![desk.command(At::Undo(1), 1, 3)]).await;
    assert!(matches!(desk.reply().await, Outcome::Unknown(_)));
    desk.send(vec![desk.command(At::Undo(1), 2, 4)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    // The step arrives again, too late.
    desk.send(vec![desk.command(At::Forward(1), 3, 5)]).await;
    assert!(matches!(desk.reply().await, Outcome::Refused(_)));
    assert_eq!(desk.ledger().await, ["undo charge"]);
    desk.close(5).await;
}

#[tokio::test]
async fn step_that_only_failed_has_nothing_to_undo() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Fail, 2);
    desk.send(vec![desk.command(At::Forward(1), 1, 1), desk.command(At::Forward(1), 2, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    desk.send(vec![desk.command(At::Undo(1), 1, 3)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    assert_eq!((desk.ledger().await, desk.script.asked().len()), (vec![], 2));
    desk.close(3).await;
}

#[tokio::test]
async fn refused_step_stays_refused_and_has_nothing_to_undo() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Refuse, 1);
    desk.send(vec![desk.command(At::Forward(1), 1, 1)]).await;
    desk.send(vec![desk.command(At::Forward(1), 2, 2)]).await;
    for _ in 0..2 {
        assert_eq!(desk.reply().await, Outcome::Refused("no charge today".into()));
    }
    desk.send(vec![desk.command(At::Undo(1), 1, 3)]).await;
    assert_eq!(desk.reply().await, Outcome::Done(serde_json::Value::Null));
    assert_eq!((desk.ledger().await, desk.script.asked().len()), (vec![], 1));
    desk.close(3).await;
}

#[tokio::test]
async fn invalid_command_is_parked() {
    let desk = Desk::open().await;
    let mut without = desk.command(At::Forward(1), 1, 1);
    without.extensions.remove("sagaattempt");
    desk.send(vec![without]).await;
    let parked =
        eventually("the message is parked", async || documents(&desk.store, "parked.bank.commands").await.pop()).await;
    assert!(parked.1.contains("lacks the attribute sagaattempt"), "{}", parked.1);
}

#[tokio::test]
async fn answered_but_lost_work_is_repeated_before_new_commands() {
    let mut desk = Desk::open().await;
    let step = desk.command(At::Forward(1), 1, 1);
    desk.send(vec![step.clone()]).await;
    let answered = desk.reply().await;
    desk.restart_owing(&[(At::Forward(1), answered)]).await;
    // An inbox that is read again from a restored offset contains the command a second time.
    desk.send(vec![step]).await;
    assert_eq!((desk.ledger().await, desk.owed().await), (vec!["charge".to_owned()], 0));
    desk.restart().await;
    desk.send(vec![desk.command(At::Undo(1), 1, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    assert_eq!(desk.ledger().await, ["charge", "undo charge"]);
    desk.close(2).await;
}

#[tokio::test]
async fn step_refused_before_a_restore_is_not_owed() {
    let mut desk = Desk::open().await;
    desk.script.play("charge", Play::Refuse, 1);
    desk.send(vec![desk.command(At::Forward(1), 1, 1), desk.command(At::Forward(2), 1, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Refused(_)));
    assert!(matches!(desk.reply().await, Outcome::Done(_)));
    let answers = desk.answers().await;
    let owed: Vec<At> =
        answers.iter().filter_map(|event| Some(StepKey::answered(&Stored::from(event))?.0.at)).collect();
    assert_eq!(owed, [At::Forward(2)], "carried out now, the refused step would be one that no saga undoes");
    desk.close(2).await;
}

#[tokio::test]
async fn work_of_a_step_and_of_its_undo_is_done_again_in_order() {
    let mut desk = Desk::open().await;
    desk.send(vec![desk.command(At::Forward(1), 1, 1)]).await;
    let done = desk.reply().await;
    desk.send(vec![desk.command(At::Undo(1), 1, 2)]).await;
    let undone = desk.reply().await;
    desk.restart_owing(&[(At::Undo(1), undone), (At::Forward(1), done)]).await;
    eventually("the bank to settle", async || (desk.owed().await == 0).then_some(())).await;
    assert_eq!(desk.ledger().await, ["charge", "undo charge"]);
    desk.close(2).await;
}

#[tokio::test]
async fn answers_without_work_are_not_repeated() {
    let mut desk = Desk::open().await;
    // An undo of a step that failed has nothing to undo; a second attempt at a step that is done gets the first answer.
    desk.script.play("charge", Play::Fail, 1);
    desk.send(vec![desk.command(At::Forward(1), 1, 1), desk.command(At::Undo(1), 1, 2)]).await;
    assert!(matches!(desk.reply().await, Outcome::Failed(_)));
    let nothing = desk.reply().await;
    desk.send(vec![desk.command(At::Forward(2), 1, 3)]).await;
    let first = desk.reply().await;
    desk.send(vec![desk.command(At::Forward(2), 2, 4)]).await;
    let again = desk.reply().await;
    assert_eq!(first, again);
    let asked = desk.script.asked().len();
    // The answer to the second attempt is noted; the first one is in the log that was restored.
    desk.restart_owing(&[(At::Undo(1), nothing), (At::Forward(2), again)]).await;
    eventually("the bank to settle", async || (desk.owed().await == 0).then_some(())).await;
    assert_eq!((desk.ledger().await, desk.script.asked().len()), (vec![], asked));
    desk.close(4).await;
}

#[tokio::test]
async fn unrepeatable_work_is_reported_and_retried_at_the_next_start() {
    let mut desk = Desk::open().await;
    desk.send(vec![desk.command(At::Forward(1), 1, 1)]).await;
    let done = desk.reply().await;
    desk.script.play("charge", Play::Refuse, u32::MAX);
    desk.restart_owing(&[(At::Forward(1), done)]).await;
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
