//! Ctrl-C and SIGTERM: the first asks the shop to stop in order, the second ends it at once.

use std::{
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

/// What a shell reports of a process that SIGINT has ended.
const INTERRUPTED: u8 = 130;
/// What it reports after SIGTERM.
#[cfg(unix)]
const TERMINATED: u8 = 143;

/// Whether somebody has asked the process to stop. Clones are the same.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Cancelled when they do.
    pub asked: CancellationToken,
    code: Arc<AtomicU8>,
}

impl Stop {
    /// From now on signals ask, instead of ending the process.
    pub fn on_signals() -> io::Result<Self> {
        let stop = Self { asked: CancellationToken::new(), code: Arc::new(AtomicU8::new(INTERRUPTED)) };
        let (mut signals, asked, code) = (Signals::listen()?, stop.asked.clone(), stop.code.clone());
        tokio::spawn(async move {
            code.store(signals.next().await, Ordering::SeqCst);
            asked.cancel();
            eprintln!("\nstopping: what is in hand is finished first; once more ends it at once");
            // As after a kill: what was acknowledged is in the store, and the rest is done by the next run.
            std::process::exit(signals.next().await.into());
        });
        Ok(stop)
    }

    /// What to exit with when it was asked to.
    pub fn exit_code(&self) -> ExitCode {
        self.code.load(Ordering::SeqCst).into()
    }
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next one, and tells what it exits with.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.terminate.recv() => TERMINATED,
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> u8 {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        INTERRUPTED
    }
}
