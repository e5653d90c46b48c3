//! `archive`: streams in which nothing more will happen, as a file of their own.

use std::{collections::HashSet, io, path::PathBuf};

use annals::{
    Archive, LogQuery, StreamId, Version,
    archive::{Stored, StreamSummary},
    saga::SagaEvent,
};
use chrono::Utc;
use clap::Args;
use futures::TryStreamExt;
use serde::Serialize;
use uuid::Uuid;

use super::verify::stream_key;
use crate::{
    event::Lines,
    exported::{Archived, FORMAT, Header, Section, Writer},
    failure::{Failure, Verdict},
    moment::Span,
    output::{Output, grouped},
    progress,
    stop::Stop,
    store::Store,
};

/// Streams asked for at once.
const PAGE: usize = 1_000;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals archive checkouts-2026.ndjson.zst --category saga.checkout --quiet-for 90d
      the checkouts that have ended, and of which nothing was heard for 90 days
  annals archive orders-2026.ndjson.zst --category order,payment --quiet-for 365d
  annals read order-536365 --archive orders-2026.ndjson.zst
      one of them later, from the file alone

Streams of sagas are archived once their saga has ended; of others, only the age says that they are finished. The file is that
of an export: lines of JSON, checksummed. Nothing is taken from the store: events are never deleted.")]
pub(crate) struct Arguments {
    /// The file; compressed if its name ends in .zst. There must be none yet.
    file: PathBuf,
    /// Streams of these categories, such as `order,saga.checkout`.
    #[arg(long, value_name = "NAME", value_delimiter = ',', required = true)]
    category: Vec<String>,
    /// Only streams whose last event is older than this, such as 12h, 90d.
    #[arg(long, value_name = "DURATION")]
    quiet_for: Span,
}

#[derive(Serialize)]
struct Done {
    file: String,
    id: Uuid,
    streams: usize,
    #[serde(flatten)]
    contents: Section,
}

pub(crate) async fn run(arguments: Arguments, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let path = arguments.file.as_path();
    let archive = store.port();
    // What is recorded from now on belongs to streams that are not finished.
    let until = archive.status().await?.head.0;
    let quiet_before = arguments.quiet_for.ago();
    let mut finished = HashSet::new();
    for category in &arguments.category {
        let prefix = format!("{category}-");
        let mut after = prefix.clone();
        loop {
            let page = archive.streams(&after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.stream.as_str().to_owned();
            for stream in page.iter().take_while(|stream| stream.stream.as_str().starts_with(&prefix)) {
                let quiet = stream.last_at < quiet_before && stream.position.0 <= until;
                if quiet && has_ended(&*archive, stream).await? {
                    finished.insert(stream_key(stream.stream.as_str()));
                }
            }
            if !after.starts_with(&prefix) {
                break;
            }
        }
    }
    let streams = finished.len();
    if streams == 0 {
        match output.json {
            true => output.value(&serde_json::json!({ "streams": 0 }))?,
            false => output.line("no stream is finished: nothing was archived")?,
        }
        return Ok(Verdict::Fine);
    }
    let header = Header {
        annals_export: FORMAT,
        id: Uuid::new_v4(),
        store: store.url.to_string(),
        taken_at: Utc::now(),
        archive: Some(Archived { categories: arguments.category.clone(), quiet_before }),
    };
    let broken = |error: io::Error| Failure::new(format!("{} cannot be written: {error}", path.display()));
    let mut writer = Writer::begin(path, &header)?;
    writer.until(until).map_err(broken)?;
    let stop = Stop::on_ctrl_c();
    let bar = progress::bar("archived", until.unsigned_abs());
    let categories = arguments.category.iter().map(|name| name.as_str().into()).collect();
    let is_json = store.has_json_only();
    let add = move |lines: &mut Lines, event: Stored<'_>| {
        // A section ends with the last event that is in it.
        if finished.contains(&stream_key(&event.stream)) {
            lines.add(&event, is_json);
        }
    };
    let mut log = store.batches(LogQuery { categories, types: Vec::new() }, 1..=until, add).await?;
    while let Some(lines) = log.try_next().await? {
        if stop.is_asked() {
            bar.finish_and_clear();
            drop(writer);
            std::fs::remove_file(path).map_err(broken)?;
            eprintln!("stopped; {} is gone again: archive once more", path.display());
            return Ok(Verdict::Stopped);
        }
        if lines.count > 0 {
            writer.events(&lines).map_err(broken)?;
            bar.set_position(lines.position.unsigned_abs());
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

/// Whether the saga of a stream has ended, if it is one.
async fn has_ended(archive: &dyn Archive, stream: &StreamSummary) -> Result<bool, Failure> {
    if !stream.stream.category().starts_with("saga.") {
        return Ok(true);
    }
    let before = Version(stream.version.0 - 1);
    let page = archive.read_stream(&StreamId::from_stored(stream.stream.as_str()), before, 1).await?;
    let ended = |event: SagaEvent| event.progress().ended.is_some();
    Ok(page.last().and_then(|event| event.decode::<SagaEvent>().ok().flatten()).is_some_and(ended))
}
