//! `streams`: lists streams.

use annals::{Archive, StoreError, archive::StreamSummary, pages::PAGE};
use chrono::{DateTime, Utc};
use clap::Args;
use futures::{StreamExt, TryStreamExt, future, stream, stream::BoxStream};
use serde::Serialize;

use crate::{
    failure::{Failure, Verdict},
    moment::{Span, age},
    output::{Output, grouped},
    store::Store,
};

/// The maximum number of rows in a table, unless `--limit` sets another.
const ROWS_DEFAULT: usize = 100;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals streams --category order --min-events 50
      list orders with many events
  annals streams --category saga.checkout --quiet-for 1h
      list checkouts without an event in the last hour
  annals streams --json | wc -l
      count the streams")]
pub(crate) struct StreamsArgs {
    /// Only streams of this category, such as `order`.
    #[arg(long)]
    category: Option<String>,
    /// Only streams with at least this many events.
    #[arg(long, value_name = "N")]
    min_events: Option<i64>,
    /// Only streams with at most this many events.
    #[arg(long, value_name = "N")]
    max_events: Option<i64>,
    /// Only streams whose last event is older than this, such as 90s, 15m, 2h, 7d.
    #[arg(long, value_name = "DURATION")]
    quiet_for: Option<Span>,
    /// Only streams whose last event is more recent than this.
    #[arg(long, value_name = "DURATION")]
    active_within: Option<Span>,
    /// Show at most this many streams [default: 100 in a table, all with --json].
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

#[derive(Serialize)]
struct StreamRow {
    stream: String,
    events: i64,
    position: i64,
    first_at: DateTime<Utc>,
    last_at: DateTime<Utc>,
}

impl From<StreamSummary> for StreamRow {
    fn from(of: StreamSummary) -> Self {
        Self {
            stream: of.stream.as_str().to_owned(),
            events: of.version.0,
            position: of.position.0,
            first_at: of.first_at,
            last_at: of.last_at,
        }
    }
}

pub(crate) async fn run(arguments: StreamsArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let archive = store.port();
    let limit = arguments.limit.unwrap_or(if output.json { usize::MAX } else { ROWS_DEFAULT });
    let wanted = StreamFilter::of(&arguments);
    let mut streams = streams(&*archive, arguments.category.as_deref());
    let mut rows = Vec::new();
    let mut found = 0;
    let mut more = false;
    while let Some(stream) = streams.try_next().await? {
        if !wanted.has(&stream) {
            continue;
        }
        if found == limit {
            more = true;
            break;
        }
        found += 1;
        rows.push(StreamRow::from(stream));
        if output.json {
            show(&std::mem::take(&mut rows), output)?;
        }
    }
    show(&rows, output)?;
    if more && !output.json {
        output.flush()?;
        eprintln!("there are more streams: raise --limit, or narrow the filter");
    }
    Ok(Verdict::Fine)
}

/// Reads the streams of a category, or of all categories, in the order of their names. Holds one page in memory.
pub(super) fn streams<'a>(
    archive: &'a dyn Archive,
    category: Option<&str>,
) -> BoxStream<'a, Result<StreamSummary, StoreError>> {
    // All streams of the category sort after this prefix, since each has an id.
    let prefix = category.map(|category| format!("{category}-")).unwrap_or_default();
    let pages = stream::try_unfold(prefix.clone(), move |after| async move {
        let page = archive.streams(&after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(None) };
        let next = last.stream.as_str().to_owned();
        Ok(Some((stream::iter(page.into_iter().map(Ok)), next)))
    });
    let is_of_it = move |stream: &StreamSummary| future::ready(Ok(stream.stream.as_str().starts_with(&prefix)));
    pages.try_flatten().try_take_while(is_of_it).boxed()
}

fn show(rows: &[StreamRow], output: &mut Output) -> Result<(), Failure> {
    output.list(&["STREAM", "EVENTS", "LAST POSITION", "LAST EVENT", "AGE"], rows, |row| {
        vec![
            row.stream.clone(),
            grouped(row.events),
            grouped(row.position),
            age(row.last_at) + " ago",
            age(row.first_at),
        ]
    })
}

/// The filter, with each duration converted to a time.
struct StreamFilter {
    min_events: i64,
    max_events: i64,
    last_before: Option<DateTime<Utc>>,
    last_after: Option<DateTime<Utc>>,
}

impl StreamFilter {
    fn of(arguments: &StreamsArgs) -> Self {
        Self {
            min_events: arguments.min_events.unwrap_or(0),
            max_events: arguments.max_events.unwrap_or(i64::MAX),
            last_before: arguments.quiet_for.map(Span::ago),
            last_after: arguments.active_within.map(Span::ago),
        }
    }

    fn has(&self, stream: &StreamSummary) -> bool {
        (self.min_events..=self.max_events).contains(&stream.version.0)
            && self.last_before.is_none_or(|before| stream.last_at < before)
            && self.last_after.is_none_or(|after| stream.last_at > after)
    }
}
