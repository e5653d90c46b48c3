//! `trace`: prints everything that one request caused, as a tree.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use annals::{
    LogQuery, Recorded, StreamId, Version,
    saga::{Command, Glimpse},
};
use clap::Args;
use futures::TryStreamExt;
use serde::{Serialize, de::IgnoredAny};
use uuid::Uuid;

use crate::{
    failure::{Failure, Verdict},
    moment::{Moment, span},
    output::{Output, shown},
    store::Store,
};

/// The maximum number of events shown per request.
const EVENTS_MAX: usize = 10_000;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals trace 5b2c1a34-5f6e-5d7c-8b9a-0c1d2e3f4a5b
  annals trace order-536365
      show everything that was caused by the request that started this stream

The log has no index of requests, so the command reads the whole log.")]
pub(crate) struct TraceArgs {
    /// The correlation id, or the name of a stream whose first event has that id.
    #[arg(value_name = "CORRELATION_ID")]
    what: String,
    /// Only consider events recorded at this time or later.
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
}

/// A node of the tree: an event, or a command that was sent.
#[derive(Serialize)]
struct Node {
    id: Uuid,
    /// The id of the cause. If the cause is the request itself, no node has this id.
    cause: Uuid,
    /// The number of steps from the request.
    depth: usize,
    #[serde(rename = "type")]
    type_name: String,
    /// The stream of an event.
    stream: Option<String>,
    version: Option<i64>,
    position: Option<i64>,
    /// The service to which a command is sent.
    to: Option<String>,
    /// The time since the first event, in milliseconds.
    after_ms: i64,
}

pub(crate) async fn run(arguments: TraceArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let (correlation, from) = begin(&arguments.what, store).await?;
    let mut log = store.log(LogQuery::all(), from..=i64::MAX).await?;
    let mut events: Vec<Arc<Recorded>> = Vec::new();
    while let Some(event) = log.try_next().await? {
        let recent = arguments.since.is_none_or(|Moment(since)| event.recorded_at >= since);
        if recent && event.metadata.correlation_id == correlation {
            events.push(event);
            if events.len() == EVENTS_MAX {
                eprintln!("only the first {EVENTS_MAX} events are shown");
                break;
            }
        }
    }
    drop(log);
    if events.is_empty() {
        return Err(Failure::new(format!("no event has the correlation id {correlation}")));
    }
    let nodes = tree(&events);
    if output.json {
        nodes.iter().try_for_each(|node| output.value(node))?;
        return Ok(Verdict::Fine);
    }
    output.line(&format!("request {correlation}, {} events", events.len()))?;
    for (at, node) in nodes.iter().enumerate() {
        let since = span(chrono::TimeDelta::milliseconds(node.after_ms));
        let what = match (&node.stream, &node.to) {
            (Some(stream), _) => format!("{}  {stream} v{}", node.type_name, node.version.unwrap_or_default()),
            (None, to) => format!("→ {}  to {}", node.type_name, to.as_deref().unwrap_or("?")),
        };
        output.line(&format!("{}{}  +{since}", branches(&nodes, at), shown(&what)))?;
    }
    Ok(Verdict::Fine)
}

/// Returns the correlation id, and the position at which the search starts.
async fn begin(what: &str, store: &Store) -> Result<(Uuid, i64), Failure> {
    if let Ok(correlation) = what.parse() {
        return Ok((correlation, 1));
    }
    let first = store.port().read_stream(&StreamId::from_stored(what), Version::START, 1).await?;
    // The search starts at the first position, because the request may have written events to other streams before the
    // first event of this stream.
    first.first().map(|event| (event.metadata.correlation_id, 1)).ok_or_else(|| {
        Failure::new(format!(
            "{what:?} is neither a correlation id, such as {}, nor a stream of this store",
            Uuid::nil()
        ))
    })
}

/// Arranges the nodes depth first, in log order, with each effect below its cause.
fn tree(events: &[Arc<Recorded>]) -> Vec<Node> {
    let start = events.first().map_or_else(chrono::Utc::now, |event| event.recorded_at);
    let mut nodes = Vec::new();
    let mut commands = HashMap::new();
    for event in events {
        let after_ms = (event.recorded_at - start).num_milliseconds();
        nodes.push(Node {
            id: event.id,
            cause: event.metadata.causation_id,
            depth: 0,
            type_name: event.type_name.to_string(),
            stream: Some(event.stream.to_string()),
            version: Some(event.version.0),
            position: Some(event.position.0),
            to: None,
            after_ms,
        });
        if !event.stream.category().starts_with("saga.") {
            continue;
        }
        let sent = Glimpse::<IgnoredAny, Vec<Command>>::of(&event.data);
        for command in sent.map(|event| event.send).unwrap_or_default() {
            // All attempts at a step share one command id. The tree shows the command at its first attempt.
            if commands.insert(command.id, ()).is_none() {
                nodes.push(Node {
                    id: command.id,
                    cause: event.id,
                    depth: 0,
                    type_name: command.type_name,
                    stream: None,
                    version: None,
                    position: None,
                    to: Some(command.to),
                    after_ms,
                });
            }
        }
    }
    let known: BTreeSet<Uuid> = nodes.iter().map(|node| node.id).collect();
    let mut effects: HashMap<Uuid, Vec<usize>> = HashMap::new();
    let mut open: Vec<(usize, usize)> = Vec::new();
    for (at, node) in nodes.iter().enumerate() {
        if known.contains(&node.cause) && node.cause != node.id {
            effects.entry(node.cause).or_default().push(at);
        } else {
            open.push((at, 1));
        }
    }
    open.reverse();
    let mut order = Vec::new();
    while let Some((at, depth)) = open.pop() {
        order.push((at, depth));
        let below = effects.remove(&nodes[at].id).unwrap_or_default();
        open.extend(below.into_iter().rev().map(|at| (at, depth + 1)));
    }
    let mut nodes: Vec<Option<Node>> = nodes.into_iter().map(Some).collect();
    let placed = order.into_iter().filter_map(|(at, depth)| nodes[at].take().map(|node| Node { depth, ..node }));
    placed.collect()
}

/// Returns the lines drawn before a node, one for each level that continues below the node.
fn branches(nodes: &[Node], at: usize) -> String {
    let depth = nodes[at].depth;
    let goes_on = |level: usize| {
        let below = nodes[at + 1..].iter().take_while(|node| node.depth >= level);
        below.into_iter().any(|node| node.depth == level)
    };
    let mut text = String::new();
    for level in 1..depth {
        text += if goes_on(level) { "│  " } else { "   " };
    }
    text + if goes_on(depth) { "├─ " } else { "└─ " }
}
