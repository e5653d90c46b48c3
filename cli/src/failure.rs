//! The ways in which a command ends.

use std::io::ErrorKind;

use annals::{BusError, CommitError, StoreError, event::DecodeError, operator::OperatorError};

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
    Message(String),
    /// The reader of the output closed the pipe, as `head` does. This is not an error.
    OutputClosed,
}

impl Failure {
    pub fn new(text: impl Into<String>) -> Self {
        Self::Message(text.into())
    }

    /// Returns the failure for an error of a temporary file.
    pub fn temporary_file(error: std::io::Error) -> Self {
        Self::Message(format!("a temporary file cannot be used: {error}; set TMPDIR to a folder with free space"))
    }
}

/// Conversions of errors whose own messages name the subject, the reason and the remedy.
macro_rules! messages {
    ($($error:ty),+) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Message(error.to_string())
            }
        }
    )+};
}

messages!(BusError, CommitError, DecodeError, OperatorError, StoreError, serde_json::Error);

/// Use this conversion only for errors while writing the output. An error about any other file has to name the file.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Message(format!("the output cannot be written: {error}")),
        }
    }
}
