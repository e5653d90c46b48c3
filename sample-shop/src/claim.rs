//! Ensures that only one shop at a time uses a SQLite file.
//!
//! The store allows several processes to share one file, but the shop does not. Each process has its own local bus,
//! while the file holds one relay checkpoint for all processes. A second process would wait in vain for messages that
//! the first process has published to its own bus.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::PathBuf,
};

use crate::arguments::StoreUrl;

/// Keeps other shops away from a store while this value lives. The operating system releases the claim of a process
/// that is killed.
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
        /// The process that holds the claim, if it is known.
        process: String,
    },
    /// The lock file cannot be created or locked.
    #[error("{}: {source}", path.display())]
    Unlockable {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl Claim {
    /// Claims a store that this process has opened. Returns `None` for a store that several shops may share, and for a
    /// store that no other process can reach.
    pub fn on(store: &StoreUrl) -> Result<Option<Self>, ClaimError> {
        let StoreUrl::Sqlite(path) = store else { return Ok(None) };
        // Locks a separate file, named after the canonical path, so that the lock holds for every name of the store's
        // file. The store's own file must not be locked, because closing any handle on it would release SQLite's own
        // locks.
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
        // The process id is used only in the error message above.
        let noted = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        noted.map_err(unlockable)?;
        Ok(Some(Self { _locked: file }))
    }
}
