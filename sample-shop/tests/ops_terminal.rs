//! Rebuilds a read model in a terminal, as an operator does: with a progress bar, a question to confirm, and Ctrl-C.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

use std::path::Path;

use annals_sqlite::SqliteStore;
use annals_tests::terminal::{Terminal, lines};
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

/// Enough events for a bar that visibly moves.
const MANY: i64 = 60_000;

async fn open(path: &Path) -> SqliteConnection {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(path)).await.unwrap()
}

/// Inserts deliveries of goods with SQL.
async fn warehouse(path: &Path) {
    SqliteStore::open(path).await.unwrap().close().await.unwrap();
    let fill = format!(
        "INSERT INTO events WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {MANY})
         SELECT n, 'stock-' || (n % 500), (n + 499) / 500, lower(hex(randomblob(16))), 'stock.received', 1,
                '{{\"sku\":\"' || (n % 500) || '\",\"quantity\":1,\"delivery_id\":\"opening\"}}',
                '{{\"correlation_id\":\"00000000-0000-0000-0000-000000000000\",\"causation_id\":\"00000000-0000-0000-0000-000000000000\"}}',
                1700000000000000 + n FROM n"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(fill)).execute(&mut open(path).await).await.unwrap();
}

async fn generations(path: &Path) -> Vec<(String, i64)> {
    let sql = "SELECT collection, count(*) FROM documents WHERE collection LIKE 'read.shelf@%' GROUP BY 1 ORDER BY 1";
    sqlx::query_as(sql).fetch_all(&mut open(path).await).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuild_shows_a_bar_asks_and_can_be_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shop.db");
    warehouse(&path).await;
    let rebuild = ["ops", "read-model", "shelf", "rebuild", "--reason", "a new shelf"];
    let terminal = || Terminal::of(env!("CARGO_BIN_EXE_sample-shop"), &path, &rebuild, 120);

    let mut building = terminal();
    building.shows("/60,000");
    building.press_ctrl_c();
    let (code, printed) = building.ended();
    assert!(code == 130 && printed.contains("stopped: the live views are unchanged"), "{printed}");
    assert!(printed.contains("built ") && printed.contains(" left"), "{printed}");

    let mut asked = terminal();
    asked.shows("Replace the live views of shelf? [y/N]");
    asked.press_ctrl_c();
    let (code, printed) = asked.ended();
    assert!(code == 130 && printed.contains("stopped: the live views are unchanged"), "{printed}");
    assert_eq!(generations(&path).await, [], "the built views are removed");

    let mut no = terminal();
    no.shows("[y/N]");
    no.types("n\n");
    let (code, printed) = no.ended();
    assert!(code == 2 && printed.contains("not confirmed: nothing was changed"), "{printed}");
    assert_eq!(generations(&path).await, []);

    let mut yes = terminal();
    yes.shows("[y/N]");
    yes.types("y\n");
    let (code, printed) = yes.ended();
    assert_eq!(code, 0, "{printed}");
    let said = lines(&printed);
    assert!(said.iter().any(|line| line == "0 live views and 500 rebuilt views: 500 differences"), "{said:#?}");
    assert_eq!(said.last().unwrap(), "swapped: 500 new views replace 0 old views");
    assert_eq!(generations(&path).await, [("read.shelf@5".to_owned(), 500)]);
}
