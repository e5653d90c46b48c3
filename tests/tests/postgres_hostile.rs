//! Values that are hard to store are either rejected before anything is written, or returned unchanged. Rows that were
//! inserted by hand stop no reader and no writer.
#![allow(clippy::unwrap_used)]

mod postgres;

use annals::{
    Append, Commit, CommitError, DocumentKey, EventStore, Expected, Metadata, NewEvent, Position, Put, Scan, StreamId,
    Version,
};
use uuid::Uuid;

use self::postgres::{Schema, append, whole_log};

fn of(stream: &str, data: &str) -> Commit {
    let event = NewEvent {
        id: Uuid::new_v4(),
        type_name: "odd.value".into(),
        schema_version: 1,
        data: data.into(),
        metadata: Metadata::of_request(Uuid::new_v4()),
    };
    let stream = StreamId::from_stored(stream);
    let expected = Expected::Any;
    Commit { appends: vec![Append { stream, expected, events: vec![event] }], puts: Vec::new() }
}

fn note(id: &str, body: &str) -> Commit {
    let key = DocumentKey::new("note", id);
    Commit { appends: Vec::new(), puts: vec![Put { key, expected: None, body: Some(body.into()), due: None }] }
}

/// The server only runs the check that rejects the commit. Nothing is stored, and no position is used up.
#[tokio::test(flavor = "multi_thread")]
async fn unreturnable_values_are_refused_before_anything_is_written() {
    let schema = Schema::new();
    let store = schema.store().await;
    let deep = format!("{}{}", "[".repeat(6_000), "]".repeat(6_000));
    let payloads = [r#"{"a":"\u0000"}"#, r#""\ud800""#, r#"{"\udfff":1}"#, r#""\ud83e\ud83e""#, &deep, "{", "NaN", ""];
    for payload in payloads {
        for commit in [of("odd-1", payload), note("1", payload)] {
            let outcome = store.commit(commit).await;
            assert!(matches!(outcome, Err(CommitError::Invalid(_))), "{payload:.50}: {outcome:?}");
        }
    }
    let long = format!("odd-{}", "x".repeat(6_000));
    for name in [&*long, "odd-two\nlines", "odd-nul\0", "odd-", "ODD-1"] {
        let outcome = store.commit(of(name, "{}")).await;
        assert!(matches!(outcome, Err(CommitError::Invalid(_))), "{name:.50}: {outcome:?}");
    }
    for id in ["nul\0", &*long] {
        let outcome = store.commit(note(id, "{}")).await;
        assert!(matches!(outcome, Err(CommitError::Invalid(_))), "{id:.50}: {outcome:?}");
    }
    let sql = "SELECT (SELECT count(*) FROM annals.events), (SELECT count(*) FROM annals.documents), annals.drawn()";
    let found: (i64, i64, i64) =
        sqlx::query_as(schema.sql(sql)).fetch_one(&mut schema.connection().await).await.unwrap();
    assert_eq!(found, (0, 0, 0));
}

/// The values come back byte for byte, through the store and through plain SQL.
#[tokio::test(flavor = "multi_thread")]
async fn odd_but_valid_values_round_trip() {
    let schema = Schema::new();
    let store = schema.store().await;
    let payloads = [
        "9007199254740993",
        "[1e400,-1e-400,1.10]",
        r#"{"a":1,"a":2,"":3}"#,
        r#" { "spaced" : [ ] } "#,
        r#""'; DROP TABLE events; -- %s %% $1 \\ \" \u00fc \ud83e\udd80""#,
        "\"\u{1f980}\u{202e}\u{feff}\"",
    ];
    let names = ["odd-it's", "odd-100%", "odd-a\"b", "odd-$1", "odd-\\n", "odd-\u{1f980}"];
    let mut outside = schema.connection().await;
    for (name, payload) in names.iter().zip(payloads) {
        store.commit(of(name, payload)).await.unwrap();
        store.commit(note(name, payload)).await.unwrap();
        let stream = StreamId::from_stored(name);
        let events = store.read_stream(&stream, Version::START, 10).await.unwrap();
        assert_eq!((events.len(), &*events[0].data), (1, payload), "{name}");
        let document = store.documents(&[DocumentKey::new("note", *name)]).await.unwrap().remove(0).unwrap();
        assert_eq!(&*document.body, payload);
        let sql = "SELECT e.data::text, d.body::text FROM annals.events AS e, annals.documents AS d
                    WHERE e.stream_id = $1 AND d.collection = 'note' AND d.id = $1";
        let found: (String, String) = sqlx::query_as(schema.sql(sql)).bind(name).fetch_one(&mut outside).await.unwrap();
        assert_eq!(found, (payload.to_owned(), payload.to_owned()));
    }
    assert_eq!(whole_log(&store).await.len(), names.len());
    assert_eq!(store.scan("note", &Scan::After("".into()), 100).await.unwrap().len(), names.len());
}

/// `psql` can insert any value that the columns accept. A reader of the log must get past such rows.
#[tokio::test(flavor = "multi_thread")]
async fn rows_inserted_by_hand_block_no_reader_or_writer() {
    let schema = Schema::new();
    let store = schema.store().await;
    store.commit(append("before-1", 0, 1)).await.unwrap();
    let mut outside = schema.connection().await;
    let insert = "INSERT INTO annals.events
                  (stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
                  VALUES ($1, $2, gen_random_uuid(), $3, $4, $5::text::json, $6::text::json, $7::text::timestamptz)";
    let deep = format!("{}{}", "[".repeat(5_000), "]".repeat(5_000));
    let long = format!("long-{}", "x".repeat(2_000));
    let rows = [
        ("NoName", 1, "", i32::MIN, r#""\u0000""#, "[]", "infinity"),
        ("", 7, "by hand\n", -1, r#""\ud800""#, r#"{"correlation_id":7}"#, "-infinity"),
        ("gap-1", i64::MAX, "by.hand", i32::MAX, &deep, "null", "4714-11-24 BC"),
        (&*long, 1, "by.hand", 0, "1e400", r#"{"traceparent":"\u0000"}"#, "294276-12-31"),
    ];
    for (stream, version, name, schema_version, data, metadata, recorded_at) in rows {
        let query = sqlx::query(schema.sql(insert)).bind(stream).bind(version).bind(name).bind(schema_version);
        query.bind(data).bind(metadata).bind(recorded_at).execute(&mut outside).await.unwrap();
    }
    let by_hand = "INSERT INTO annals.events (position, stream_id, version, event_id, type, schema_version, data)
                   VALUES (9223372036854775807, 'last-1', 1, gen_random_uuid(), 'by.hand', 1, '{}')";
    sqlx::query(schema.sql(by_hand)).execute(&mut outside).await.unwrap();
    store.commit(append("after-1", 0, 1)).await.unwrap();
    assert_eq!(store.status().await.unwrap().head, Position(6));

    for store in [store.clone(), schema.store().await] {
        let log = whole_log(&store).await;
        let names: Vec<_> = log.iter().map(|event| event.stream.as_str().to_owned()).collect();
        assert_eq!(names, ["before-1", "NoName", "", "gap-1", &long, "after-1"]);
        // The row at the last possible position does not count. Failed attempts may have used up a few positions.
        let head = store.status().await.unwrap().head;
        assert!((Position(6)..Position(100)).contains(&head), "{head:?}");
        assert_eq!(&*log[3].data, deep);
        let full = store.commit(append("gap-1", i64::MAX, 1)).await;
        assert!(matches!(full, Err(CommitError::Unavailable(_) | CommitError::Invalid(_))), "{full:?}");
        let stream = StreamId::from_stored("gap-1");
        assert_eq!(store.read_stream(&stream, Version::START, 10).await.unwrap().len(), 1);
    }
    // An unreadable row does not stop later writes.
    let last = store.commit(append("after-1", 1, 1)).await.unwrap().position;
    assert_eq!(whole_log(&store).await.last().unwrap().position, last);
}
