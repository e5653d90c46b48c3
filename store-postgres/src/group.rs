//! Decides the outcomes of a group of commits in memory, one commit after another, from the versions of streams and
//! documents. At first the versions are guesses: the writer assumes the versions that the commits expect. The database
//! checks each guess, so a group takes one round trip, or two if a guess was wrong.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use annals::{Append, Commit, CommitError, Committed, DocumentKey, Expected, Position, Put, StreamId, Version};
use chrono::{DateTime, Utc};
use uuid::Uuid;

/// A commit in the form in which the writer receives it. The caller prepares as much of the commit as possible, because
/// callers run in parallel, and the writer does not.
pub(crate) struct Prepared {
    appends: Vec<PreparedAppend>,
    puts: Vec<Put>,
    /// The number of rows that the commit adds to a group.
    pub(crate) rows: usize,
    /// The number of payload bytes that the commit adds to a group.
    pub(crate) bytes: usize,
    /// The number of the history when the commit was submitted.
    pub(crate) history: u64,
}

struct PreparedAppend {
    stream: StreamId,
    expected: Expected,
    events: Vec<EventText>,
}

/// The columns of an event that do not depend on its place in the log.
pub(crate) struct EventText {
    pub(crate) id: Uuid,
    pub(crate) type_name: Cow<'static, str>,
    pub(crate) schema_version: i32,
    pub(crate) data: String,
    pub(crate) metadata: String,
}

impl Prepared {
    pub(crate) fn new(commit: Commit, history: u64) -> Self {
        let rows = commit.rows();
        let appended = commit.appends.iter().flat_map(|append| &append.events).map(|event| event.data.len());
        let put = commit.puts.iter().filter_map(|put| put.body.as_ref()).map(|body| body.len());
        let bytes = appended.chain(put).sum();
        let appends = commit.appends.into_iter().map(PreparedAppend::from).collect();
        Self { appends, puts: commit.puts, rows, bytes, history }
    }
}

impl From<Append> for PreparedAppend {
    fn from(append: Append) -> Self {
        let text = |event: annals::NewEvent| EventText {
            id: event.id,
            type_name: event.type_name,
            schema_version: event.schema_version,
            data: event.data,
            metadata: event.metadata.to_json(),
        };
        Self { stream: append.stream, expected: append.expected, events: append.events.into_iter().map(text).collect() }
    }
}

/// The current versions of a group's streams and documents, in the order of [`GroupPlan::streams`] and
/// [`GroupPlan::documents`].
#[derive(Clone, Debug)]
pub(crate) struct Versions {
    pub(crate) streams: Vec<i64>,
    /// The ids of the last events of the streams.
    pub(crate) events: Vec<Option<Uuid>>,
    pub(crate) documents: Vec<i64>,
}

/// The plan for a group: the outcome of each commit, and the rows to write.
pub(crate) struct GroupPlan<'g> {
    /// The streams of the group, each once, in byte order.
    pub(crate) streams: Vec<StreamState<'g>>,
    /// The documents of the group, each once, in byte order.
    pub(crate) documents: Vec<DocumentState<'g>>,
    /// The events of the group, in byte order of their streams.
    pub(crate) events: Vec<EventRow<'g>>,
    /// Whether the plan is based on known versions instead of guesses.
    known: bool,
    outcomes: Vec<Result<Placed, CommitError>>,
}

pub(crate) struct StreamState<'g> {
    pub(crate) id: &'g StreamId,
    /// The stream's version before the group; `None` accepts any version.
    pub(crate) base: Option<i64>,
    /// The id of the event at the version `base`; `None` accepts any event, or no event.
    pub(crate) event: Option<Uuid>,
    /// The id of the last event that the group has appended.
    appended: Option<Uuid>,
    steps: i64,
    /// Whether a write depends on the version of this stream.
    relied_on: bool,
}

