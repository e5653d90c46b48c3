//! The shop's shelf is rebuilt next to the live shelf, compared with it, and swapped. Plain SQL checks the views.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Command, Output, Stdio},
};

use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

fn shop(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(words).stdin(Stdio::null()).env_remove("ANNALS_STORE").env("USER", "tester").output().unwrap()
}

fn text(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

async fn open(path: &Path) -> SqliteConnection {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(path)).await.unwrap()
}

/// The views of one generation: the units on hand and the units reserved, by SKU.
async fn views(path: &Path, generation: u32) -> BTreeMap<String, (i64, i64)> {
    let sql = "SELECT id, json_extract(body, '$.on_hand'), json_extract(body, '$.reserved') FROM documents WHERE collection = $1";
    let rows: Vec<(String, i64, i64)> =
        sqlx::query_as(sql).bind(format!("read.shelf@{generation}")).fetch_all(&mut open(path).await).await.unwrap();
    rows.into_iter().map(|(sku, on_hand, reserved)| (sku, (on_hand, reserved))).collect()
}

/// Computes the same numbers directly from the events.
async fn summed(path: &Path) -> BTreeMap<String, (i64, i64)> {
    let sql = "SELECT json_extract(data, '$.sku'), \
         SUM(CASE type WHEN 'stock.shipped' THEN -1 WHEN 'stock.reserved' THEN 0 WHEN 'stock.released' THEN 0 ELSE 1 END \
             * json_extract(data, '$.quantity')), \
         SUM(CASE type WHEN 'stock.reserved' THEN 1 WHEN 'stock.released' THEN -1 WHEN 'stock.shipped' THEN -1 ELSE 0 END \
             * json_extract(data, '$.quantity')) \
         FROM events WHERE stream_id LIKE 'stock-%' GROUP BY 1";
    let rows: Vec<(String, i64, i64)> = sqlx::query_as(sql).fetch_all(&mut open(path).await).await.unwrap();
    rows.into_iter().map(|(sku, on_hand, reserved)| (sku, (on_hand, reserved))).collect()
}

#[tokio::test]
async fn shelf_is_rebuilt_next_to_the_live_one_compared_and_swapped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shop.db");
    let store = format!("sqlite:{}", path.display());
    let ran = shop(&["run", "--generate", "60", "--quiet", "--json", "--store", &store]);
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let ops = |words: &[&str]| shop(&[&["ops", "--store", &store, "read-model"], words].concat());
    let rebuild = ["shelf", "rebuild", "--reason", "a new shelf"];
    let error = |output: &Output| String::from_utf8(output.stderr.clone()).unwrap();

    let nobody = ops(&["shelf"]);
    assert!(
        nobody.status.code() == Some(2) && error(&nobody).contains("this store has no views of a read model shelf")
    );
    let unknown = ops(&["shelves", "compare"]);
    assert!(error(&unknown).contains("there is no read model named \"shelves\"; known: shelf"), "{}", error(&unknown));

    // No operator confirms the rebuild, so nothing is swapped, and nothing of the rebuild is left behind.
    let asked = ops(&rebuild);
    assert_eq!(asked.status.code(), Some(2), "{asked:?}");
    assert!(
        error(&asked).contains("Replace the live views of shelf? Confirmation needs a terminal"),
        "{}",
        error(&asked)
    );
    assert!(views(&path, 1).await.is_empty() && views(&path, 2).await.is_empty());

    let swapped = ops(&[&rebuild[..], &["--yes"]].concat());
    assert_eq!(swapped.status.code(), Some(0), "{swapped:?}");
    let expected = summed(&path).await;
    assert!(expected.len() > 10 && expected.values().any(|(on_hand, _)| *on_hand > 0), "{expected:?}");
    // The rejected rebuild has used up the generation number 2.
    assert_eq!(views(&path, 3).await, expected);
    let said = format!("0 live views and {0} rebuilt views: {0} differences\n", expected.len());
    assert!(text(&swapped).contains(&said), "{}", text(&swapped));
    let act: String =
        sqlx::query_scalar("SELECT data FROM events WHERE stream_id = 'operator-shelf' AND type = 'operator.swapped'")
            .fetch_one(&mut open(&path).await)
            .await
            .unwrap();
    assert!(act.contains("\"by\":\"tester\"") && act.contains("a new shelf"), "{act}");

    let same = ops(&["shelf", "compare"]);
    assert_eq!(same.status.code(), Some(0), "{same:?}");
    assert!(views(&path, 4).await.is_empty(), "the compared views are removed");

    // The test makes one view wrong, removes another view, and adds a view that should not exist.
    let skus: Vec<&String> = expected.keys().collect();
    let harm = format!(
        "UPDATE documents SET body = '{{\"on_hand\":-7,\"reserved\":0}}' WHERE collection = 'read.shelf@3' AND id = '{}'; \
         DELETE FROM documents WHERE collection = 'read.shelf@3' AND id = '{}'; \
         INSERT INTO documents (collection, id, version, body) VALUES ('read.shelf@3', '~', 1, '{{\"on_hand\":1}}')",
        skus[0], skus[1]
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(harm)).execute(&mut open(&path).await).await.unwrap();
    let differs = ops(&["shelf", "compare", "--limit", "2"]);
    assert_eq!(differs.status.code(), Some(1), "{differs:?}");
    let lines: Vec<&str> = text(&differs).lines().collect();
    assert!(
        lines[0].starts_with(&format!("{}: live {{\"on_hand\":-7,\"reserved\":0}}, rebuilt ", skus[0])),
        "{lines:?}"
    );
    assert!(lines[1].starts_with(&format!("{}: live none, rebuilt ", skus[1])), "{lines:?}");
    assert_eq!(lines[2], "and 1 more: raise --limit to see more differences");
    assert!(lines[3].ends_with(&format!("{} rebuilt views: 3 differences", expected.len())), "{lines:?}");
    let compared = ops(&["shelf", "compare", "--json"]);
    let last: serde_json::Value = serde_json::from_str(text(&compared).lines().last().unwrap()).unwrap();
    assert_eq!(last["differences"], 3);

    assert!(ops(&[&rebuild[..], &["--yes"]].concat()).status.success());
    assert_eq!(views(&path, 7).await, expected);
    assert!(views(&path, 3).await.is_empty());
    let shown = ops(&["shelf", "--json", "--limit", "1000"]);
    assert_eq!(text(&shown).lines().count(), expected.len());
}
