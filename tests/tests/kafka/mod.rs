//! Two services on PostgreSQL, connected by Kafka. One service publishes tallies, and the other copies them. The tests
//! check the result with plain SQL and a plain Kafka client.
#![allow(dead_code)]

pub mod process;
pub mod topic;
pub mod wire;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use annals::{
    Append, Bus, Commit, EventStore, Expected, Group, Metadata, NewEvent, Runtime, Service, StreamId, health::State,
};
use annals_kafka::{KafkaBus, Settings};
use annals_postgres::PostgresStore;
use annals_tests::{kafka::brokers, tally::Copier};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use self::topic::Record;
use crate::postgres::{self, Schema};

/// The longest time that the services may take to recover from any fault.
pub const RECOVERY: Duration = Duration::from_secs(180);
/// The interval between reads of state that is visible only in the database.
const LOOK: Duration = Duration::from_millis(20);
/// The number of tallies that a load writes to.
pub const TALLIES: usize = 20;
/// The longest time that draining a runtime may take.
pub const DRAIN: Duration = Duration::from_secs(60);

/// The two services, each with its own schema.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pair {
    /// The name of the publishing service. This name is also a part of the other service's name.
    pub service: String,
    pub brokers: String,
    source: String,
    sink: String,
    /// Settings of the bus that differ from the defaults.
    pub settings: BTreeMap<String, String>,
    #[serde(skip)]
    schemas: Arc<Vec<Schema>>,
}

impl std::fmt::Debug for Schema {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An event as plain SQL reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub position: i64,
    pub event_id: Uuid,
    pub stream_id: String,
    pub amount: i64,
}

impl Pair {
    /// Creates a pair on the brokers that all tests share.
    pub async fn new() -> Self {
        Self::on(&brokers()).await
    }

    pub async fn on(brokers: &str) -> Self {
        // The log output helps people to debug a failed test.
        if std::env::var_os("RUST_LOG").is_some() {
            let filter = tracing_subscriber::EnvFilter::from_default_env();
            _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        }
        let schemas = Arc::new(vec![Schema::new(), Schema::new()]);
        let names = (schemas[0].name().to_owned(), schemas[1].name().to_owned());
        let service = format!("source-{}", Uuid::new_v4().simple());
        let settings = BTreeMap::from([("partitions".to_owned(), "4".to_owned())]);
        let pair = Self { service, brokers: brokers.into(), source: names.0, sink: names.1, settings, schemas };
        // Creates the tables before the test reads from them.
        pair.source_store().await;
        pair.sink_store().await;
        pair
    }

