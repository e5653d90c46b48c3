//! The cached states that a unit of work must not use again.

use crate::{commit::CommitError, event::StreamId};

/// The cached states that an earlier attempt found outdated.
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

    /// Returns the streams to read again after this error. The first time, this is only the stream that the error
    /// names. After that, it is every stream.
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
