//! Tests the command in a terminal, as people use it: bars, tables, narrow windows, Ctrl-C and resuming. Also tests it
//! with redirected output, where the command draws nothing.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod travel;

use std::path::{Path, PathBuf};

use annals_sqlite::SqliteStore;
use annals_tests::terminal::{Terminal, lines};
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use travel::{Ended, Place, TRIPS, command, ended, url};

/// Enough events for a bar that visibly moves.
const MANY: i64 = 200_000;

fn terminal(store: &Path, words: &[&str], columns: u16) -> Terminal {
    Terminal::of(env!("CARGO_BIN_EXE_annals"), store, words, columns)
}

/// Creates a store with many events, which are inserted with SQL.
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

fn words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// Presses Ctrl-C while the bar moves. Returns the output, and the arguments of the printed `annals` command that
/// continues the interrupted one.
fn stopped(store: &Path, words: &[&str], columns: u16) -> (Vec<String>, String) {
    let mut terminal = terminal(store, words, columns);
    terminal.shows("/200,000");
    terminal.press_ctrl_c();
    let (code, printed) = terminal.ended();
    assert_eq!(code, 130, "{printed}");
    let said = lines(&printed).into_iter().find(|line| line.contains("to continue, run: ")).expect(&printed);
    let (_, go_on) = said.split_once("to continue, run: annals ").expect("the whole command");
    (go_on.split(' ').map(str::to_owned).collect(), printed)
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_shows_a_progress_bar_and_stops_on_ctrl_c() {
    let place = Place::empty();
    let store = many(&place).await;
    let mut stopped = terminal(&store, &["verify"], 120);
    stopped.shows("/200,000");
    stopped.press_ctrl_c();
    let (code, printed) = stopped.ended();
    assert_eq!(code, 130, "{printed}");
    let said = lines(&printed).pop().unwrap();
    assert!(said.starts_with("stopped at position ") && said.contains("the rest of the log is not verified"), "{said}");
    let (code, printed) = terminal(&store, &["verify"], 40).ended();
    assert_eq!(code, 0, "{printed}");
    assert!(lines(&printed).last().unwrap().contains("0 faults"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn narrow_terminal_shows_the_whole_history_of_a_saga() {
    let place = Place::with_trips().await;
    let told = |columns: u16| {
        let (code, printed) = terminal(&place.file("travel.db"), &["saga", "poor-1"], columns).ended();
        assert_eq!(code, 0, "{printed}");
        lines(&printed)
    };
    let wide = told(200);
    let narrow = told(40);
    let timeline = narrow.iter().skip_while(|line| !line.contains("+0ms")).collect::<Vec<_>>();
    assert!(timeline.len() > 10 && timeline.iter().all(|line| line.chars().count() <= 40), "{narrow:#?}");
    // The text is still to the right of the times, and no word is missing.
    let margin = " ".repeat(11);
    let is_beside = |line: &&&String| line.starts_with(&margin) || line.trim_start().starts_with('+');
    assert!(timeline.iter().all(|line| is_beside(&line)), "{narrow:#?}");
    let all = |lines: &[String]| lines.join(" ").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(all(&narrow), all(&wide));
}

#[tokio::test(flavor = "multi_thread")]
async fn export_import_archive_and_replay_resume_after_ctrl_c() {
    let place = Place::empty();
    let store = many(&place).await;
    let file = place.file("many.ndjson.zst");
    let file = file.to_str().unwrap();
    let mut go_on = vec!["export".to_owned(), file.to_owned()];
    for _ in 0..2 {
        let printed;
        (go_on, printed) = stopped(&store, &words(&go_on), 250);
        assert_eq!(go_on, ["export", file, "--resume"]);
        // The bar has colours, and shows a rate and the remaining time.
        assert!(printed.contains("\x1b[36m") && printed.contains("/s") && printed.contains(" left"), "{printed:?}");
    }
    let (code, printed) = terminal(&store, &words(&go_on), 250).ended();
    assert!(code == 0 && printed.contains("200,000 events"), "{printed}");

    let target = place.file("target.db");
    annals(&target, &["migrate"]).fine();
    let (go_on, _) = stopped(&target, &["import", file], 250);
    assert_eq!(go_on, ["import", file]);
    let (code, printed) = terminal(&target, &words(&go_on), 250).ended();
    assert!(code == 0 && printed.contains("200,000 events"), "{printed}");

    let archive = place.file("things.ndjson.zst");
    let archive = archive.to_str().unwrap();
    let (go_on, _) = stopped(&target, &["archive", archive, "--category", "thing", "--quiet-for", "1d"], 250);
    assert_eq!(go_on, ["archive", archive, "--resume"]);
    let (code, printed) = terminal(&target, &words(&go_on), 250).ended();
    assert!(code == 0 && printed.contains("200,000 events of 1000 streams"), "{printed}");

    let lines_file = place.file("lines.ndjson");
    let replay = ["replay", "--output", lines_file.to_str().unwrap()];
    let (go_on, _) = stopped(&target, &replay, 250);
    let (code, printed) = terminal(&target, &words(&go_on), 250).ended();
    assert_eq!(code, 0, "{printed}");
    let replayed = std::fs::read_to_string(&lines_file).unwrap();
    assert!(replayed == annals(&store, &["replay"]).fine(), "what came over is not what was there");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_fits_a_narrow_terminal() {
    const COLUMNS: u16 = 40;
    let place = Place::with_trips().await;
    let (code, printed) = terminal(&place.file("travel.db"), &["sagas"], COLUMNS).ended();
    assert_eq!(code, 0, "{printed}");
    let found = lines(&printed);
    assert_eq!(found.iter().filter(|line| line.starts_with("ID ")).count(), TRIPS.len(), "a cell a line: {printed}");
    // On a wide terminal, the command prints a table.
    let (_, printed) = terminal(&place.file("travel.db"), &["sagas"], 200).ended();
    assert_eq!(lines(&printed).len(), 1 + TRIPS.len(), "{printed}");

    let store = many(&place).await;
    let replayed = place.file("narrow.ndjson");
    let (code, printed) = terminal(&store, &["replay", "--output", replayed.to_str().unwrap()], COLUMNS).ended();
    assert_eq!(code, 0, "{printed}");
    let bars: Vec<_> = lines(&printed).into_iter().filter(|line| line.contains("/200,000")).collect();
    assert!(!bars.is_empty(), "{printed:?}");
    assert!(bars.iter().all(|line| line.chars().count() <= usize::from(COLUMNS)), "{bars:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redirected_output_has_no_progress_bar() {
    let place = Place::empty();
    let store = many(&place).await;
    let file = |name: &str| place.file(name).to_str().unwrap().to_owned();
    let export = file("many.ndjson");
    let replay = file("replay.ndjson");
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
fn unopened_store_is_named_without_its_password() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("nowhere.db");
    let (code, printed) = terminal(&store, &["streams"], 80).ended();
    assert!(code == 2 && printed.contains("there is no such store"), "{printed}");
    let url = "postgres://shop:secret@127.0.0.1:1/shop";
    let (code, printed) = terminal(&store, &["streams", "--store", url], 80).ended();
    assert!(code == 2 && printed.contains("the database cannot") && !printed.contains("secret"), "{printed}");
}
