//! Appending events and reading streams.

use annals::{
    Commit, Committed, Expected, Metadata, NewEvent, Position, TraceContext, Version, commit::COMMIT_ROWS_MAX,
    event::Party,
};
use chrono::{TimeDelta, Utc};
use uuid::Uuid;

use super::{
    StoreUnderTest, append, appending, assert_conflict, assert_empty, at, event, key, numbered, put, putting, stream,
    whole_log, whole_stream,
};

/// Checks all fields of events that are read from the stream and from the log.
pub async fn events_round_trip<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let given = NewEvent {
        id: Uuid::new_v4(),
        type_name: "order.placed".into(),
        schema_version: 7,
        data: r#"{"sku":"A"}"#.into(),
        metadata: Metadata {
            correlation_id: Uuid::new_v4(),
            causation_id: Uuid::new_v4(),
            trace: TraceContext::parse([traceparent], None),
            actor: Party::new("user \"ü\" \\").ok(),
            tenant: Party::new("t-1").ok(),
            ..Metadata::default()
        },
    };
    let before = Utc::now();
    let odd_state = TraceContext::parse([traceparent], ["vendor=\"\\ {},1@other=2"]);
    assert!(odd_state.as_ref().is_some_and(|trace| trace.tracestate().is_some()));
    let odd_trace = Metadata { trace: odd_state, ..Metadata::default() };
    let second = NewEvent { id: Uuid::new_v4(), metadata: odd_trace, ..given.clone() };
    store.commit(appending([append("order-1", at(0), vec![given.clone(), second.clone()])])).await.unwrap();

    let events = whole_stream(&*store, "order-1").await;
    for (found, given) in events.iter().zip([&given, &second]) {
        assert_eq!(found.stream, stream("order-1"));
        assert_eq!(found.id, given.id);
        assert_eq!(*found.type_name, *given.type_name);
        assert_eq!(found.schema_version, given.schema_version);
        assert_eq!(*found.data, *given.data);
        assert_eq!(found.metadata, given.metadata);
        // The clock of the store may differ from the clock of this machine, but both must show the real time.
        assert!((found.recorded_at - before).num_hours().abs() < 24, "{}", found.recorded_at);
    }
    assert_eq!((events.len(), events[0].version, events[1].version), (2, Version(1), Version(2)));
    let from_log = whole_log(&*store).await;
    assert!(events.iter().zip(&from_log).all(|(one, other)| *one == **other));
}

/// Payloads that a JSON library would not reproduce byte for byte.
pub const ODD_PAYLOADS: &[&str] = &[
    r#"{"a":1,"a":2}"#,
    r#"{"z":1,"a":9007199254740993}"#,
    r#"{"huge":1e400,"tiny":1e-400,"exact":0.1000,"signed":-0}"#,
    " { \"spaces\" :\t[ 1 ,\n2 ]\r\n} ",
    r#""just text: ü 漢字 🦀 \ud83e\udd80 \/ \u00fc""#,
    r#""\\u0000 is a backslash and letters""#,
    r#""' \" ; -- $1 ?1 :x {} %s""#,
    "\"\u{2028}\u{fffd}\u{feff}e\u{301}é\"",
    "null",
    "true",
    "[]",
    "{}",
    "123456789012345678901234567890.123456789012345678901234567890",
];

/// The store keeps payloads as text, not as JSON values.
pub async fn payloads_round_trip_byte_for_byte<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let events = ODD_PAYLOADS.iter().map(|data| event("odd.payload", *data)).collect();
    store.commit(appending([append("odd-1", at(0), events)])).await.unwrap();
    let found = whole_stream(&*store, "odd-1").await;
    let found = found.iter().map(|event| &*event.data).collect::<Vec<_>>();
    assert_eq!(found, ODD_PAYLOADS);
}

/// Versions count up from 1 in each stream. Positions rise in the order of the commits.
pub async fn versions_are_dense_and_positions_rise<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let mut last = Position::START;
    for round in 0..10 {
        for name in ["a-1", "b-1"] {
            let committed = store.commit(appending([append(name, at(round * 3), numbered(3))])).await.unwrap();
            assert_eq!(committed.versions, [Version(round * 3 + 3)]);
            assert!(committed.position > last);
            last = committed.position;
        }
    }
    for name in ["a-1", "b-1"] {
        let versions = whole_stream(&*store, name).await.iter().map(|event| event.version.0).collect::<Vec<_>>();
        assert_eq!(versions, (1..=30).collect::<Vec<_>>());
    }
    let log = whole_log(&*store).await;
    assert_eq!(log.len(), 60);
    assert!(log.is_sorted_by(|one, next| one.position < next.position));
    assert_eq!(log.last().map(|event| event.position), Some(last));
}

