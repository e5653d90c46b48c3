//! `replay`: sends a range of the log again, to a target that the operator chooses.

mod lines;
mod rerun;
mod target;
mod topic;

use std::{path::PathBuf, time::Duration};

use annals::Position;
use annals_kafka::Settings;
use chrono::{DateTime, Utc};
use clap::Args;
use futures::TryStreamExt;

use self::{rerun::Rerun, target::Target, topic::Topic};
use super::tail::Which;
use crate::{
    again::Again,
    domain::Domain,
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
  annals replay --category order,return --bus kafka://broker:9092 --service order --topic order.history
      to a topic of its own, for a consumer that needs what retention has removed elsewhere
  annals replay --category order,return --since 2h --bus kafka://broker:9092 --service order
      once more to order.events, where the relay of the service has sent it before

Without --bus it writes lines of JSON, as `read --json` does. With it, messages are those of the relay: the same ids, keys,
bytes and headers. Ctrl-C stops at what was written, or acknowledged by the brokers, and says how to go on.

Replaying re-runs no side effects. Commands and replies of sagas are not replayed. In the service's own topic, messages carry the
lane and log of its relay: consumers of ours know by them what they had, and pass over it; so does one that is new and has begun
with later events, so fill it from a topic of its own. That is why only what the relay has sent already goes there. In another
topic they carry no lane: whoever reads it handles each as often as it comes. Consumers of others know repeated ones by ce_id.

Read models are built anew by `read-model NAME rebuild`, from all events. A handler is called with --handler only if the service's
binary has registered it as one that may see events again.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// Only events of these streams.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    stream: Vec<String>,
    /// From this position.
    #[arg(long, value_name = "POSITION", conflicts_with = "since")]
    from: Option<i64>,
    /// Up to this position.
    #[arg(long, value_name = "POSITION", conflicts_with = "until")]
    to: Option<i64>,
    /// Only events recorded at this time or later.
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
    /// Only events recorded before this time.
    #[arg(long, value_name = "TIME")]
    until: Option<Moment>,
    /// Write to this file instead of standard output.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["bus", "handler"])]
    output: Option<PathBuf>,
    /// Append to the file.
    #[arg(long, requires = "output")]
    append: bool,
    /// Send to a topic of this Kafka: `kafka://host:port[,host:port][?name=value&…]`. Any value can stand in a file or
    /// in the environment: `?sasl.password_file=PATH`, `?sasl.password_env=VARIABLE`.
    #[arg(long, value_name = "URL", requires = "service", conflicts_with = "handler")]
    bus: Option<Settings>,
    /// The service whose events are replayed.
    #[arg(long, value_name = "NAME", requires = "bus")]
    service: Option<String>,
    /// The topic [default: the service's own topic for events].
    #[arg(long, value_name = "NAME", requires = "bus")]
    topic: Option<String>,
    /// Call this handler of the service's own binary. The service must have registered the handler with
    /// `Ops::replayable`.
    #[arg(long, value_name = "NAME")]
    handler: Option<String>,
    /// Only count the events.
    #[arg(long)]
    dry_run: bool,
    /// Keep the pauses between the events, divided by this factor, such as 1x or 10x.
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    speed: Option<f64>,
}

fn factor(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('x').unwrap_or(text).parse::<f64>().ok();
    number
        .filter(|factor| factor.is_finite() && *factor > 0.0)
        .ok_or_else(|| "a factor above 0, such as 10x".to_owned())
}

impl Arguments {
    /// Returns the command that continues after position `after`, for a run that ended before `last`.
    fn again(&self, again: &Again, after: i64, last: i64) -> String {
        let mut words = vec!["replay".to_owned()];
        let listed = |names: &[String]| (!names.is_empty()).then(|| names.join(","));
        let options = [
            ("--category", listed(&self.which.category)),
            ("--type", listed(&self.which.types)),
            ("--stream", listed(&self.stream)),
            ("--where", self.which.path.as_ref().map(ToString::to_string)),
            ("--from", Some((after + 1).to_string())),
            ("--to", Some(last.to_string())),
            // The URL is printed without its parameters, because any of them may be a password.
            ("--bus", self.bus.as_ref().map(ToString::to_string)),
            ("--service", self.service.clone()),
            ("--topic", self.topic.clone()),
            ("--handler", self.handler.clone()),
            ("--speed", self.speed.map(|factor| format!("{factor}x"))),
            ("--output", self.output.as_ref().map(|path| path.display().to_string())),
        ];
        for (option, value) in options.into_iter().filter_map(|(option, value)| Some((option, value?))) {
            words.extend([option.to_owned(), value]);
        }
        if self.output.is_some() {
            words.push("--append".to_owned());
        }
        again.command(words)
    }
}

