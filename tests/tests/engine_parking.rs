//! Parking: a message that fails blocks only the messages with its key. The blocked messages stay in order, and stay
//! blocked until the parked message is resolved.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use annals::{
    Commit, CommitError, Committed, DeadLetters, Document, DocumentKey, EventStore, Handler, HandlerError, Health,
    LogPage, LogQuery, MemoryStore, Message, Operator, Position, Put, Recorded, Repository, Scan, StoreError,
    StoreStatus, StreamId, Subscription, Terminal, Version, Work, commit::COMMIT_ROWS_MAX, parking::DeadLetter,
    worker::RetryPolicy,
};
use annals_conformance::bus::within;
use annals_tests::{
    faulty::{Fault, FaultyStore},
    tally::{Tally, TallyCommand, TallyEvent, add, document, documents, eventually},
};
use async_trait::async_trait;
use tokio::{sync::Semaphore, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// What the handler does with a given amount.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Trouble {
    Fail,
    Terminal,
    TooLarge,
    Invalid,
    Panic,
    NulInReason,
}

/// Appends each amount to a list in one document per key, unless a [`Trouble`] is set for that amount.
#[derive(Clone, Default)]
struct Fussy {
    troubles: Arc<Mutex<HashMap<i64, (Trouble, u32)>>>,
    tries: Arc<Mutex<HashMap<i64, Vec<std::time::Instant>>>>,
    unprepared: Arc<Mutex<HashSet<i64>>>,
}

impl Fussy {
    /// Makes this amount fail this many times.
    fn trouble(&self, amount: i64, trouble: Trouble, times: u32) -> &Self {
        self.troubles.lock().unwrap().insert(amount, (trouble, times));
        self
    }

    fn heal(&self) {
        self.troubles.lock().unwrap().clear();
    }

    fn tries(&self, amount: i64) -> usize {
        self.tries.lock().unwrap().get(&amount).map_or(0, Vec::len)
    }

    fn next(&self, amount: i64) -> Option<Trouble> {
        self.tries.lock().unwrap().entry(amount).or_default().push(std::time::Instant::now());
        let mut troubles = self.troubles.lock().unwrap();
        let (trouble, times) = troubles.get_mut(&amount)?;
        *times = times.checked_sub(1)?;
        Some(*trouble)
    }
}

fn handled(id: &str) -> DocumentKey {
    DocumentKey::new("handled", id)
}

fn amount_of(message: &Message) -> Option<i64> {
    match message.decode::<TallyEvent>() {
        Ok(Some(TallyEvent::Added { amount })) => Some(amount),
        _ => None,
    }
}

#[async_trait]
impl Handler for Fussy {
    async fn prepare(&self, messages: &[&Message], _work: &mut Work) -> Result<(), HandlerError> {
        let unprepared = self.unprepared.lock().unwrap();
        let found = messages.iter().filter_map(|message| amount_of(message)).find(|amount| unprepared.contains(amount));
        found.map_or(Ok(()), |amount| Err(format!("cannot prepare for {amount}").into()))
    }

    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(TallyEvent::Added { amount }) = message.decode()? else { return Ok(()) };
        let key = handled(message.subject.split_once('-').map_or("", |(_, id)| id));
        let mut list: Vec<i64> = work.document(&key).await?.unwrap_or_default();
        list.push(amount);
        // Stages the write before a failure, so that a test can see whether any of it is kept.
        work.put(&key, &list)?;
        match self.next(amount) {
            None => Ok(()),
            Some(Trouble::Fail) => Err(format!("{amount} does not please").into()),
            Some(Trouble::NulInReason) => Err(format!("{amount} has\0a hole").into()),
            Some(Trouble::Terminal) => Err(format!("{amount} never will")).terminal(),
            Some(Trouble::Panic) => panic!("{amount} is too much"),
            Some(Trouble::Invalid) => {
                work.put_json(&DocumentKey::new("bad", amount.to_string()), Some("not json".into()), None);
                Ok(())
            }
            Some(Trouble::TooLarge) => {
                for row in 0..=COMMIT_ROWS_MAX {
                    work.put(&DocumentKey::new("rows", format!("{amount}.{row}")), &row)?;
                }
                Ok(())
            }
        }
    }
}

struct Bed {
    store: Arc<dyn EventStore>,
    fussy: Fussy,
    letters: DeadLetters,
    retry: RetryPolicy,
}

struct Running(JoinHandle<Result<(), annals::NameError>>, Health, CancellationToken);

impl Running {
    async fn kill(self) {
        self.0.abort();
        _ = self.0.await;
    }

