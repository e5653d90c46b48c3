//! `subscriptions`: shows the progress of the log's subscriptions, and what blocks them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use annals::{
    Archive, Document, StoreError,
    checkpoint::{CHECKPOINTS, Checkpoint},
    pages,
};
use chrono::{DateTime, Utc};
use clap::Args;
use futures::TryStreamExt;
use serde::Serialize;
use tokio::time::Instant;

use crate::{
    failure::{Failure, Verdict},
    moment::{Span, age},
    output::{Output, grouped},
    store::Store,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals subscriptions
  annals subscriptions --sample 10s --behind 1000
      list subscriptions that are at least 1,000 events behind, with their rates over ten seconds")]
pub(crate) struct SubscriptionsArgs {
    /// How long to measure the speed of each subscription; 0s to skip.
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    sample: Span,
    /// Only subscriptions that are at least this many events behind.
    #[arg(long, value_name = "N")]
    behind: Option<i64>,
}

/// A lane of the log, or a partition of a topic.
#[derive(Serialize)]
struct SubscriptionRow {
    subscription: String,
    lane: String,
    /// A position in the log, or an offset in a topic.
    position: i64,
    /// The number of events in the log after `position`. `None` for a topic, whose end is unknown here.
    lag: Option<i64>,
    rate_per_second: Option<f64>,
    owner: Option<String>,
    updated_at: DateTime<Utc>,
    parked: usize,
    waits_for: Option<String>,
}

pub(crate) async fn run(arguments: SubscriptionsArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let archive = store.port();
    let sample = arguments.sample.0;
    let before = if sample.is_zero() { BTreeMap::new() } else { checkpoints(&*archive).await? };
    let began = Instant::now();
    tokio::time::sleep(sample).await;
    // Reads the checkpoints before the head. A checkpoint that was read later could be beyond the head.
    let after = checkpoints(&*archive).await?;
    let status = archive.status().await?;
    let elapsed = began.elapsed();
    let mut rows = Vec::new();
    for (id, checkpoint) in &after {
        let (name, lane) = named(id, checkpoint);
        let of_log = checkpoint.incarnation.is_none();
        let lag = of_log.then(|| (status.head.0 - checkpoint.next).max(0));
        if arguments.behind.is_some_and(|behind| lag.is_none_or(|lag| lag < behind)) {
            continue;
        }
        let parked = parked(&*archive, name, id).await?;
        let waits_for = match &status.waits_for {
            _ if checkpoint.paused => Some("an operator: it is paused".to_owned()),
            Some(writer) if lag.is_some_and(|lag| lag == 0) => Some(writer.to_string()),
            _ if parked > 0 => Some(format!("{parked} parked: see dead-letters")),
            _ => None,
        };
        rows.push(SubscriptionRow {
            subscription: name.to_owned(),
            lane: lane.to_owned(),
            position: checkpoint.next,
            lag,
            rate_per_second: before.get(id).map(|before| rate(before, checkpoint, elapsed)),
            owner: checkpoint.holder.as_deref().map(str::to_owned),
            updated_at: checkpoint.at,
            parked,
            waits_for,
        });
    }
    output.list(&["SUBSCRIPTION", "LANE", "POSITION", "LAG", "RATE", "OWNER", "MOVED", "WAITS FOR"], &rows, |row| {
        vec![
            row.subscription.clone(),
            row.lane.clone(),
            grouped(row.position),
            row.lag.map_or("-".into(), grouped),
            row.rate_per_second.map_or("-".into(), |rate| format!("{}/s", grouped(rate.round() as i64))),
            row.owner.clone().unwrap_or_else(|| "-".into()),
            age(row.updated_at) + " ago",
            row.waits_for.clone().unwrap_or_default(),
        ]
    })?;
    if let Some(writer) = status.waits_for.filter(|_| !output.json) {
        output.line(&format!("readers of the log wait for {writer}"))?;
    }
    Ok(Verdict::Fine)
}

/// Splits the id of a checkpoint into the name of the subscription and the name of its lane. A group has one checkpoint
/// per partition, `<group>/<topic>/<number>`; a subscription of the log has one per lane.
fn named<'a>(id: &'a str, checkpoint: &Checkpoint) -> (&'a str, &'a str) {
    match checkpoint.incarnation {
        Some(_) => id.split_once('/').unwrap_or((id, "")),
        None => id.rsplit_once('/').unwrap_or((id, "")),
    }
}

fn rate(before: &Checkpoint, after: &Checkpoint, elapsed: Duration) -> f64 {
    (after.next - before.next) as f64 / elapsed.as_secs_f64()
}

/// Returns all checkpoints by the ids of their documents. Skips unreadable checkpoints, which `verify` reports.
pub(crate) async fn checkpoints(archive: &dyn Archive) -> Result<BTreeMap<Arc<str>, Checkpoint>, StoreError> {
    let documents = documents(archive, CHECKPOINTS).await?;
    let read = |document: Document| {
        let checkpoint = serde_json::from_str(&document.body).ok()?;
        Some((document.key.id, checkpoint))
    };
    Ok(documents.into_iter().filter_map(read).collect())
}

/// Returns a whole collection. Only for collections that are always small.
pub(crate) async fn documents(archive: &dyn Archive, collection: &str) -> Result<Vec<Document>, StoreError> {
    pages::collection(archive, collection, "").try_collect().await
}

/// Returns the number of parked messages of a lane.
async fn parked(archive: &dyn Archive, name: &str, id: &str) -> Result<usize, StoreError> {
    #[derive(serde::Deserialize)]
    struct ParkedLane {
        lane: String,
    }
    let documents = documents(archive, &format!("parked.{name}")).await?;
    let of_lane =
        |document: &&Document| serde_json::from_str::<ParkedLane>(&document.body).is_ok_and(|parked| parked.lane == id);
    Ok(documents.iter().filter(of_lane).count())
}
