//! `import`: a store out of a file.

use std::{path::PathBuf, sync::Arc};

use annals::{Archive, Document, DocumentKey, StoreError, archive::Contents};
use clap::Args;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    exported::{Reader, Section, Step},
    failure::{Failure, Verdict},
    output::{Output, grouped},
    progress,
    stop::Stop,
    store::Store,
};

/// The collection of the one document that says how far an import is.
pub(crate) const IMPORT: &str = "import";

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals migrate --store postgres://owner@localhost/shop
  annals import shop.ndjson.zst --store postgres://owner@localhost/shop
      into a store that must be empty; broken off, the same command goes on

Everything is kept as it was: ids, versions, positions with their gaps, times, and every byte of a payload. No service may
run on the store meanwhile.")]
pub(crate) struct Arguments {
    /// What `export` wrote.
    file: PathBuf,
}

/// How far an import is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Of which export.
    pub export: Uuid,
    #[serde(flatten)]
    pub contents: Section,
}

pub(crate) async fn run(arguments: Arguments, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let path = arguments.file.display();
    let archive = store.port();
    let mut reader = Reader::open(&arguments.file)?;
    let export = reader.header().id;
    let (mut version, done) = match progress_of(&*archive).await? {
        Some((version, progress)) if progress.export == export => (version, progress.contents),
        Some((_, progress)) => {
            return Err(Failure::new(format!("the store was filled from another export ({})", progress.export)));
        }
        None if is_empty(&*archive).await? => (0, Section::default()),
        None => return Err(Failure::new("the store is not empty: an import needs one of its own")),
    };
    let stop = Stop::on_ctrl_c();
    let bar = progress::bar("imported", 0);
    let (mut events, mut documents) = (0, 0);
    let (mut contents, mut last) = (Contents::default(), None::<Section>);
    loop {
        match reader.step()? {
            Step::Event(event) => {
                events += 1;
                if events > done.events {
                    contents.events.push(Arc::new(*event));
                }
            }
            Step::Document(document) => {
                documents += 1;
                if documents > done.documents {
                    contents.documents.push(document);
                }
            }
            Step::Section(section) => {
                bar.set_length(section.until.unwrap_or_default().unsigned_abs());
                bar.set_position(section.position.unsigned_abs());
                let complete = section.complete;
                // What is written was checked, and in the same commit stands how far it is.
                if !contents.events.is_empty() || !contents.documents.is_empty() || (complete && !done.complete) {
                    version += 1;
                    contents.documents.push(document(export, &section, version)?);
                    archive.restore(std::mem::take(&mut contents)).await.map_err(refused)?;
                }
                last = Some(section);
                if complete {
                    break;
                }
                if stop.is_asked() {
                    bar.finish_and_clear();
                    eprintln!("stopped after {} events; go on with: import {path}", grouped(events as i64));
                    return Ok(Verdict::Stopped);
                }
            }
            Step::End => {
                bar.finish_and_clear();
                return Err(Failure::new(format!(
                    "{path} is not complete: it ends after {} events. They are imported; go on with `export --resume`, and \
                     then import it again",
                    grouped(last.map_or(0, |section| section.events) as i64)
                )));
            }
        }
    }
    bar.finish_and_clear();
    if done.complete {
        eprintln!("{path} was imported before");
    }
    let contents = last.unwrap_or_default();
    if output.json {
        output.value(&Progress { export, contents })?;
    } else {
        let (events, documents) = (grouped(contents.events as i64), grouped(contents.documents as i64));
        output.line(&format!(
            "{}: {events} events, {documents} documents, last position {}",
            store.url, contents.position
        ))?;
    }
    Ok(Verdict::Fine)
}

fn key() -> DocumentKey {
    DocumentKey::new(IMPORT, "progress")
}

fn document(export: Uuid, section: &Section, version: i64) -> Result<Document, Failure> {
    let body = serde_json::to_string(&Progress { export, contents: section.clone() })?;
    Ok(Document { key: key(), version, body: body.into(), due: None })
}

/// How far an import of a store is, with the version of the document that says so; `None` if there was none.
pub(crate) async fn progress_of(archive: &dyn Archive) -> Result<Option<(i64, Progress)>, StoreError> {
    let found = archive.documents(&[key()]).await?.into_iter().next().flatten();
    let Some(document) = found else { return Ok(None) };
    let progress = serde_json::from_str(&document.body)
        .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", document.key)))?;
    Ok(Some((document.version, progress)))
}

async fn is_empty(archive: &dyn Archive) -> Result<bool, StoreError> {
    Ok(archive.streams("", 1).await?.is_empty() && archive.collections().await?.is_empty())
}

fn refused(error: annals::CommitError) -> Failure {
    Failure::new(format!("the store did not take it: {error}. Does something else write to it?"))
}
