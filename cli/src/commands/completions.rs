//! `completions`: prints the shell script that completes this command.

use clap::Args;
use clap_complete::Shell;

use crate::failure::{Failure, Verdict};

#[derive(Debug, Args)]
#[command(after_help = "Example:
  annals completions bash > ~/.local/share/bash-completion/completions/annals")]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

pub(crate) fn run(arguments: CompletionsArgs, mut command: clap::Command) -> Result<Verdict, Failure> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, name, &mut script);
    std::io::Write::write_all(&mut std::io::stdout(), &script)?;
    Ok(Verdict::Fine)
}
