//! `dead-letters`: lists messages that could not be handled, and redrives or drops them.

use std::sync::Arc;

use annals::{Archive, DeadLetters, Operator, StoreError, parking::DeadLetter};
use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    confirm::ActionArgs,
    failure::{Failure, Verdict},
    moment::{self, age},
    output::{Output, grouped, short, shown},
    store::Store,
};

/// The maximum number of characters of a reason in a table.
const REASON_CHARS_MAX: usize = 60;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals dead-letters
      list parked messages by key; exit code 1 if there are any
  annals dead-letters show order.mailer order-536365
  annals dead-letters redrive order.mailer order-536365 --reason \"the mail server is back\"
      handle the messages of this key again, in order; --all redrives all keys
  annals dead-letters drop order.mailer order-536365 --reason \"test order\" --yes
      drop the first message of this key; the messages behind the dropped message are handled next")]
pub(crate) struct DeadLettersArgs {
    #[command(subcommand)]
    what: Option<DeadLettersCommand>,
}

#[derive(Debug, Subcommand)]
enum DeadLettersCommand {
    /// List parked keys, each with its first message.
    List {
        /// Only the keys of this subscription or group.
        subscription: Option<String>,
    },
    /// Show a whole parked message.
    Show {
        /// The subscription or group of the message.
        subscription: String,
        /// The key or the id of the message.
        key: String,
    },
    /// Redrive messages, so that their service tries them again.
    Redrive {
        /// The subscription or group of the messages.
        subscription: String,
        /// A key, or the id of a message.
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        key: Option<String>,
        /// All keys of the subscription.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        act: ActionArgs,
    },
    /// Drop a message for good.
    Drop {
        /// The subscription or group of the message.
        subscription: String,
        /// The key or the id of the message.
        key: String,
        #[command(flatten)]
        act: ActionArgs,
    },
}

#[derive(Serialize)]
struct DeadLetterRow {
    subscription: String,
    key: String,
    id: String,
    reason: String,
    attempts: u32,
    parked_at: DateTime<Utc>,
    retries_at: Option<DateTime<Utc>>,
    behind: usize,
    message: Box<RawValue>,
}

impl DeadLetterRow {
    fn of(letter: DeadLetter) -> Self {
        let DeadLetter { id, parked, retries_at, behind } = letter;
        Self {
            subscription: parked.subscription.to_string(),
            key: parked.key.to_string(),
            id: id.to_string(),
            reason: parked.reason,
            attempts: parked.attempts,
            parked_at: parked.parked_at,
            retries_at,
            behind,
            message: parked.message,
        }
    }
}

pub(crate) async fn run(arguments: DeadLettersArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    match arguments.what.unwrap_or(DeadLettersCommand::List { subscription: None }) {
        DeadLettersCommand::List { subscription } => list(subscription, store, output).await,
        DeadLettersCommand::Show { subscription, key } => show(&subscription, &key, store, output).await,
        DeadLettersCommand::Redrive { subscription, key, all: _, act } => {
            redrive(&subscription, key, &act, store, output).await
        }
        DeadLettersCommand::Drop { subscription, key, act } => drop_one(&subscription, &key, &act, store, output).await,
    }
}

async fn letters(store: &Store, subscription: &str) -> Result<Vec<DeadLetterRow>, StoreError> {
    let letters = DeadLetters::new(store.port()).list(subscription).await?;
    Ok(letters.into_iter().map(DeadLetterRow::of).collect())
}

/// Returns the subscriptions and groups that have parked messages.
async fn subscriptions(archive: &dyn Archive) -> Result<Vec<String>, StoreError> {
    let collections = archive.collections().await?;
    Ok(collections.iter().filter_map(|name| name.strip_prefix("parked.").map(str::to_owned)).collect())
}

async fn list(subscription: Option<String>, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let of = match subscription {
        Some(subscription) => vec![subscription],
        None => subscriptions(&*store.port()).await?,
    };
    let mut rows = Vec::new();
    for subscription in of {
        rows.extend(letters(store, &subscription).await?);
    }
    let headings = &["SUBSCRIPTION", "KEY", "BEHIND", "ATTEMPTS", "PARKED", "TRIED AGAIN", "REASON"];
    output.list(headings, &rows, |row| {
        vec![
            row.subscription.clone(),
            row.key.clone(),
            grouped(row.behind as i64),
            row.attempts.to_string(),
            age(row.parked_at) + " ago",
            row.retries_at.map_or_else(|| "when redriven".to_owned(), moment::time),
            short(&row.reason, REASON_CHARS_MAX),
        ]
    })?;
    Ok(if rows.is_empty() { Verdict::Fine } else { Verdict::Fault })
}

async fn show(subscription: &str, key: &str, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let rows = letters(store, subscription).await?;
    let Some(row) = rows.into_iter().find(|row| row.key == key || row.id == key) else {
        return Err(nothing(subscription, key));
    };
    if output.json {
        output.value(&row)?;
        return Ok(Verdict::Fine);
    }
    let retry = row.retries_at.map_or_else(|| "when redriven".to_owned(), moment::time);
    for (name, value) in [
        ("id", row.id),
        ("key", row.key),
        ("parked", format!("{} ({} ago)", moment::time(row.parked_at), age(row.parked_at))),
        ("attempts", row.attempts.to_string()),
        ("tried again", retry),
        ("behind", grouped(row.behind as i64)),
        ("reason", row.reason),
    ] {
        output.line(&format!("{name:<12} {}", shown(&value)))?;
    }
    output.line("message")?;
    let message = annals::json::pretty(row.message.get())?;
    message.lines().try_for_each(|line| output.line(&format!("  {}", shown(line))))?;
    Ok(Verdict::Fine)
}

async fn redrive(
    subscription: &str,
    key: Option<String>,
    act: &ActionArgs,
    store: &Store,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let operator = Operator::new(store.port(), &act.by()?);
    let keys = match key {
        Some(key) => vec![key],
        None => letters(store, subscription).await?.into_iter().map(|row| row.key).collect(),
    };
    for key in &keys {
        let waiting = operator.redrive(subscription, key, &act.reason).await?;
        if waiting == 0 {
            return Err(nothing(subscription, key));
        }
        let messages = if waiting == 1 { "message" } else { "messages" };
        output.line(&format!("{}: {waiting} {messages} will be handled again", shown(key)))?;
    }
    if keys.is_empty() {
        return Err(Failure::new(format!("{subscription} has no parked messages")));
    }
    Ok(Verdict::Fine)
}

async fn drop_one(
    subscription: &str,
    key: &str,
    act: &ActionArgs,
    store: &Store,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let rows = letters(store, subscription).await?;
    let Some(row) = rows.iter().find(|row| row.key == key || row.id == key) else {
        return Err(nothing(subscription, key));
    };
    let by = act.by()?;
    act.confirm(&format!("Drop the first message of {} for good? The message failed with: {}.", row.key, row.reason))?;
    let archive: Arc<dyn Archive> = store.port();
    match Operator::new(archive, &by).drop_first(subscription, key, &act.reason).await? {
        Some(_) => output
            .line(&format!("{}: dropped; the log keeps the message in stream operator-{subscription}", row.key))?,
        None => return Err(nothing(subscription, key)),
    }
    Ok(Verdict::Fine)
}

fn nothing(subscription: &str, key: &str) -> Failure {
    Failure::new(format!(
        "{subscription} has no parked message with the key or id {key}; `dead-letters list` shows parked messages"
    ))
}
