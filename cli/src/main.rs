//! The `annals` command for the store of any service.

use std::{io::IsTerminal, process::ExitCode};

use annals_cli::Ops;

#[tokio::main]
async fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "off".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ops::named("annals").run(std::env::args_os().skip(1)).await
}
