//! A PostgreSQL server for one test, which the test can kill, fill up or throw away. The process is a child of the
//! test, so that Ctrl-C ends both.

use std::{
    fs,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use sqlx::{Connection, PgConnection};
use tempfile::TempDir;

/// The longest time that a server may take to start, including a start after a crash.
const START: Duration = Duration::from_secs(60);

pub struct Server {
    folder: TempDir,
    data: PathBuf,
    port: u16,
    /// Settings in addition to the common ones.
    settings: Vec<String>,
    environment: Vec<(String, String)>,
    running: Option<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Server {
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        Self::start_in(folder, data, Vec::new()).await
    }

    /// Starts a server with these environment variables, such as a library to preload.
    pub async fn start_with_environment(environment: Vec<(String, String)>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        Self::begin(folder, data, Vec::new(), environment).await
    }

    /// Starts a server whose tables are in the caller's folder `data`. All other files, including the write-ahead log,
    /// are in `folder`.
    pub async fn start_in(folder: TempDir, data: PathBuf, settings: Vec<String>) -> Self {
        Self::begin(folder, data, settings, Vec::new()).await
    }

    async fn begin(folder: TempDir, data: PathBuf, settings: Vec<String>, environment: Vec<(String, String)>) -> Self {
        fs::create_dir_all(&data).unwrap();
        if let Some((user, group)) = postgres_user() {
            for path in [folder.path(), &data] {
                chown(path, Some(user), Some(group)).unwrap();
            }
        }
        let wal = folder.path().join("wal");
        let mut initdb = program("initdb");
        initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]);
        initdb.arg("--pgdata").arg(&data).arg("--waldir").arg(&wal).current_dir(folder.path());
        let output = initdb.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut server = Self { folder, data, port: 0, settings, environment, running: None };
        server.resume().await;
        server
    }

    /// Starts the server, for the first time or again, on the same port.
    pub async fn resume(&mut self) {
        if self.port == 0 {
            self.port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        }
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log")).unwrap();
        let mut postgres = program("postgres");
        postgres.arg("-D").arg(&self.data).current_dir(self.folder.path()).stdin(Stdio::null());
        postgres.stdout(log.try_clone().unwrap()).stderr(log);
        for setting in [
            "listen_addresses=127.0.0.1",
            &format!("port={}", self.port),
            "unix_socket_directories=",
            // In these tests only processes die, never the machine.
            "fsync=off",
            "max_connections=100",
            "max_wal_size=64MB",
        ] {
            postgres.args(["-c", setting]);
        }
        for setting in &self.settings {
            postgres.args(["-c", setting]);
        }
        postgres.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let mut running = postgres.spawn().unwrap();
        let url = self.url();
        let up = async {
            while PgConnection::connect(&url).await.is_err() {
                // The server cannot start while a process of the killed server is still running.
                if running.try_wait().unwrap().is_some() {
                    running = postgres.spawn().unwrap();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let up = tokio::time::timeout(START, up).await;
        self.running = Some(running);
        if up.is_err() {
            panic!("{}", fs::read_to_string(self.folder.path().join("log")).unwrap());
        }
    }

    /// Starts a standby that follows this server asynchronously.
    pub async fn standby(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        if let Some((user, group)) = postgres_user() {
            chown(folder.path(), Some(user), Some(group)).unwrap();
        }
        let mut copy = program("pg_basebackup");
        copy.args(["--checkpoint=fast", "--write-recovery-conf", "--no-sync"]).arg("--pgdata").arg(&data);
        copy.arg(format!("--dbname=host=127.0.0.1 port={} user=postgres", self.port)).current_dir(folder.path());
        let output = copy.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut standby = Self {
            folder,
            data,
            port: 0,
            settings: self.settings.clone(),
            environment: self.environment.clone(),
            running: None,
        };
        standby.resume().await;
        standby
    }

    /// Waits until this standby has received everything that its primary has written so far.
    pub async fn catch_up(&self, primary: &Self) {
        let mut there = PgConnection::connect(&primary.url()).await.unwrap();
        let until: String =
            sqlx::query_scalar("SELECT pg_current_wal_insert_lsn()::text").fetch_one(&mut there).await.unwrap();
        let mut here = PgConnection::connect(&self.url()).await.unwrap();
        let caught_up = async {
            let sql = "SELECT pg_last_wal_replay_lsn() >= $1::pg_lsn";
            while !sqlx::query_scalar::<_, bool>(sql).bind(&until).fetch_one(&mut here).await.unwrap() {
                // Only this statement flushes writes that no commit has flushed.
                sqlx::query("SELECT pg_switch_wal()").execute(&mut there).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(START, caught_up).await.expect("the standby must catch up");
    }

    /// Makes this standby the primary.
    pub async fn promote(&self) {
        let mut connection = PgConnection::connect(&self.url()).await.unwrap();
        let promoted: bool = sqlx::query_scalar("SELECT pg_promote()").fetch_one(&mut connection).await.unwrap();
        assert!(promoted);
    }

    /// Returns a session that is independent of the store.
    pub async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.url()).await.unwrap()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Kills all processes of the server with SIGKILL.
    pub fn kill(&mut self) {
        let Some(mut postmaster) = self.running.take() else { return };
        let id = postmaster.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        // Kills the postmaster first, because it would start new processes.
        postmaster.kill().ok();
        postmaster.wait().ok();
        Command::new("kill").arg("-9").args(children.split_whitespace()).stderr(Stdio::null()).status().ok();
    }

    pub fn url(&self) -> String {
        self.url_at("127.0.0.1")
    }

    /// Returns the URL with another name of this machine as the host.
    pub fn url_at(&self, host: &str) -> String {
        format!("postgres://postgres@{host}:{}/postgres", self.port)
    }
}

/// Returns a command for a program of the server or for one of its companions. The program runs as a user that the
/// server accepts.
pub fn program(name: &str) -> Command {
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().filter_map(Result::ok);
    let installed = installed.map(|version| version.path().join("bin").join(name));
    // The program may be outside the search path.
    let newest = installed.chain([Path::new("/usr/sbin").join(name)]).filter(|path| path.exists()).max();
    let mut command = Command::new(newest.unwrap_or_else(|| Path::new(name).to_owned()));
    if let Some((user, group)) = postgres_user() {
        command.uid(user).gid(group);
    }
    command
}

pub fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output().unwrap();
    output.stdout.trim_ascii() == b"0"
}

/// If the current user is root, returns another user for the server, because PostgreSQL refuses to run as root.
pub fn postgres_user() -> Option<(u32, u32)> {
    if !is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let fields: Vec<&str> =
        users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == "postgres")?;
    Some((fields[2].parse().ok()?, fields[3].parse().ok()?))
}