    async fn stop(self) {
        self.2.cancel();
        within("stop", self.0).await.unwrap().unwrap();
    }
}

impl Bed {
    fn new() -> Self {
        Self::on(Arc::new(MemoryStore::new()))
    }

    fn on(store: Arc<dyn EventStore>) -> Self {
        // No message is retried automatically, unless a test asks for retries.
        let retry = RetryPolicy { attempts_max: 1, ..RetryPolicy::default() };
        Self { letters: DeadLetters::new(store.clone()), store, fussy: Fussy::default(), retry }
    }

    fn start(&self) -> Running {
        let shutdown = CancellationToken::new();
        let health = Health::default();
        let fussy = Subscription::new("fussy", self.fussy.clone());
        let fussy = fussy.query(LogQuery::categories(["tally"])).retry(self.retry.clone());
        let task = tokio::spawn(fussy.run(self.store.clone(), health.clone(), shutdown.clone()));
        Running(task, health, shutdown)
    }

    async fn add(&self, id: &str, amounts: impl IntoIterator<Item = i64>) {
        add(&self.store, id, amounts).await;
    }

    async fn list(&self, id: &str) -> Vec<i64> {
        let found = document(&self.store, &handled(id)).await;
        found.map(|body| serde_json::from_str(&body).unwrap()).unwrap_or_default()
    }

    async fn becomes(&self, id: &str, amounts: &[i64]) {
        eventually(&format!("{id} is {amounts:?}"), async || (self.list(id).await == amounts).then_some(())).await;
    }

    async fn letters(&self) -> Vec<DeadLetter> {
        self.letters.list("fussy").await.unwrap()
    }

    /// Returns the only parked key, once `behind` messages wait behind it.
    async fn parked(&self, behind: usize) -> DeadLetter {
        let found = eventually("the message is parked", async || {
            Some(self.letters().await).filter(|letters| letters.first().is_some_and(|letter| letter.behind == behind))
        });
        let mut letters = found.await;
        assert_eq!(letters.len(), 1, "{letters:?}");
        letters.remove(0)
    }

    fn operator(&self) -> Operator {
        Operator::new(self.store.clone(), "ann")
    }

    async fn nothing_is_parked(&self) {
        eventually("nothing is parked", async || self.letters().await.is_empty().then_some(())).await;
        assert_eq!(documents(&self.store, "parked.fussy").await, []);
    }
}

#[tokio::test]
async fn failing_key_waits_in_order_and_other_keys_continue() {
    let bed = Bed::new();
    bed.fussy.trouble(2, Trouble::Fail, u32::MAX);
    bed.add("a", 1..=5).await;
    bed.add("b", 11..=15).await;
    let running = bed.start();
    bed.becomes("b", &[11, 12, 13, 14, 15]).await;
    let letter = bed.parked(3).await;
    assert_eq!((&*letter.parked.key, letter.parked.attempts, letter.retries_at), ("tally-a", 1, None));
    assert_eq!(letter.parked.reason, "2 does not please");
    assert_eq!(bed.list("a").await, [1]);
    bed.fussy.heal();
    assert_eq!(bed.operator().redrive("fussy", "tally-a", "a test").await.unwrap(), 4);
    bed.becomes("a", &[1, 2, 3, 4, 5]).await;
    bed.nothing_is_parked().await;
    bed.add("a", [6]).await;
    bed.becomes("a", &[1, 2, 3, 4, 5, 6]).await;
    assert_eq!(bed.operator().redrive("fussy", "tally-a", "a test").await.unwrap(), 0);
    running.stop().await;
}

#[tokio::test]
async fn parked_message_is_retried_with_growing_delays() {
    let mut bed = Bed::new();
    let delay_min = Duration::from_millis(300);
    let delay_max = Duration::from_secs(60);
    bed.retry = RetryPolicy { attempts_max: 4, delay_min, delay_max };
    bed.fussy.trouble(1, Trouble::Fail, 3);
    bed.add("a", 1..=3).await;
    let running = bed.start();
    bed.becomes("a", &[1, 2, 3]).await;
    bed.nothing_is_parked().await;
    let tries = bed.fussy.tries.lock().unwrap()[&1].clone();
    assert_eq!(tries.len(), 4);
    let pauses: Vec<_> = tries.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (pause, doubled) in pauses.iter().zip([300, 600, 1_200]) {
        // The delay is chosen at random from the upper half of its range.
        assert!(*pause >= Duration::from_millis(doubled / 2), "{pauses:?}");
    }
    running.stop().await;
}