    /// Adds a setting of the bus.
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.insert(name.into(), value.into());
        self
    }

    pub fn topic(&self) -> String {
        format!("{}.events", self.service)
    }

    pub fn group(&self) -> String {
        format!("sink-{}", self.service)
    }

    pub async fn source_store(&self) -> Arc<dyn EventStore> {
        store(&self.source).await
    }

    pub async fn sink_store(&self) -> Arc<dyn EventStore> {
        store(&self.sink).await
    }

    pub async fn bus(&self) -> KafkaBus {
        let settings: Settings =
            format!("kafka://{}?partitions={}", self.brokers, self.settings["partitions"]).parse().unwrap();
        let others = self.settings.iter().filter(|(name, _)| *name != "partitions");
        let settings = others.fold(settings, |settings, (name, value)| match &**name {
            "replication" => settings.replication(value.parse().unwrap()),
            name => settings.set(name, value),
        });
        KafkaBus::connect(settings).await.unwrap()
    }

    pub async fn start_relay(
        &self,
        store: Arc<dyn EventStore>,
        bus: Arc<dyn Bus>,
        lanes: u32,
        instance: Option<&str>,
    ) -> Runtime {
        let mut runtime = instance.map_or_else(Runtime::new, Runtime::shared);
        let service = Service::new(&self.service, store).publish(&["tally"]).relay_lanes(lanes);
        runtime.start(vec![service], bus).await.unwrap();
        runtime
    }

    pub async fn start_consumer(
        &self,
        store: Arc<dyn EventStore>,
        bus: Arc<dyn Bus>,
        instance: Option<&str>,
    ) -> Runtime {
        let mut runtime = instance.map_or_else(Runtime::new, Runtime::shared);
        let copier = Group::new(&self.group(), &[&self.topic()], Copier::new(store.clone()));
        let service = Service::new(&self.group(), store).consume(copier);
        runtime.start(vec![service], bus).await.unwrap();
        runtime
    }

    /// Starts a relay in this process with its own Kafka client.
    pub async fn relay(&self) -> Runtime {
        self.start_relay(self.source_store().await, Arc::new(self.bus().await), 1, None).await
    }

    /// Starts a consumer in this process with its own Kafka client.
    pub async fn consumer(&self) -> Runtime {
        self.start_consumer(self.sink_store().await, Arc::new(self.bus().await), None).await
    }

    /// Connects to the database with plain SQL.
    pub async fn sql(&self) -> Sql {
        let connection = self.schemas[0].connection().await;
        Sql { connection, source: self.schemas[0].clone(), sink: self.schemas[1].clone() }
    }

    /// Returns the whole topic, read by a plain consumer.
    pub async fn records(&self) -> Vec<Record> {
        let brokers = self.brokers.clone();
        let topic = self.topic();
        spawn_blocking(move || topic::read(&brokers, &topic)).await.unwrap()
    }

    /// Returns the number of records in the topic.
    pub async fn sent(&self) -> i64 {
        let brokers = self.brokers.clone();
        let topic = self.topic();
        spawn_blocking(move || topic::count(&brokers, &topic)).await.unwrap()
    }

    /// Waits until every event is handled. Then asserts that log and topic agree, that every effect has happened once,
    /// that no lane is behind, and that nothing is parked. Returns the number of records that were sent more than once.
    pub async fn agrees(&self) -> usize {
        let (stored, records) = self.settled().await;
        let first = same_events(&stored, &records);
        let mut last: HashMap<&str, i64> = HashMap::new();
        for event in &first {
            let before = last.insert(&event.stream_id, event.position).unwrap_or(0);
            assert!(before < event.position, "{event:?} came after position {before}");
        }
        records.len() - first.len()
    }

    /// Performs the same checks after an outage in which the relay continued, so that earlier messages arrived later.
    pub async fn agrees_out_of_order(&self) {
        let (stored, records) = self.settled().await;
        same_events(&stored, &records);
    }

    async fn settled(&self) -> (Vec<Stored>, Vec<Record>) {
        let mut sql = self.sql().await;
        self.handled(&mut sql).await;
        let stored = sql.stored().await;
        let records = self.records().await;
        sql.assert_copied(&stored).await;
        assert_eq!(sql.dead_letters().await, [], "nothing is parked");
        self.caught_up(&mut sql).await;
        (stored, records)
    }

    /// Waits until all events are copied.
    pub async fn handled(&self, sql: &mut Sql) {
        let waited = timeout(RECOVERY, async {
            while sql.copies().await < sql.events().await {
                sleep(LOOK).await;
            }
        });
        if waited.await.is_err() {
            panic!(
                "{} events, {} records, {} copied; {:?}; parked: {:?}",
                sql.events().await,
                self.sent().await,
                sql.copies().await,
                sql.checkpoints().await,
                sql.dead_letters().await
            );
        }
    }

    /// Waits until the relay has reached the end of the log.
    pub async fn relay_is_at_the_end(&self, sql: &mut Sql) {
        let waited = timeout(RECOVERY, async {
            let name = format!("{}.relay", self.service);
            loop {
                // The relay writes its first checkpoint only after it has sent a message.
                let lags = sql.lags(&name).await;
                if !lags.is_empty() && lags.iter().all(|lag| *lag == 0) {
                    return;
                }
                sleep(LOOK).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("the relay is behind"));
    }

    /// Waits until relay and consumer have reached the ends of log and topic.
    pub async fn caught_up(&self, sql: &mut Sql) {
        let brokers = self.brokers.clone();
        let topic = self.topic();
        let ends = spawn_blocking(move || topic::ends(&brokers, &topic)).await.unwrap();
        let written = ends.into_iter().filter(|(_, (first, next))| first < next);
        let expected: BTreeMap<String, i64> =
            written.map(|(partition, (_, next))| (partition.to_string(), next)).collect();
        let waited = timeout(RECOVERY, async {
            loop {
                let lags = sql.lags(&format!("{}.relay", self.service)).await;
                let offsets = sql.offsets(&format!("{}/{}", self.group(), self.topic())).await;
                if !lags.is_empty() && lags.iter().all(|lag| *lag == 0) && offsets == expected {
                    return;
                }
                sleep(LOOK).await;
            }
        });
        if waited.await.is_err() {
            panic!("still behind: the topic ends at {expected:?}; {:?}", sql.checkpoints().await);
        }
    }
}

async fn store(schema: &str) -> Arc<dyn EventStore> {
    let settings = annals_postgres::Settings { schema: schema.into(), connections: 4 };
    Arc::new(PostgresStore::connect(&postgres::url(), settings).await.unwrap())
}

/// Asserts that the topic and the log hold the same event ids. Returns the events in the order in which each first
/// arrived.
pub fn same_events<'a>(stored: &'a [Stored], records: &[Record]) -> Vec<&'a Stored> {
    let by_id: HashMap<Uuid, &Stored> = stored.iter().map(|event| (event.event_id, event)).collect();
    let (mut seen, mut first): (HashSet<Uuid>, Vec<&Stored>) = Default::default();
    for record in records {
        let event = by_id.get(&record.id()).unwrap_or_else(|| panic!("no such event: {record:?}"));
        assert_eq!(record.text_key(), event.stream_id);
        if seen.insert(record.id()) {
            first.push(event);
        }
    }
    let missing: Vec<_> = stored.iter().filter(|event| !seen.contains(&event.event_id)).take(3).collect();
    assert!(missing.is_empty(), "{} of {} events are in the topic; not {missing:?}", seen.len(), stored.len());
    first
}

