//! Where in the log a time is.

use annals::{Archive, LogQuery, Position, StoreError};
use chrono::{DateTime, Utc};

/// The position before the first event recorded at `time` or later. Times rise with positions, but for what clocks of
/// several writers differ by: events that near may be on the wrong side.
pub(crate) async fn position_at(archive: &dyn Archive, time: DateTime<Utc>) -> Result<Position, StoreError> {
    // Everything up to `before` is earlier; everything after `until` is not.
    let (mut before, mut until) = (0, archive.status().await?.head.0);
    while before < until {
        let middle = before + (until - before) / 2;
        let page = archive.read_log(&LogQuery::all(), Position(middle), 1).await?;
        match page.events.first() {
            Some(event) if event.recorded_at < time => before = event.position.0,
            // Nothing lies between here and the event that was found, if one was.
            _ => until = middle,
        }
    }
    Ok(Position(before))
}
