//! What a unit of work must not take from a cache again.

use crate::{commit::CommitError, event::StreamId};

/// Which cached states were proven outdated by an earlier attempt.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Stale {
    #[default]
    Nothing,
    Streams(Vec<StreamId>),
    Everything,
}

impl Stale {
    pub fn has(&self, stream: &StreamId) -> bool {
        match self {
            Self::Nothing => false,
            Self::Streams(streams) => streams.contains(stream),
            Self::Everything => true,
        }
    }

    /// What to read anew after this error: first only the stream it names, then everything.
    pub fn after(self, error: &CommitError) -> Self {
        match (self, error) {
            (Self::Nothing, CommitError::Conflict { stream, .. }) => Self::Streams(vec![stream.clone()]),
            (Self::Streams(mut streams), CommitError::Conflict { stream, .. }) if streams.len() < 4 => {
                streams.push(stream.clone());
                Self::Streams(streams)
            }
            _ => Self::Everything,
        }
    }
}
