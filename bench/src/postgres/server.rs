//! The server to measure: the server that `DATABASE_URL` names, or a temporary one.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

use crate::Failure;

/// The default settings, except for more memory, no autovacuum, and enough space that no checkpoint disturbs only one
/// side of a comparison.
const OPTIONS: &str = "-c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections=300 \
     -c shared_buffers=512MB -c max_wal_size=8GB -c checkpoint_timeout=30min -c autovacuum=off";

/// The address of the server.
pub struct Server {
    pub url: String,
    own: Option<Own>,
}

struct Own {
    programs: PathBuf,
    folder: TempDir,
    pid: u32,
}

impl Server {
    /// Runs the measurement until it ends or is interrupted, and then returns, so that the caller can stop the server.
    pub async fn until_interrupted(measuring: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
        tokio::select! {
            measured = measuring => measured,
            _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
        }
    }

    /// Starts a server in `folder`, unless `DATABASE_URL` names one.
    pub fn start(folder: &Path) -> Result<Self, Failure> {
        if let Ok(url) = std::env::var("DATABASE_URL") {
            return Ok(Self { url, own: None });
        }
        let programs = programs()?;
        let folder = tempfile::tempdir_in(folder)?;
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(folder.path()))?;
        }
        let data = folder.path().join("data");
        let setup = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"];
        run(as_postgres(&programs.join("initdb")).arg("--pgdata").arg(&data).args(setup))?;
        // The port is free now, and will most likely still be free a moment later.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut start = as_postgres(&programs.join("pg_ctl"));
        start.args(["start", "--wait", "--silent", "--pgdata"]).arg(&data).arg("--log").arg(folder.path().join("log"));
        run(start.arg("--options").arg(format!("{OPTIONS} -c port={port}")))?;
        let pid = std::fs::read_to_string(data.join("postmaster.pid"))?.lines().next().unwrap_or("").parse()?;
        let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        Ok(Self { url, own: Some(Own { programs, folder, pid }) })
    }

    /// The process id of the postmaster, the parent of all server processes. `None` if this program did not start the
    /// server.
    pub fn pid(&self) -> Option<u32> {
        self.own.as_ref().map(|own| own.pid)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(Own { programs, folder, .. }) = &self.own {
            let mut stop = as_postgres(&programs.join("pg_ctl"));
            stop.args(["stop", "--wait", "--silent", "--mode=immediate", "--pgdata"]).arg(folder.path().join("data"));
            if let Err(error) = run(&mut stop) {
                eprintln!("the server still runs: {error}");
            }
        }
    }
}

fn programs() -> Result<PathBuf, Failure> {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map_err(|error| format!("no DATABASE_URL, and no PostgreSQL in /usr/lib/postgresql: {error}"))?
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|programs| programs.join("postgres").exists())
        .collect();
    versions.sort();
    versions.pop().ok_or_else(|| "no server program in /usr/lib/postgresql".into())
}

/// Returns a command that does not run as root, because PostgreSQL refuses to run as root.
fn as_postgres(program: &Path) -> Command {
    let mut command = if is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(program);
        command
    } else {
        Command::new(program)
    };
    command.current_dir("/");
    command
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nUid:\t0\t"))
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let ended = command.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    if ended.success() { Ok(()) } else { Err(format!("{command:?}: {ended}").into()) }
}
