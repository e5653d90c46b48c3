//! Measures the cost of a workload with the counters of the server and the CPU time.

use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection, Row};

use crate::{Failure, postgres::server::Server};

/// The number of clock ticks per second in `/proc`. The value is the same on every Linux known to us.
const TICKS_PER_SECOND: f64 = 100.0;

/// The counters since the start of the server.
#[derive(Clone, Copy)]
pub struct Counters {
    /// The number of transactions that have ended. Each of our statements is its own transaction, so this equals the
    /// number of round trips.
    round_trips: i64,
    /// The number of transactions that wrote.
    commits: i64,
    wal_bytes: i64,
    cpu_seconds: f64,
}

/// The costs of a workload per 1,000 operations.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Costs {
    pub round_trips: f64,
    pub commits: f64,
    pub wal_kilobytes: f64,
    /// The CPU time of this process, of its ended children, and, if this program started the server, of the server.
    pub cpu_ms: f64,
}

impl Counters {
    /// Reads the counters after all other sessions have ended, because a session adds its counts when it ends.
    pub async fn now(server: &Server) -> Result<Self, Failure> {
        let mut connection = PgConnection::connect(&server.url).await?;
        let others =
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let patience = Instant::now();
        while server.pid().is_some() && sqlx::query_scalar::<_, i64>(others).fetch_one(&mut connection).await? > 0 {
            if patience.elapsed() > Duration::from_secs(10) {
                return Err("sessions of the last workload do not end".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let row = sqlx::query(
            "SELECT xact_commit + xact_rollback, pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
                    (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint
               FROM pg_stat_database WHERE datname = current_database()",
        )
        .fetch_one(&mut connection)
        .await?;
        connection.close().await?;
        let cpu_seconds = cpu_seconds(server.pid());
        Ok(Self { round_trips: row.try_get(0)?, commits: row.try_get(1)?, wal_bytes: row.try_get(2)?, cpu_seconds })
    }

    /// Returns the costs since `before`.
    pub fn since(&self, before: &Self, operations: usize) -> Costs {
        let per_thousand = 1_000.0 / operations as f64;
        Costs {
            round_trips: (self.round_trips - before.round_trips) as f64 * per_thousand,
            commits: (self.commits - before.commits) as f64 * per_thousand,
            wal_kilobytes: (self.wal_bytes - before.wal_bytes) as f64 / 1_024.0 * per_thousand,
            cpu_ms: (self.cpu_seconds - before.cpu_seconds) * 1_000.0 * per_thousand,
        }
    }
}

/// Returns the CPU seconds that this process and the processes of a server have used so far.
pub fn cpu_seconds(server: Option<u32>) -> f64 {
    let own = ticks("self").map_or(0, |(_, own, ended)| own + ended);
    let Some(server) = server else { return own as f64 / TICKS_PER_SECOND };
    // The time of an ended process is part of its parent's time. A running process has to be added separately.
    let ended = ticks(&server.to_string()).map_or(0, |(_, own, ended)| own + ended);
    let running = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let running =
        running.filter_map(|entry| ticks(entry.file_name().to_str()?)).filter(|(parent, ..)| *parent == server);
    (own + ended + running.map(|(_, own, _)| own).sum::<u64>()) as f64 / TICKS_PER_SECOND
}

/// Returns the parent of a process, the clock ticks of the process itself, and the clock ticks of its ended children.
fn ticks(process: &str) -> Option<(u32, u64, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    Some((u32::try_from(number(1)?).ok()?, number(11)? + number(12)?, number(13)? + number(14)?))
}
