//! The contract of [`EventStore`], as tests.
//!
//! ```
//! use std::sync::Arc;
//!
//! use annals::{EventStore, MemoryStore};
//! use annals_conformance::store::StoreUnderTest;
//!
//! struct Memory(Arc<MemoryStore>);
//!
//! impl StoreUnderTest for Memory {
//!     async fn fresh() -> Self {
//!         Self(Arc::new(MemoryStore::new()))
//!     }
//!     fn store(&self) -> Arc<dyn EventStore> {
//!         self.0.clone()
//!     }
//! }
//!
//! annals_conformance::store::suite!(Memory);
//! # fn main() {}
//! ```
//!
//! A store whose contents outlive the process also implements [`Durable`], and is tested with `suite!(Sqlite,
//! durable)`. The word `durable` adds tests; no test is ever skipped.

// A property that does not hold panics, and so the test fails.
#![allow(clippy::unwrap_used)]

use std::{future::Future, sync::Arc, time::Duration};

use annals::{
    Append, Commit, CommitError, DocumentKey, EventStore, Expected, LogQuery, Metadata, NewEvent, Position, Put,
    Recorded, StreamId, Version,
};
use uuid::Uuid;

pub mod append;
pub mod concurrency;
pub mod documents;
pub mod durability;
pub mod log;
pub mod refusal;

pub use crate::__store_suite as suite;

/// The longest time that a property may take on a slow and busy machine. A property that hangs fails.
const PROPERTY_SECONDS_MAX: u64 = 120;
/// The limit for a step that should happen at once.
pub(crate) const PROMPTLY: Duration = Duration::from_secs(10);

/// Creates stores to test.
pub trait StoreUnderTest: Sized + Send + Sync + 'static {
    /// Creates an empty store that no other test can reach.
    fn fresh() -> impl Future<Output = Self> + Send;
    /// Returns the store.
    fn store(&self) -> Arc<dyn EventStore>;
}

/// A store whose contents outlive the process.
pub trait Durable: StoreUnderTest {
    /// Closes the store and opens it again.
    fn reopen(self) -> impl Future<Output = Self> + Send;
}

/// Runs a property to its end, for [`suite!`].
pub fn run(property: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        let bound = Duration::from_secs(PROPERTY_SECONDS_MAX);
        tokio::time::timeout(bound, property).await.expect("the property must come to an end");
    });
}

