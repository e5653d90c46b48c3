//! `export`: writes a store to a file.

use std::path::{Path, PathBuf};

use annals::{
    Archive, LogQuery,
    archive::{IMPORT, Stored},
    pages,
};
use chrono::Utc;
use clap::Args;
use futures::TryStreamExt;
use serde::Serialize;
use uuid::Uuid;

use crate::{
    event_lines::Lines,
    exported::{ExportWriter, FORMAT, Header, Section},
    failure::{Failure, Verdict},
    output::{Output, grouped},
    progress,
    resume_command::ResumeCommand,
    stop::Stop,
    store::Store,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals export shop.ndjson.zst
      export everything: events with positions and times, documents with versions
  annals export shop.ndjson.zst --resume
      continue an interrupted export
  annals export shop.ndjson --json
      write an uncompressed file, because the name does not end in .zst

The export ends at the position that the log has when all documents are written. If services run during the export, documents
(checkpoints, read models) are from different moments: stop the services if the documents must match exactly.")]
pub(crate) struct ExportArgs {
    /// The file, which is compressed if its name ends in .zst.
    file: PathBuf,
    /// Continue an interrupted file after its last complete section.
    #[arg(long)]
    resume: bool,
}

#[derive(Serialize)]
struct ExportSummary {
    file: String,
    id: Uuid,
    #[serde(flatten)]
    contents: Section,
}

pub(crate) async fn run(
    arguments: ExportArgs,
    store: &Store,
    resume: &ResumeCommand,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let path = arguments.file.as_path();
    let (mut writer, header) = if arguments.resume { resumed(path, store)? } else { begun(path, store)? };
    if !write(&mut writer, store).await? {
        writer.section(false)?;
        let command = resume.command(["export", &*path.to_string_lossy(), "--resume"]);
        eprintln!("stopped after position {}; to continue, run: {command}", grouped(writer.so_far().position));
        return Ok(Verdict::Stopped);
    }
    writer.section(true)?;
    let file = path.display().to_string();
    let contents = writer.so_far().clone();
    if output.json {
        output.value(&ExportSummary { file, id: header.id, contents })?;
    } else {
        let events = grouped(contents.events as i64);
        let documents = grouped(contents.documents as i64);
        output.line(&format!("{file}: {events} events, {documents} documents, blake3 {}", contents.blake3))?;
    }
    Ok(Verdict::Fine)
}

/// Begins a new file.
fn begun(path: &Path, store: &Store) -> Result<(ExportWriter, Header), Failure> {
    let header = Header {
        annals_export: FORMAT,
        id: Uuid::new_v4(),
        store: store.url.to_string(),
        taken_at: Utc::now(),
        archive: None,
    };
    Ok((ExportWriter::begin(path, &header)?, header))
}

/// Resumes an interrupted file of this store.
fn resumed(path: &Path, store: &Store) -> Result<(ExportWriter, Header), Failure> {
    let shown = path.display();
    let Some((writer, header)) = ExportWriter::resume(path)? else {
        return Err(Failure::new(format!("{shown} is complete: there is nothing to resume")));
    };
    if header.archive.is_some() {
        return Err(Failure::new(format!(
            "{shown} is an archive, not an export: continue the file with `archive --resume`"
        )));
    }
    if header.store != store.url.to_string() {
        return Err(Failure::new(format!(
            "{shown} was written from {}, not from {}: name that store, or another file",
            header.store, store.url
        )));
    }
    Ok((writer, header))
}

/// Writes documents and events. Returns `false` if the user stopped the export.
async fn write(writer: &mut ExportWriter, store: &Store) -> Result<bool, Failure> {
    let stop = Stop::on_ctrl_c();
    if writer.so_far().until.is_none() {
        if !documents(writer, &*store.port(), &stop).await? {
            return Ok(false);
        }
        writer.until(store.port().status().await?.head.0)?;
    }
    events(writer, store, &stop).await
}

async fn documents(writer: &mut ExportWriter, archive: &dyn Archive, stop: &Stop) -> Result<bool, Failure> {
    let (collection_done, mut after) = writer.so_far().document.clone().unwrap_or_default();
    for collection in archive.collections().await? {
        // The progress of an import describes this store and is not part of its contents.
        if *collection < *collection_done || &*collection == IMPORT {
            continue;
        }
        if *collection != *collection_done {
            after = String::new();
        }
        let mut documents = pages::collection(archive, &collection, &after);
        while let Some(document) = documents.try_next().await? {
            writer.document(&document)?;
            if stop.is_asked() {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

async fn events(writer: &mut ExportWriter, store: &Store, stop: &Stop) -> Result<bool, Failure> {
    let until = writer.so_far().until.unwrap_or_default();
    let bar = progress::bar("exported", until.unsigned_abs(), stop);
    let is_json = store.has_json_only();
    let add = move |lines: &mut Lines, event: Stored<'_>| lines.add(&event, is_json);
    let mut log = store.batches(LogQuery::all(), writer.so_far().position + 1..=until, add).await?;
    let mut stopped = false;
    while !stopped && let Some(lines) = log.try_next().await? {
        // An empty page does not contain the position at which it ends.
        if lines.count > 0 {
            writer.events(&lines)?;
            bar.set_position(lines.position.unsigned_abs());
            stopped = stop.is_asked();
        }
    }
    bar.finish_and_clear();
    Ok(!stopped)
}
