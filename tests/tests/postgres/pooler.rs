//! A PgBouncer for one test, in transaction mode, in front of the test server.

use std::{
    fs,
    os::unix::fs::chown,
    process::{Child, Stdio},
    time::Duration,
};

use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tempfile::TempDir;
use tokio::{net::TcpStream, time::timeout};

use super::{
    PROMPTLY,
    server::{postgres_user, program},
    url,
};

pub struct Pooler {
    folder: TempDir,
    port: u16,
    running: Option<Child>,
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Pooler {
    /// Starts a pooler with this number of server sessions for all clients. `more` holds further lines of
    /// configuration.
    pub async fn start(sessions: u32, more: &str) -> Self {
        let server = url().parse::<PgConnectOptions>().unwrap().to_url_lossy();
        let host = server.host_str().unwrap();
        let port = server.port().unwrap_or(5432);
        let password = server.password().map(|password| format!("password={password}")).unwrap_or_default();
        let folder = tempfile::tempdir().unwrap();
        if let Some((user, group)) = postgres_user() {
            chown(folder.path(), Some(user), Some(group)).unwrap();
        }
        let mut pooler = Self { folder, port: 0, running: None };
        pooler.port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let configuration = format!(
            "[databases]\n\
             * = host={host} port={port} user={user} {password}\n\
             [pgbouncer]\n\
             listen_addr = 127.0.0.1\nlisten_port = {}\nunix_socket_dir =\n\
             auth_type = any\npool_mode = transaction\ndefault_pool_size = {sessions}\nmax_client_conn = 500\n\
             server_login_retry = 1\n{more}\n",
            pooler.port,
            user = server.username(),
        );
        fs::write(pooler.folder.path().join("ini"), configuration).unwrap();
        pooler.resume().await;
        pooler
    }

    /// Starts the pooler, for the first time or again, on the same port.
    pub async fn resume(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log")).unwrap();
        let mut pgbouncer = program("pgbouncer");
        pgbouncer.arg(self.folder.path().join("ini")).current_dir(self.folder.path()).stdin(Stdio::null());
        pgbouncer.stdout(log.try_clone().unwrap()).stderr(log);
        self.running = Some(pgbouncer.spawn().expect("PgBouncer must be installed: `./test` does that"));
        let up = async {
            while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(PROMPTLY, up).await.is_err() {
            panic!("{}", fs::read_to_string(self.folder.path().join("log")).unwrap());
        }
    }

    /// Kills the pooler with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.kill().ok();
            running.wait().ok();
        }
    }

    /// Returns the URL without `pooled=true`.
    pub fn plain_url(&self) -> String {
        let server: PgConnectOptions = url().parse().unwrap();
        let mut url = server.to_url_lossy();
        url.set_query(None);
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.to_string()
    }

    pub fn url(&self) -> String {
        format!("{}?pooled=true", self.plain_url())
    }
}
