//! `import`: fills a store from a file.

use std::path::PathBuf;

use annals::{
    Archive, Document, StoreError,
    archive::{Contents, import_key},
};
use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::{
    exported::{ExportItem, ExportReader, Section},
    failure::{Failure, Verdict},
    output::{Output, grouped},
    progress,
    resume_command::ResumeCommand,
    stop::Stop,
    store::{Store, restore},
};

/// Sections are collected until they have this number of events, and are then written together.
const PART_EVENTS: usize = 20_000;
const PART_BYTES: usize = 16 << 20;
/// The number of parts that are read ahead while another part is written.
const PARTS_AHEAD: usize = 1;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals migrate --store postgres://owner@localhost/shop
  annals import shop.ndjson.zst --store postgres://owner@localhost/shop
      import into an empty store; after an interruption, the same command continues

An import keeps ids, versions, positions with their gaps, times, and every byte of each payload. No service starts on the store
before the import is complete.")]
pub(crate) struct ImportArgs {
    /// A file that `export` wrote.
    file: PathBuf,
}

/// The progress of an import.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ImportProgress {
    /// The id of the export.
    pub export: Uuid,
    #[serde(flatten)]
    pub contents: Section,
}

pub(crate) async fn run(
    arguments: ImportArgs,
    store: &Store,
    resume: &ResumeCommand,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let path = arguments.file.display();
    let archive = store.port();
    let reader = ExportReader::open(&arguments.file)?;
    if reader.header().archive.is_some() {
        return Err(Failure::new(format!(
            "{path} is an archive of some streams, not a whole store: `read STREAM --archive {path}` reads it"
        )));
    }
    let export = reader.header().id;
    let (mut version, done) = match progress_of(&*archive).await? {
        Some((version, progress)) if progress.export == export => (version, progress.contents),
        Some((_, progress)) => {
            return Err(Failure::new(format!(
                "the store was filled from another export ({}): import into a new store",
                progress.export
            )));
        }
        None if is_empty(&*archive).await? => (0, Section::default()),
        None => return Err(Failure::new("the store is not empty: import into a new store")),
    };
    let stop = Stop::on_ctrl_c();
    let bar = progress::bar("imported", 0, &stop);
    let (parts, mut read) = mpsc::channel(PARTS_AHEAD);
    let events_done = done.events;
    let documents_done = done.documents;
    // The task ends on its own once the channel is closed.
    let reading = tokio::task::spawn_blocking(move || read_parts(reader, events_done, documents_done, &parts));
    let mut last = None::<Section>;
    while let Some(Part { mut contents, section }) = read.recv().await {
        bar.set_length(section.until.unwrap_or_default().unsigned_abs());
        let complete = section.complete;
        // Writes verified sections only. One commit writes the contents of the sections and the progress.
        if !contents.events.is_empty() || !contents.documents.is_empty() || (complete && !done.complete) {
            version += 1;
            contents.documents.push(document(export, &section, version)?);
            restore(&*archive, contents).await?;
        }
        bar.set_position(section.position.unsigned_abs());
        let events = section.events;
        last = Some(section);
        if !complete && stop.is_asked() {
            bar.finish_and_clear();
            let command = resume.command(["import", &*arguments.file.to_string_lossy()]);
            eprintln!("stopped after {} events; to continue, run: {command}", grouped(events as i64));
            return Ok(Verdict::Stopped);
        }
    }
    bar.finish_and_clear();
    let complete = reading.await.map_err(|error| Failure::new(format!("{path} cannot be read: {error}")))??;
    if !complete {
        return Err(Failure::new(format!(
            "{path} is incomplete: the file ends after {} events. These events are imported. Continue the file with \
             `export --resume`, and then import the file again",
            grouped(last.map_or(0, |section| section.events) as i64)
        )));
    }
    if done.complete {
        eprintln!("{path} was imported before");
    }
    let contents = last.unwrap_or_default();
    if output.json {
        output.value(&ImportProgress { export, contents })?;
    } else {
        let events = grouped(contents.events as i64);
        let documents = grouped(contents.documents as i64);
        output.line(&format!(
            "{}: {events} events, {documents} documents, last position {}",
            store.url, contents.position
        ))?;
    }
    Ok(Verdict::Fine)
}

/// Verified sections that are written in one commit.
#[derive(Default)]
struct Part {
    contents: Contents,
    /// The last of these sections. Its counts cover the file up to this section.
    section: Section,
}

/// Reads sections and skips those that the store already has. Returns whether the file is complete.
fn read_parts(
    mut reader: ExportReader,
    events_done: u64,
    documents_done: u64,
    parts: &mpsc::Sender<Part>,
) -> Result<bool, Failure> {
    let mut events = 0;
    let mut documents = 0;
    let mut bytes = 0;
    let mut contents = Contents::default();
    let mut whole = None::<Part>;
    let complete = loop {
        let step = match reader.step() {
            Ok(step) => step,
            Err(error) => {
                // The valid sections before the error are written before the command fails.
                whole.map(|part| parts.blocking_send(part).ok());
                return Err(error);
            }
        };
        match step {
            ExportItem::Event(event) => {
                events += 1;
                if events > events_done {
                    bytes += event.data.len();
                    contents.events.push(*event);
                }
            }
            ExportItem::Document(document) => {
                documents += 1;
                if documents > documents_done {
                    bytes += document.body.len();
                    contents.documents.push(document);
                }
            }
            ExportItem::Section(section) => {
                let complete = section.complete;
                let mut part = whole.take().unwrap_or_default();
                part.contents.events.append(&mut contents.events);
                part.contents.documents.append(&mut contents.documents);
                part.section = section;
                let full = part.contents.events.len() >= PART_EVENTS || bytes >= PART_BYTES;
                if !complete && !full {
                    whole = Some(part);
                    continue;
                }
                bytes = 0;
                if parts.blocking_send(part).is_err() || complete {
                    break complete;
                }
            }
            ExportItem::End => break false,
        }
    };
    whole.map(|part| parts.blocking_send(part).ok());
    Ok(complete)
}

fn document(export: Uuid, section: &Section, version: i64) -> Result<Document, Failure> {
    let body = serde_json::to_string(&ImportProgress { export, contents: section.clone() })?;
    Ok(Document { key: import_key(), version, body: body.into(), due: None })
}

/// Returns the progress of an import into this store, with the version of the document that holds it. Returns `None` if
/// the store has no such document.
pub(crate) async fn progress_of(archive: &dyn Archive) -> Result<Option<(i64, ImportProgress)>, StoreError> {
    let found = archive.documents(&[import_key()]).await?.into_iter().next().flatten();
    let Some(document) = found else { return Ok(None) };
    let progress = serde_json::from_str(&document.body)
        .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", document.key)))?;
    Ok(Some((document.version, progress)))
}

async fn is_empty(archive: &dyn Archive) -> Result<bool, StoreError> {
    Ok(archive.streams("", 1).await?.is_empty() && archive.collections().await?.is_empty())
}