/// The state of both services, as plain SQL reads it.
pub struct Sql {
    pub connection: PgConnection,
    pub source: Schema,
    pub sink: Schema,
}

/// A row of the operators' view of dead letters. `behind` is the number of messages that wait behind the dead letter.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    pub key: String,
    pub reason: String,
    pub attempts: i32,
    pub message: String,
    pub behind: i64,
}

impl Sql {
    async fn number(&mut self, of: Schema, sql: &str) -> i64 {
        sqlx::query_scalar(of.sql(sql)).fetch_one(&mut self.connection).await.unwrap()
    }

    /// Returns the number of events that must be copied.
    pub async fn events(&mut self) -> i64 {
        self.number(self.source.clone(), "SELECT count(*) FROM annals.events WHERE stream_id NOT LIKE 'operator-%'")
            .await
    }

    /// Returns the number of copies, including repeated copies.
    pub async fn copies(&mut self) -> i64 {
        let sql = "SELECT count(*) FROM annals.events WHERE stream_id LIKE 'copy-%'";
        self.number(self.sink.clone(), sql).await
    }

    /// Returns the whole log, in order.
    pub async fn stored(&mut self) -> Vec<Stored> {
        let sql = "SELECT position, event_id, stream_id, coalesce((data ->> 'amount')::bigint, 0) AS amount
                     FROM annals.events WHERE stream_id NOT LIKE 'operator-%' ORDER BY position";
        let rows = sqlx::query_as(self.source.sql(sql)).fetch_all(&mut self.connection).await.unwrap();
        let row = |(position, event_id, stream_id, amount)| Stored { position, event_id, stream_id, amount };
        rows.into_iter().map(row).collect()
    }

    /// Asserts that the document and the copied tally hold every amount once, in order.
    pub async fn assert_copied(&mut self, stored: &[Stored]) {
        let mut expected: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for event in stored {
            let (_, id) = event.stream_id.split_once('-').unwrap();
            expected.entry(id.into()).or_default().push(event.amount);
        }
        assert_same("documents", &self.copied().await, &expected);
        let sql = "SELECT substr(stream_id, 6) AS id, (data ->> 'amount')::bigint AS amount FROM annals.events
                    WHERE stream_id LIKE 'copy-%' ORDER BY position";
        let copies: Vec<(String, i64)> =
            sqlx::query_as(self.sink.sql(sql)).fetch_all(&mut self.connection).await.unwrap();
        let mut copied: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for (id, amount) in copies {
            copied.entry(id).or_default().push(amount);
        }
        assert_same("copies", &copied, &expected);
    }

    /// Returns the copied amounts of each tally, as the documents hold them.
    pub async fn copied(&mut self) -> BTreeMap<String, Vec<i64>> {
        let sql = "SELECT id, body::text FROM annals.documents WHERE collection = 'copied'";
        let documents: Vec<(String, String)> =
            sqlx::query_as(self.sink.sql(sql)).fetch_all(&mut self.connection).await.unwrap();
        documents.into_iter().map(|(id, body)| (id, serde_json::from_str(&body).unwrap())).collect()
    }

    /// Moves the relay back to the start of the log, as an operator does to fill the topic again.
    pub async fn set_back(&mut self) {
        let sql = "UPDATE annals.documents SET version = version + 1, body = (body::jsonb || '{\"next\": 0}')::json
                    WHERE collection = 'checkpoint' AND id LIKE '%.relay/%'";
        let done = sqlx::query(self.source.sql(sql)).execute(&mut self.connection).await.unwrap();
        assert_eq!(done.rows_affected(), 1);
    }

