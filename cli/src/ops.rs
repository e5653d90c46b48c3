//! The command, and the domain that a service registers with it.

use std::{ffi::OsString, pin::Pin, process::ExitCode};

use clap::{CommandFactory, FromArgMatches};

use crate::{
    arguments::{Arguments, Command},
    commands::{
        archive, check_history, completions, dead_letters, export, import, migrate, read, read_model, recover, replay,
        saga, sagas, streams, subscription, subscriptions, tail, trace, verify,
    },
    common::CommonArgs,
    domain::Domain,
    failure::{Failure, Verdict},
    output::{self, Output},
    quoted::without_passwords,
    resume_command::ResumeCommand,
    store::{Open, Store, StoreUrl},
};

/// Exit code: a fault was found, and an operator should look at the store.
const FOUND_A_FAULT: u8 = 1;
/// Exit code: the command line is wrong, or the store cannot be reached.
const COULD_NOT: u8 = 2;
/// Exit code after Ctrl-C, as shells report it.
const STOPPED: u8 = 130;

/// The command, and the parts of the service's domain that are registered with it.
#[derive(Clone)]
pub struct Ops {
    name: &'static str,
    domain: Domain,
}

impl std::fmt::Debug for Ops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ops").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Ops {
    /// Creates the command. `name` is the text with which an operator starts the command, such as `annals` or
    /// `sample-shop ops`.
    pub fn named(name: &'static str) -> Self {
        Self { name, domain: Domain::default() }
    }

    /// Registers these events, for `check-history`.
    pub fn events<E: annals::Event>(mut self) -> Self {
        self.domain.add_events::<E>();
        self
    }

    /// Registers the sagas of this definition, which `check-history` replays.
    pub fn saga<C: annals::SagaState>(mut self, saga: annals::Saga<C>) -> Self {
        self.domain.add_saga(saga);
        self
    }

    /// Registers the projection that the service runs for this read model, so that the command can build its views.
    pub fn read_model<R: annals::ReadModel>(mut self, projection: annals::Projection<R>) -> Self {
        self.domain.add_read_model(projection);
        self
    }

    /// Registers a handler for `replay --handler NAME`. The command calls registered handlers only. On a replay, the
    /// handler sees events that it has handled before. If the handler executes a command on an aggregate again, the
    /// command returns its first result. The handler's document writes must be idempotent. Any effect outside the store
    /// happens again.
    pub fn replayable(mut self, name: &'static str, handler: impl annals::Handler) -> Self {
        self.domain.add_handler(name, handler);
        self
    }

    /// Runs the command with `words`, the arguments after its name. Prints to standard output and standard error.
    /// Requires a Tokio runtime.
    pub fn run(
        self,
        words: impl IntoIterator<Item = OsString>,
    ) -> Pin<Box<dyn Future<Output = ExitCode> + Send + 'static>> {
        let words: Vec<OsString> = words.into_iter().collect();
        Box::pin(async move {
            // Runs on a thread of its own, because asking for confirmation blocks the thread and the compiler cannot
            // prove that all futures in the command are `Send`.
            let runtime = tokio::runtime::Handle::current();
            let ran = tokio::task::spawn_blocking(move || runtime.block_on(self.run_here(words)));
            // The panic message has been printed already.
            ran.await.unwrap_or(COULD_NOT.into())
        })
    }

    async fn run_here(self, words: Vec<OsString>) -> ExitCode {
        let (arguments, resume) = match self.arguments(words) {
            Ok(read) => read,
            Err(error) => {
                // Clap prints help to standard output, which may be closed.
                error.print().ok();
                return if error.use_stderr() { COULD_NOT.into() } else { ExitCode::SUCCESS };
            }
        };
        match self.carry_out(arguments, &resume).await {
            Ok(Verdict::Fine) | Err(Failure::OutputClosed) => ExitCode::SUCCESS,
            Ok(Verdict::Fault) => FOUND_A_FAULT.into(),
            Ok(Verdict::Stopped) => STOPPED.into(),
            Err(Failure::Message(text)) => {
                eprintln!("{}: {}", self.name, output::shown(&text));
                COULD_NOT.into()
            }
        }
    }

    fn command(&self) -> clap::Command {
        // Passes the name as one word. Otherwise clap would parse the second word of the name as an argument.
        Arguments::command().name(self.name).bin_name(self.name).no_binary_name(true)
    }

    fn arguments(&self, words: impl IntoIterator<Item = OsString>) -> Result<(Arguments, ResumeCommand), clap::Error> {
        let read = self.command().try_get_matches_from(words).and_then(|matches| {
            let arguments = Arguments::from_arg_matches(&matches)?;
            let resume = ResumeCommand::of(self.name, &matches, &arguments.common);
            Ok((arguments, resume))
        });
        read.map_err(without_passwords)
    }

    async fn carry_out(&self, arguments: Arguments, resume: &ResumeCommand) -> Result<Verdict, Failure> {
        let Arguments { common, command } = arguments;
        let mut output = Output::new(common.json);
        match command {
            Command::Completions(arguments) => return completions::run(arguments, self.command()),
            Command::Migrate(arguments) => {
                return migrate::run(arguments, url(&common)?, &common.schema, &mut output).await;
            }
            Command::CheckHistory(arguments) => {
                let outcome = check_history::run(arguments, &self.domain, &mut output);
                return output.end(outcome);
            }
            Command::Read(arguments) if arguments.is_of_archives() => {
                let outcome = read::from_archives(arguments, &mut output);
                return output.end(outcome);
            }
            _ => {}
        }
        let store = open(&common).await?;
        let outcome = match command {
            Command::Streams(arguments) => streams::run(arguments, &store, &mut output).await,
            Command::Read(arguments) => read::run(arguments, &store, &mut output).await,
            Command::Tail(arguments) => tail::run(arguments, &store, &mut output).await,
            Command::Subscriptions(arguments) => subscriptions::run(arguments, &store, &mut output).await,
            Command::Sagas(arguments) => sagas::run(arguments, &store, &mut output).await,
            Command::Saga(arguments) => saga::run(arguments, &store, &mut output).await,
            Command::DeadLetters(arguments) => dead_letters::run(arguments, &store, &mut output).await,
            Command::Subscription(arguments) => subscription::run(arguments, &store, &mut output).await,
            Command::Replay(arguments) => replay::run(*arguments, &store, &self.domain, resume, &mut output).await,
            Command::ReadModel(arguments) => read_model::run(arguments, &store, &self.domain, &mut output).await,
            Command::Export(arguments) => export::run(arguments, &store, resume, &mut output).await,
            Command::Archive(arguments) => archive::run(arguments, &store, resume, &mut output).await,
            Command::Import(arguments) => import::run(arguments, &store, resume, &mut output).await,
            Command::Verify(arguments) => verify::run(arguments, &store, &mut output).await,
            Command::Recover(arguments) => recover::run(arguments, &store, resume, &mut output).await,
            Command::Trace(arguments) => trace::run(arguments, &store, &mut output).await,
            Command::Migrate(_) | Command::CheckHistory(_) | Command::Completions(_) => Ok(Verdict::Fine),
        };
        let outcome = output.end(outcome);
        // The printed output stays valid even if closing the store fails.
        store.close().await.ok();
        outcome
    }
}

fn url(common: &CommonArgs) -> Result<&StoreUrl, Failure> {
    let missing = || Failure::new("no store is named: pass --store URL, or set ANNALS_STORE");
    common.store.as_ref().ok_or_else(missing)
}

async fn open(common: &CommonArgs) -> Result<Store, Failure> {
    let url = url(common)?;
    Store::open(url, &common.schema, Open::Existing).await.map_err(|error| error.into_failure(url, &common.schema))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The command must be `Send`, so that a service can spawn it.
    #[test]
    fn command_may_run_on_any_thread() {
        fn sent(_: impl Send) {}
        sent(Ops::named("annals").run([]));
    }
}
