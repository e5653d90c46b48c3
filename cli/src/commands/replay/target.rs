//! Where a replay goes. A topic of a bus is one more of these: `take` publishes, `commit` waits for the receipts.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use annals::Recorded;

use crate::{event::write_line, failure::Failure, output::Output};

pub(super) enum Target<'a> {
    /// Events are only counted.
    Nowhere,
    Output(&'a mut Output),
    File(PathBuf, BufWriter<File>),
}

impl Target<'_> {
    /// A new file, or what is there already.
    pub fn file(path: &Path, append: bool) -> Result<Self, Failure> {
        let mut options = OpenOptions::new();
        if append {
            options.append(true)
        } else {
            options.write(true).create_new(true)
        };
        match options.open(path) {
            Ok(file) => Ok(Self::File(path.to_owned(), BufWriter::with_capacity(1 << 20, file))),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Failure::new(format!("{} exists already: name another file, or --append to it", path.display())))
            }
            Err(error) => Err(unwritable(path, &error)),
        }
    }

    /// Hands an event over.
    pub async fn take(&mut self, event: &Recorded) -> Result<(), Failure> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Output(_) | Self::File(..) => {
                let mut line = Vec::new();
                write_line(&event.into(), false, &mut line);
                self.take_lines(&line)
            }
        }
    }

    /// Whether lines can be handed over as well, as they are.
    pub fn takes_lines(&self) -> bool {
        matches!(self, Self::Nowhere | Self::Output(_) | Self::File(..))
    }

    pub fn take_lines(&mut self, lines: &[u8]) -> Result<(), Failure> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Output(output) => output.lines(lines),
            Self::File(path, file) => file.write_all(lines).map_err(|error| unwritable(path, &error)),
        }
    }

    /// Resolves once everything that was handed over is there.
    pub async fn commit(&mut self) -> Result<(), Failure> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Output(output) => output.flush(),
            Self::File(path, file) => file.flush().map_err(|error| unwritable(path, &error)),
        }
    }
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("{} cannot be written: {error}", path.display()))
}
