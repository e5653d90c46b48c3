//! `archive`: copies finished streams to a separate file.

use std::{
    collections::HashSet,
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

use super::streams::streams;
use crate::{
    event_lines::Lines,
    exported::{Archived, ExportWriter, FORMAT, Header, Section},
    failure::{Failure, Verdict},
    moment::Span,
    output::{Output, grouped},
    progress,
    resume_command::ResumeCommand,
    stop::Stop,
    store::Store,
    stream_key::stream_key,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals archive checkouts-2026.ndjson.zst --category saga.checkout --quiet-for 90d
      archive checkouts that have ended and had no event for 90 days
  annals archive orders-2026.ndjson.zst --category order,payment --quiet-for 365d
  annals archive orders-2026.ndjson.zst --resume
      continue an interrupted archive
  annals read order-536365 --archive orders-2026.ndjson.zst
      read an archived stream later, from the file alone

The stream of a saga is archived only after the saga has ended. Any other stream counts as finished by its age alone. The file has
the format of an export: lines of JSON with checksums. The streams also stay in the store: events are never deleted.")]
pub(crate) struct ArchiveArgs {
    /// The file, which must not exist yet. The file is compressed if its name ends in .zst.
    file: PathBuf,
    /// Streams of these categories, such as `order,saga.checkout`.
    #[arg(long, value_name = "NAME", value_delimiter = ',', required_unless_present = "resume")]
    category: Vec<String>,
    /// Only streams whose last event is older than this, such as 12h, 90d.
    #[arg(long, value_name = "DURATION", required_unless_present = "resume")]
    quiet_for: Option<Span>,
    /// Continue an interrupted file with the streams that the first run selected.
    #[arg(long, conflicts_with_all = ["category", "quiet_for"])]
    resume: bool,
}

#[derive(Serialize)]
struct ArchiveSummary {
    file: String,
    id: Uuid,
    streams: usize,
    #[serde(flatten)]
    contents: Section,
}

pub(crate) async fn run(
    arguments: ArchiveArgs,
    store: &Store,
    resume: &ResumeCommand,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let path = arguments.file.clone();
    let begun = if arguments.resume { Some(resumed(&path, store).await?) } else { begun(arguments, store).await? };
    let Some((mut writer, header, finished)) = begun else {
        match output.json {
            true => output.value(&serde_json::json!({ "streams": 0 }))?,
            false => output.line("no stream is finished: nothing was archived")?,
        }
        return Ok(Verdict::Fine);
    };
    let streams = finished.keys.len();
    if !write(&mut writer, &header, finished, store).await? {
        writer.section(false)?;
        let command = resume.command(["archive", &*path.to_string_lossy(), "--resume"]);
        eprintln!("stopped after position {}; to continue, run: {command}", grouped(writer.so_far().position));
        return Ok(Verdict::Stopped);
    }
    writer.section(true)?;
    let file = path.display().to_string();
    let contents = writer.so_far().clone();
    if output.json {
        output.value(&ArchiveSummary { file, id: header.id, streams, contents })?;
    } else {
        let events = grouped(contents.events as i64);
        output.line(&format!("{file}: {events} events of {streams} streams, blake3 {}", contents.blake3))?;
    }
    Ok(Verdict::Fine)
}

/// Begins a new file. Returns `None` if no stream is finished.
async fn begun(
    arguments: ArchiveArgs,
    store: &Store,
) -> Result<Option<(ExportWriter, Header, FinishedStreams)>, Failure> {
    let archive = store.port();
    // A stream with an event after this position is not finished.
    let until = archive.status().await?.head.0;
    let categories = arguments.category;
    let quiet_before = arguments.quiet_for.map_or_else(Utc::now, Span::ago);
    let finished = FinishedStreams::of(&*archive, &categories, quiet_before, until).await?;
    let streams = finished.keys.len();
    if streams == 0 {
        return Ok(None);
    }
    let header = Header {
        annals_export: FORMAT,
        id: Uuid::new_v4(),
        store: store.url.to_string(),
        taken_at: Utc::now(),
        archive: Some(Archived { categories, quiet_before, streams, blake3: finished.blake3.clone() }),
    };
    let mut writer = ExportWriter::begin(&arguments.file, &header)?;
    writer.until(until)?;
    Ok(Some((writer, header, finished)))
}

/// Resumes an interrupted file with the streams that the first run selected. Of any other stream, the file would hold
/// only a part of the events.
async fn resumed(path: &Path, store: &Store) -> Result<(ExportWriter, Header, FinishedStreams), Failure> {
    let shown = path.display();
    let Some((writer, header)) = ExportWriter::resume(path)? else {
        return Err(Failure::new(format!("{shown} is complete: there is nothing to resume")));
    };
    let Some(archived) = &header.archive else {
        return Err(Failure::new(format!(
            "{shown} is an export, not an archive: continue the file with `export --resume`"
        )));
    };
    if header.store != store.url.to_string() {
        return Err(Failure::new(format!(
            "{shown} was written from {}, not from {}: name that store, or another file",
            header.store, store.url
        )));
    }
    let Some(until) = writer.so_far().until else {
        return Err(Failure::new(format!("{shown} ends before its first event: remove the file, and archive again")));
    };
    let finished = FinishedStreams::of(&*store.port(), &archived.categories, archived.quiet_before, until).await?;
    if finished.blake3 != archived.blake3 {
        return Err(Failure::new(format!(
            "{shown} was started with {} finished streams, and some of these streams have changed since: archive into \
             another file",
            archived.streams
        )));
    }
    Ok((writer, header, finished))
}

/// Writes the events of the finished streams. Returns `false` if the user stopped the command.
async fn write(
    writer: &mut ExportWriter,
    header: &Header,
    finished: FinishedStreams,
    store: &Store,
) -> Result<bool, Failure> {
    let until = writer.so_far().until.unwrap_or_default();
    let stop = Stop::on_ctrl_c();
    let bar = progress::bar("archived", until.unsigned_abs(), &stop);
    let is_json = store.has_json_only();
    let categories = header.archive.iter().flat_map(|archived| &archived.categories).map(|name| name.as_str().into());
    let query = LogQuery { categories: categories.collect(), types: Vec::new() };
    let add = move |lines: &mut Lines, event: Stored<'_>| {
        // Only archived events advance the position, so every section ends at one of its own events.
        if finished.keys.contains(&stream_key(&event.stream)) {
            lines.add(&event, is_json);
        }
    };
    let mut log = store.batches(query, writer.so_far().position + 1..=until, add).await?;
    let mut stopped = false;
    while !stopped && let Some(lines) = log.try_next().await? {
        if lines.count > 0 {
            writer.events(&lines)?;
            bar.set_position(lines.position.unsigned_abs());
        }
        stopped = stop.is_asked();
    }
    bar.finish_and_clear();
    Ok(!stopped)
}

/// The finished streams.
struct FinishedStreams {
    keys: HashSet<u128>,
    /// The hash of the names of all streams.
    blake3: String,
}

impl FinishedStreams {
    /// Finds the streams that have no event since `quiet_before` or after `until`. Leaves out sagas that have not
    /// ended.
    async fn of(
        archive: &dyn Archive,
        categories: &[String],
        quiet_before: DateTime<Utc>,
        until: i64,
    ) -> Result<Self, Failure> {
        let mut keys = HashSet::new();
        let mut hasher = blake3::Hasher::new();
        for category in categories {
            let mut streams = streams(archive, Some(category));
            while let Some(stream) = streams.try_next().await? {
                let quiet = stream.last_at < quiet_before && stream.position.0 <= until;
                if quiet && has_ended(archive, &stream).await? {
                    keys.insert(stream_key(stream.stream.as_str()));
                    hasher.update(stream.stream.as_str().as_bytes()).update(b"\n");
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
