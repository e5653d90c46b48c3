use std::{io, path::PathBuf};

/// The input as a whole cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// It is not there, may not be read, or broke off while it was read. Nothing was made of its unread rest.
    #[error("{}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A directory, a pipe or a device. The input is read more than once, so it must be a regular file.
    #[error("{} is not a regular file; the input is read more than once", path.display())]
    NotAFile {
        /// The path given.
        path: PathBuf,
    },
    /// Not even a header.
    #[error("{} is empty; its first line must name the columns {}", path.display(), super::columns::names())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The first line names too few columns, or one twice, or is no CSV.
    #[error("{}:{line}: {reason}; the first line must name the columns {}", path.display(), super::columns::names())]
    Header {
        /// The file.
        path: PathBuf,
        /// Where it stands: the first line that is not blank.
        line: u64,
        /// What is wrong.
        reason: String,
    },
    /// The file is not what it was when it was opened. Start again when nobody writes to it.
    #[error("{} changed while it was in use", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

/// A row that no invoice can be made of. Its whole invoice is left out; the rows after it are read on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {reason}", file.display())]
pub struct RowError {
    /// The file, as it was given.
    pub file: PathBuf,
    /// The physical line the row starts on; the header is line 1.
    pub line: u64,
    /// What is wrong, for a person.
    pub reason: String,
}

/// What a reader meets instead of an invoice.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// One row is wrong: report it and go on.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The input broke off: it was the last item, and what was read of the open invoice is dropped.
    #[error(transparent)]
    Input(#[from] InputError),
}