/// The error of a failed commit names the current version of the stream.
pub async fn commit_succeeds_only_at_the_expected_version<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    assert_conflict(store.commit(appending([append("a-1", at(1), numbered(1))])).await, "a-1", 1, 0);
    store.commit(appending([append("a-1", at(0), numbered(2))])).await.unwrap();
    for wrong in [0, 1, 3, i64::MAX, -1] {
        assert_conflict(store.commit(appending([append("a-1", at(wrong), numbered(1))])).await, "a-1", wrong, 2);
    }
    store.commit(appending([append("a-1", at(2), numbered(1))])).await.unwrap();
    assert_eq!(whole_stream(&*store, "a-1").await.len(), 3);
}

/// An append without an expected version also succeeds on a new stream.
pub async fn commit_without_expected_version_succeeds_at_any_version<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    for round in 1..=3 {
        let committed = store.commit(appending([append("a-1", Expected::Any, numbered(2))])).await.unwrap();
        assert_eq!(committed.versions, [Version(round * 2)]);
    }
}

/// Versions follow the order of the appends in the commit, whatever order the store writes them in.
pub async fn a_commit_spans_streams<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    store.commit(appending([append("m-1", at(0), numbered(4))])).await.unwrap();
    let commit = appending([
        append("z-1", at(0), numbered(3)),
        append("m-1", at(4), numbered(1)),
        append("a-1", Expected::Any, numbered(2)),
    ]);
    let Committed { position, versions, .. } = store.commit(commit).await.unwrap();
    assert_eq!(versions, [Version(3), Version(5), Version(2)]);
    let log = whole_log(&*store).await;
    assert_eq!(log.len(), 10);
    assert_eq!(log.last().map(|event| event.position), Some(position));
}

/// If one part of a commit has a conflict, the other streams and documents of the commit stay unchanged.
pub async fn conflict_leaves_nothing_of_the_commit<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let document = key("note", "1");
    for (streams, expected) in [(["a-1", "b-1", "c-1"], Some(0)), (["a-1", "b-1", "d-1"], Some(1))] {
        // In the first round, the version of the stream is wrong; in the second round, the version of the document is
        // wrong.
        let last = at(if expected == Some(0) { 1 } else { 0 });
        let appends = [(streams[0], at(0)), (streams[1], Expected::Any), (streams[2], last)];
        let commit = Commit {
            appends: appends.map(|(name, expected)| append(name, expected, numbered(2))).into(),
            puts: vec![put(&key("note", "2"), None, Some("{}")), put(&document, expected, Some("{}"))],
        };
        assert!(store.commit(commit).await.is_err());
        assert_empty(&*store, &[document.clone(), key("note", "2")]).await;
    }
    store.commit(appending([append("a-1", at(0), numbered(1))])).await.unwrap();
}

/// A commit without contents always succeeds.
pub async fn empty_commit_succeeds<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    assert_eq!(store.commit(Commit::default()).await.unwrap(), Committed::default());
    assert_empty(&*store, &[]).await;
}

/// An append without events makes a commit depend on a stream without writing to that stream.
pub async fn an_append_without_events_only_checks<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    store.commit(appending([append("a-1", at(0), numbered(2))])).await.unwrap();
    let commit = || appending([append("a-1", at(2), vec![]), append("b-1", Expected::Any, vec![])]);
    let committed = store.commit(commit()).await.unwrap();
    assert_eq!((committed.position, committed.versions), (Position::START, vec![Version(2), Version::START]));

    let document = key("note", "1");
    let guarded =
        Commit { puts: vec![put(&document, Some(0), Some("1"))], ..appending([append("a-1", at(1), vec![])]) };
    assert_conflict(store.commit(guarded).await, "a-1", 1, 2);
    assert_eq!(store.documents(&[document]).await.unwrap(), [None]);
    assert_eq!(whole_log(&*store).await.len(), 2);
}

/// After a log has lost its last events and grown again, the same version may belong to another event.
pub async fn expected_event_is_compared_by_its_id<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let events = numbered(2);
    let other = Uuid::new_v4();
    let first = events[0].id;
    let second = events[1].id;
    store.commit(appending([append("a-1", at(0), events)])).await.unwrap();
    let expect = |version, id| Expected::Event { version: Version(version), id };
    for (expected, count) in
        [(expect(2, other), 1), (expect(2, first), 0), (expect(1, first), 1), (expect(3, second), 2)]
    {
        let version = expected.version().unwrap().0;
        let alone = appending([append("a-1", expected, numbered(count))]);
        assert_conflict(store.commit(alone).await, "a-1", version, 2);
        // The append is also committed together with another stream and with a document, because stores may handle such
        // commits differently.
        let with_another = appending([append("a-1", expected, numbered(count)), append("b-1", at(0), numbered(1))]);
        assert_conflict(store.commit(with_another).await, "a-1", version, 2);
        let note = put(&key("note", "1"), None, Some("1"));
        let with_document = Commit { puts: vec![note], ..appending([append("a-1", expected, numbered(count))]) };
        assert_conflict(store.commit(with_document).await, "a-1", version, 2);
    }
    assert!(store.read_stream(&stream("b-1"), Version::START, 1).await.unwrap().is_empty());
    store.commit(appending([append("a-1", expect(2, second), vec![])])).await.unwrap();
    let third = numbered(1);
    let third_id = third[0].id;
    let another = appending([append("never-1", expect(1, other), numbered(1))]);
    store.commit(appending([append("a-1", expect(2, second), third)])).await.unwrap();
    assert_conflict(store.commit(another).await, "never-1", 1, 0);
    // Many commits run at once. Some of them depend on appends of other commits in the same group.
    let racing = (0..40).map(|number| {
        let store = store.clone();
        let id = if number % 2 == 0 { third_id } else { other };
        async move { store.commit(appending([append("a-1", expect(3, id), numbered(1))])).await }
    });
    let outcomes = futures::future::join_all(racing).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(outcomes.iter().position(Result::is_ok).map(|place| place % 2), Some(0));
    assert_eq!(whole_stream(&*store, "a-1").await.len(), 4);
}

