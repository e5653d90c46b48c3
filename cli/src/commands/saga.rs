//! `saga`: shows the history of one saga.

mod action;
mod timeline;

use annals::{
    Recorded, StreamId, Version, pages,
    saga::{Path, SagaEvent},
};
use clap::{Args, ValueEnum};
use futures::TryStreamExt;

use super::sagas;
use crate::{
    failure::{Failure, Verdict},
    moment::{self, span},
    output::{Output, shown},
    store::Store,
};

/// The maximum number of events to show. A normal saga has some tens of events.
const EVENTS_MAX: usize = 10_000;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals saga 536365
      show steps, attempts, commands, replies, timers and errors
  annals saga saga.return-C536379 --diagram > path.mmd
      draw the path of the saga as a Mermaid flowchart; --diagram=svg draws a picture
  annals saga 536365 retry --reason \"the card provider is back\"
      send the commands of the stuck step again")]
pub(crate) struct SagaArgs {
    /// The saga's id, or its stream if several sagas have the id: `536365`, `saga.checkout-536365`.
    #[arg(value_name = "ID")]
    id: String,
    /// Draw the path of the saga, as a Mermaid flowchart or an SVG.
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "mermaid")]
    diagram: Option<Format>,
    /// The action on the saga, if the saga is stuck.
    #[command(subcommand)]
    act: Option<action::SagaAction>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Mermaid,
    Svg,
}

pub(crate) async fn run(arguments: SagaArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let stream = locate(store, &arguments.id).await?;
    if let Some(verb) = arguments.act {
        return action::run(verb, &stream, store, output).await;
    }
    let history = history(store, &stream).await?;
    if let Some(format) = arguments.diagram {
        let path = Path::of(history.iter().map(|(_, event)| event));
        let drawn = match format {
            Format::Mermaid => path.mermaid(),
            Format::Svg => path.svg(stream.as_str()),
        };
        output.line(drawn.trim_end())?;
        return Ok(Verdict::Fine);
    }
    let entries = timeline::entries(&history);
    if output.json {
        entries.iter().try_for_each(|entry| output.value(entry))?;
        return Ok(Verdict::Fine);
    }
    let Some((first, last)) = history.first().zip(history.last()) else { return Ok(Verdict::Fine) };
    let progress = last.1.progress();
    output.line(&shown(&format!("{stream}  {}", timeline::state(progress))))?;
    output.line(&format!("started {}, definition {}", moment::time(first.0.recorded_at), progress.definition))?;
    output.line(&format!("correlation {}", first.0.metadata.correlation_id))?;
    output.line("")?;
    for entry in &entries {
        let since = format!("+{}", span(entry.at - first.0.recorded_at));
        for (number, line) in entry.lines.iter().enumerate() {
            let margin = if number == 0 { since.as_str() } else { "" };
            output.with_margin(&format!("{margin:>9}  "), &shown(line))?;
        }
    }
    if let Some(waits) = timeline::waits(progress, store.port().clock().now()) {
        output.line("")?;
        output.line(&waits)?;
    }
    Ok(Verdict::Fine)
}

/// Returns the stream of a saga by its id. Fails if several sagas have the id.
pub(crate) async fn locate(store: &Store, id: &str) -> Result<StreamId, Failure> {
    let archive = store.port();
    let mut found = Vec::new();
    if id.starts_with("saga.") {
        let stream = StreamId::from_stored(id);
        if !archive.read_stream(&stream, Version::START, 1).await?.is_empty() {
            return Ok(stream);
        }
    }
    let names = sagas::names(&*archive).await?;
    for name in &names {
        let stream = StreamId::from_stored(&format!("saga.{name}-{id}"));
        if !archive.read_stream(&stream, Version::START, 1).await?.is_empty() {
            found.push(stream);
        }
    }
    match found.as_slice() {
        [stream] => Ok(stream.clone()),
        [] if names.is_empty() => Err(Failure::new("this store has no sagas")),
        [] => Err(Failure::new(format!("there is no saga {id}; this store has sagas named: {}", names.join(", ")))),
        several => {
            let streams: Vec<_> = several.iter().map(StreamId::as_str).collect();
            Err(Failure::new(format!("several sagas have the id {id}: name a stream instead: {}", streams.join(", "))))
        }
    }
}

/// Returns the events of a saga.
pub(crate) async fn history(store: &Store, stream: &StreamId) -> Result<Vec<(Recorded, SagaEvent)>, Failure> {
    let archive = store.port();
    let mut history = Vec::new();
    let mut events = pages::history(&*archive, stream, Version::START);
    while history.len() < EVENTS_MAX
        && let Some(event) = events.try_next().await?
    {
        let decoded = event.decode::<SagaEvent>()?;
        history.extend(decoded.map(|decoded| (event, decoded)));
    }
    Ok(history)
}
