//! A second run of a file with a different opening stock is refused. An invoice that is submitted again with other
//! contents is rejected. Without these checks, the shop would silently keep the earlier stock and the earlier invoice.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod serving;

use std::{path::Path, process::Command};

use self::serving::Serving;

const HEADER: &str = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n";
const LINE: &str = "536365,85123A,lantern,6,2010-12-01 08:26:00,2.55,17850,United Kingdom\n";

fn run(folder: &Path, rows: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let store = format!("sqlite:{}", folder.join("shop.db").display());
    run_in(folder, &["--store", &store], rows, arguments)
}

fn run_in(folder: &Path, shop: &[&str], rows: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let file = folder.join("orders.csv");
    std::fs::write(&file, format!("{HEADER}{rows}")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(["run", "--json", "--quiet"]).args(shop).arg("--orders").arg(file).args(arguments);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap() + &String::from_utf8(output.stdout).unwrap();
    (output.status.code(), said)
}

#[test]
fn other_stock_factor_or_other_file_of_one_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (code, said) = run(folder.path(), LINE, &[]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(folder.path(), LINE, &[]);
    assert!(code == Some(0) && said.contains("in the store already"), "{said}");
    let grown = format!("{LINE}{}", LINE.replace("536365", "536366"));
    for (rows, arguments) in [(LINE, &["--stock-factor", "1.5"][..]), (&grown, &[])] {
        let (code, said) = run(folder.path(), rows, arguments);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("with 6 units of 85123A where there would be"), "{said}");
        assert!(said.contains("name another --store"), "{said}");
    }
}

#[test]
fn changed_invoice_is_rejected() {
    let folder = tempfile::tempdir().unwrap();
    is_rejected("the store has an invoice of this name with other content", |rows| run(folder.path(), rows, &[]));
    let shop = Serving::all("memory:");
    let by_key = "this Idempotency-Key was used before with another body";
    is_rejected(by_key, |rows| run_in(folder.path(), &["--http", &shop.url()], rows, &[]));
}

/// Asserts that a shop rejects invoices whose contents differ from those of an earlier run, and that the run fails.
fn is_rejected(reason: &str, run: impl Fn(&str) -> (Option<i32>, String)) {
    let returned = LINE.replace("536365", "C536366").replace(",6,", ",-1,");
    let rows = format!("{LINE}{returned}");
    assert_eq!(run(&rows).0, Some(0));
    let before = run(&rows);
    assert!(before.0 == Some(0) && !before.1.contains("rejected:"), "{before:?}");
    let (code, said) = run(&rows.replace("2.55", "9.99"));
    assert_eq!(code, Some(1), "{said}");
    for of in ["order 536365", "return C536366"] {
        assert!(said.contains(&format!("rejected: {of}: {reason}")), "{said}");
    }
    assert!(said.contains(r#""charged":"15.30""#), "{said}");
}
