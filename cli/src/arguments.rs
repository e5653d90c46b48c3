//! The command line. The arguments of each command are in the command's own file.

use clap::{Parser, Subcommand};

use crate::{
    commands::{
        archive, check_history, completions, dead_letters, export, import, migrate, read, read_model, recover, replay,
        saga, sagas, streams, subscription, subscriptions, tail, trace, verify,
    },
    common::CommonArgs,
};

const EXAMPLES: &str = "Examples:
  annals streams --category order --store sqlite:shop.db
      list the orders of a SQLite store
  annals read order-536365 --store postgres://shop@localhost/shop
      show the events of one order
  annals saga 536365
      show the history of a saga; the variable ANNALS_STORE names the store
  annals tail --category payment --json | jq .data
      print payments as they are recorded

Exit codes: 0: success; 1: a fault was found that a person should look at; 2: the command failed; 130: Ctrl-C stopped the
command.";

/// Inspects, replays, verifies, moves and repairs a store of Annals.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, propagate_version = true, max_term_width = 100)]
pub(crate) struct Arguments {
    /// The store, and the output format.
    #[command(flatten)]
    pub common: CommonArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List streams.
    Streams(streams::StreamsArgs),
    /// Show the events of a stream.
    Read(read::ReadArgs),
    /// Show events as they are recorded.
    Tail(tail::TailArgs),
    /// Show the progress of the log's subscriptions.
    Subscriptions(subscriptions::SubscriptionsArgs),
    /// List sagas.
    Sagas(sagas::SagasArgs),
    /// Show what happened to a saga, or act on it.
    Saga(saga::SagaArgs),
    /// List messages that could not be handled, and act on them.
    DeadLetters(dead_letters::DeadLettersArgs),
    /// Pause, resume or reset a subscription.
    Subscription(subscription::SubscriptionArgs),
    /// Show everything that one request caused, as a tree.
    Trace(trace::TraceArgs),
    /// Send a range of events to standard output, a file, a Kafka topic or a handler.
    Replay(Box<replay::ReplayArgs>),
    /// Show the views of a read model, or rebuild them next to the live views.
    ReadModel(read_model::ReadModelArgs),
    /// Write a store to a file.
    Export(export::ExportArgs),
    /// Write finished streams to a file, to read them later.
    Archive(archive::ArchiveArgs),
    /// Fill an empty store from a file that `export` wrote.
    Import(import::ImportArgs),
    /// Check a whole store: versions, ids, payloads, sagas, checkpoints, seals.
    Verify(verify::VerifyArgs),
    /// Repair a store whose database was restored from a backup that is older than its Kafka topics.
    Recover(recover::RecoverArgs),
    /// Check that this build can read the events of an export, and that its sagas take the same steps as recorded.
    CheckHistory(check_history::CheckHistoryArgs),
    /// Create a store, or migrate an older store to this version.
    Migrate(migrate::MigrateArgs),
    /// Print completions for a shell.
    Completions(completions::CompletionsArgs),
}
