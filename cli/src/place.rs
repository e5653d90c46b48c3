//! Finds the place of a time in the log.

use annals::{Archive, LogQuery, Position, StoreError};
use chrono::{DateTime, Utc};

/// Returns the position before the first event recorded at `time` or later. Times rise with positions, except for the
/// differences between the clocks of several writers: events that close to `time` may be on the wrong side.
pub(crate) async fn position_at(archive: &dyn Archive, time: DateTime<Utc>) -> Result<Position, StoreError> {
    // All events up to `before` are earlier; none after `until` is.
    let (mut before, mut until) = (0, archive.status().await?.head.0);
    while before < until {
        let middle = before + (until - before) / 2;
        let page = archive.read_log(&LogQuery::all(), Position(middle), 1).await?;
        match page.events.first() {
            Some(event) if event.recorded_at < time => before = event.position.0,
            // No event lies between `middle` and the event that was found, if one was found.
            _ => until = middle,
        }
    }
    Ok(Position(before))
}
