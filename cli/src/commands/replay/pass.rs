//! Reads the range of a replay, and passes its events to the target.

use std::{ops::RangeInclusive, time::Duration};

use annals::archive::Stored;
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use indicatif::ProgressBar;

use super::{arguments::ReplayArgs, target::Target};
use crate::{event_lines::Lines, failure::Failure, stop::Stop, store::Store};

/// One pass over the range.
pub(super) struct Pass<'a> {
    store: &'a Store,
    arguments: &'a ReplayArgs,
    positions: RangeInclusive<i64>,
    bar: ProgressBar,
    /// The number of events that were passed to the target.
    pub events: i64,
    /// The last position that was read.
    pub position: i64,
}

impl<'a> Pass<'a> {
    pub fn new(store: &'a Store, arguments: &'a ReplayArgs, positions: RangeInclusive<i64>, bar: ProgressBar) -> Self {
        let position = positions.start() - 1;
        Self { store, arguments, positions, bar, events: 0, position }
    }

    /// Returns whether the pass has reached the end of the range. Returns `false` if the user stopped the pass.
    pub async fn run(&mut self, target: &mut Target<'_>, stop: &Stop) -> Result<bool, Failure> {
        let ended = match self.arguments.speed {
            None if target.takes_lines() => self.lines(target, stop).await,
            _ => self.one_by_one(target, stop).await,
        };
        self.bar.finish_and_clear();
        if let Some((before, events)) = target.unacknowledged() {
            self.position = before;
            self.events -= events;
        }
        ended
    }

    /// Passes events as lines, in batches.
    async fn lines(&mut self, target: &mut Target<'_>, stop: &Stop) -> Result<bool, Failure> {
        let filter = self.arguments.filter.clone();
        let streams = self.arguments.stream.clone();
        let is_json = self.store.has_json_only();
        let query = filter.query();
        let take = move |lines: &mut Lines, event: Stored<'_>| {
            let of_stream = streams.is_empty() || streams.iter().any(|name| *name == event.stream);
            if of_stream && filter.has(&event.data) { lines.add(&event, is_json) } else { lines.skip(&event) }
        };
        let mut batches = self.store.batches(query, self.positions.clone(), take).await?;
        let mut ended = false;
        while !stop.is_asked() {
            let Some(next) = stop.unless(batches.try_next()).await else { break };
            let Some(lines) = next? else {
                ended = true;
                break;
            };
            target.take_lines(&lines.bytes)?;
            self.events += lines.count as i64;
            self.moved(self.position.max(lines.position));
        }
        target.commit().await?;
        Ok(ended || self.position >= *self.positions.end())
    }

    /// Passes one event after the other, with the pauses between them.
    async fn one_by_one(&mut self, target: &mut Target<'_>, stop: &Stop) -> Result<bool, Failure> {
        match stop.unless(self.pass_on(target)).await {
            Some(ended) => ended.map(|()| true),
            // Messages in flight may still arrive.
            None => target.give_up().await.map(|()| false),
        }
    }

    async fn pass_on(&mut self, target: &mut Target<'_>) -> Result<(), Failure> {
        let arguments = self.arguments;
        let mut log = self.store.log(arguments.filter.query(), self.positions.clone()).await?;
        let mut pace = Pace::new(arguments.speed);
        while let Some(event) = log.try_next().await? {
            let of_stream =
                arguments.stream.is_empty() || arguments.stream.iter().any(|name| name == event.stream.as_str());
            if of_stream && arguments.filter.has(&event.data) {
                pace.until(event.recorded_at).await;
                self.events += 1;
                target.take(&event).await?;
            }
            self.moved(event.position.0);
        }
        target.commit().await
    }

    fn moved(&mut self, position: i64) {
        self.position = position;
        self.bar.set_position((position - self.positions.start() + 1).unsigned_abs());
    }
}

/// Waits between two events for the time between their recording times, divided by a factor.
struct Pace {
    factor: Option<f64>,
    began: Option<(tokio::time::Instant, DateTime<Utc>)>,
}

impl Pace {
    fn new(factor: Option<f64>) -> Self {
        Self { factor, began: None }
    }

    async fn until(&mut self, time: DateTime<Utc>) {
        let Some(factor) = self.factor else { return };
        let (began, first) = *self.began.get_or_insert((tokio::time::Instant::now(), time));
        let since = (time - first).to_std().unwrap_or_default();
        let wait = Duration::try_from_secs_f64(since.as_secs_f64() / factor).unwrap_or(Duration::MAX);
        if let Some(at) = began.checked_add(wait) {
            tokio::time::sleep_until(at).await;
        }
    }
}
