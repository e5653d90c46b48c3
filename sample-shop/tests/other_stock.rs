//! If a file is run again with other stock, the run is refused. If an invoice comes again with other contents, the
//! invoice is rejected. Otherwise the shop would silently keep the earlier version.
#![allow(clippy::unwrap_used)]

use std::{path::Path, process::Command};

const HEADER: &str = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n";
const LINE: &str = "536365,85123A,lantern,6,2010-12-01 08:26:00,2.55,17850,United Kingdom\n";

fn run(folder: &Path, rows: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let (file, store) = (folder.join("orders.csv"), folder.join("shop.db"));
    std::fs::write(&file, format!("{HEADER}{rows}")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(["run", "--json", "--quiet", "--store", &format!("sqlite:{}", store.display()), "--orders"]);
    let output = command.arg(file).args(arguments).output().unwrap();
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
    let returned = LINE.replace("536365", "C536366").replace(",6,", ",-1,");
    let rows = format!("{LINE}{returned}");
    assert_eq!(run(folder.path(), &rows, &[]).0, Some(0));
    let before = run(folder.path(), &rows, &[]);
    assert!(before.0 == Some(0) && !before.1.contains("rejected:"), "{before:?}");
    let (code, said) = run(folder.path(), &rows.replace("2.55", "9.99"), &[]);
    assert_eq!(code, Some(1), "{said}");
    for of in ["order 536365", "return C536366"] {
        assert!(
            said.contains(&format!("rejected: {of}: the store has an invoice of this name with other content")),
            "{said}"
        );
    }
    assert!(said.contains(r#""charged":"15.30""#), "{said}");
}
