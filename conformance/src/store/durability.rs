//! The contents that a durable store must have after it is opened again.

use annals::{Commit, Expected, Scan};

use super::{
    Durable, append, append::ODD_PAYLOADS, appending, assert_conflict, assert_document_conflict, at, event, key,
    numbered, put, putting, whole_log, whole_stream,
};

/// Checks events, documents and the head.
pub async fn everything_survives_reopening<T: Durable>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let events = ODD_PAYLOADS.iter().map(|data| event("odd.payload", *data)).collect();
    let puts = (0..300).map(|number| put(&key("note", &format!("{number:03}")), Some(0), Some("\"é\""))).collect();
    store.commit(Commit { appends: vec![append("a-1", at(0), events)], puts }).await.unwrap();
    store.commit(putting([put(&key("note", "007"), Some(1), None)])).await.unwrap();
    let log = whole_log(&*store).await;
    let status = store.status().await.unwrap();
    let documents = store.scan("note", &Scan::After("".into()), 1_000).await.unwrap();
    assert_eq!((log.len(), documents.len()), (ODD_PAYLOADS.len(), 299));
    drop(store);

    let under_test = under_test.reopen().await;
    let store = under_test.store();
    assert_eq!(whole_log(&*store).await, log);
    assert_eq!(store.status().await.unwrap(), status);
    assert_eq!(store.scan("note", &Scan::After("".into()), 1_000).await.unwrap(), documents);
}

/// Versions, positions and time continue from the values before the store was closed.
pub async fn writes_continue_after_reopening<T: Durable>() {
    let mut under_test = T::fresh().await;
    let note = key("note", "1");
    for round in 0..4 {
        let store = under_test.store();
        assert_conflict(store.commit(appending([append("a-1", at(99), vec![])])).await, "a-1", 99, round * 2);
        let conflict = store.commit(putting([put(&note, Some(99), Some("1"))])).await;
        assert_document_conflict(conflict, &note, 99, round);
        let appends = vec![append("a-1", at(round * 2), numbered(2)), append("b-1", Expected::Any, numbered(1))];
        store.commit(Commit { appends, puts: vec![put(&note, Some(round), Some("1"))] }).await.unwrap();
        drop(store);
        under_test = under_test.reopen().await;
    }
    let store = under_test.store();
    let log = whole_log(&*store).await;
    assert_eq!(log.len(), 12);
    assert!(log.is_sorted_by(|one, next| one.position < next.position && one.recorded_at <= next.recorded_at));
    assert_eq!(whole_stream(&*store, "a-1").await.len(), 8);
}

/// No part of a rejected commit is stored, not even a part that would have succeeded alone.
pub async fn refused_commit_is_absent_after_reopening<T: Durable>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let appends = vec![append("a-1", at(0), numbered(2)), append("b-1", at(1), numbered(1))];
    let commit = Commit { appends, puts: vec![put(&key("note", "1"), Some(0), Some("1"))] };
    assert_conflict(store.commit(commit).await, "b-1", 1, 0);
    drop(store);
    let under_test = under_test.reopen().await;
    super::assert_empty(&*under_test.store(), &[key("note", "1")]).await;
}
