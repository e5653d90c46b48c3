//! Documents: compare-and-set, reading and scanning.

use std::sync::Arc;

use annals::{
    Commit, Document, DocumentKey, EventStore, LogQuery, Position, Put, Scan, StreamId, Version,
    commit::DUE_SECONDS_MIN,
};
use chrono::{DateTime, TimeDelta, Utc};

use super::{
    StoreUnderTest, append, append::ODD_PAYLOADS, appending, assert_document_conflict, at, key, numbered, put, putting,
    stream,
};

async fn version(store: &Arc<dyn EventStore>, key: &DocumentKey) -> i64 {
    store.documents(std::slice::from_ref(key)).await.unwrap()[0].as_ref().map_or(0, |document| document.version)
}

fn ids(documents: &[Document]) -> Vec<&str> {
    documents.iter().map(|document| &*document.key.id).collect()
}

/// Versions rise both with and without an expected version.
pub async fn versions_rise_with_each_put<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let key = key("note", "1");
    for (expected, after) in [(Some(0), 1), (Some(1), 2), (None, 3), (None, 4), (Some(4), 5)] {
        let body = format!("{{\"put\":{after}}}");
        store.commit(putting([put(&key, expected, Some(&body))])).await.unwrap();
        let found = store.documents(std::slice::from_ref(&key)).await.unwrap().remove(0).unwrap();
        assert_eq!(found, Document { key: key.clone(), version: after, body: body.into(), due: None });
    }
}

/// Version 0 means that the document must not exist. The error names the current version of the document.
pub async fn put_succeeds_only_at_the_expected_version<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let key = key("note", "1");
    for wrong in [1, 5, -1, i64::MAX] {
        assert_document_conflict(store.commit(putting([put(&key, Some(wrong), Some("1"))])).await, &key, wrong, 0);
        assert_document_conflict(store.commit(putting([put(&key, Some(wrong), None)])).await, &key, wrong, 0);
    }
    store.commit(putting([put(&key, None, Some("1"))])).await.unwrap();
    store.commit(putting([put(&key, None, Some("2"))])).await.unwrap();
    for wrong in [0, 1, 3] {
        assert_document_conflict(store.commit(putting([put(&key, Some(wrong), Some("3"))])).await, &key, wrong, 2);
        assert_document_conflict(store.commit(putting([put(&key, Some(wrong), None)])).await, &key, wrong, 2);
    }
    let found = store.documents(&[key]).await.unwrap().remove(0).unwrap();
    assert_eq!((found.version, &*found.body), (2, "2"));
}

/// The next put after a removal must expect version 0. Removing a missing document is not an error.
pub async fn a_removed_document_counts_as_version_0<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let key = key("note", "1");
    store.commit(putting([put(&key, Some(0), None)])).await.unwrap();
    store.commit(putting([put(&key, None, None)])).await.unwrap();
    for expected in [Some(2), None] {
        store.commit(putting([put(&key, Some(0), Some("1"))])).await.unwrap();
        store.commit(putting([put(&key, Some(1), Some("2"))])).await.unwrap();
        store.commit(putting([put(&key, expected, None)])).await.unwrap();
        assert_eq!(version(&store, &key).await, 0);
        assert!(store.scan("note", &Scan::After("".into()), 10).await.unwrap().is_empty());
        assert_document_conflict(store.commit(putting([put(&key, Some(2), Some("3"))])).await, &key, 2, 0);
    }
}

/// The store returns one answer per key, including missing keys and keys that are requested twice.
pub async fn documents_are_returned_in_the_order_of_the_keys<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let held = [key("b", "2"), key("a", "1"), key("a", "2"), key("b", "")];
    store.commit(putting(held.iter().map(|key| put(key, None, Some(&format!("\"{key}\"")))))).await.unwrap();
    let asked = [key("b", "2"), key("b", "1"), key("a", "2"), key("b", "2"), key("", ""), key("b", ""), key("a", "1")];
    let found = store.documents(&asked).await.unwrap();
    let found = found.iter().map(|found| found.as_ref().map(|found| found.key.to_string())).collect::<Vec<_>>();
    let expected = ["b/2", "", "a/2", "b/2", "", "b/", "a/1"].map(|name| (!name.is_empty()).then(|| name.to_owned()));
    assert_eq!(found, expected);
    assert!(store.documents(&[]).await.unwrap().is_empty());
}

/// The store keeps bodies as text, not as JSON values.
pub async fn bodies_round_trip_byte_for_byte<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let keys = (0..ODD_PAYLOADS.len()).map(|number| key("odd", &number.to_string())).collect::<Vec<_>>();
    let puts = keys.iter().zip(ODD_PAYLOADS).map(|(key, body)| put(key, None, Some(body)));
    store.commit(putting(puts)).await.unwrap();
    let found = store.documents(&keys).await.unwrap();
    let found = found.iter().flatten().map(|document| &*document.body).collect::<Vec<_>>();
    assert_eq!(found, ODD_PAYLOADS);
}

