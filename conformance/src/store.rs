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
//! A store that outlives its process also implements [`Durable`], and declares that with `suite!(Sqlite, durable)`. The
//! declaration adds tests; no test is ever skipped.

// If a property does not hold, it panics, which fails the test.
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

/// A store that outlives its process.
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
            durability: everything_is_there_after_reopening;
            durability: writing_goes_on_after_reopening;
            durability: what_was_refused_is_not_there_after_reopening;
        }
    };
    ($factory:ty) => {
        $crate::__store_properties! { $factory;
            append: events_come_back_as_they_were_given;
            append: payloads_come_back_byte_for_byte;
            append: versions_are_dense_and_positions_rise;
            append: a_commit_holds_only_at_the_expected_version;
            append: any_version_will_do_where_none_is_expected;
            append: a_commit_spans_streams;
            append: one_conflict_leaves_nothing_of_the_commit;
            append: an_empty_commit_holds;
            append: an_append_without_events_only_checks;
            append: an_event_that_is_expected_is_compared_by_its_id;
            append: a_stream_is_read_after_a_version_up_to_a_limit;
            append: streams_with_like_names_are_apart;
            append: a_commit_may_be_as_large_as_the_limit;
            append: the_clock_does_not_go_back;
            append: the_time_of_recording_is_kept_to_the_microsecond;
            refusal: twins_are_refused;
            refusal: names_that_are_none_are_refused;
            refusal: what_is_too_large_is_refused;
            refusal: times_before_the_calendar_are_refused;
            refusal: payloads_that_no_reader_takes_are_refused;
            documents: versions_rise_with_each_put;
            documents: a_put_holds_only_at_the_expected_version;
            documents: a_removed_document_counts_as_version_0;
            documents: they_come_in_the_order_of_the_keys;
            documents: bodies_come_back_byte_for_byte;
            documents: scanned_in_byte_order;
            documents: scanned_by_what_is_due;
            documents: due_follows_the_last_put;
            documents: due_is_kept_to_the_microsecond;
            documents: names_that_no_store_can_hold_are_absent;
            documents: they_become_visible_with_the_events_of_their_commit;
            log: pages_follow_each_other_in_order;
            log: a_query_leaves_out_and_goes_past;
            log: a_page_that_is_not_the_last_says_so;
            log: a_reader_that_caught_up_stays_where_it_is;
            log: a_far_position_has_nothing_after_it;
            log: waiting_ends_at_once_when_there_is_more;
            log: waiting_ends_with_the_next_commit;
            log: a_tailing_reader_sees_every_event_once_and_in_order;
            log: the_head_is_the_last_event;
            concurrency: of_many_writers_at_one_version_one_wins;
            concurrency: a_commit_tells_where_its_events_stand;
            concurrency: conflicts_fail_alone;
            concurrency: counting_up_loses_nothing;
            concurrency: of_two_that_rely_on_absence_one_holds;
            concurrency: dropped_commits_are_whole_or_not_there;
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
    let (mut all, mut after) = (Vec::new(), Position::START);
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
