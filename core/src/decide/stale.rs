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

    /// Returns the cached states to avoid after this error. Each of the first four conflicts adds only the stream that
    /// the error names. After a fifth conflict, or after any other error, no cached state is used.
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
