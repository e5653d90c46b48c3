//! `read`: prints the events of a stream.

use std::{collections::BTreeMap, path::PathBuf};

use annals::{Recorded, StreamId, Version, archive::line::write_line, pages};
use chrono::{DateTime, Utc};
use clap::Args;
use futures::TryStreamExt;

use crate::{
    exported::{ExportItem, ExportReader},
    failure::{Failure, Verdict},
    moment::{self, Moment},
    output::{Output, one_line, shown},
    store::Store,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals read order-536365
      show every event of an order
  annals read order-536365 --at \"2026-11-21 15:04\"
      show the events of an order up to that time
  annals read order-536365 --from 3 --to 5 --json | jq .data
      print the payloads of three events
  annals read order-536365 --archive orders-2026.ndjson.zst
      show the events of an archived stream")]
pub(crate) struct ReadArgs {
    /// The stream, such as `order-536365`.
    #[arg(value_name = "STREAM")]
    stream: String,
    /// From this version on.
    #[arg(long, value_name = "VERSION", default_value_t = 1)]
    from: i64,
    /// Up to this version.
    #[arg(long, value_name = "VERSION", default_value_t = i64::MAX, hide_default_value = true)]
    to: i64,
    /// Only events recorded up to this time.
    #[arg(long, value_name = "TIME")]
    at: Option<Moment>,
    /// Read from these files, which `archive` or `export` wrote, instead of a store.
    #[arg(long, value_name = "FILE")]
    archive: Vec<PathBuf>,
}

impl ReadArgs {
    pub fn is_of_archives(&self) -> bool {
        !self.archive.is_empty()
    }

    /// Returns whether this event and all later events are outside the range. Within a stream, versions and times never
    /// fall.
    fn ends_before(&self, version: i64, recorded_at: DateTime<Utc>) -> bool {
        version > self.to || self.at.is_some_and(|Moment(at)| recorded_at > at)
    }
}

pub(crate) async fn run(arguments: ReadArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let stream = StreamId::from_stored(&arguments.stream);
    let events = store.port();
    let after = Version(arguments.from.saturating_sub(1).max(0));
    let mut history = pages::history(&*events, &stream, after);
    let mut any = false;
    while let Some(event) = history.try_next().await? {
        any = true;
        if arguments.ends_before(event.version.0, event.recorded_at) {
            return Ok(Verdict::Fine);
        }
        show(&event, output)?;
    }
    if !any && events.read_stream(&stream, Version::START, 1).await?.is_empty() {
        return Err(Failure::new(missing(&arguments.stream)));
    }
    Ok(Verdict::Fine)
}

/// Reads the events from files. Reads each file to its end, so that a damaged file is reported before any of its events
/// counts as valid.
pub(crate) fn from_archives(arguments: ReadArgs, output: &mut Output) -> Result<Verdict, Failure> {
    let mut found = BTreeMap::new();
    for path in &arguments.archive {
        let mut reader = ExportReader::open(path)?;
        let mut complete = false;
        loop {
            match reader.step()? {
                ExportItem::Event(event) if event.stream == arguments.stream => _ = found.insert(event.version, event),
                ExportItem::Event(_) | ExportItem::Document(_) => {}
                ExportItem::Section(section) => complete = section.complete,
                ExportItem::End => break,
            }
            if complete {
                break;
            }
        }
        if !complete {
            return Err(Failure::new(format!(
                "{} is incomplete: continue the file with `archive --resume` or `export --resume`",
                path.display()
            )));
        }
    }
    if found.is_empty() {
        let files: Vec<_> = arguments.archive.iter().map(|path| path.display().to_string()).collect();
        return Err(Failure::new(format!("there is no stream {} in {}", arguments.stream, files.join(", "))));
    }
    for event in found.into_values().skip_while(|event| event.version.0 < arguments.from) {
        if arguments.ends_before(event.version.0, event.recorded_at) {
            break;
        }
        show(&event.recorded(), output)?;
    }
    Ok(Verdict::Fine)
}

fn missing(stream: &str) -> String {
    let hint = match StreamId::parse(stream) {
        Ok(stream) => format!("`streams --category {}` lists the streams of this category", stream.category()),
        Err(_) => "a stream is named `<category>-<id>`, such as order-536365; `streams` lists all streams".to_owned(),
    };
    format!("there is no stream {stream}; {hint}")
}

/// Prints an event with its payload, or as a line of JSON.
pub(crate) fn show(event: &Recorded, output: &mut Output) -> Result<(), Failure> {
    if output.json {
        let mut line = Vec::new();
        write_line(&event.into(), false, &mut line);
        return output.lines(&line);
    }
    output.line(&one_line(&format!(
        "{} {}  {} v{}  position {}",
        moment::time(event.recorded_at),
        event.type_name,
        event.stream,
        event.version,
        event.position
    )))?;
    output.line(&format!("  id {}  cause {}", event.id, event.metadata.causation_id))?;
    // Raw text is the only form that keeps the order of the keys. For people, the payload is pretty-printed.
    let data = match annals::json::pretty(&event.data) {
        Ok(data) => data,
        Err(error) => format!("not JSON ({error}): {}", event.data),
    };
    data.lines().try_for_each(|line| output.line(&format!("  {}", shown(line))))
}