impl StreamState<'_> {
    /// Returns how the group locks the stream. `Some(true)`: the group relies on the stream without writing to it, so
    /// no other process may write to the stream until this group is written. `Some(false)`: the group itself writes to
    /// the stream, and waits only for processes that rely on the stream without writing to it. `None`: the group does
    /// not lock the stream, because no write depends on it; a commit that writes nothing is valid at the moment of its
    /// read.
    pub(crate) fn held(&self) -> Option<bool> {
        match self.steps {
            0 => self.relied_on.then_some(true),
            _ => Some(false),
        }
    }
}

pub(crate) struct DocumentState<'g> {
    pub(crate) key: &'g DocumentKey,
    /// The document's version before the group; `None` accepts any version.
    pub(crate) base: Option<i64>,
    /// Whether the group removes the document. The versions of the document then start again at 1.
    pub(crate) fresh: bool,
    pub(crate) steps: i64,
    /// The last put that takes effect.
    pub(crate) put: Option<&'g Put>,
}

pub(crate) struct EventRow<'g> {
    /// The number of the event within the group, in log order, starting at 1.
    pub(crate) rank: usize,
    /// The index of the stream.
    pub(crate) stream: usize,
    /// The difference between the event's version and the stream's version before the group.
    pub(crate) step: i64,
    pub(crate) text: &'g EventText,
}

/// A commit that succeeds: the rank of its last event, and the versions of its streams.
struct Placed {
    rank: Option<usize>,
    /// The number of events in the commit; their ranks are consecutive.
    events: usize,
    versions: Vec<(usize, i64)>,
}

/// Guesses the version before the group: the version from which `steps` more events lead to `expected`. If no version
/// can meet the expectation, the guess is 0; if 0 is right, the conflict is found without another round trip.
fn guess(expected: i64, steps: i64) -> i64 {
    expected.checked_sub(steps).filter(|base| (0..i64::MAX / 2).contains(base)).unwrap_or(0)
}

impl<'g> GroupPlan<'g> {
    /// Decides the outcomes from the known versions, or from guesses if `known` is `None`.
    pub(crate) fn new(group: &'g [Prepared], known: Option<&Versions>) -> Self {
        let mut streams: Vec<_> =
            group.iter().flat_map(|commit| &commit.appends).map(|append| &append.stream).collect();
        streams.sort_unstable_by_key(|stream| stream.as_str());
        streams.dedup();
        let mut documents: Vec<_> = group.iter().flat_map(|commit| &commit.puts).map(|put| &put.key).collect();
        documents.sort_unstable_by_key(|key| (&*key.collection, &*key.id));
        documents.dedup();
        let stream_indexes: HashMap<_, _> = streams.iter().copied().zip(0..).collect();
        let document_indexes: HashMap<_, _> = documents.iter().copied().zip(0..).collect();
        let mut plan = Self {
            streams: streams
                .into_iter()
                .enumerate()
                .map(|(n, id)| StreamState {
                    id,
                    base: known.map(|known| known.streams[n]),
                    event: known.and_then(|known| known.events[n]),
                    appended: None,
                    steps: 0,
                    relied_on: false,
                })
                .collect(),
            documents: documents
                .into_iter()
                .enumerate()
                .map(|(n, key)| {
                    let base = known.map(|known| known.documents[n]);
                    DocumentState { key, base, fresh: false, steps: 0, put: None }
                })
                .collect(),
            events: Vec::with_capacity(group.iter().map(|commit| commit.rows).sum()),
            known: known.is_some(),
            outcomes: Vec::with_capacity(group.len()),
        };
        for commit in group {
            let outcome = plan.decide(commit, &stream_indexes, &document_indexes);
            plan.outcomes.push(outcome);
        }
        plan.events.sort_unstable_by_key(|event| (event.stream, event.step));
        plan
    }

