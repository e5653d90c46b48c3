//! What the shop says of a file with malformed rows, and how it exits.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

const HEADER: &str = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n";
const SOUND: &str = "536365,85123A,HOLDER,6,2010-12-01T08:26:00,2.55,17850,United Kingdom\n";
const NO_QUANTITY: &str = "536366,22633,WARMER,none,2010-12-01T08:28:00,1.85,17850,United Kingdom\n";

fn run(rows: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.csv");
    std::fs::write(&file, format!("{HEADER}{rows}")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(["run", "--store", "memory:", "--json", "--orders"]).arg(&file).output().unwrap()
}

fn orders(output: &Output) -> u64 {
    let line = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str::<serde_json::Value>(line.lines().last().unwrap()).unwrap()["orders"].as_u64().unwrap()
}

#[test]
fn nothing_but_bad_rows_is_a_failure() {
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
fn some_bad_rows_are_counted() {
    let output = run(&format!("{SOUND}{NO_QUANTITY}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("1 row malformed; 1 invoice left out"), "{said}");
    assert!(!said.contains("no order"), "{said}");
    assert_eq!(orders(&output), 1);
}

/// A day without orders is no mistake.
#[test]
fn no_rows_at_all_are_none() {
    let output = run("");
    assert_eq!((output.status.code(), orders(&output)), (Some(0), 0));
}