/// A read may start at any version, including versions beyond the end.
pub async fn stream_is_read_after_a_version_up_to_a_limit<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    store.commit(appending([append("a-1", at(0), numbered(10))])).await.unwrap();
    let cases: [(i64, usize, &[i64]); 8] = [
        (0, 3, &[1, 2, 3]),
        (3, 3, &[4, 5, 6]),
        (8, 3, &[9, 10]),
        (10, 3, &[]),
        (i64::MAX, 3, &[]),
        (9, usize::MAX, &[10]),
        (0, 0, &[]),
        (-5, 1, &[1]),
    ];
    for (after, limit, expected) in cases {
        let events = store.read_stream(&stream("a-1"), Version(after), limit).await.unwrap();
        let versions = events.iter().map(|event| event.version.0).collect::<Vec<_>>();
        assert_eq!(versions, expected, "after {after}, limit {limit}");
    }
    assert!(store.read_stream(&stream("a-2"), Version::START, 10).await.unwrap().is_empty());
}

/// Names that differ only in pattern characters, case, Unicode forms or spaces are different names.
pub async fn streams_with_similar_names_are_separate<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let long = format!("a-{}", "x".repeat(510));
    let names =
        ["a-1", "a-10", "a-%", "a-_", "a-é", "a-e\u{301}", "a-É", "a-1 ", "a- 1", "a-b-c", "a-B-c", "a-'", &long];
    for (index, name) in names.iter().enumerate() {
        let committed = store.commit(appending([append(name, at(0), numbered(index + 1))])).await.unwrap();
        assert_eq!(committed.versions, [Version(index as i64 + 1)], "{name:?}");
    }
    for (index, name) in names.iter().enumerate() {
        let events = whole_stream(&*store, name).await;
        assert_eq!(events.len(), index + 1, "{name:?}");
        assert!(events.iter().all(|event| event.stream == stream(name)));
    }
}

/// Even with the maximum number of rows, all events come back in order.
pub async fn commit_can_be_as_large_as_the_limit<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    store.commit(appending([append("a-1", at(0), numbered(COMMIT_ROWS_MAX))])).await.unwrap();
    let events = whole_stream(&*store, "a-1").await;
    assert_eq!(events.len(), COMMIT_ROWS_MAX);
    for (event, number) in events.iter().zip(1..) {
        assert_eq!((event.version, &*event.data), (Version(number), &*format!(r#"{{"number":{number}}}"#)));
    }
    let keys = (0..COMMIT_ROWS_MAX).map(|number| key("many", &format!("{number:05}"))).collect::<Vec<_>>();
    store.commit(putting(keys.iter().map(|key| put(key, Some(0), Some(&format!("\"{key}\"")))))).await.unwrap();
    for (found, key) in store.documents(&keys).await.unwrap().into_iter().zip(keys) {
        assert_eq!(found.map(|found| found.body.to_string()), Some(format!("\"{key}\"")));
    }
}

/// Recording times never decrease, neither within a commit nor between commits.
pub async fn the_clock_does_not_go_back<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    for round in 0..50 {
        store.commit(appending([append("a-1", at(round * 2), numbered(2))])).await.unwrap();
    }
    let log = whole_log(&*store).await;
    assert_eq!(log.len(), 100);
    assert!(log.is_sorted_by_key(|event| event.recorded_at));
}

/// The commit reports the same recording time as its events.
pub async fn the_time_of_recording_is_kept_to_the_microsecond<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    for round in 0..20 {
        let name = format!("a-{round}");
        let before = Utc::now() - TimeDelta::minutes(1);
        let committed = store.commit(appending([append(&name, at(0), numbered(2))])).await.unwrap();
        for event in whole_stream(&*store, &name).await {
            assert_eq!(event.recorded_at.timestamp_subsec_nanos() % 1_000, 0);
            assert!(committed.recorded_at.is_none_or(|said| said == event.recorded_at), "{committed:?}");
            // The store's clock is the clock of this machine.
            assert!(before < event.recorded_at && event.recorded_at < before + TimeDelta::minutes(2));
        }
    }
}
