//! The command in a terminal, as a person has it: bars, tables, narrow windows, Ctrl-C and going on; and with its output
//! somewhere else, where nothing is drawn.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod travel;

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use annals_sqlite::SqliteStore;
use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use travel::{Ended, Place, TRIPS, command, ended, url};

const PATIENCE: Duration = Duration::from_secs(120);
/// So many that a person sees a bar move.
const MANY: i64 = 200_000;

/// A terminal with one command in it.
struct Terminal {
    child: Box<dyn Child + Send + Sync>,
    master: Box<dyn MasterPty + Send>,
    keys: Box<dyn Write + Send>,
    screen: Arc<(Mutex<Vec<u8>>, Condvar)>,
    reading: JoinHandle<()>,
}

impl Terminal {
    fn of(store: &Path, words: &[&str], columns: u16) -> Self {
        let size = PtySize { rows: 24, cols: columns, pixel_width: 0, pixel_height: 0 };
        let pair = native_pty_system().openpty(size).unwrap();
        let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_annals"));
        command.args(words);
        for unwanted in ["ANNALS_SCHEMA", "RUST_LOG", "NO_COLOR", "CLICOLOR", "COLUMNS"] {
            command.env_remove(unwanted);
        }
        command.env("ANNALS_STORE", url(store));
        command.env("TERM", "xterm-256color");
        let child = pair.slave.spawn_command(command).unwrap();
        drop(pair.slave);
        let (mut reader, keys) = (pair.master.try_clone_reader().unwrap(), pair.master.take_writer().unwrap());
        let screen = Arc::<(Mutex<Vec<u8>>, Condvar)>::default();
        let seen = screen.clone();
        let reading = std::thread::spawn(move || {
            let mut bytes = [0; 4_096];
            // It ends with an error once nobody has the other side any more.
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                seen.0.lock().unwrap().extend_from_slice(&bytes[..count]);
                seen.1.notify_all();
            }
        });
        Self { child, master: pair.master, keys, screen, reading }
    }

    /// Waits until this was printed.
    fn shows(&self, text: &str) {
        let (screen, changed) = &*self.screen;
        let (started, mut seen) = (Instant::now(), screen.lock().unwrap());
        while !String::from_utf8_lossy(&seen).contains(text) {
            assert!(started.elapsed() < PATIENCE, "{text:?} is not in {:?}", String::from_utf8_lossy(&seen));
            seen = changed.wait_timeout(seen, Duration::from_secs(1)).unwrap().0;
        }
    }

    fn press_ctrl_c(&mut self) {
        self.keys.write_all(b"\x03").unwrap();
        self.keys.flush().unwrap();
    }

    /// How it ended, and everything that was printed.
    fn ended(mut self) -> (u32, String) {
        let code = self.child.wait().unwrap().exit_code();
        drop((self.keys, self.master));
        self.reading.join().unwrap();
        let bytes = std::mem::take(&mut *self.screen.0.lock().unwrap());
        (code, String::from_utf8(bytes).unwrap())
    }
}

/// What is printed, line by line, without what moves the cursor and what colours; a line that was drawn again is another one.
fn lines(printed: &str) -> Vec<String> {
    let mut plain = String::new();
    let mut characters = printed.chars();
    while let Some(character) = characters.next() {
        if character != '\x1b' {
            plain.push(character);
            continue;
        }
        // Only colours leave the cursor where it is. https://invisible-island.net/xterm/ctlseqs/ctlseqs.html
        if characters.by_ref().find(char::is_ascii_alphabetic) != Some('m') {
            plain.push('\n');
        }
    }
    plain.split(['\r', '\n']).map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
}

/// A store of many events, written by SQL.
async fn many(place: &Place) -> PathBuf {
    let path = place.file("many.db");
    SqliteStore::open(&path).await.unwrap().close().await.unwrap();
    let mut connection = SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&path)).await.unwrap();
    let fill = format!(
        "INSERT INTO events WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {MANY})
         SELECT n, 'thing-' || (n % 1000), (n + 999) / 1000, lower(hex(randomblob(16))), 'thing.happened', 1, '{{\"n\":' || n || '}}',
                '{{}}', 1700000000000000 + n FROM n"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(fill)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    path
}

fn annals(store: &Path, words: &[&str]) -> Ended {
    let mut command = command(words);
    command.env("ANNALS_STORE", url(store));
    ended(command)
}

