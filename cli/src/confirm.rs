//! Asks for confirmation before an irreversible action, and identifies the operator.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;
use tokio::sync::oneshot;

use crate::{failure::Failure, stop::Stop};

/// The arguments of every action that changes the store. The log records the operator and the reason.
#[derive(Clone, Debug, Args)]
pub(crate) struct ActionArgs {
    /// The reason, which is recorded in the log.
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    pub reason: String,
    /// The operator [default: the user who is logged in].
    #[arg(long, value_name = "NAME", env = "ANNALS_OPERATOR")]
    by: Option<String>,
    /// Skip the confirmation of an action that cannot be undone.
    #[arg(long)]
    yes: bool,
}

fn reason(text: &str) -> Result<String, &'static str> {
    Some(text.to_owned())
        .filter(|text| !text.trim().is_empty())
        .ok_or("the reason is empty; the log records why an operator acted")
}

impl ActionArgs {
    /// The name of the operator.
    pub fn by(&self) -> Result<String, Failure> {
        let login = || ["USER", "LOGNAME", "USERNAME"].iter().find_map(|name| std::env::var(name).ok());
        let by = self.by.clone().or_else(login).filter(|by| !by.trim().is_empty());
        by.ok_or_else(|| {
            Failure::new("no operator is named: pass --by NAME, or set ANNALS_OPERATOR; the log records each operator")
        })
    }

    /// The arguments that repeat the reason, the operator and `--yes` on another command line.
    pub fn words(&self) -> Vec<String> {
        let mut words = vec!["--reason".to_owned(), self.reason.clone()];
        if let Some(by) = &self.by {
            words.extend(["--by".to_owned(), by.clone()]);
        }
        if self.yes {
            words.push("--yes".to_owned());
        }
        words
    }

    /// Succeeds only if the operator confirms, now or with `--yes`.
    pub fn confirm(&self, question: &str) -> Result<(), Failure> {
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() {
            return Err(Failure::new(format!(
                "{question} Confirmation needs a terminal: repeat the command with --yes"
            )));
        }
        ask(question)
    }

    /// Same as [`confirm`](Self::confirm), but also listens for Ctrl-C. Returns `None` if the operator pressed Ctrl-C
    /// before answering.
    pub async fn confirm_unless(&self, stop: &Stop, question: &str) -> Option<Result<(), Failure>> {
        if self.yes || !io::stdin().is_terminal() {
            return Some(self.confirm(question));
        }
        let (answered, answer) = oneshot::channel();
        let question = question.to_owned();
        // Reading the terminal blocks, so a separate thread reads the answer. After Ctrl-C, nothing waits for this
        // thread; it ends with the process.
        std::thread::spawn(move || answered.send(ask(&question)));
        let answer = stop.unless(answer).await;
        if answer.is_none() {
            // Ends the line of the question.
            eprintln!();
        }
        answer.map(|answer| answer.unwrap_or_else(|_| Err(Failure::new("not confirmed: nothing was changed"))))
    }
}

fn ask(question: &str) -> Result<(), Failure> {
    eprint!("{question} [y/N] ");
    io::stderr().flush().ok();
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    read.map_err(|error| Failure::new(format!("the answer cannot be read: {error}")))?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::new("not confirmed: nothing was changed")),
    }
}