pub(crate) async fn run(
    arguments: Arguments,
    store: &Store,
    domain: &Domain,
    again: &Again,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let archive = store.port();
    let first = match (arguments.from, arguments.since) {
        (Some(position), _) => position.max(1),
        (None, Some(Moment(time))) => position_at(&*archive, time).await?.0 + 1,
        (None, None) => 1,
    };
    let head = archive.status().await?.head.0;
    let mut last = match (arguments.to, arguments.until) {
        (Some(position), _) => position.min(head),
        (None, Some(Moment(time))) => position_at(&*archive, time).await?.0,
        (None, None) => head,
    };
    let mut target = match (&arguments.output, &arguments.bus, &arguments.handler) {
        (None, Some(settings), _) => {
            let topic = Topic::open(settings, &arguments, store).await?;
            if let Some(sent) = topic.sent().filter(|sent| *sent < last) {
                eprintln!("only up to position {sent}: what follows, the relay sends by itself");
                last = sent;
            }
            Target::Topic(Box::new(topic))
        }
        (None, None, Some(handler)) => Target::Handler(Rerun::of(handler, domain, store)?),
        _ if arguments.dry_run => Target::Nowhere,
        (Some(path), ..) => Target::file(path, arguments.append)?,
        (None, None, None) => Target::Output(output),
    };
    if arguments.dry_run {
        target = Target::Nowhere;
    }
    let stop = Stop::on_ctrl_c();
    let bar = match target {
        // On a terminal, the lines and a bar would overwrite each other.
        Target::Output(_) => indicatif::ProgressBar::hidden(),
        _ => progress::bar("replayed", (last - first + 1).max(0).unsigned_abs()),
    };
    let (mut written, mut at) = (0_i64, first - 1);
    let ended = if arguments.speed.is_none() && target.takes_lines() {
        let wanted = (arguments.which.clone(), arguments.stream.clone());
        let taken;
        (written, at, taken) = lines::replay(store, wanted, first..=last, &mut target, (&bar, &stop)).await?;
        match taken {
            Ok(()) => target.commit().await.map(|()| at >= last || !stop.is_asked()),
            Err(failure) => Err(failure),
        }
    } else {
        let mut log = store.log(arguments.which.query(), first..=last).await?;
        let mut pace = Pace::new(arguments.speed);
        let replays = async {
            while let Some(event) = log.try_next().await? {
                let of_stream =
                    arguments.stream.is_empty() || arguments.stream.iter().any(|name| name == event.stream.as_str());
                if of_stream && arguments.which.has(&event.data) {
                    pace.until(event.recorded_at).await;
                    written += 1;
                    target.take(&event).await?;
                }
                at = event.position.0;
                bar.set_position((at - first + 1).unsigned_abs());
            }
            target.commit().await
        };
        let ended = tokio::select! {
            ended = replays => Some(ended),
            () = stop.asked() => None,
        };
        match ended {
            // Messages in flight may still arrive.
            None => target.give_up().await.map(|()| false),
            Some(ended) => ended.map(|()| true),
        }
    };
    bar.finish_and_clear();
    if let Some((before, events)) = target.unacknowledged() {
        (at, written) = (before, written - events);
    }
    let (said, events) = (if arguments.dry_run { "would be replayed" } else { "replayed" }, grouped(written));
    match ended {
        Ok(true) => {}
        Ok(false) => {
            let again = arguments.again(again, at, last);
            eprintln!("stopped: {events} events {said}, up to position {at}; go on with: {again}");
            return Ok(Verdict::Stopped);
        }
        Err(Failure::Told(reason)) if matches!(target, Target::File(_) | Target::Topic(_) | Target::Handler(_)) => {
            let again = arguments.again(again, at, last);
            return Err(Failure::new(format!(
                "{reason}\n{events} events {said}, up to position {at}; go on with: {again}"
            )));
        }
        Err(failure) => return Err(failure),
    }
    if !matches!(target, Target::Output(_)) {
        let until = Position(last.max(at));
        output.line(&format!("{events} events {said}, of positions {first} to {until}"))?;
    }
    Ok(Verdict::Fine)
}

/// Waits between two events for the time between their recording times, divided by a factor.
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