#[tokio::test]
async fn message_stays_parked_after_the_last_attempt_until_redriven() {
    let mut bed = Bed::new();
    bed.retry =
        RetryPolicy { attempts_max: 3, delay_min: Duration::from_millis(1), delay_max: Duration::from_millis(2) };
    bed.fussy.trouble(1, Trouble::Fail, u32::MAX);
    bed.add("a", 1..=2).await;
    let running = bed.start();
    let last = async || bed.letters().await.into_iter().find(|letter| letter.parked.attempts == 3);
    let letter = eventually("three attempts", last).await;
    assert_eq!((letter.retries_at, letter.behind), (None, 1));
    // A second key is parked and redriven later. The redrive of this key proves that time has passed for the first key.
    bed.fussy.trouble(21, Trouble::Fail, 2);
    bed.add("b", [21]).await;
    bed.becomes("b", &[21]).await;
    assert_eq!(bed.fussy.tries(1), 3);
    // A failed redrive counts as one more attempt, and the message stays parked.
    bed.operator().redrive("fussy", "tally-a", "a test").await.unwrap();
    let again = async || bed.letters().await.into_iter().find(|letter| letter.parked.attempts == 4);
    assert_eq!(eventually("a fourth attempt", again).await.retries_at, None);
    bed.fussy.heal();
    bed.operator().redrive("fussy", "tally-a", "a test").await.unwrap();
    bed.becomes("a", &[1, 2]).await;
    running.stop().await;
}

#[tokio::test]
async fn hopeless_messages_park_at_once_with_the_reason() {
    let too_large = format!("the effects of the message take {} rows", COMMIT_ROWS_MAX + 2);
    for (trouble, reason) in [
        (Trouble::Terminal, "5 never will"),
        (Trouble::TooLarge, &too_large),
        (Trouble::Invalid, "not JSON"),
        (Trouble::NulInReason, "5 has\u{fffd}a hole"),
    ] {
        let mut bed = Bed::new();
        if trouble != Trouble::NulInReason {
            bed.retry = RetryPolicy::default();
        }
        bed.fussy.trouble(5, trouble, u32::MAX);
        // The failing message is in the middle of a batch with other keys.
        for id in ["a", "b", "c"] {
            bed.add(id, 1..=3).await;
        }
        bed.add("bad", [5]).await;
        for id in ["a", "b", "c"] {
            bed.add(id, 6..=8).await;
        }
        bed.add("bad", [9]).await;
        let running = bed.start();
        for id in ["a", "b", "c"] {
            bed.becomes(id, &[1, 2, 3, 6, 7, 8]).await;
        }
        let letter = bed.parked(1).await;
        assert!(letter.parked.reason.contains(reason), "{trouble:?}: {}", letter.parked.reason);
        assert_eq!((&*letter.parked.key, letter.retries_at), ("tally-bad", None), "{trouble:?}");
        // A failed redrive parks the message again and does not retry it endlessly.
        bed.operator().redrive("fussy", "tally-bad", "a test").await.unwrap();
        eventually("the message has failed again", async || {
            bed.letters().await.into_iter().find(|letter| letter.parked.attempts == 2 && letter.retries_at.is_none())
        })
        .await;
        bed.fussy.heal();
        bed.operator().redrive("fussy", "tally-bad", "a test").await.unwrap();
        bed.becomes("bad", &[5, 9]).await;
        running.stop().await;
    }
}

#[tokio::test]
async fn panic_parks_its_message_and_the_lane_continues() {
    let mut bed = Bed::new();
    bed.retry =
        RetryPolicy { attempts_max: 2, delay_min: Duration::from_millis(1), delay_max: Duration::from_millis(2) };
    bed.fussy.trouble(2, Trouble::Panic, 2);
    bed.add("a", 1..=3).await;
    bed.add("b", 11..=13).await;
    let running = bed.start();
    bed.becomes("b", &[11, 12, 13]).await;
    let twice = async || bed.letters().await.into_iter().find(|letter| letter.parked.attempts == 2);
    let letter = eventually("the message has failed twice", twice).await;
    assert_eq!((&*letter.parked.reason, letter.retries_at), ("panicked: 2 is too much", None));
    assert!(running.1.is_working(), "{:?}", running.1.parts());
    bed.operator().redrive("fussy", "tally-a", "a test").await.unwrap();
    bed.becomes("a", &[1, 2, 3]).await;
    running.stop().await;
}

