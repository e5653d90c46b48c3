//! Replays events as lines, in batches. Works only without pauses, and only for a target that accepts lines.

use std::ops::RangeInclusive;

use annals::archive::Stored;
use futures::TryStreamExt;
use indicatif::ProgressBar;

use super::target::Target;
use crate::{commands::tail::Which, event::Lines, failure::Failure, stop::Stop, store::Store};

/// Returns the number of matching events, the last position that was read, and whether an error occurred.
pub(super) async fn replay(
    store: &Store,
    (which, streams): (Which, Vec<String>),
    positions: RangeInclusive<i64>,
    target: &mut Target<'_>,
    (bar, stop): (&ProgressBar, &Stop),
) -> Result<(i64, i64, Result<(), Failure>), Failure> {
    let before = positions.start() - 1;
    let (query, is_json) = (which.query(), store.has_json_only());
    let take = move |lines: &mut Lines, event: Stored<'_>| {
        let of_stream = streams.is_empty() || streams.iter().any(|name| *name == event.stream);
        if of_stream && which.has(&event.data) { lines.add(&event, is_json) } else { lines.skip(&event) }
    };
    let mut batches = store.batches(query, positions, take).await?;
    let (mut written, mut at) = (0, before);
    loop {
        let next = tokio::select! {
            biased;
            () = stop.asked() => break,
            next = batches.try_next() => next?,
        };
        let Some(lines) = next else { break };
        if let Err(failure) = target.take_lines(&lines.bytes) {
            return Ok((written, at, Err(failure)));
        }
        written += lines.count as i64;
        at = at.max(lines.position);
        bar.set_position((at - before).unsigned_abs());
    }
    Ok((written, at, Ok(())))
}
