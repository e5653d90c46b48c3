//! `export`: writes a store to a file.

use std::{io, path::PathBuf};

use annals::{
    LogQuery, Scan,
    archive::{IMPORT, Stored},
};
use chrono::Utc;
use clap::Args;
use futures::TryStreamExt;
use serde::Serialize;
use uuid::Uuid;

use crate::{
    again::Again,
    event::Lines,
    exported::{FORMAT, Header, Section, Writer},
    failure::{Failure, Verdict},
    output::{Output, grouped},
    progress,
    stop::Stop,
    store::Store,
};

/// The number of documents per read.
const PAGE: usize = 500;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals export shop.ndjson.zst
      everything: events with their positions and times, documents with their versions
  annals export shop.ndjson.zst --resume
      goes on with one that was broken off
  annals export shop.ndjson --json
      not compressed, since the name does not end in .zst

The log is exported as it stood when it began. Documents (checkpoints, read models) of services that run meanwhile are each
of another moment: stop the services if they are to be exact.")]
pub(crate) struct Arguments {
    /// The file; compressed if its name ends in .zst.
    file: PathBuf,
    /// Continue an interrupted file after its last complete section.
    #[arg(long)]
    resume: bool,
}

#[derive(Serialize)]
struct Exported {
    file: String,
    id: Uuid,
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
    let broken = |error: io::Error| Failure::new(format!("{} cannot be written: {error}", path.display()));
    let (mut writer, header) = match arguments.resume {
        true => match Writer::go_on(path)? {
            Some(found) => found,
            None => {
                return Err(Failure::new(format!("{} is complete: there is nothing to go on with", path.display())));
            }
        },
        false => {
            let header = Header {
                annals_export: FORMAT,
                id: Uuid::new_v4(),
                store: store.url.to_string(),
                taken_at: Utc::now(),
                archive: None,
            };
            (Writer::begin(path, &header)?, header)
        }
    };
    if header.archive.is_some() {
        return Err(Failure::new(format!(
            "{} is an archive, not an export: `archive --resume` goes on with it",
            path.display()
        )));
    }
    if header.store != store.url.to_string() {
        return Err(Failure::new(format!(
            "{} was taken from {}, not from {}",
            path.display(),
            header.store,
            store.url
        )));
    }
    let stop = Stop::on_ctrl_c();
    let stopped = |writer: &mut Writer| {
        writer.section(false).map_err(broken)?;
        let again = again.command(["export", &*path.to_string_lossy(), "--resume"]);
        eprintln!("stopped after position {}; go on with: {again}", grouped(writer.so_far().position));
        Ok(Verdict::Stopped)
    };
    if writer.so_far().until.is_none() {
        let archive = store.port();
        let (collection_done, mut after) = writer.so_far().document.clone().unwrap_or_default();
        for collection in archive.collections().await? {
            // The progress of an import describes this store and is not part of its contents.
            if *collection < *collection_done || &*collection == IMPORT {
                continue;
            }
            if *collection != *collection_done {
                after = String::new();
            }
            loop {
                let page = archive.scan(&collection, &Scan::After(after.as_str().into()), PAGE).await?;
                let Some(last) = page.last() else { break };
                after = last.key.id.to_string();
                page.iter().try_for_each(|document| writer.document(document)).map_err(broken)?;
                if stop.is_asked() {
                    return stopped(&mut writer);
                }
            }
        }
        writer.until(archive.status().await?.head.0).map_err(broken)?;
    }
    let until = writer.so_far().until.unwrap_or_default();
    let bar = progress::bar("exported", until.unsigned_abs());
    let is_json = store.has_json_only();
    let add = move |lines: &mut Lines, event: Stored<'_>| lines.add(&event, is_json);
    let mut log = store.batches(LogQuery::all(), writer.so_far().position + 1..=until, add).await?;
    while let Some(lines) = log.try_next().await? {
        // An empty page does not say at which position it ends.
        if lines.count == 0 {
            continue;
        }
        writer.events(&lines).map_err(broken)?;
        bar.set_position(lines.position.unsigned_abs());
        if stop.is_asked() {
            bar.finish_and_clear();
            return stopped(&mut writer);
        }
    }
    writer.section(true).map_err(broken)?;
    bar.finish_and_clear();
    let contents = writer.so_far().clone();
    if output.json {
        output.value(&Exported { file: path.display().to_string(), id: header.id, contents })?;
    } else {
        let (events, documents) = (grouped(contents.events as i64), grouped(contents.documents as i64));
        output.line(&format!(
            "{}: {events} events, {documents} documents, blake3 {}",
            path.display(),
            contents.blake3
        ))?;
    }
    Ok(Verdict::Fine)
}
