//! Asking before what cannot be undone, and who asks.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;

use crate::failure::Failure;

/// What every act takes: it is recorded with who and why.
#[derive(Clone, Debug, Args)]
pub(crate) struct Act {
    /// Why; it stays in the log.
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
    /// Who [default: the user who is logged in].
    #[arg(long, value_name = "NAME", env = "ANNALS_OPERATOR")]
    by: Option<String>,
    /// Do not ask before what cannot be undone.
    #[arg(long)]
    yes: bool,
}

impl Act {
    /// Who acts.
    pub fn by(&self) -> Result<String, Failure> {
        let login = || ["USER", "LOGNAME", "USERNAME"].iter().find_map(|name| std::env::var(name).ok());
        let by = self.by.clone().or_else(login).filter(|by| !by.trim().is_empty());
        by.ok_or_else(|| Failure::new("say who you are, with --by NAME: acts are recorded with who and why"))
    }

    /// Goes on only if somebody says yes, now or with `--yes`.
    pub fn confirm(&self, question: &str) -> Result<(), Failure> {
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() {
            return Err(Failure::new(format!("{question} Nobody is there to be asked: repeat it with --yes")));
        }
        eprint!("{question} [y/N] ");
        io::stderr().flush().ok();
        let mut answer = String::new();
        let read = io::stdin().lock().read_line(&mut answer);
        read.map_err(|error| Failure::new(format!("the answer could not be read: {error}")))?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Failure::new("nothing was done")),
        }
    }
}