#[tokio::test]
async fn failed_prepare_parks_only_its_message() {
    let bed = Bed::new();
    bed.fussy.unprepared.lock().unwrap().insert(4);
    for id in ["a", "b", "c"] {
        bed.add(id, 1..=3).await;
    }
    bed.add("bad", 4..=5).await;
    bed.add("d", 6..=8).await;
    let running = bed.start();
    bed.becomes("d", &[6, 7, 8]).await;
    let letter = bed.parked(1).await;
    assert_eq!((&*letter.parked.key, &*letter.parked.reason), ("tally-bad", "cannot prepare for 4"));
    for id in ["a", "b", "c"] {
        assert_eq!(bed.list(id).await, [1, 2, 3]);
    }
    running.stop().await;
}

#[tokio::test]
async fn undecodable_event_is_parked_without_retries() {
    let mut bed = Bed::new();
    bed.retry = RetryPolicy::default();
    let odd = annals::NewEvent {
        id: uuid::Uuid::new_v4(),
        type_name: "tally.added".into(),
        schema_version: 1,
        data: "{}".into(),
        metadata: annals::Metadata::default(),
    };
    let stream = annals::StreamId::new("tally", "odd").unwrap();
    let append = annals::Append { stream, expected: annals::Expected::Any, events: vec![odd] };
    bed.store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
    bed.add("a", [1]).await;
    let running = bed.start();
    bed.becomes("a", &[1]).await;
    let letter = bed.parked(0).await;
    assert_eq!(letter.retries_at, None);
    assert!(letter.parked.reason.contains("tally.added") && letter.parked.reason.contains("tally-odd"), "{letter:?}");
    assert_eq!(&*letter.parked.message().unwrap().data, "{}");
    running.stop().await;
}

#[tokio::test]
async fn dropping_the_first_message_releases_the_next() {
    let bed = Bed::new();
    bed.fussy.trouble(1, Trouble::Fail, u32::MAX);
    bed.add("a", 1..=3).await;
    let running = bed.start();
    bed.parked(2).await;
    let dropped = bed.operator().drop_first("fussy", "tally-a", "a test").await.unwrap().unwrap();
    assert_eq!(amount_of(&dropped.message().unwrap()), Some(1));
    bed.becomes("a", &[2, 3]).await;
    bed.nothing_is_parked().await;
    assert!(bed.operator().drop_first("fussy", "tally-a", "a test").await.unwrap().is_none());
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn dropping_the_only_message_frees_its_key() {
    let bed = Bed::new();
    bed.fussy.trouble(1, Trouble::Fail, u32::MAX);
    bed.add("a", [1]).await;
    let running = bed.start();
    bed.parked(0).await;
    bed.operator().drop_first("fussy", "tally-a", "a test").await.unwrap();
    // This message arrives before the worker knows of the drop. At that moment, no message is parked any more, so this
    // message has nothing to wait for.
    bed.add("a", [2]).await;
    bed.becomes("a", &[2]).await;
    bed.nothing_is_parked().await;
    running.kill().await;
}

#[tokio::test]
async fn parked_messages_survive_a_restart() {
    let bed = Bed::new();
    bed.fussy.trouble(1, Trouble::Fail, u32::MAX);
    bed.add("a", 1..=2).await;
    let running = bed.start();
    bed.parked(1).await;
    running.kill().await;
    bed.add("a", 3..=4).await;
    bed.add("b", [11]).await;
    let running = bed.start();
    bed.becomes("b", &[11]).await;
    bed.parked(3).await;
    assert_eq!(bed.list("a").await, [0; 0]);
    bed.fussy.heal();
    bed.operator().redrive("fussy", "tally-a", "a test").await.unwrap();
    bed.becomes("a", &[1, 2, 3, 4]).await;
    running.stop().await;
}

#[tokio::test]
async fn interrupted_redrive_continues() {
    // The fault comes after the first parked message is handled: the process dies, or the store is away for a moment.
    for fault in [Fault::CrashBefore, Fault::CrashAfter, Fault::Unavailable, Fault::AppliedUnknown, Fault::LostUnknown]
    {
        let mut bed = Bed::new();
        let inner = bed.store.clone();
        let faulty = FaultyStore::new(inner.clone());
        bed.store = Arc::new(faulty.clone());
        bed.fussy.trouble(1, Trouble::Fail, u32::MAX);
        add(&inner, "a", 1..=4).await;
        let mut running = bed.start();
        bed.parked(3).await;
        bed.fussy.heal();
        // The second message is committed in the third commit from here.
        faulty.at(faulty.commits() + 3, fault.clone());
        bed.operator().redrive("fussy", "tally-a", "a test").await.unwrap();
        if matches!(fault, Fault::CrashBefore | Fault::CrashAfter) {
            within("crash", faulty.crashed()).await;
            running.kill().await;
            bed = Bed { fussy: bed.fussy, ..Bed::on(inner.clone()) };
            running = bed.start();
        }
        bed.becomes("a", &[1, 2, 3, 4]).await;
        bed.nothing_is_parked().await;
        running.stop().await;
    }
}

#[tokio::test]
async fn redrive_reads_current_state() {
    // This handler executes commands on an aggregate. When a message is redriven, the stream has events that others
    // have written since.
    struct Adds(Repository<Tally>, Arc<Mutex<bool>>);
    #[async_trait]
    impl Handler for Adds {
        async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
            let Some(amount) = amount_of(message) else { return Ok(()) };
            work.execute(&self.0, "sum", &TallyCommand::Add(amount)).await?;
            if *self.1.lock().unwrap() { Err("not yet".into()) } else { Ok(()) }
        }
    }
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let failing = Arc::new(Mutex::new(true));
    let sums = || Repository::<Tally>::with(store.clone(), "sum", 10);
    let retry = RetryPolicy { attempts_max: 1, ..RetryPolicy::default() };
    let adds =
        Subscription::new("adds", Adds(sums(), failing.clone())).query(LogQuery::categories(["tally"])).retry(retry);
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(adds.run(store.clone(), Health::default(), shutdown.clone()));
    add(&store, "a", 1..=3).await;
    let letters = DeadLetters::new(store.clone());
    eventually("the message is parked", async || {
        letters.list("adds").await.unwrap().first().is_some_and(|letter| letter.behind == 2).then_some(())
    })
    .await;
    sums().execute("sum", TallyCommand::Add(100), uuid::Uuid::new_v4()).await.unwrap();
    *failing.lock().unwrap() = false;
    Operator::new(store.clone(), "ann").redrive("adds", "tally-a", "a test").await.unwrap();
    eventually("all amounts are added", async || {
        (sums().state("sum").await.unwrap().amounts == [100, 1, 2, 3]).then_some(())
    })
    .await;
    shutdown.cancel();
    within("stop", task).await.unwrap().unwrap();
}

