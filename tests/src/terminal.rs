//! Runs one command in a terminal, for tests that use the command as a person does.

use std::{
    io::{Read, Write},
    path::Path,
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};

const PATIENCE: Duration = Duration::from_secs(120);

/// A terminal in which a command runs.
pub struct Terminal {
    child: Box<dyn Child + Send + Sync>,
    master: Box<dyn MasterPty + Send>,
    keys: Box<dyn Write + Send>,
    screen: Arc<(Mutex<Vec<u8>>, Condvar)>,
    reading: JoinHandle<()>,
}

impl Terminal {
    /// Runs a program with these arguments on a store, in a window with this many columns.
    pub fn of(program: &str, store: &Path, words: &[&str], columns: u16) -> Self {
        let size = PtySize { rows: 24, cols: columns, pixel_width: 0, pixel_height: 0 };
        let pair = native_pty_system().openpty(size).unwrap();
        let mut command = CommandBuilder::new(program);
        command.args(words);
        for unwanted in ["ANNALS_SCHEMA", "RUST_LOG", "NO_COLOR", "CLICOLOR", "COLUMNS"] {
            command.env_remove(unwanted);
        }
        command.env("ANNALS_STORE", format!("sqlite:{}", store.display()));
        command.env("TERM", "xterm-256color");
        command.env("USER", "tester");
        let child = pair.slave.spawn_command(command).unwrap();
        drop(pair.slave);
        let mut reader = pair.master.try_clone_reader().unwrap();
        let keys = pair.master.take_writer().unwrap();
        let screen = Arc::<(Mutex<Vec<u8>>, Condvar)>::default();
        let seen = screen.clone();
        let reading = std::thread::spawn(move || {
            let mut bytes = [0; 4_096];
            // Reading ends with an error once the other side is closed.
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                seen.0.lock().unwrap().extend_from_slice(&bytes[..count]);
                seen.1.notify_all();
            }
        });
        Self { child, master: pair.master, keys, screen, reading }
    }

    /// Waits until the text has been printed.
    pub fn shows(&self, text: &str) {
        let (screen, changed) = &*self.screen;
        let started = Instant::now();
        let mut seen = screen.lock().unwrap();
        while !String::from_utf8_lossy(&seen).contains(text) {
            assert!(started.elapsed() < PATIENCE, "{text:?} is not in {:?}", String::from_utf8_lossy(&seen));
            seen = changed.wait_timeout(seen, Duration::from_secs(1)).unwrap().0;
        }
    }

    /// Presses these keys.
    pub fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    /// Presses Ctrl-C.
    pub fn press_ctrl_c(&mut self) {
        self.types("\x03");
    }

    /// Returns the exit code and everything that was printed.
    pub fn ended(mut self) -> (u32, String) {
        let started = Instant::now();
        let code = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status.exit_code();
            }
            if started.elapsed() > PATIENCE {
                self.child.kill().unwrap();
                panic!("the program does not end: {:?}", String::from_utf8_lossy(&self.screen.0.lock().unwrap()));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        drop((self.keys, self.master));
        self.reading.join().unwrap();
        let bytes = std::mem::take(&mut *self.screen.0.lock().unwrap());
        (code, String::from_utf8(bytes).unwrap())
    }
}

/// Returns the output line by line, without cursor movements and colours. Each redraw of a line counts as a further
/// line.
pub fn lines(printed: &str) -> Vec<String> {
    let mut plain = String::new();
    let mut characters = printed.chars();
    while let Some(character) = characters.next() {
        if character != '\x1b' {
            plain.push(character);
            continue;
        }
        // Colour sequences are the only escape sequences that do not move the cursor.
        // https://invisible-island.net/xterm/ctlseqs/ctlseqs.html
        if characters.by_ref().find(char::is_ascii_alphabetic) != Some('m') {
            plain.push('\n');
        }
    }
    plain.split(['\r', '\n']).map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
}
