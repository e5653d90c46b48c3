//! The arguments of `replay`.

use std::path::PathBuf;

use annals_kafka::Settings;
use clap::Args;

use crate::{event_filter::EventFilter, moment::Moment, resume_command::ResumeCommand};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals replay --category order --since 2026-11-01 --until 2026-12-01 > november.ndjson
  annals replay --from 1 --to 100000 --output first.ndjson
      show a progress bar; after Ctrl-C, print the command that continues
  annals replay --type payment.charged --dry-run
      only count the events
  annals replay --stream order-536365,payment-536365 --speed 10x
      replay ten times as fast as the events were recorded
  annals replay --category order,return --bus kafka://broker:9092 --service order --topic order.history
      send to a separate topic, for a consumer that needs events that retention has removed elsewhere
  annals replay --category order,return --since 2h --bus kafka://broker:9092 --service order
      send again to order.events, where the relay of the service has sent the same events before

Without --bus, the command writes lines of JSON, as `read --json` does. With --bus, the command sends the messages of the relay: the
same ids, keys, bytes and headers. Ctrl-C stops after the last event that was written, or that the brokers acknowledged, and the
command prints how to continue.

A replay repeats no side effects: commands and replies of sagas are not replayed. In the service's own topic, messages carry the
lane and the log of its relay. A consumer that uses Annals recognizes the messages that it has handled, and skips them. A new
consumer that has begun with later events skips the replayed messages too, so fill a new consumer from a separate topic. For the
same reason, the own topic gets only events that the relay has sent already. In another topic, messages carry no lane, and a
consumer handles each copy. Other consumers recognize copies by ce_id.

`read-model NAME rebuild` builds read models again, from all events. --handler calls a handler only if the service's binary has
registered the handler as safe for repeated events.")]
pub(crate) struct ReplayArgs {
    #[command(flatten)]
    pub filter: EventFilter,
    /// Only events of these streams.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub stream: Vec<String>,
    /// From this position.
    #[arg(long, value_name = "POSITION", conflicts_with = "since")]
    pub from: Option<i64>,
    /// Up to this position.
    #[arg(long, value_name = "POSITION", conflicts_with = "until")]
    pub to: Option<i64>,
    /// Only events recorded at this time or later.
    #[arg(long, value_name = "TIME")]
    pub since: Option<Moment>,
    /// Only events recorded before this time.
    #[arg(long, value_name = "TIME")]
    pub until: Option<Moment>,
    /// Write to this file instead of standard output.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["bus", "handler"])]
    pub output: Option<PathBuf>,
    /// Append to the file.
    #[arg(long, requires = "output")]
    pub append: bool,
    /// Send to a topic of this Kafka: `kafka://host:port[,host:port][?name=value&…]`. Any value can come from a file or
    /// from the environment: `?sasl.password_file=PATH`, `?sasl.password_env=VARIABLE`.
    #[arg(long, value_name = "URL", requires = "service", conflicts_with = "handler")]
    pub bus: Option<Settings>,
    /// The service whose events are replayed.
    #[arg(long, value_name = "NAME", requires = "bus")]
    pub service: Option<String>,
    /// The topic [default: the service's own topic for events].
    #[arg(long, value_name = "NAME", requires = "bus")]
    pub topic: Option<String>,
    /// Call this handler of the service's own binary. The service must have registered the handler with
    /// `Ops::replayable`.
    #[arg(long, value_name = "NAME")]
    pub handler: Option<String>,
    /// Only count the events.
    #[arg(long)]
    pub dry_run: bool,
    /// Keep the pauses between the events, divided by this factor, such as 1x or 10x.
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    pub speed: Option<f64>,
}

fn factor(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('x').unwrap_or(text).parse::<f64>().ok();
    number
        .filter(|factor| factor.is_finite() && *factor > 0.0)
        .ok_or_else(|| "not a factor: write a number above 0, such as 10x".to_owned())
}

impl ReplayArgs {
    /// Returns the command that continues after position `after`, for a run that ended before `last`.
    pub fn resumed(&self, resume: &ResumeCommand, after: i64, last: i64) -> String {
        let mut words = vec!["replay".to_owned()];
        let listed = |names: &[String]| (!names.is_empty()).then(|| names.join(","));
        let options = [
            ("--category", listed(&self.filter.category)),
            ("--type", listed(&self.filter.types)),
            ("--stream", listed(&self.stream)),
            ("--where", self.filter.path.as_ref().map(ToString::to_string)),
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
        resume.command(words)
    }
}