/// The order is by bytes, not by the rules of any language. A scan does not return documents of other collections,
/// however similar their names are.
pub async fn scan_returns_byte_order<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let in_order =
        [" ", "%", "10", "9", "A", "Z", "_", "a", "a b", "aa", "e\u{301}", "z", "ß", "é", "漢", "\u{ffff}", "🦀"];
    assert!(in_order.is_sorted_by_key(|id| id.as_bytes()));
    let puts = in_order.iter().rev().map(|id| put(&key("c", id), Some(0), Some("{}")));
    let others = ["", "b", "c1", "C", "c\u{301}"].map(|collection| put(&key(collection, "m"), Some(0), Some("{}")));
    store.commit(putting(puts.chain(others))).await.unwrap();

    let all = store.scan("c", &Scan::After("".into()), 100).await.unwrap();
    assert_eq!(ids(&all), in_order);
    for limit in [1, 4, in_order.len()] {
        let mut seen = Vec::new();
        let mut after = Arc::from("");
        loop {
            let page = store.scan("c", &Scan::After(after), limit).await.unwrap();
            assert!(page.len() <= limit);
            let Some(last) = page.last() else { break };
            after = last.key.id.clone();
            seen.extend(page);
        }
        assert_eq!(seen, all, "in pages of {limit}");
    }
    assert!(store.scan("c", &Scan::After("".into()), 0).await.unwrap().is_empty());
    assert!(store.scan("nothing", &Scan::After("".into()), 10).await.unwrap().is_empty());
}

fn minute(number: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000, 123_456_000).unwrap() + TimeDelta::minutes(number)
}

fn timer(id: &str, due: Option<DateTime<Utc>>) -> Put {
    Put { due, ..put(&key("timer", id), None, Some("{}")) }
}

/// A scan for due documents returns only documents that are due by the given time, earliest first. Times are compared to
/// the microsecond.
pub async fn scan_returns_due_documents<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let other = Put { due: Some(minute(0)), ..put(&key("other", "o"), None, Some("{}")) };
    let timers = [("d", 4), ("a", 3), ("c", 1), ("b", 2)].map(|(id, number)| timer(id, Some(minute(number))));
    store.commit(putting(timers.into_iter().chain([timer("never", None), other]))).await.unwrap();

    let due = async |by: DateTime<Utc>, limit: usize| store.scan("timer", &Scan::Due(by), limit).await.unwrap();
    assert_eq!(ids(&due(minute(9), 10).await), ["c", "b", "a", "d"]);
    assert_eq!(ids(&due(minute(9), 2).await), ["c", "b"]);
    assert_eq!(ids(&due(minute(3), 10).await), ["c", "b", "a"]);
    assert_eq!(ids(&due(minute(3) - TimeDelta::microseconds(1), 10).await), ["c", "b"]);
    assert!(due(minute(0), 10).await.is_empty());
    assert!(due(minute(9), 0).await.is_empty());
    assert_eq!(due(minute(1), 10).await[0].due, Some(minute(1)));
    assert_eq!(ids(&store.scan("timer", &Scan::After("".into()), 10).await.unwrap()), ["a", "b", "c", "d", "never"]);
}

/// The last put decides: it may set a later time, remove the time, or remove the document.
pub async fn due_follows_the_last_put<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let due = async || {
        let found = store.scan("timer", &Scan::Due(minute(5)), 10).await.unwrap();
        found.into_iter().map(|document| (document.key.id.to_string(), document.version)).collect::<Vec<_>>()
    };
    let puts = ["later", "never", "gone", "same"].map(|id| timer(id, Some(minute(1))));
    store.commit(putting(puts)).await.unwrap();
    assert_eq!(due().await.len(), 4);
    let gone = put(&key("timer", "gone"), None, None);
    let puts = [timer("later", Some(minute(9))), timer("never", None), gone, timer("same", Some(minute(2)))];
    store.commit(putting(puts)).await.unwrap();
    assert_eq!(due().await, [("same".to_owned(), 2)]);
    store.commit(putting([timer("later", Some(minute(1))), timer("gone", Some(minute(3)))])).await.unwrap();
    let expected = [("later", 3), ("same", 2), ("gone", 1)].map(|(id, version)| (id.to_owned(), version));
    assert_eq!(due().await, expected);
}

