use std::{io, path::PathBuf};

/// An error that makes the whole input unusable.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The file does not exist, access to it is denied, or reading it failed. The part that was not read has no effect.
    #[error("{}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The path is a directory, a pipe or a device. The input is read more than once, so it must be a regular file.
    #[error("{} is not a regular file; the input is read more than once", path.display())]
    NotAFile {
        /// The path as given.
        path: PathBuf,
    },
    /// The file has no header.
    #[error("{} is empty; its first line must name the columns {}", path.display(), super::columns::names())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The header lacks columns, names a column twice, or is not CSV.
    #[error("{}:{line}: {reason}; the first line must name the columns {}", path.display(), super::columns::names())]
    Header {
        /// The file.
        path: PathBuf,
        /// The line of the header: the first line that is not blank.
        line: u64,
        /// What is wrong.
        reason: String,
    },
    /// The file changed after it was opened. Start again once no other program writes to the file.
    #[error("{} changed while it was in use", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

/// An error in a row, which therefore cannot become part of an invoice. The whole invoice of the row is left out, and
/// reading continues after that invoice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {reason}", file.display())]
pub struct RowError {
    /// The file, as named by the caller.
    pub file: PathBuf,
    /// The physical line on which the row starts; the header is line 1.
    pub line: u64,
    /// What is wrong, in words for a person.
    pub reason: String,
}

/// The error that a reader returns in place of an invoice.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// One row is wrong: report it and continue.
    #[error(transparent)]
    Row(#[from] RowError),
    /// Reading the input failed. This error is the last item, and the unfinished invoice is dropped.
    #[error(transparent)]
    Input(#[from] InputError),
}
