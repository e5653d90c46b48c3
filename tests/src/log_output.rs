//! Collects what a subscriber of `tracing` writes.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
};

/// The output of a subscriber. Clones share the same output.
#[derive(Clone, Debug, Default)]
pub struct LogOutput(Arc<Mutex<Vec<u8>>>);

impl LogOutput {
    /// Returns everything that was written so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for LogOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