/// Due times are rounded down to the microsecond, including times before 1970 and 2000. The time in the query is
/// compared with the same precision.
pub async fn due_is_kept_to_the_microsecond<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let times = [
        (1_800_000_000, 123_456_789, 123_456_000),
        (950_000_000, 1, 0),
        (940_000_000, 999, 0),
        (940_000_000, 123_456_999, 123_456_000),
        (-1, 999_999_999, 999_999_000),
        (-1_000_000_000, 1_500, 1_000),
        (DUE_SECONDS_MIN, 0, 0),
        (DateTime::<Utc>::MAX_UTC.timestamp(), 999_999_999, 999_999_000),
    ];
    for (number, (seconds, given, kept)) in times.into_iter().enumerate() {
        let time = |nanoseconds| DateTime::from_timestamp(seconds, nanoseconds).unwrap();
        let timer = Put { due: Some(time(given)), ..put(&key(&format!("timer{number}"), "t"), None, Some("{}")) };
        let collection = timer.key.collection.clone();
        let timer_key = timer.key.clone();
        store.commit(putting([timer])).await.unwrap();
        let due = store.documents(&[timer_key]).await.unwrap()[0].as_ref().unwrap().due;
        assert_eq!(due, Some(time(kept)));
        let found = async |by| store.scan(&collection, &Scan::Due(by), 10).await.unwrap().len();
        assert_eq!(found(time(kept)).await, 1, "{seconds}");
        assert_eq!(found(time(given)).await, 1, "{seconds}");
        if seconds > DUE_SECONDS_MIN {
            assert_eq!(found(time(kept) - TimeDelta::nanoseconds(1)).await, 0, "{seconds}");
        }
    }
}

/// For a name that a store cannot represent, the store returns no document, as for any other name without a document.
pub async fn unstorable_names_are_absent<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let puts = ["a", "a\u{1}", "aa", "b"].map(|id| put(&key("c", id), None, Some("{}")));
    store.commit(putting(puts)).await.unwrap();
    store.commit(appending([append("a-1", at(0), numbered(3))])).await.unwrap();

    let long = "x".repeat(100_000);
    let keys = [key("c", "a\0b"), key("c", "b"), key("c\0", "a"), key("c", "\0"), key("c", &long), key("c", "a")];
    let found = store.documents(&keys).await.unwrap();
    let found = found.iter().map(|found| found.as_ref().map(|found| &*found.key.id)).collect::<Vec<_>>();
    assert_eq!(found, [None, Some("b"), None, None, None, Some("a")]);
    assert_eq!(store.documents(&keys[..1]).await.unwrap(), [None]);
    assert!(store.scan("c\0", &Scan::After("".into()), 10).await.unwrap().is_empty());
    assert!(store.scan("c\0", &Scan::Due(minute(9)), 10).await.unwrap().is_empty());
    let after = async |id: &str| ids(&store.scan("c", &Scan::After(id.into()), 10).await.unwrap()).join(" ");
    assert_eq!(after("a\0b").await, "a\u{1} aa b");
    assert_eq!(after("\0").await, "a a\u{1} aa b");
    assert_eq!(after(&long).await, "");
    for name in ["a-\0", "a-1\0", &long] {
        let stream = StreamId::from_stored(name);
        assert!(store.read_stream(&stream, Version::START, 10).await.unwrap().is_empty());
    }
    for query in [LogQuery::categories(["a\0"]), LogQuery::types(["thing.happened\0"]), LogQuery::types([&*long])] {
        let page = store.read_log(&query, Position::START, 10).await.unwrap();
        assert!(page.events.is_empty() && page.next > Position::START, "{query:?}");
    }
    let query = LogQuery::types(["\0", "thing.happened"]);
    assert_eq!(store.read_log(&query, Position::START, 10).await.unwrap().events.len(), 3);
}

/// A reader that reads a checkpoint first and the stream second finds the events that the checkpoint covers. The same
/// holds in the opposite order.
pub async fn documents_become_visible_with_the_events_of_their_commit<T: StoreUnderTest>() {
    const COMMITS: i64 = 200;
    let under_test = T::fresh().await;
    let store = under_test.store();
    let keys = [key("count", "one"), key("count", "other")];
    let writing = {
        let store = store.clone();
        let keys = keys.clone();
        tokio::spawn(async move {
            for done in 0..COMMITS {
                let puts = keys.iter().map(|key| put(key, Some(done), Some(&(done + 1).to_string()))).collect();
                store.commit(Commit { appends: vec![append("a-1", at(done), numbered(1))], puts }).await.unwrap();
            }
        })
    };
    let counted = async || {
        let found = store.documents(&keys).await.unwrap();
        let bodies = found.iter().map(|found| found.as_ref().map_or("0", |found| &found.body)).collect::<Vec<_>>();
        assert_eq!(bodies[0], bodies[1], "documents are as of one moment");
        bodies[0].parse::<i64>().unwrap()
    };
    let appended = async || {
        let events = store.read_stream(&stream("a-1"), Version::START, 1_000).await.unwrap();
        events.len() as i64
    };
    let mut seen = 0;
    while seen < COMMITS {
        let all_returned = writing.is_finished();
        let first = counted().await;
        let second = appended().await;
        let third = counted().await;
        assert!(first <= second && second <= third, "counted {first}, then {second} events, then counted {third}");
        assert!(!all_returned || first == COMMITS, "the last commit must be visible once it returned");
        seen = first;
    }
    writing.await.unwrap();
}
