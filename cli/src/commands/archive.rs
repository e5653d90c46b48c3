//! `archive`: copies finished streams to a separate file.

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
};

use annals::{
    Archive, LogQuery, StreamId, Version,
    archive::{Stored, StreamSummary},
    saga::SagaEvent,
};
use chrono::{DateTime, Utc};
use clap::Args;
use futures::TryStreamExt;
use serde::Serialize;
use uuid::Uuid;

use super::verify::stream_key;
use crate::{
    again::Again,
    event::Lines,
    exported::{Archived, FORMAT, Header, Section, Writer},
    failure::{Failure, Verdict},
    moment::Span,
    output::{Output, grouped},
    progress,
    stop::Stop,
    store::Store,
};

/// The number of streams per page of the listing.
const PAGE: usize = 1_000;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals archive checkouts-2026.ndjson.zst --category saga.checkout --quiet-for 90d
      the checkouts that have ended, and of which nothing was heard for 90 days
  annals archive orders-2026.ndjson.zst --category order,payment --quiet-for 365d
  annals archive orders-2026.ndjson.zst --resume
      goes on with one that was broken off
  annals read order-536365 --archive orders-2026.ndjson.zst
      one of them later, from the file alone

Streams of sagas are archived once their saga has ended; of others, only the age says that they are finished. The file is that
of an export: lines of JSON, checksummed. Nothing is taken from the store: events are never deleted.")]
pub(crate) struct Arguments {
    /// The file; compressed if its name ends in .zst. It must not exist yet.
    file: PathBuf,
    /// Streams of these categories, such as `order,saga.checkout`.
    #[arg(long, value_name = "NAME", value_delimiter = ',', required_unless_present = "resume")]
    category: Vec<String>,
    /// Only streams whose last event is older than this, such as 12h, 90d.
    #[arg(long, value_name = "DURATION", required_unless_present = "resume")]
    quiet_for: Option<Span>,
    /// Continue an interrupted file with the streams that it was started with.
    #[arg(long, conflicts_with_all = ["category", "quiet_for"])]
    resume: bool,
}

#[derive(Serialize)]
struct Done {
    file: String,
    id: Uuid,
    streams: usize,
    #[serde(flatten)]
    contents: Section,
}

pub(crate) async fn run(
    arguments: Arguments,
    store: &Store,
    again: &Again,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let path = arguments.file.as_path();
    let archive = store.port();
    let broken = |error: io::Error| Failure::new(format!("{} cannot be written: {error}", path.display()));
    let (mut writer, header, finished) = match arguments.resume {
        true => go_on(path, store).await?,
        false => {
            // A stream with an event after this position is not finished.
            let until = archive.status().await?.head.0;
            let (categories, quiet_before) = (arguments.category, arguments.quiet_for.map_or_else(Utc::now, Span::ago));
            let finished = Finished::of(&*archive, &categories, quiet_before, until).await?;
            let streams = finished.keys.len();
            if streams == 0 {
                match output.json {
                    true => output.value(&serde_json::json!({ "streams": 0 }))?,
                    false => output.line("no stream is finished: nothing was archived")?,
                }
                return Ok(Verdict::Fine);
            }
            let archived = Archived { categories, quiet_before, streams, blake3: finished.blake3.clone() };
            let (id, taken_at) = (Uuid::new_v4(), Utc::now());
            let store = store.url.to_string();
            let header = Header { annals_export: FORMAT, id, store, taken_at, archive: Some(archived) };
            let mut writer = Writer::begin(path, &header)?;
            writer.until(until).map_err(broken)?;
            (writer, header, finished)
        }
    };
    let until = writer.so_far().until.unwrap_or_default();
    let stop = Stop::on_ctrl_c();
    let bar = progress::bar("archived", until.unsigned_abs());
    let (streams, is_json) = (finished.keys.len(), store.has_json_only());
    let categories = header.archive.iter().flat_map(|archived| &archived.categories).map(|name| name.as_str().into());
    let query = LogQuery { categories: categories.collect(), types: Vec::new() };
    let add = move |lines: &mut Lines, event: Stored<'_>| {
        // Other events do not advance the position, so a section ends with an event of its own.
        if finished.keys.contains(&stream_key(&event.stream)) {
            lines.add(&event, is_json);
        }
    };
    let mut log = store.batches(query, writer.so_far().position + 1..=until, add).await?;
    while let Some(lines) = log.try_next().await? {
        if lines.count > 0 {
            writer.events(&lines).map_err(broken)?;
            bar.set_position(lines.position.unsigned_abs());
        }
        if stop.is_asked() {
            bar.finish_and_clear();
            writer.section(false).map_err(broken)?;
            let again = again.command(["archive", &*path.to_string_lossy(), "--resume"]);
            eprintln!("stopped after position {}; go on with: {again}", grouped(writer.so_far().position));
            return Ok(Verdict::Stopped);
        }
    }
    writer.section(true).map_err(broken)?;
    bar.finish_and_clear();
    let contents = writer.so_far().clone();
    if output.json {
        output.value(&Done { file: path.display().to_string(), id: header.id, streams, contents })?;
    } else {
        let (file, events) = (path.display(), grouped(contents.events as i64));
        output.line(&format!("{file}: {events} events of {streams} streams, blake3 {}", contents.blake3))?;
    }
    Ok(Verdict::Fine)
}

