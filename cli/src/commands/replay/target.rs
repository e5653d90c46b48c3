//! The targets of a replay.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use annals::{Recorded, archive::line::write_line};

use super::{handler::HandlerTarget, topic::TopicTarget};
use crate::{failure::Failure, output::Output};

pub(super) enum Target<'a> {
    /// Only counts events.
    Nowhere,
    Output(&'a mut Output),
    File(Box<FileTarget>),
    Topic(Box<TopicTarget>),
    Handler(HandlerTarget),
}

impl Target<'_> {
    /// Opens a new file, or appends to an existing one.
    pub fn file(path: &Path, append: bool) -> Result<Self, Failure> {
        let mut options = OpenOptions::new();
        if append {
            options.append(true)
        } else {
            options.write(true).create_new(true)
        };
        match options.open(path) {
            Ok(file) => FileTarget::of(path, file)
                .map(|file| Self::File(Box::new(file)))
                .map_err(|error| unwritable(path, &error)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Failure::new(format!("{} exists already: name another file, or add --append", path.display())))
            }
            Err(error) => Err(unwritable(path, &error)),
        }
    }

    /// Passes an event to the target.
    pub async fn take(&mut self, event: &Arc<Recorded>) -> Result<(), Failure> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Output(_) | Self::File(..) => {
                let mut line = Vec::new();
                write_line(&(&**event).into(), false, &mut line);
                self.take_lines(&line)
            }
            Self::Topic(topic) => topic.take(event).await,
            Self::Handler(rerun) => rerun.take(event).await,
        }
    }

    /// Returns whether the target also accepts lines.
    pub fn takes_lines(&self) -> bool {
        matches!(self, Self::Nowhere | Self::Output(_) | Self::File(..))
    }

    pub fn take_lines(&mut self, lines: &[u8]) -> Result<(), Failure> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Output(output) => output.lines(lines),
            Self::File(file) => file.write(lines),
            Self::Topic(_) | Self::Handler(_) => Err(Failure::new("this target takes events one by one")),
        }
    }

    /// The position up to which a relay has sent everything to the target, if a relay sends to it.
    pub fn sent(&self) -> Option<i64> {
        match self {
            Self::Topic(topic) => topic.sent(),
            _ => None,
        }
    }

    /// Waits until every event that was passed to the target has arrived.
    pub async fn commit(&mut self) -> Result<(), Failure> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Output(output) => output.flush(),
            Self::File(_) => Ok(()),
            Self::Topic(topic) => topic.commit().await,
            // Each event is its own commit.
            Self::Handler(_) => Ok(()),
        }
    }

    /// Stops accepting events. Waits a moment, because events that were already passed to the target may still arrive.
    pub async fn give_up(&mut self) -> Result<(), Failure> {
        match self {
            Self::Topic(topic) => {
                topic.give_up().await;
                Ok(())
            }
            other => other.commit().await,
        }
    }

    /// The events that were passed to the target but may not have arrived: the position before the first of these
    /// events, and their number.
    pub fn unacknowledged(&self) -> Option<(i64, i64)> {
        match self {
            Self::Topic(topic) => topic.unacknowledged(),
            Self::Handler(rerun) => rerun.under_way.map(|position| (position - 1, 1)),
            _ => None,
        }
    }
}

/// A file that contains only whole lines, even if the disk fails or is full.
pub(super) struct FileTarget {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl FileTarget {
    fn of(path: &Path, file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// Writes all of the lines or none.
    fn write(&mut self, lines: &[u8]) -> Result<(), Failure> {
        let written = self.file.write_all(lines);
        written.map_err(|error| match self.file.set_len(self.bytes) {
            Ok(()) => unwritable(&self.path, &error),
            Err(other) => Failure::new(format!(
                "{} cannot be written: {error}; the file cannot be truncated to its last whole line, at byte {}: {other}",
                self.path.display(),
                self.bytes
            )),
        })?;
        self.bytes += lines.len() as u64;
        Ok(())
    }
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("{} cannot be written: {error}", path.display()))
}
