//! Compares the `annals` command with `psql \copy` of the same columns. The command replays, verifies, exports and
//! imports a log. Each figure covers the whole process, from start to end.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use annals_postgres::{PostgresStore, Settings};

use crate::{
    Failure,
    postgres::{Bench, Measured, report, rows, server::Server},
};

/// All columns of an event.
const COLUMNS: &str = "position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at";

/// Measures the `annals` command on PostgreSQL.
///
/// The command must be in the folder of this program, where `cargo build --profile dist -p annals-cli` puts it. `psql`
/// must be in the path. The database is the one that DATABASE_URL names, or a temporary one.
#[derive(clap::Args)]
pub struct CliArguments {
    /// The number of events in the log.
    #[arg(long, default_value_t = 1_000_000)]
    events: i64,
    /// Folder for the data of the database server and for files. The benchmark measures the disk that holds this
    /// folder.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// The number of rounds. All figures are measured once per round, and the median is printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Print one JSON object per figure, instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark until it ends or is interrupted, and then stops the server.
pub async fn run(arguments: CliArguments) -> Result<(), Failure> {
    let server = Server::start(&arguments.directory)?;
    Server::until_interrupted(measure(&arguments, &server)).await
}

async fn measure(arguments: &CliArguments, server: &Server) -> Result<(), Failure> {
    let url = &server.url;
    // Creates the tables.
    PostgresStore::connect(url, Settings::default()).await?.close().await?;
    let files = tempfile::tempdir_in(&arguments.directory)?;
    let sides = Sides { url: url.clone(), events: usize::try_from(arguments.events)? };
    let file = |name: &str| files.path().join(name);
    let lines = file("lines.ndjson");
    let columns = file("columns.txt");
    let plain = file("export.ndjson");
    let packed = file("export.ndjson.zst");
    rows::empty(url).await?;
    let mut bench = Bench::new(server);
    for _ in 0..arguments.rounds.max(1) {
        rows::fill(url, arguments.events).await?;
        // The first copy warms up the caches, so that all programs find the log in memory.
        sides.copy("TO", &columns).await?;

        let copied = bench.measure("replay to a file", r"psql \copy", sides.copy("TO", &columns)).await?;
        let replayed =
            bench.measure("replay to a file", "annals", sides.annals(&["replay", "--output"], &lines)).await?;
        bench.rate(replayed, copied, r"\copy", "≥ 0.8");

        let verify = "verify";
        let copied = bench.measure(verify, r"psql \copy", sides.copy("TO", &columns)).await?;
        let before = bench.measure(verify, "annals, nothing sealed", sides.annals(&["verify"], "")).await?;
        bench.rate(before, copied, r"\copy", "");
        let sealing = bench.measure(verify, "annals --seal", sides.annals(&["verify", "--seal"], "")).await?;
        bench.rate(sealing, copied, r"\copy", "");
        let sealed = bench.measure(verify, "annals, hash chain", sides.annals(&["verify"], "")).await?;
        bench.rate(sealed, copied, r"\copy", "≥ 0.5");

        let export = "export";
        let copied = bench.measure(export, r"psql \copy", sides.copy("TO", &columns)).await?;
        let exported = bench.measure(export, "annals", sides.annals(&["export"], &plain)).await?;
        bench.rate(exported, copied, r"\copy", "≥ 0.5");
        let zstd = bench.measure(export, "annals, compressed", sides.annals(&["export"], &packed)).await?;
        bench.rate(zstd, copied, r"\copy", "");

        let import = "import";
        rows::empty(url).await?;
        let copied = bench.measure(import, r"psql \copy", sides.copy("FROM", &columns)).await?;
        rows::empty(url).await?;
        let imported = bench.measure(import, "annals", sides.annals(&["import"], &plain)).await?;
        bench.rate(imported, copied, r"\copy", "≥ 0.5");
        rows::empty(url).await?;
        let unpacked = bench.measure(import, "annals, compressed", sides.annals(&["import"], &packed)).await?;
        bench.rate(unpacked, copied, r"\copy", "");
        // Each round starts with an empty log, as the first round did.
        rows::empty(url).await?;
        for file in [&lines, &columns, &plain, &packed] {
            fs::remove_file(file)?;
        }
    }
    report(&bench, arguments.json);
    Ok(())
}

struct Sides {
    url: String,
    events: usize,
}

impl Sides {
    /// Runs the command with the arguments `words`, followed by `last` unless `last` is empty.
    async fn annals(&self, words: &[&str], last: impl AsRef<OsStr>) -> Result<Measured, Failure> {
        let program = std::env::current_exe()?.with_file_name("annals");
        if !program.exists() {
            let program = program.display();
            return Err(format!("{program} is missing: `cargo build --profile dist -p annals-cli` makes it").into());
        }
        let mut command = Command::new(program);
        command.args(words).args(Some(last.as_ref()).filter(|last| !last.is_empty())).env("ANNALS_STORE", &self.url);
        self.ended(command).await
    }

    /// Copies all events: with `TO`, from the log to the file; with `FROM`, from the file to the log.
    async fn copy(&self, direction: &str, file: &Path) -> Result<Measured, Failure> {
        let what = match direction {
            "TO" => format!("(SELECT {COLUMNS} FROM annals.events ORDER BY position)"),
            _ => format!("annals.events ({COLUMNS})"),
        };
        let mut command = Command::new("psql");
        command.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--command"]);
        command.arg(format!(r"\copy {what} {direction} '{}'", file.display())).arg(&self.url);
        self.ended(command).await
    }

    async fn ended(&self, mut command: Command) -> Result<Measured, Failure> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let started = Instant::now();
        let events = self.events;
        let ended = tokio::task::spawn_blocking(move || command.status().map(|status| (command, status))).await??;
        let seconds = started.elapsed().as_secs_f64();
        let (command, status) = ended;
        if status.success() {
            return Ok(Measured { count: events, seconds, latency: None });
        }
        Err(format!("{:?}: {status}", command.get_program()).into())
    }
}