/// Presses Ctrl-C while the bar moves; gives what to type to go on.
fn stopped(store: &Path, words: &[&str], columns: u16) -> (String, String) {
    let mut terminal = Terminal::of(store, words, columns);
    terminal.shows("/200,000");
    terminal.press_ctrl_c();
    let (code, printed) = terminal.ended();
    assert_eq!(code, 130, "{printed}");
    let said = lines(&printed).into_iter().find(|line| line.contains("go on with: ")).expect(&printed);
    (said.split_once("go on with: ").unwrap().1.to_owned(), printed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bar_moves_ctrl_c_stops_at_a_good_place_and_it_goes_on() {
    let place = Place::empty();
    let store = many(&place).await;
    let file = place.file("many.ndjson.zst");
    let file = file.to_str().unwrap();
    for attempt in 0..2 {
        let words = if attempt == 0 { vec!["export", file] } else { vec!["export", file, "--resume"] };
        let (go_on, printed) = stopped(&store, &words, 250);
        assert_eq!(go_on, format!("export {file} --resume"));
        // Drawn in colours, with a rate, and with the time that is left.
        assert!(printed.contains("\x1b[36m") && printed.contains("/s") && printed.contains(" left"), "{printed:?}");
    }
    let (code, printed) = Terminal::of(&store, &["export", file, "--resume"], 250).ended();
    assert!(code == 0 && printed.contains("200,000 events"), "{printed}");

    let target = place.file("target.db");
    annals(&target, &["migrate"]).fine();
    let (go_on, _) = stopped(&target, &["import", file], 250);
    assert_eq!(go_on, format!("import {file}"));
    let (code, printed) = Terminal::of(&target, &["import", file], 250).ended();
    assert!(code == 0 && printed.contains("200,000 events"), "{printed}");

    let lines_file = place.file("lines.ndjson");
    let replay = ["replay", "--output", lines_file.to_str().unwrap()];
    let (go_on, _) = stopped(&target, &replay, 250);
    let words: Vec<_> = go_on.split(' ').skip_while(|word| *word != "replay").collect();
    let (code, printed) = Terminal::of(&target, &words, 250).ended();
    assert_eq!(code, 0, "{printed}");
    let replayed = std::fs::read_to_string(&lines_file).unwrap();
    assert!(replayed == annals(&store, &["replay"]).fine(), "what came over is not what was there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_narrow_terminal_is_not_written_over_its_edge() {
    const COLUMNS: u16 = 40;
    let place = Place::with_trips().await;
    let (code, printed) = Terminal::of(&place.file("travel.db"), &["sagas"], COLUMNS).ended();
    assert_eq!(code, 0, "{printed}");
    let found = lines(&printed);
    assert_eq!(found.iter().filter(|line| line.starts_with("ID ")).count(), TRIPS.len(), "a cell a line: {printed}");
    // With room for it, a table.
    let (_, printed) = Terminal::of(&place.file("travel.db"), &["sagas"], 200).ended();
    assert_eq!(lines(&printed).len(), 1 + TRIPS.len(), "{printed}");

    let store = many(&place).await;
    let replayed = place.file("narrow.ndjson");
    let (code, printed) = Terminal::of(&store, &["replay", "--output", replayed.to_str().unwrap()], COLUMNS).ended();
    assert_eq!(code, 0, "{printed}");
    let bars: Vec<_> = lines(&printed).into_iter().filter(|line| line.contains("/200,000")).collect();
    assert!(!bars.is_empty(), "{printed:?}");
    assert!(bars.iter().all(|line| line.chars().count() <= usize::from(COLUMNS)), "{bars:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_drawn_where_nobody_looks() {
    let place = Place::empty();
    let store = many(&place).await;
    let file = |name: &str| place.file(name).to_str().unwrap().to_owned();
    let (export, replay) = (file("many.ndjson"), file("replay.ndjson"));
    let target = place.file("target.db");
    annals(&target, &["migrate"]).fine();
    for (store, words) in [
        (&store, vec!["streams", "--limit", "3"]),
        (&store, vec!["verify"]),
        (&store, vec!["export", &export]),
        (&target, vec!["import", &export]),
        (&target, vec!["replay", "--output", &replay]),
    ] {
        let ended = annals(store, &words);
        assert_eq!(ended.code, 0, "{words:?}: {ended:?}");
        assert!(!ended.out.contains(['\x1b', '\r']) && !ended.err.contains(['\x1b', '\r']), "{words:?}: {ended:?}");
        assert!(words[0] == "streams" || ended.err.is_empty(), "{words:?}: {ended:?}");
    }
}

#[test]
fn what_cannot_be_opened_is_told_without_its_password() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("nowhere.db");
    let (code, printed) = Terminal::of(&store, &["streams"], 80).ended();
    assert!(code == 2 && printed.contains("there is no such store"), "{printed}");
    let url = "postgres://shop:secret@127.0.0.1:1/shop";
    let (code, printed) = Terminal::of(&store, &["streams", "--store", url], 80).ended();
    assert!(code == 2 && printed.contains("the database cannot") && !printed.contains("secret"), "{printed}");
}
