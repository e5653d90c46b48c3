//! Allows one shop at a time on a SQLite file.
//!
//! The store allows several processes on one file, but the shop does not: each process has a bus of its own, while the
//! file holds one relay progress for all of them. Another process would wait in vain for messages that this one has put
//! on its bus.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::PathBuf,
};

use crate::arguments::StoreUrl;

/// Keeps other shops away from a store as long as the claim lives. A process that is killed releases its claim.
#[derive(Debug)]
pub struct Claim {
    _locked: File,
}

/// Why a store could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another process holds the claim.
    #[error("{store} is in use by another sample-shop{process}: wait until it ends, or name another --store")]
    InUse {
        /// The store.
        store: StoreUrl,
        /// The process that holds it, if that is known.
        process: String,
    },
    /// The lock file can be neither created nor locked.
    #[error("{}: {source}", path.display())]
    Unlockable {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl Claim {
    /// Claims a store that is open. Returns `None` for stores that several shops may share, or that no other process
    /// can reach.
    pub fn on(store: &StoreUrl) -> Result<Option<Self>, ClaimError> {
        let StoreUrl::Sqlite(path) = store else { return Ok(None) };
        // The lock has the canonical path, so it holds for every name of the file. The store's own file must not be
        // locked: closing any handle on it releases SQLite's own locks.
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
        // The process id only serves the error message above.
        let noted = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        noted.map_err(unlockable)?;
        Ok(Some(Self { _locked: file }))
    }
}
