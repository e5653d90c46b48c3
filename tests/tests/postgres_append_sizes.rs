//! The append function in SQL processes a few rows one by one, and many rows as sets. Both ways must give the same
//! result as the reference store.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::sync::Arc;

use annals::{
    Append, Commit, DocumentKey, EventStore, Expected, LogQuery, MemoryStore, Metadata, NewEvent, Position, Put,
    StreamId, Version,
};
use chrono::{DateTime, TimeZone, Utc};
use uuid::Uuid;

use self::postgres::Schema;

const COMMITS: u64 = 600;
/// More rows than the function would process one by one.
const PADDING: usize = 30;
const STREAMS: u64 = 6;
const DOCUMENTS: u64 = 6;

fn stream(number: u64) -> StreamId {
    StreamId::new("thing", &number.to_string()).unwrap()
}

fn key(number: u64) -> DocumentKey {
    DocumentKey::new("things", number.to_string())
}

fn due(number: u64) -> Option<DateTime<Utc>> {
    number.is_multiple_of(3).then(|| Utc.timestamp_opt(1_800_000_000 + number as i64, 0).unwrap())
}

/// Returns a commit that may or may not succeed: it expects streams and documents at the current version, at another
/// version, or at any version.
async fn some_commit(reference: &MemoryStore, random: &mut fastrand::Rng) -> Commit {
    let mut commit = Commit::default();
    let streams = random.u64(0..=3);
    for number in random.choose_multiple(0..STREAMS, streams as usize) {
        let stands = reference.read_stream(&stream(number), Version::START, 10_000).await.unwrap().len() as i64;
        let expected = match random.u64(0..10) {
            0 => Expected::Version(Version(stands + 1)),
            1 => Expected::Version(Version((stands - 1).max(0))),
            2 | 3 => Expected::Any,
            _ => Expected::Version(Version(stands)),
        };
        let event = |random: &mut fastrand::Rng| NewEvent {
            id: Uuid::from_u128(random.u128(..)),
            type_name: "thing.happened".into(),
            schema_version: 1,
            data: format!(r#"{{"n": {}}}"#, random.u64(..1_000)),
            metadata: Metadata::of_request(Uuid::from_u128(random.u128(..))),
        };
        let events = (0..random.u64(0..=3)).map(|_| event(random)).collect();
        commit.appends.push(Append { stream: stream(number), expected, events });
    }
    let documents = random.u64(0..=3);
    for number in random.choose_multiple(0..DOCUMENTS, documents as usize) {
        let stands =
            reference.documents(&[key(number)]).await.unwrap().remove(0).map_or(0, |document| document.version);
        let expected = match random.u64(0..10) {
            0 => Some(stands + 1),
            1 => Some((stands - 1).max(0)),
            2 | 3 => None,
            _ => Some(stands),
        };
        let drawn = random.u64(..1_000);
        let body = (!drawn.is_multiple_of(4)).then(|| format!(r#"{{"n": {drawn}}}"#).into());
        commit.puts.push(Put { key: key(number), expected, due: body.as_ref().and(due(drawn)), body });
    }
    commit
}

/// Returns the same commit, padded with enough rows that the function processes it as a set.
fn padded(mut commit: Commit, number: u64) -> Commit {
    for pad in 0..PADDING {
        let event = NewEvent {
            id: Uuid::new_v4(),
            type_name: "padding.added".into(),
            schema_version: 1,
            data: "{}".into(),
            metadata: Metadata::default(),
        };
        let stream = StreamId::new("padding", &format!("{number}.{pad}")).unwrap();
        commit.appends.push(Append { stream, expected: Expected::Any, events: vec![event] });
    }
    commit
}

/// Describes the whole content of the store.
async fn all_of(store: &dyn EventStore) -> Vec<String> {
    let mut all = Vec::new();
    for number in 0..STREAMS {
        for event in store.read_stream(&stream(number), Version::START, 10_000).await.unwrap() {
            let annals::Recorded { stream, version, id, type_name, schema_version, data, metadata, .. } = event;
            all.push(format!("{stream} {version} {id} {type_name} {schema_version} {data} {metadata:?}"));
        }
    }
    let keys: Vec<_> = (0..DOCUMENTS).map(key).collect();
    all.extend(store.documents(&keys).await.unwrap().into_iter().map(|document| format!("{document:?}")));
    all
}

#[tokio::test]
async fn single_and_set_appends_give_the_same_result() {
    let schemas = [Schema::new(), Schema::new()];
    let few = schemas[0].store().await;
    let many = schemas[1].store().await;
    let reference = Arc::new(MemoryStore::default());
    let mut random = fastrand::Rng::with_seed(7);
    let mut held = 0;
    let mut refused = 0;
    for number in 0..COMMITS {
        let commit = some_commit(&reference, &mut random).await;
        if commit.is_empty() {
            continue;
        }
        let count = commit.appends.len();
        let expected = reference.commit(commit.clone()).await.map(|committed| committed.versions);
        let by_few = few.commit(commit.clone()).await.map(|committed| committed.versions);
        let by_many = many.commit(padded(commit.clone(), number)).await.map(|mut committed| {
            committed.versions.truncate(count);
            committed.versions
        });
        let words = |outcome: &Result<Vec<Version>, annals::CommitError>| match outcome {
            Ok(versions) => format!("{versions:?}"),
            Err(error) => error.to_string(),
        };
        assert_eq!(words(&by_few), words(&expected), "one by one: {commit:?}");
        assert_eq!(words(&by_many), words(&expected), "as sets: {commit:?}");
        *if expected.is_ok() { &mut held } else { &mut refused } += 1;
    }
    assert!(held > COMMITS / 4 && refused > COMMITS / 4, "{held} held, {refused} were refused");
    let expected = all_of(&*reference).await;
    assert_eq!(all_of(&few).await, expected);
    assert_eq!(all_of(&many).await, expected);
    // The log holds the events of successful commits in their order, and no event of a rejected commit.
    let log = |store: annals_postgres::PostgresStore| async move {
        let page = store.read_log(&LogQuery::categories(["thing"]), Position::START, 100_000).await.unwrap();
        page.events.iter().map(|event| event.id).collect::<Vec<_>>()
    };
    assert_eq!(log(few.clone()).await, log(many.clone()).await);
    few.close().await.unwrap();
    many.close().await.unwrap();
}