#[tokio::test]
async fn due_messages_of_other_lanes_hide_no_message() {
    let bed = Bed::new();
    let of_nobody = (0..300).map(|number| {
        let body = serde_json::json!({
            "subscription": "fussy", "lane": "fussy/7", "key": format!("tally-x{number}"), "reason": "", "attempts": 1,
            "parked_at": chrono::Utc::now(), "message": {},
        });
        let key = DocumentKey::new("parked.fussy", format!("tally-x{number} #{:019}.0", 0));
        Put { key, expected: Some(0), body: Some(body.to_string().into()), due: Some(chrono::DateTime::UNIX_EPOCH) }
    });
    bed.store.commit(Commit { appends: Vec::new(), puts: of_nobody.collect() }).await.unwrap();
    bed.fussy.trouble(1, Trouble::Fail, 1);
    bed.add("a", [1]).await;
    let running = bed.start();
    eventually("the message is parked", async || (bed.letters().await.len() == 301).then_some(())).await;
    bed.operator().redrive("fussy", "tally-a", "a test").await.unwrap();
    bed.becomes("a", &[1]).await;
    running.stop().await;
}

/// A store with one session for reads. A wait for events holds the session most of the time.
struct OneSession {
    inner: Arc<dyn EventStore>,
    session: Semaphore,
}

#[async_trait]
impl EventStore for OneSession {
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        self.inner.commit(commit).await
    }

    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        let _session = self.session.acquire().await.unwrap();
        self.inner.read_stream(stream, after, limit).await
    }

    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        let _session = self.session.acquire().await.unwrap();
        self.inner.read_log(query, after, limit).await
    }

    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        let _session = self.session.acquire().await.unwrap();
        self.inner.documents(keys).await
    }

    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        let _session = self.session.acquire().await.unwrap();
        self.inner.scan(collection, scan, limit).await
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        loop {
            let session = self.session.acquire().await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let is_over = !self.inner.read_log(&LogQuery::all(), after, 1).await?.events.is_empty();
            drop(session);
            if is_over {
                return Ok(());
            }
        }
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        self.inner.status().await
    }
}

/// A lane that retries a parked message needs the session that its own wait for events may hold.
#[tokio::test]
async fn parked_message_is_retried_on_a_store_with_one_session() {
    let mut bed = Bed::new();
    bed.retry = RetryPolicy::default();
    bed.fussy.trouble(1, Trouble::Fail, 2);
    let inner = bed.store.clone();
    bed.store = Arc::new(OneSession { inner: inner.clone(), session: Semaphore::new(1) });
    let running = bed.start();
    bed.store = inner;
    bed.add("a", [1, 2]).await;
    bed.becomes("a", &[1, 2]).await;
    running.stop().await;
}
