//! Finds the position in the log that belongs to a time.

use annals::{Archive, LogQuery, Position, StoreError};
use chrono::{DateTime, Utc};

/// Returns the position before the first event that was recorded at `time` or later. Times rise with positions, except
/// that the clocks of several writers may differ. An event whose time is within that difference of `time` may be on the
/// wrong side of the returned position.
pub(crate) async fn position_at(archive: &dyn Archive, time: DateTime<Utc>) -> Result<Position, StoreError> {
    // Invariant: all events up to `before` were recorded before `time`, and no event after `until` was recorded before
    // `time`.
    let mut before = 0;
    let mut until = archive.status().await?.head.0;
    while before < until {
        let middle = before + (until - before) / 2;
        let page = archive.read_log(&LogQuery::all(), Position(middle), 1).await?;
        match page.events.first() {
            Some(event) if event.recorded_at < time => before = event.position.0,
            // No event lies between `middle` and the event that was found, if any. All events after `middle` are recent
            // enough.
            _ => until = middle,
        }
    }
    Ok(Position(before))
}