    /// Returns the guessed versions of the streams if the group contains only appends and there is a guess for every
    /// stream.
    pub(crate) fn only_appends(&self) -> Option<Vec<i64>> {
        let appends = self.documents.is_empty() && !self.events.is_empty();
        let base = |stream: &StreamState<'_>| {
            stream.base.filter(|base| {
                *base < i64::MAX / 2 && stream.held() != Some(true) && !(*base == 0 && stream.event.is_some())
            })
        };
        let bases = || self.streams.iter().map(base).collect();
        appends.then(bases).flatten()
    }

    /// Adds the whole commit to the group, or nothing of it.
    fn decide(
        &mut self,
        commit: &'g Prepared,
        streams: &HashMap<&'g StreamId, usize>,
        documents: &HashMap<&'g DocumentKey, usize>,
    ) -> Result<Placed, CommitError> {
        for append in &commit.appends {
            let state = &mut self.streams[streams[&append.stream]];
            let Some(expected) = append.expected.version() else { continue };
            let before = *state.base.get_or_insert_with(|| guess(expected.0, state.steps));
            // While the event at this version is not known, the guess is the event that the commit expects.
            if !self.known && state.steps == 0 && before == expected.0 {
                state.event = state.event.or(append.expected.event());
            }
            let last = state.appended.or(state.event);
            append.expected.check(&append.stream, Version(before + state.steps), last)?;
        }
        for put in &commit.puts {
            let state = &mut self.documents[documents[&put.key]];
            if let Some(expected) = put.expected {
                let before =
                    if state.fresh { 0 } else { *state.base.get_or_insert_with(|| guess(expected, state.steps)) };
                put.check(before + state.steps)?;
            }
        }

        let mut placed = Placed { rank: None, events: 0, versions: Vec::with_capacity(commit.appends.len()) };
        for append in &commit.appends {
            let stream = streams[&append.stream];
            let state = &mut self.streams[stream];
            state.relied_on |= commit.rows > 0 && append.expected != Expected::Any;
            for text in &append.events {
                state.steps += 1;
                state.appended = Some(text.id);
                let rank = self.events.len() + 1;
                self.events.push(EventRow { rank, stream, step: state.steps, text });
                placed.rank = Some(rank);
                placed.events += 1;
            }
            placed.versions.push((stream, state.steps));
        }
        for put in &commit.puts {
            let state = &mut self.documents[documents[&put.key]];
            match put.body {
                Some(_) => state.steps += 1,
                None => (state.fresh, state.steps) = (true, 0),
            }
            state.put = Some(put);
        }
        Ok(placed)
    }

    /// Returns the id of the last event in log order.
    pub(crate) fn last_event(&self) -> Option<Uuid> {
        self.events.iter().max_by_key(|event| event.rank).map(|event| event.text.id)
    }

    /// Returns the outcome of each commit after the group was written.
    pub(crate) fn outcomes(self, written: &Written, versions: &Versions) -> Vec<Result<Committed, CommitError>> {
        let version = |(stream, steps): &(usize, i64)| Version(versions.streams[*stream] + steps);
        let committed = |placed: Placed| Committed {
            position: placed.rank.map_or(Position::START, |rank| written.position(rank)),
            versions: placed.versions.iter().map(version).collect(),
            recorded_at: placed.rank.filter(|rank| written.is_one_run(*rank, placed.events)).and(written.recorded_at),
        };
        self.outcomes.into_iter().map(|outcome| outcome.map(committed)).collect()
    }
}

/// The positions of a group's events, and the time of their recording.
pub(crate) struct Written {
    /// The positions in the order of the ranks.
    pub(crate) positions: Vec<i64>,
    /// The time of recording; `None` if there are no events, or if this process cannot represent the database's time.
    pub(crate) recorded_at: Option<DateTime<Utc>>,
}

impl Written {
    fn position(&self, rank: usize) -> Position {
        self.positions.get(rank - 1).map_or(Position::START, |position| Position(*position))
    }

    /// Returns whether the last `events` events up to a rank have consecutive positions. Other processes draw positions
    /// from the same sequence, so there may be gaps.
    fn is_one_run(&self, last_rank: usize, events: usize) -> bool {
        self.position(last_rank).0 - self.position(last_rank + 1 - events).0 == events as i64 - 1
    }
}

impl DocumentState<'_> {
    /// Returns the body to write; `None` removes the document.
    pub(crate) fn body(&self) -> Option<&Arc<str>> {
        self.put.and_then(|put| put.body.as_ref())
    }
}