/// Resumes a file with the streams that it was started with. With other streams, the file would hold only the second
/// half of some streams.
async fn go_on(path: &Path, store: &Store) -> Result<(Writer, Header, Finished), Failure> {
    let shown = path.display();
    let Some((writer, header)) = Writer::go_on(path)? else {
        return Err(Failure::new(format!("{shown} is complete: there is nothing to go on with")));
    };
    let Some(archived) = &header.archive else {
        return Err(Failure::new(format!("{shown} is an export, not an archive: `export --resume` goes on with it")));
    };
    if header.store != store.url.to_string() {
        return Err(Failure::new(format!("{shown} was taken from {}, not from {}", header.store, store.url)));
    }
    let Some(until) = writer.so_far().until else {
        return Err(Failure::new(format!("{shown} ends before its first event: remove it, and archive anew")));
    };
    let finished = Finished::of(&*store.port(), &archived.categories, archived.quiet_before, until).await?;
    if finished.blake3 != archived.blake3 {
        return Err(Failure::new(format!(
            "{shown} was begun with {} finished streams, and of these not all are finished any more: archive anew, into \
             another file",
            archived.streams
        )));
    }
    Ok((writer, header, finished))
}

/// The finished streams.
struct Finished {
    keys: HashSet<u128>,
    /// The hash of the names of all streams.
    blake3: String,
}

impl Finished {
    /// Finds the streams that have no event since `quiet_before` or after `until`. Leaves out sagas that have not
    /// ended.
    async fn of(
        archive: &dyn Archive,
        categories: &[String],
        quiet_before: DateTime<Utc>,
        until: i64,
    ) -> Result<Self, Failure> {
        let (mut keys, mut hasher) = (HashSet::new(), blake3::Hasher::new());
        for category in categories {
            let prefix = format!("{category}-");
            let mut after = prefix.clone();
            loop {
                let page = archive.streams(&after, PAGE).await?;
                let Some(last) = page.last() else { break };
                after = last.stream.as_str().to_owned();
                for stream in page.iter().take_while(|stream| stream.stream.as_str().starts_with(&prefix)) {
                    let quiet = stream.last_at < quiet_before && stream.position.0 <= until;
                    if quiet && has_ended(archive, stream).await? {
                        keys.insert(stream_key(stream.stream.as_str()));
                        hasher.update(stream.stream.as_str().as_bytes()).update(b"\n");
                    }
                }
                if !after.starts_with(&prefix) {
                    break;
                }
            }
        }
        Ok(Self { keys, blake3: hasher.finalize().to_hex().to_string() })
    }
}

/// Returns whether the saga of a stream has ended. Returns true for a stream that does not belong to a saga.
async fn has_ended(archive: &dyn Archive, stream: &StreamSummary) -> Result<bool, Failure> {
    if !stream.stream.category().starts_with("saga.") {
        return Ok(true);
    }
    let before = Version(stream.version.0 - 1);
    let page = archive.read_stream(&StreamId::from_stored(stream.stream.as_str()), before, 1).await?;
    let ended = |event: SagaEvent| event.progress().ended.is_some();
    Ok(page.last().and_then(|event| event.decode::<SagaEvent>().ok().flatten()).is_some_and(ended))
}