    /// Returns the parked keys of both services.
    pub async fn dead_letters(&mut self) -> Vec<DeadLetter> {
        let sql =
            "SELECT key, reason, attempts, message::text AS message, behind FROM annals.dead_letters ORDER BY key";
        let mut found = Vec::new();
        for schema in [self.source.clone(), self.sink.clone()] {
            let rows = sqlx::query_as(schema.sql(sql)).fetch_all(&mut self.connection).await.unwrap();
            let row = |(key, reason, attempts, message, behind)| DeadLetter { key, reason, attempts, message, behind };
            found.extend(rows.into_iter().map(row));
        }
        found
    }

    /// Returns the lag of each lane of a subscription in the publishing service.
    pub async fn lags(&mut self, subscription: &str) -> Vec<i64> {
        let sql = "SELECT lag::bigint FROM annals.checkpoints WHERE subscription = $1";
        sqlx::query_scalar(self.source.sql(sql)).bind(subscription).fetch_all(&mut self.connection).await.unwrap()
    }

    /// Returns the offset from which the copying service continues in each partition.
    pub async fn offsets(&mut self, subscription: &str) -> BTreeMap<String, i64> {
        let sql = "SELECT lane, position FROM annals.checkpoints WHERE subscription = $1 AND position > 0";
        let query = sqlx::query_as(self.sink.sql(sql)).bind(subscription);
        query.fetch_all(&mut self.connection).await.unwrap().into_iter().collect()
    }

    /// Returns all checkpoints, for people to read.
    pub async fn checkpoints(&mut self) -> Vec<String> {
        let sql = "SELECT id || ' ' || body::text FROM annals.documents WHERE collection = 'checkpoint' ORDER BY id";
        let mut found = Vec::new();
        for schema in [self.source.clone(), self.sink.clone()] {
            let of: Vec<String> = sqlx::query_scalar(schema.sql(sql)).fetch_all(&mut self.connection).await.unwrap();
            found.extend(of);
        }
        found
    }
}

fn assert_same(what: &str, found: &BTreeMap<String, Vec<i64>>, expected: &BTreeMap<String, Vec<i64>>) {
    for (id, expected) in expected {
        let found = found.get(id).map_or(&[][..], |found| found);
        assert_eq!(found, expected, "{what} of tally {id}");
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}

/// Adds an amount for each of these rounds to each tally.
pub async fn add(store: &Arc<dyn EventStore>, rounds: std::ops::Range<i64>) {
    for round in rounds {
        let appends = (0..TALLIES).map(|tally| append(&format!("tally-{tally}"), round)).collect();
        store.commit(Commit { appends, puts: Vec::new() }).await.unwrap();
    }
}

/// Returns an append that adds one amount to one tally.
pub fn append(stream: &str, amount: i64) -> Append {
    let event = NewEvent {
        id: Uuid::new_v4(),
        type_name: "tally.added".into(),
        schema_version: 1,
        data: format!(r#"{{"amount":{amount}}}"#),
        metadata: Metadata::of_request(Uuid::new_v4()),
    };
    Append { stream: StreamId::parse(stream).unwrap(), expected: Expected::Any, events: vec![event] }
}

/// Keeps adding amounts to all tallies until stopped.
pub struct Load {
    stop: watch::Sender<bool>,
    added: JoinHandle<i64>,
}

impl Load {
    /// Starts a load with a pause after each round.
    pub fn start(store: Arc<dyn EventStore>, pause: Duration) -> Self {
        let (stop, stopped) = watch::channel(false);
        let added = tokio::spawn(async move {
            let mut round = 0;
            while !*stopped.borrow() {
                add(&store, round..round + 1).await;
                round += 1;
                sleep(pause).await;
            }
            round
        });
        Self { stop, added }
    }

    /// Returns the number of rounds.
    pub async fn end(self) -> i64 {
        self.stop.send_replace(true);
        self.added.await.unwrap()
    }
}

/// Polls until the condition holds.
pub async fn until(what: &str, mut is: impl AsyncFnMut() -> bool) {
    let waited = timeout(RECOVERY, async {
        while !is().await {
            sleep(LOOK).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("never came about: {what}"));
}

/// Waits until the parts of a runtime satisfy the condition. Returns the duration of the wait.
pub async fn shows(runtime: &Runtime, what: &str, is: impl Fn(&BTreeMap<String, State>) -> bool) -> Duration {
    let asked_at = Instant::now();
    while !is(&runtime.health().parts()) {
        assert!(asked_at.elapsed() < RECOVERY, "never {what}: {:?}", runtime.health().parts());
        sleep(LOOK).await;
    }
    asked_at.elapsed()
}

/// Returns whether any part is in trouble.
pub fn in_trouble(parts: &BTreeMap<String, State>) -> bool {
    parts.values().any(|state| matches!(state, State::Trouble(_)))
}
