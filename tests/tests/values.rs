//! Numbers are either read back exactly as they were written, or rejected when they are written.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{collections::BTreeMap, fmt::Debug, sync::Arc};

use annals::{
    Aggregate, DeadLetters, DocumentKey, Event, EventError, ExecuteError, Expected, LocalBus, LogQuery, Message,
    Projection, ReadModel, Repository, Runtime, Service, Snapshot, StreamId, Transaction, Version, Views,
    commit::{Append, Commit},
};
use annals_tests::tally::eventually;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use self::postgres::on_each_store;

fn keep(value: serde_json::Value) -> Result<serde_json::Value, String> {
    Ok(value)
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Inner {
    ratio: f32,
    large: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Either {
    Number(f64),
    Text(String),
}

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "m")]
enum Measure {
    Single {
        value: f64,
    },
    Short {
        value: f32,
    },
    Maybe {
        value: Option<f64>,
    },
    Nested {
        list: Vec<(u8, f64)>,
        map: BTreeMap<String, Option<f32>>,
        either: Either,
    },
    Flat {
        #[serde(flatten)]
        inner: Inner,
        name: String,
    },
    Tuple(f64),
    Wide {
        unsigned: u128,
        signed: i128,
    },
    FlatWide {
        #[serde(flatten)]
        inner: FlatWide,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FlatWide {
    wide: u128,
}

/// The same event one version later, so that every event goes through an upcaster that changes nothing.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "m")]
enum Later {
    #[event(version = 2, upcasters(keep))]
    Single { value: f64 },
    #[event(version = 2, upcasters(keep))]
    Short { value: f32 },
    #[event(version = 2, upcasters(keep))]
    Maybe { value: Option<f64> },
    #[event(version = 2, upcasters(keep))]
    Nested { list: Vec<(u8, f64)>, map: BTreeMap<String, Option<f32>>, either: Either },
    #[event(version = 2, upcasters(keep))]
    Flat {
        #[serde(flatten)]
        inner: Inner,
        name: String,
    },
    #[event(version = 2, upcasters(keep))]
    Wide { unsigned: u128, signed: i128 },
}

fn decoded<E: Event>(event: &Measure) -> E {
    let text = event.encode().unwrap_or_else(|error| panic!("{event:?}: {error}"));
    E::decode(event.type_name(), event.schema_version(), &text)
        .unwrap_or_else(|error| panic!("{text}: {error}"))
        .unwrap()
}

/// Compares the debug output, which prints the shortest text that identifies a number.
fn assert_same<L: Debug, R: Debug>(left: &L, right: &R) {
    assert_eq!(format!("{left:?}"), format!("{right:?}"));
}

/// Returns floats with bit patterns of all kinds.
fn floats() -> impl Iterator<Item = f64> {
    let mut random = fastrand::Rng::with_seed(1);
    let fixed = [0.0, -0.0, f64::MAX, f64::MIN, f64::MIN_POSITIVE, 5e-324, 0.1, 1e16, 1e17, 123_456_789.123_456_79];
    let any = std::iter::from_fn(move || {
        let bits = f64::from_bits(random.u64(..));
        Some(if bits.is_finite() { bits } else { random.f64() * 1_000.0 })
    });
    fixed.into_iter().chain(any.take(10_000))
}

#[test]
fn every_finite_number_round_trips() {
    for value in floats() {
        let short = value as f32;
        let inner = Inner { ratio: if short.is_finite() { short } else { 0.1 }, large: value.to_bits() };
        let events = [
            Measure::Single { value },
            Measure::Short { value: inner.ratio },
            Measure::Maybe { value: Some(value) },
            Measure::Nested {
                list: vec![(1, value)],
                map: [("k".to_owned(), Some(inner.ratio))].into(),
                either: Either::Number(value),
            },
            Measure::Flat { inner, name: "n".into() },
        ];
        for event in &events {
            assert_same(event, &decoded::<Measure>(event));
            assert_same(event, &decoded::<Later>(event));
        }
        assert_same(&Measure::Tuple(value), &decoded::<Measure>(&Measure::Tuple(value)));
    }
}

#[test]
fn integers_up_to_128_bits_round_trip_through_upcasters() {
    let mut random = fastrand::Rng::with_seed(2);
    let fixed = [0, 1, u128::from(u64::MAX), u128::from(u64::MAX) + 1, 10_u128.pow(24), i128::MAX as u128, u128::MAX];
    let any = std::iter::from_fn(|| Some(random.u128(..) >> random.u32(..128)));
    for unsigned in fixed.into_iter().chain(any.take(5_000)) {
        let signed = -((unsigned >> 1) as i128) - 1;
        let event = Measure::Wide { unsigned, signed };
        assert_same(&event, &decoded::<Measure>(&event));
        assert_same(&event, &decoded::<Later>(&event));
    }
}

#[test]
fn raw_json_survives_upcasters() {
    #[derive(Event, Debug)]
    #[event(prefix = "r")]
    enum Raw {
        #[event(version = 2, upcasters(keep))]
        Payload { body: Box<RawValue> },
    }
    let read = Raw::decode("r.payload", 1, r#"{"body":{"a":1}}"#).unwrap();
    let Some(Raw::Payload { body }) = read else { panic!("{read:?}") };
    assert_eq!(body.get(), r#"{"a":1}"#);
}

#[test]
fn unreadable_values_are_refused_on_write() {
    let large = u128::from(u64::MAX) + 1;
    // serde cannot read 128-bit integers inside flattened fields.
    let error = Measure::FlatWide { inner: FlatWide { wide: large } }.encode().unwrap_err();
    assert!(
        matches!(&error, EventError::Unencodable { reason, .. } if reason.contains("128")
        || reason.contains("64 bits")),
        "{error}"
    );
}

/// Returns an event with this value in each possible field, together with the name of the field.
fn not_finite(value: f64) -> [(Measure, &'static str); 7] {
    let short = value as f32;
    let nested = |list, map, either| Measure::Nested { list, map, either };
    let text = || Either::Text("null".into());
    [
        (Measure::Single { value }, "value"),
        (Measure::Short { value: short }, "value"),
        (Measure::Maybe { value: Some(value) }, "value"),
        (nested(vec![(1, 1.0), (2, value)], BTreeMap::new(), text()), "list[1][1]"),
        (nested(vec![], [("k".to_owned(), Some(short))].into(), text()), "map[\"k\"]"),
        (nested(vec![], BTreeMap::new(), Either::Number(value)), "either"),
        (Measure::Flat { inner: Inner { ratio: short, large: 0 }, name: "n".into() }, "ratio"),
    ]
}

#[test]
fn numbers_that_are_not_finite_are_unencodable_and_named() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for (event, field) in not_finite(value) {
            match event.encode() {
                Err(EventError::Unencodable { reason, .. }) => assert!(reason.contains(field), "{field}: {reason}"),
                other => panic!("{event:?}: {other:?}"),
            }
        }
        assert!(Measure::Tuple(value).encode().is_err());
    }
    // In other fields, `null` is valid.
    let event = Measure::Maybe { value: None };
    assert_same(&event, &decoded::<Measure>(&event));
}

#[derive(Clone, Default, Debug, Serialize, Deserialize)]
struct Sum {
    sum: f64,
    last: f64,
    ratio: f64,
}

impl Aggregate for Sum {
    const CATEGORY: &'static str = "m";
    const SNAPSHOT: Option<Snapshot<Self>> = Some(Snapshot::every(1, 1));
    type Command = Measure;
    type Event = Measure;
    type Refusal = std::convert::Infallible;

    fn decide(&self, command: &Measure) -> Result<Vec<Measure>, Self::Refusal> {
        Ok(vec![command.clone()])
    }

    fn evolve(&mut self, event: &Measure) {
        if let Measure::Single { value } = event {
            self.sum += value;
            self.last = *value;
            // If the first value is zero, this division gives NaN, and the state gets no snapshot.
            self.ratio = self.last / self.sum;
        }
    }
}

#[tokio::test]
async fn state_is_the_same_before_and_after_a_restart() {
    on_each_store(async |store| {
        let sums = Repository::<Sum>::new(store.clone());
        for value in floats().filter(|value| value.abs() < 1e9).take(300) {
            sums.execute("a", Measure::Single { value }, Uuid::new_v4()).await.unwrap();
            let restarted = Repository::<Sum>::new(store.clone()).state("a").await.unwrap();
            assert_same(&sums.state("a").await.unwrap(), &restarted);
        }
        for refused in [f64::NAN, f64::INFINITY] {
            let outcome = sums.execute("a", Measure::Single { value: refused }, Uuid::new_v4()).await;
            assert!(matches!(&outcome, Err(ExecuteError::Invalid(reason)) if reason.contains("value")), "{outcome:?}");
        }
        sums.execute("a", Measure::Single { value: 1.5 }, Uuid::new_v4()).await.unwrap();
        let restarted = Repository::<Sum>::new(store.clone()).state("a").await.unwrap();
        assert_same(&sums.state("a").await.unwrap(), &restarted);
    })
    .await;
}

#[tokio::test]
async fn documents_refuse_numbers_that_are_not_finite() {
    on_each_store(async |store| {
        let mut transaction = Transaction::new(store.clone(), Uuid::new_v4());
        let mut work = transaction.begin();
        let key = DocumentKey::new("rate", "1");
        let error = work.put(&key, &BTreeMap::from([("eur", f64::NAN)])).unwrap_err().to_string();
        assert!(error.contains("rate/1") && error.contains("eur"), "{error}");
        work.put(&key, &f64::MIN_POSITIVE).unwrap();
        transaction.commit(work).await.unwrap();
        let read = transaction.begin().document::<f64>(&key).await.unwrap();
        assert_eq!(read, Some(f64::MIN_POSITIVE));
    })
    .await;
}

#[derive(Default, Serialize, Deserialize, Debug, PartialEq, Clone)]
struct Rate {
    yes: u32,
    rate: f64,
}

struct Rates;

impl ReadModel for Rates {
    const NAME: &'static str = "rates";
    type Event = Measure;
    type View = Rate;

    fn keys(&self, event: &Measure, _: &Message) -> Vec<String> {
        match event {
            Measure::Single { value } => vec![if *value < 0.0 { "down" } else { "up" }.into()],
            _ => Vec::new(),
        }
    }

    fn apply(&self, _: &str, rate: &mut Rate, event: &Measure, _: &Message) {
        if let Measure::Single { value } = event {
            rate.yes += 1;
            rate.rate = value / (f64::from(rate.yes) - 1.0) / value;
        }
    }
}

/// The first view becomes infinite, so its event is parked and later events of the same key wait. Other keys continue.
#[tokio::test(flavor = "multi_thread")]
async fn view_with_an_infinite_number_parks_its_event_and_stays_readable() {
    on_each_store(async |store| {
        let event = |value: f64| annals::NewEvent {
            id: Uuid::new_v4(),
            type_name: "m.single".into(),
            schema_version: 1,
            data: Measure::Single { value }.encode().unwrap(),
            metadata: annals::Metadata::default(),
        };
        let append = |name: &str, value| Append {
            stream: StreamId::new("m", name).unwrap(),
            expected: Expected::Any,
            events: vec![event(value)],
        };
        let views = Views::<Rates>::new(store.clone());
        let mut runtime = Runtime::new();
        let rates = Projection::new(Rates, LogQuery::categories(["m"]));
        let service = Service::new("rates", store.clone()).project(rates);
        runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
        store.commit(Commit { appends: vec![append("a", 1.0)], puts: Vec::new() }).await.unwrap();
        let letters = DeadLetters::new(store.clone());
        let letter = eventually("a dead letter", async || letters.list("rates@1").await.unwrap().pop()).await;
        assert!(letter.parked.reason.contains("rate"), "{}", letter.parked.reason);
        assert!(letter.retries_at.is_none(), "another try gives the same view");
        assert_eq!(views.get("up").await.unwrap(), None);
        assert!(views.list("", 10).await.unwrap().is_empty());
        runtime.drain(std::time::Duration::from_secs(5)).await.unwrap();
    })
    .await;
}

/// A build that accepted NaN has stored this value. Reading the value always fails with an error that names the place
/// of the value, and no new event is added to the stream.
#[tokio::test]
async fn error_names_the_place_of_a_null_instead_of_a_number() {
    on_each_store(async |store| {
        let event = annals::NewEvent {
            id: Uuid::new_v4(),
            type_name: "m.single".into(),
            schema_version: 1,
            data: r#"{"value":null}"#.into(),
            metadata: annals::Metadata::default(),
        };
        let stream = StreamId::new("m", "old").unwrap();
        let append = Append { stream: stream.clone(), expected: Expected::Any, events: vec![event] };
        store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
        let error = Repository::<Sum>::new(store.clone()).state("old").await.unwrap_err().to_string();
        assert!(error.contains("m-old") && error.contains("null"), "{error}");
        assert_eq!(store.read_stream(&stream, Version::START, 10).await.unwrap().len(), 1);
    })
    .await;
}
