//! The messages and exit codes of the shop for a file with malformed rows.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod serving;

use std::process::{Command, Output};

use serde_json::{Value, json};

use self::serving::Serving;

const HEADER: &str = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n";
const SOUND: &str = "536365,85123A,HOLDER,6,2010-12-01T08:26:00,2.55,17850,United Kingdom\n";
const NO_QUANTITY: &str = "536366,22633,WARMER,none,2010-12-01T08:28:00,1.85,17850,United Kingdom\n";

fn run(rows: &str) -> Output {
    run_with(rows, &["--store", "memory:"])
}

fn run_with(rows: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.csv");
    std::fs::write(&file, format!("{HEADER}{rows}")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(["run", "--json"]).args(arguments).arg("--orders").arg(&file).output().unwrap()
}

fn line(output: &Output) -> Value {
    serde_json::from_str(String::from_utf8_lossy(&output.stdout).lines().last().unwrap()).unwrap()
}

fn orders(output: &Output) -> u64 {
    line(output)["orders"].as_u64().unwrap()
}

#[test]
fn input_with_only_bad_rows_fails() {
    for rows in [NO_QUANTITY.to_owned(), NO_QUANTITY.repeat(3), format!("{SOUND}\"536365,\n")] {
        let output = run(&rows);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("no order, return or adjustment could be made of any row"), "{said}");
        assert!(said.contains("malformed"), "{said}");
        assert_eq!(orders(&output), 0);
    }
}

#[test]
fn left_out_rows_are_counted_and_fail_the_run() {
    let sound = SOUND.replace("536365", "536366");
    for (rows, malformed, left_out) in [
        (NO_QUANTITY.to_owned(), "1 row malformed; 1 invoice left out", json!({"invoices": 1, "rows": 1})),
        (format!("{sound}{NO_QUANTITY}"), "1 row malformed; 1 invoice left out", json!({"invoices": 1, "rows": 2})),
        (format!("{sound}2,A,H,1,12/1/2010,1,,\n{sound}"), "1 row malformed", json!({"invoices": 1, "rows": 2})),
        (format!(",A,H,1,12/1/2010,1,,\n{sound}"), "1 row malformed", json!({"invoices": 2, "rows": 3})),
    ] {
        let rows = format!("1,A,H,1,12/1/2010,1,,UK\n3,A,H,1,12/1/2010,1,,UK\n{rows}");
        let shop = Serving::all("memory:");
        for output in [run(&rows), run_with(&rows, &["--http", &shop.url()])] {
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains(malformed), "{said}");
            assert!(!said.contains("no order"), "{said}");
            assert_eq!(line(&output)["left_out"], left_out, "{rows}");
        }
    }
}

/// A file as spreadsheets save it: dates with the month first, text in Windows-1252, a byte order mark or CRLF, and
/// empty rows at the end.
#[test]
fn spreadsheet_format_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.csv");
    let rows =
        "536365,85123A,\"CAF\u{e9} \u{a3}40, BIG\",6,12/1/2010 8:26,2.55,17850,United Kingdom\n,,,,,,,\n,,,,,,,\n";
    let text = format!("{HEADER}{rows}").replace('\n', "\r\n");
    std::fs::write(&file, text.chars().map(|c| u8::try_from(c).unwrap()).collect::<Vec<_>>()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    let output = command.args(["run", "--store", "memory:", "--json", "--orders"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), orders(&output)), (Some(0), 1), "{said}");
    assert!(said.contains("1 row not UTF-8, and read as Windows-1252") && !said.contains("malformed"), "{said}");
    assert_eq!(line(&output)["left_out"], json!({"invoices": 0, "rows": 0}));
}

/// A file without rows is valid: a day may have no orders.
#[test]
fn file_without_rows_has_no_orders() {
    let output = run("");
    assert_eq!((output.status.code(), orders(&output)), (Some(0), 0));
}
