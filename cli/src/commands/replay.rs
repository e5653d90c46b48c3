//! `replay`: a range of the log, once more, to somewhere else.

mod lines;
mod target;

use std::{path::PathBuf, time::Duration};

use annals::Position;
use chrono::{DateTime, Utc};
use clap::Args;
use futures::TryStreamExt;

use self::target::Target;
use super::tail::Which;
use crate::{
    failure::{Failure, Verdict},
    moment::Moment,
    output::{Output, grouped},
    place::position_at,
    progress,
    stop::Stop,
    store::Store,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals replay --category order --since 2026-11-01 --until 2026-12-01 > november.ndjson
  annals replay --from 1 --to 100000 --output first.ndjson
      with a progress bar; Ctrl-C stops it, and it says how to go on
  annals replay --type payment.charged --dry-run
      counts, and writes nothing
  annals replay --stream order-536365,payment-536365 --speed 10x
      ten times as fast as it happened

It writes lines of JSON, as `read --json` does. No handler is called: to have one see events again, see `subscription reset`.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// Only events of these streams.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    stream: Vec<String>,
    /// From this position on.
    #[arg(long, value_name = "POSITION", conflicts_with = "since")]
    from: Option<i64>,
    /// Up to this position.
    #[arg(long, value_name = "POSITION", conflicts_with = "until")]
    to: Option<i64>,
    /// Only what was recorded since then.
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
    /// Only what was recorded before then.
    #[arg(long, value_name = "TIME")]
    until: Option<Moment>,
    /// Write to this file, not to standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write behind what is in the file already.
    #[arg(long, requires = "output")]
    append: bool,
    /// Count, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Keep the pauses between events, so many times shorter, such as 1x or 10x.
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    speed: Option<f64>,
}

fn factor(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('x').unwrap_or(text).parse::<f64>().ok();
    number
        .filter(|factor| factor.is_finite() && *factor > 0.0)
        .ok_or_else(|| "a factor above 0, such as 10x".to_owned())
}

pub(crate) async fn run(arguments: Arguments, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let archive = store.port();
    let first = match (arguments.from, arguments.since) {
        (Some(position), _) => position.max(1),
        (None, Some(Moment(time))) => position_at(&*archive, time).await?.0 + 1,
        (None, None) => 1,
    };
    let head = archive.status().await?.head.0;
    let last = match (arguments.to, arguments.until) {
        (Some(position), _) => position.min(head),
        (None, Some(Moment(time))) => position_at(&*archive, time).await?.0,
        (None, None) => head,
    };
    let mut target = match (&arguments.output, arguments.dry_run) {
        (_, true) => Target::Nowhere,
        (Some(path), false) => Target::file(path, arguments.append)?,
        (None, false) => Target::Output(output),
    };
    let bar = match target {
        // Its lines and a bar would write over each other on a terminal.
        Target::Output(_) => indicatif::ProgressBar::hidden(),
        _ => progress::bar("replayed", (last - first + 1).max(0).unsigned_abs()),
    };
    let stop = Stop::on_ctrl_c();
    let (mut written, mut at) = (0_i64, first - 1);
    if arguments.speed.is_none() && target.takes_lines() {
        let wanted = (arguments.which.clone(), arguments.stream.clone());
        (written, at) = lines::replay(store, wanted, first..=last, &mut target, (&bar, &stop)).await?;
    } else {
        let mut pace = Pace::new(arguments.speed);
        let mut log = store.log(arguments.which.query(), first..=last).await?;
        loop {
            let next = tokio::select! {
                next = log.try_next() => next?,
                () = stop.asked() => break,
            };
            let Some(event) = next else { break };
            let of_stream =
                arguments.stream.is_empty() || arguments.stream.iter().any(|name| name == event.stream.as_str());
            if of_stream && arguments.which.has(&event.data) {
                tokio::select! {
                    () = pace.until(event.recorded_at) => {}
                    () = stop.asked() => break,
                }
                target.take(&event).await?;
                written += 1;
            }
            at = event.position.0;
            bar.set_position((at - first + 1).unsigned_abs());
        }
    }
    target.commit().await?;
    bar.finish_and_clear();
    let said = if arguments.dry_run { "would be replayed" } else { "replayed" };
    let events = grouped(written);
    if stop.is_asked() {
        let file = arguments.output.map_or_else(String::new, |path| format!(" --output {} --append", path.display()));
        eprintln!("stopped: {events} events {said}, up to position {at}; go on with: --from {}{file}", at + 1);
        return Ok(Verdict::Stopped);
    }
    if !matches!(target, Target::Output(_)) {
        let until = Position(last.max(at));
        output.line(&format!("{events} events {said}, of positions {first} to {until}"))?;
    }
    Ok(Verdict::Fine)
}

/// Waits as long as the pauses between events were, divided by a factor.
struct Pace {
    factor: Option<f64>,
    began: Option<(tokio::time::Instant, DateTime<Utc>)>,
}

impl Pace {
    fn new(factor: Option<f64>) -> Self {
        Self { factor, began: None }
    }

    async fn until(&mut self, time: DateTime<Utc>) {
        let Some(factor) = self.factor else { return };
        let (began, first) = *self.began.get_or_insert((tokio::time::Instant::now(), time));
        let since = (time - first).to_std().unwrap_or_default();
        let wait = Duration::try_from_secs_f64(since.as_secs_f64() / factor).unwrap_or(Duration::MAX);
        if let Some(at) = began.checked_add(wait) {
            tokio::time::sleep_until(at).await;
        }
    }
}
