//! Batches of events as lines of JSON.

use annals::archive::{Stored, line::write_line};

/// The lines of a batch of events.
#[derive(Default)]
pub(crate) struct Lines {
    pub bytes: Vec<u8>,
    pub count: u64,
    /// The position of the last event that was added or skipped.
    pub position: i64,
}

impl Lines {
    pub fn add(&mut self, event: &Stored<'_>, is_json: bool) {
        write_line(event, is_json, &mut self.bytes);
        self.count += 1;
        self.position = event.position.0;
    }

    /// Skips an event that does not match the filter.
    pub fn skip(&mut self, event: &Stored<'_>) {
        self.position = event.position.0;
    }
}
