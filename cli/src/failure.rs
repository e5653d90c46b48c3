//! The ways in which a command ends.

use std::io::ErrorKind;

use annals::{CommitError, StoreError, operator::OperatorError};

/// The result of a command that ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    /// The command found a fault that an operator should look at.
    Fault,
    /// The command was stopped before its end.
    Stopped,
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The text to print.
    Told(String),
    /// The reader of the output closed the pipe, as `head` does. This is not an error.
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

/// For errors while writing the output only. An error about any other file has to name the file.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Told(format!("the output could not be written: {error}")),
        }
    }
}
