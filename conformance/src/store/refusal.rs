//! Commits that can never succeed. The store rejects them as invalid and stores nothing.

use std::sync::Arc;

use annals::{
    Append, Commit, CommitError, EventStore, Expected, Put, StreamId,
    commit::{COMMIT_ROWS_MAX, DOCUMENT_BYTES_MAX, DOCUMENT_ID_BYTES_MAX, DUE_SECONDS_MIN},
    event::EVENT_BYTES_MAX,
};
use chrono::{DateTime, Utc};

use super::{StoreUnderTest, append, assert_empty, at, event, key, numbered, put, putting};

/// Adds valid parts to the invalid commit. Alone, these parts would succeed.
async fn assert_refused(store: &Arc<dyn EventStore>, mut commit: Commit) {
    let sound = key("sound", "1");
    commit.appends.push(append("sound-1", at(0), numbered(1)));
    commit.puts.push(put(&sound, Some(0), Some("{}")));
    match store.commit(commit).await {
        Err(CommitError::Invalid(reason)) => assert!(!reason.is_empty() && reason.len() < 2_000, "{reason}"),
        other => panic!("a refusal was due, not {other:?}"),
    }
    assert_empty(&**store, &[sound]).await;
}

fn of(append: Append) -> Commit {
    Commit { appends: vec![append], puts: Vec::new() }
}

/// Two writes to the same key in one commit have no defined result.
pub async fn duplicate_streams_and_documents_are_refused<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let twins = ["a-1", "a-1"].map(|name| append(name, Expected::Any, numbered(1)));
    assert_refused(&store, Commit { appends: twins.into(), puts: Vec::new() }).await;
    let document = key("note", "1");
    assert_refused(&store, putting([put(&document, None, Some("1")), put(&document, None, None)])).await;
}

/// The origin of an invalid name does not matter: ids that were read from a store may be invalid, but such ids are
/// never written again.
pub async fn invalid_names_are_refused<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let long = format!("order-{}", "x".repeat(10_000));
    for name in ["order-two\nlines", "order-nul\0", "order", "-1", "order-", "", "Order-1", "or der-1", &long] {
        let append = Append { stream: StreamId::from_stored(name), expected: Expected::Any, events: numbered(1) };
        assert_refused(&store, of(append)).await;
    }
    assert_refused(&store, of(append("a-1", at(0), vec![event("nul\0", "{}")]))).await;
    assert_refused(&store, putting([put(&key("nul\0", "1"), None, Some("{}"))])).await;
    let long = "x".repeat(DOCUMENT_ID_BYTES_MAX + 1);
    for id in ["nul\0", &long] {
        assert_refused(&store, putting([put(&key("note", id), None, Some("{}"))])).await;
    }
}

/// Each commit exceeds a limit by one byte, row or event.
pub async fn oversized_data_is_refused<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let text = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
    assert_refused(&store, of(append("a-1", at(0), vec![event("too.large", text(EVENT_BYTES_MAX + 1))]))).await;
    assert_refused(&store, putting([put(&key("note", "1"), None, Some(&text(DOCUMENT_BYTES_MAX + 1)))])).await;
    assert_refused(&store, of(append("a-1", at(0), numbered(COMMIT_ROWS_MAX)))).await;

    let large = of(append("a-1", at(0), vec![event("just.fits", text(EVENT_BYTES_MAX))]));
    store.commit(large).await.unwrap();
    store.commit(putting([put(&key("note", "1"), None, Some(&text(DOCUMENT_BYTES_MAX)))])).await.unwrap();
}

/// Every store rejects such times, because one of the stores cannot represent them.
pub async fn times_before_the_calendar_are_refused<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    for due in [DateTime::from_timestamp(DUE_SECONDS_MIN - 1, 0).unwrap(), DateTime::<Utc>::MIN_UTC] {
        let timer = Put { due: Some(due), ..put(&key("timer", "t"), None, Some("{}")) };
        assert_refused(&store, putting([timer])).await;
    }
}

/// The store rejects such payloads before writing them, so that no reader fails later.
pub async fn unreadable_payloads_are_refused<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let deep = format!("{}{}", "[".repeat(6_000), "]".repeat(6_000));
    let payloads = [
        r#"{"a":"\u0000"}"#,
        r#"{"\u0000":1}"#,
        r#""\ud800""#,
        r#"{"a":"\udc00\ud800"}"#,
        &deep,
        "",
        "{",
        "nothing",
        "{} {}",
        "NaN",
        "'a'",
        "\"\u{1}\"",
    ];
    for payload in payloads {
        assert_refused(&store, of(append("a-1", at(0), vec![event("odd.payload", payload)]))).await;
        assert_refused(&store, putting([put(&key("note", "1"), None, Some(payload))])).await;
    }
}
