//! One shop at a time on a SQLite file.
//!
//! The store takes several processes on one file, and the shop does not: each has a bus of its own, while how far messages
//! were carried stands in the file for all. What one has put on its bus the other waits for in vain.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::PathBuf,
};

use crate::arguments::StoreUrl;

/// Keeps other shops away from a store while it lives. A process that is killed lets go of it.
#[derive(Debug)]
pub struct Claim {
    _locked: File,
}

/// Why a store could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Somebody else has it.
    #[error("{store} is in use by another sample-shop{process}: wait until it ends, or name another --store")]
    InUse {
        /// The store.
        store: StoreUrl,
        /// Which process, if it could be told.
        process: String,
    },
    /// The file that is locked can be neither made nor locked.
    #[error("{}: {source}", path.display())]
    Unlockable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Claim {
    /// Claims a store that is open. `None` where others cannot be in the way, or do no harm.
    pub fn on(store: &StoreUrl) -> Result<Option<Self>, ClaimError> {
        let StoreUrl::Sqlite(path) = store else { return Ok(None) };
        // Under whatever name the file was opened. Not the file itself: when any handle on it is closed, SQLite's own locks go.
        let mut name = fs::canonicalize(path).unwrap_or_else(|_| path.clone()).into_os_string();
        name.push("-lock");
        let path = PathBuf::from(name);
        let unlockable = |source| ClaimError::Unlockable { path: path.clone(), source };
        let opened = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(unlockable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut number = String::new();
                let known = file.read_to_string(&mut number).is_ok() && number.parse::<u32>().is_ok();
                let process = if known { format!(" (process {number})") } else { String::new() };
                return Err(ClaimError::InUse { store: store.clone(), process });
            }
            Err(TryLockError::Error(source)) => return Err(unlockable(source)),
        }
        // Only for the message above.
        let noted = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        noted.map_err(unlockable)?;
        Ok(Some(Self { _locked: file }))
    }
}