/// Generates a test for each property of a store: `suite!(Factory)`, or `suite!(Factory, durable)` for a [`Durable`]
/// store.
#[doc(hidden)]
#[macro_export]
macro_rules! __store_suite {
    ($factory:ty, durable) => {
        $crate::store::suite!($factory);
        $crate::__store_properties! { $factory;
            durability: everything_survives_reopening;
            durability: writes_continue_after_reopening;
            durability: refused_commit_is_absent_after_reopening;
        }
    };
    ($factory:ty) => {
        $crate::__store_properties! { $factory;
            append: events_round_trip;
            append: payloads_round_trip_byte_for_byte;
            append: versions_are_dense_and_positions_rise;
            append: commit_succeeds_only_at_the_expected_version;
            append: commit_without_expected_version_succeeds_at_any_version;
            append: a_commit_spans_streams;
            append: conflict_leaves_nothing_of_the_commit;
            append: empty_commit_succeeds;
            append: an_append_without_events_only_checks;
            append: expected_event_is_compared_by_its_id;
            append: stream_is_read_after_a_version_up_to_a_limit;
            append: streams_with_similar_names_are_separate;
            append: commit_can_be_as_large_as_the_limit;
            append: the_clock_does_not_go_back;
            append: the_time_of_recording_is_kept_to_the_microsecond;
            refusal: duplicate_streams_and_documents_are_refused;
            refusal: invalid_names_are_refused;
            refusal: oversized_data_is_refused;
            refusal: times_before_the_calendar_are_refused;
            refusal: unreadable_payloads_are_refused;
            documents: versions_rise_with_each_put;
            documents: put_succeeds_only_at_the_expected_version;
            documents: a_removed_document_counts_as_version_0;
            documents: documents_are_returned_in_the_order_of_the_keys;
            documents: bodies_round_trip_byte_for_byte;
            documents: scan_returns_byte_order;
            documents: scan_returns_due_documents;
            documents: due_follows_the_last_put;
            documents: due_is_kept_to_the_microsecond;
            documents: unstorable_names_are_absent;
            documents: documents_become_visible_with_the_events_of_their_commit;
            log: pages_follow_each_other_in_order;
            log: query_skips_other_events_and_advances;
            log: page_reports_whether_it_is_the_last;
            log: caught_up_reader_keeps_its_position;
            log: far_position_has_no_events_after_it;
            log: wait_returns_at_once_if_there_are_more_events;
            log: wait_ends_with_the_next_commit;
            log: a_tailing_reader_sees_every_event_once_and_in_order;
            log: the_head_is_the_last_event;
            concurrency: one_of_many_writers_at_one_version_wins;
            concurrency: commit_returns_the_positions_of_its_events;
            concurrency: conflict_fails_only_its_own_commit;
            concurrency: concurrent_increments_lose_nothing;
            concurrency: one_of_two_commits_relying_on_absence_succeeds;
            concurrency: dropped_commits_are_complete_or_absent;
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __store_properties {
    ($factory:ty; $($area:ident: $property:ident;)*) => {
        $(
            #[test]
            fn $property() {
                $crate::store::run($crate::store::$area::$property::<$factory>());
            }
        )*
    };
}

pub(crate) fn stream(name: &str) -> StreamId {
    StreamId::parse(name).unwrap()
}

pub(crate) fn event(type_name: &'static str, data: impl Into<String>) -> NewEvent {
    NewEvent {
        id: Uuid::new_v4(),
        type_name: type_name.into(),
        schema_version: 1,
        data: data.into(),
        metadata: Metadata::of_request(Uuid::new_v4()),
    }
}

/// Returns events numbered from 1.
pub(crate) fn numbered(count: usize) -> Vec<NewEvent> {
    (1..=count).map(|number| event("thing.happened", format!(r#"{{"number":{number}}}"#))).collect()
}

pub(crate) fn at(version: i64) -> Expected {
    Expected::Version(Version(version))
}

pub(crate) fn append(name: &str, expected: Expected, events: Vec<NewEvent>) -> Append {
    Append { stream: stream(name), expected, events }
}

pub(crate) fn appending(appends: impl IntoIterator<Item = Append>) -> Commit {
    Commit { appends: appends.into_iter().collect(), puts: Vec::new() }
}

pub(crate) fn key(collection: &str, id: &str) -> DocumentKey {
    DocumentKey::new(collection, id)
}

/// Puts a document, or removes the document if `body` is `None`.
pub(crate) fn put(key: &DocumentKey, expected: Option<i64>, body: Option<&str>) -> Put {
    Put { key: key.clone(), expected, body: body.map(Into::into), due: None }
}

pub(crate) fn putting(puts: impl IntoIterator<Item = Put>) -> Commit {
    Commit { appends: Vec::new(), puts: puts.into_iter().collect() }
}

/// Reads the whole log, in small pages.
pub(crate) async fn whole_log(store: &dyn EventStore) -> Vec<Arc<Recorded>> {
    let mut all = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(&LogQuery::all(), after, 100).await.unwrap();
        if page.next == after {
            return all;
        }
        after = page.next;
        all.extend(page.events);
    }
}

pub(crate) async fn whole_stream(store: &dyn EventStore, name: &str) -> Vec<Recorded> {
    store.read_stream(&StreamId::from_stored(name), Version::START, 100_000).await.unwrap()
}

/// Asserts that the store holds neither events nor these documents.
pub(crate) async fn assert_empty(store: &dyn EventStore, documents: &[DocumentKey]) {
    assert_eq!(store.status().await.unwrap().head, Position::START);
    assert!(whole_log(store).await.is_empty());
    assert!(store.documents(documents).await.unwrap().iter().all(Option::is_none));
}

pub(crate) fn assert_conflict(outcome: Result<annals::Committed, CommitError>, name: &str, wanted: i64, found: i64) {
    match outcome {
        Err(CommitError::Conflict { stream, expected, actual }) => {
            assert_eq!((stream.as_str(), expected, actual), (name, Version(wanted), Version(found)));
        }
        other => panic!("a conflict on {name} was due, not {other:?}"),
    }
}

pub(crate) fn assert_document_conflict(
    outcome: Result<annals::Committed, CommitError>,
    wanted_key: &DocumentKey,
    wanted: i64,
    found: i64,
) {
    match outcome {
        Err(CommitError::DocumentConflict { key, expected, actual }) => {
            assert_eq!((&key, expected, actual), (wanted_key, wanted, found));
        }
        other => panic!("a conflict on document {wanted_key} was due, not {other:?}"),
    }
}
