//! Handles Ctrl-C and SIGTERM. The first signal asks the shop to stop in good order, and the second signal ends the
//! process at once.

use std::{
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

/// The exit code that a shell reports for a process ended by SIGINT.
const INTERRUPTED: u8 = 130;
/// The exit code that a shell reports for a process ended by SIGTERM.
#[cfg(unix)]
const TERMINATED: u8 = 143;

/// Whether a signal has asked the process to stop. Clones share the state.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Cancelled when the process is asked to stop.
    pub asked: CancellationToken,
    code: Arc<AtomicU8>,
}

impl Stop {
    /// Handles the signals from now on: a first signal asks the process to stop instead of ending it.
    pub fn on_signals() -> io::Result<Self> {
        let stop = Self { asked: CancellationToken::new(), code: Arc::new(AtomicU8::new(INTERRUPTED)) };
        let mut signals = Signals::listen()?;
        let asked = stop.asked.clone();
        let code = stop.code.clone();
        tokio::spawn(async move {
            code.store(signals.next().await, Ordering::SeqCst);
            asked.cancel();
            eprintln!("\nstopping: work in progress is finished first; a second signal ends the process at once");
            // Has the same effect as a kill: acknowledged work is in the store, and the next run does the remaining
            // work.
            std::process::exit(signals.next().await.into());
        });
        Ok(stop)
    }

    /// The exit code of a process that was asked to stop.
    pub fn exit_code(&self) -> ExitCode {
        self.code.load(Ordering::SeqCst).into()
    }
}

struct Signals {
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next signal and returns its exit code.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.terminate.recv() => TERMINATED,
        }
    }
}

#[cfg(not(unix))]
impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {})
    }

    async fn next(&mut self) -> u8 {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        INTERRUPTED
    }
}
