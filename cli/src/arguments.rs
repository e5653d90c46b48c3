//! The command line. The arguments of each command are in the command's own file.

use clap::{Args, Parser, Subcommand};

use crate::{
    commands::{
        archive, check_history, completions, dead_letters, export, import, migrate, read, read_model, recover, replay,
        saga, sagas, streams, subscription, subscriptions, tail, trace, verify,
    },
    store::StoreUrl,
};

const EXAMPLES: &str = "Examples:
  annals streams --category order --store sqlite:shop.db
      the orders of a SQLite store
  annals read order-536365 --store postgres://shop@localhost/shop
      what happened to one of them
  annals saga 536365
      the same of its saga; the store is named by ANNALS_STORE
  annals tail --category payment --json | jq .data
      payments as they are recorded

Exit codes: 0, all is well; 1, something was found that a person has to look at; 2, it could not be done.";

/// Inspects, replays, verifies, moves and repairs a store of annals.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, propagate_version = true, max_term_width = 100)]
pub(crate) struct Arguments {
    /// The store, and the output format.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The arguments that all commands share.
#[derive(Clone, Debug, Args)]
pub(crate) struct Common {
    /// The store: `sqlite:PATH` or `postgres://user@host/database`. A password can stand in a file or in the
    /// environment: `?password_file=PATH`, `?password_env=VARIABLE`, PGPASSWORD or PGPASSFILE.
    #[arg(long, global = true, value_name = "URL", env = "ANNALS_STORE", hide_env_values = true)]
    pub store: Option<StoreUrl>,
    /// The schema of the store in a PostgreSQL database.
    #[arg(long, global = true, value_name = "NAME", env = "ANNALS_SCHEMA", default_value = "annals")]
    pub schema: String,
    /// Print one JSON value per line.
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List streams.
    Streams(streams::Arguments),
    /// Show the events of a stream.
    Read(read::Arguments),
    /// Show events as they are recorded.
    Tail(tail::Arguments),
    /// Show the progress of the log's subscriptions.
    Subscriptions(subscriptions::Arguments),
    /// List sagas.
    Sagas(sagas::Arguments),
    /// Show what happened to a saga, or act on it.
    Saga(saga::Arguments),
    /// List messages that could not be handled, and act on them.
    DeadLetters(dead_letters::Arguments),
    /// Pause, resume or reset a subscription.
    Subscription(subscription::Arguments),
    /// Show everything that one request caused, as a tree.
    Trace(trace::Arguments),
    /// Send events of a range to standard output, a file, a Kafka topic or a handler.
    Replay(Box<replay::Arguments>),
    /// Show the views of a read model, or rebuild them next to the live views.
    ReadModel(read_model::Arguments),
    /// Write a store to a file.
    Export(export::Arguments),
    /// Write finished streams to a file, to read them later.
    Archive(archive::Arguments),
    /// Fill an empty store from a file that `export` wrote.
    Import(import::Arguments),
    /// Check a whole store: versions, ids, payloads, sagas, checkpoints, seals.
    Verify(verify::Arguments),
    /// Repair a store whose database was restored from a backup that is older than its Kafka topics.
    Recover(recover::Arguments),
    /// Check that this build can read the events of an export, and that its sagas take the same steps as recorded.
    CheckHistory(check_history::Arguments),
    /// Create a store, or migrate an older store to this version.
    Migrate(migrate::Arguments),
    /// Print completions for a shell.
    Completions(completions::Arguments),
}
