//! How a command ends.

use std::io::ErrorKind;

use annals::{CommitError, StoreError, operator::OperatorError};

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    /// Something that a person has to look at.
    Fault,
    /// Somebody wanted it to end before it had.
    Stopped,
}

/// Why a command did not do what it was asked for.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What to tell.
    Told(String),
    /// Whoever read the output has gone, as `head` does: no reason to complain.
    OutputClosed,
}

impl Failure {
    pub fn new(text: impl Into<String>) -> Self {
        Self::Told(text.into())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Told(error.to_string())
    }
}

impl From<CommitError> for Failure {
    fn from(error: CommitError) -> Self {
        Self::Told(error.to_string())
    }
}

impl From<OperatorError> for Failure {
    fn from(error: OperatorError) -> Self {
        Self::Told(error.to_string())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::Told(error.to_string())
    }
}

/// Of writing the output; what else is read or written says which file it is.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Told(format!("the output could not be written: {error}")),
        }
    }
}
