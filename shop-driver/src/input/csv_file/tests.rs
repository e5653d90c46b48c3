use std::{fs, path::PathBuf};

use rust_decimal::Decimal;
use tempfile::TempDir;

use super::*;
use crate::input::{invoice::Line, rows::Tally, source::Source};

const HEADER: &str = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country";

struct Written {
    _folder: TempDir,
    path: PathBuf,
}

fn write(bytes: impl AsRef<[u8]>) -> Written {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.csv");
    fs::write(&path, bytes).expect("written");
    Written { _folder: folder, path }
}

/// Returns a row of `number` with this SKU, quantity and price.
fn row(number: &str, sku: &str, quantity: &str, price: &str) -> String {
    format!("{number},{sku},SOMETHING,{quantity},2010-12-01T08:26,{price},17850,United Kingdom\n")
}

/// Reads a file with these rows and returns the ids of its invoices, the reports as `LINE: reason`, and the counts.
fn read_rows(rows: &[String]) -> (Vec<String>, Vec<String>, Rows) {
    read_text(format!("{HEADER}\n{}", rows.concat()))
}

fn read_text(bytes: impl AsRef<[u8]>) -> (Vec<String>, Vec<String>, Rows) {
    let file = write(bytes);
    let mut invoices = read_csv(&file.path).and_then(|file| file.invoices()).expect("readable");
    let mut ids = Vec::new();
    let mut reports = Vec::new();
    for item in &mut invoices {
        match item {
            Ok(invoice) => ids.push(invoice.id().to_owned()),
            Err(ReadError::Row(error)) => {
                assert_eq!(error.to_string(), format!("{}:{}: {}", file.path.display(), error.line, error.reason));
                reports.push(format!("{}: {}", error.line, error.reason));
            }
            Err(ReadError::Input(error)) => panic!("{error}"),
        }
    }
    let rows = invoices.rows().clone();
    assert_eq!(invoices.bytes_read(), fs::metadata(&file.path).expect("still there").len());
    let became =
        [rows.orders, rows.returns, rows.adjustments, rows.left_out].iter().map(|tally| tally.rows).sum::<u64>();
    assert_eq!(rows.read, became + rows.malformed);
    assert_eq!(rows.malformed, reports.len() as u64);
    (ids, reports, rows)
}

fn sound(number: &str) -> String {
    row(number, "85123A", "6", "2.55")
}

#[test]
fn number_and_total_decide_the_kind_of_an_invoice() {
    let rows = [
        row("1", "A", "2", "1.5"),
        row("1", "A", "3", "0"),
        row("C2", "A", "-2", "1.5"),
        row("C3", "A", "-1", "0"),
        row("4", "B", "-5", "0"),
        row("4", "C", "7", "0.0"),
        row("5", "B", "1", "2"),
        row("5", "B", "-1", "2"),
    ];
    let file = write(format!("{HEADER}\n{}", rows.concat()));
    let source = Source::file(&file.path).expect("readable");
    let found: Vec<Invoice> = source.invoices().expect("readable").map(|item| item.expect("sound")).collect();
    let line = |quantity, tenths| Line { sku: "A".into(), quantity, unit_price: Decimal::new(tenths, 1) };
    let customer = Some("17850".to_owned());
    let expected = [
        Invoice::Order { id: "1".into(), customer: customer.clone(), lines: vec![line(2, 15), line(3, 0)] },
        Invoice::Return { id: "C2".into(), customer: customer.clone(), lines: vec![line(2, 15)] },
        Invoice::Return { id: "C3".into(), customer, lines: vec![line(1, 0)] },
        Invoice::Adjustment { id: "4".into(), lines: vec![("B".into(), -5), ("C".into(), 7)] },
        Invoice::Adjustment { id: "5".into(), lines: vec![("B".into(), 1), ("B".into(), -1)] },
    ];
    assert_eq!(found, expected);
    let totals: Vec<String> = found.iter().map(|invoice| invoice.total().normalize().to_string()).collect();
    assert_eq!(totals, ["3", "3", "0", "0", "0"]);
    let demand = source.demand().expect("readable");
    assert_eq!(demand.into_iter().collect::<Vec<_>>(), [("A".to_owned(), 5), ("B".to_owned(), 6)]);
}

#[test]
fn malformed_row_drops_only_its_whole_invoice() {
    let (ids, reports, rows) = read_rows(&[
        sound("1"),
        sound("2"),
        row("2", "A", "six", "1"),
        sound("2"),
        row("2", "A", "0", "1"),
        sound("3"),
    ]);
    assert_eq!(ids, ["1", "3"]);
    assert_eq!(reports, ["4: Quantity \"six\" is not a whole number", "6: Quantity is 0"]);
    assert_eq!(rows.left_out, Tally { invoices: 1, rows: 2 });
    assert_eq!(rows.orders, Tally { invoices: 2, rows: 2 });
    assert!(rows.messages[0].ends_with("a.csv:4: Quantity \"six\" is not a whole number"), "{}", rows.messages[0]);
}

#[test]
fn malformed_rows_add_no_demand() {
    let rows = [sound("1"), row("1", "A", "x", "1"), row("2", "B", "3", "1")];
    let file = write(format!("{HEADER}\n{}", rows.concat()));
    let demand = Source::file(&file.path).and_then(|source| source.demand()).expect("readable");
    assert_eq!(demand.into_iter().collect::<Vec<_>>(), [("B".to_owned(), 3)]);
}

#[test]
fn signs_must_fit_the_kind() {
    let (ids, reports, rows) = read_rows(&[
        row("C1", "A", "-1", "1"),
        row("C1", "A", "2", "1"),
        row("2", "A", "5", "1"),
        row("2", "A", "-1", "1"),
        row("3", "A", "-1", "1"),
        row("4", "A", "1", "-1"),
    ]);
    assert_eq!(ids, [""; 0]);
    let expected = [
        "3: the quantity of a return must be below zero",
        "5: the quantity of an order must be above zero",
        "6: the quantity of an order must be above zero",
        "7: UnitPrice \"-1\" is below zero",
    ];
    assert_eq!(reports, expected);
    assert_eq!(rows.left_out, Tally { invoices: 4, rows: 2 });
}

#[test]
fn invoice_with_scattered_rows_is_left_out() {
    let (ids, reports, rows) = read_rows(&[sound("1"), sound("2"), sound("1"), sound("1"), sound("3"), sound("1")]);
    assert_eq!(ids, ["2", "3"]);
    let back = |line| format!("{line}: 1 appears again: it starts on line 2, with other invoices in between");
    assert_eq!(reports, [back(4), back(5), back(7)]);
    assert_eq!(rows.left_out, Tally { invoices: 1, rows: 1 });
}

#[test]
fn row_without_a_number_drops_both_neighbours() {
    let (ids, reports, rows) =
        read_rows(&[sound("1"), sound("2"), row("", "A", "1", "1"), sound("3"), sound("3"), sound("4")]);
    assert_eq!(ids, ["1", "4"]);
    let expected =
        "4: InvoiceNo is empty; the invoices above and below are left out, because the row may belong to either";
    assert_eq!(reports, [expected]);
    assert_eq!(rows.left_out, Tally { invoices: 2, rows: 3 });

    let (ids, _, rows) = read_rows(&[sound("1"), sound("2"), row("", "A", "1", "1"), sound("2"), sound("3")]);
    assert_eq!(ids, ["1", "3"]);
    assert_eq!(rows.left_out, Tally { invoices: 1, rows: 2 });
}

#[test]
fn malformed_row_with_a_number_drops_only_that_invoice() {
    let (ids, reports, rows) =
        read_rows(&[sound("1"), "2,A,short\n".into(), sound("2"), "garbage\n".into(), sound("3")]);
    assert_eq!(ids, ["1", "3"]);
    assert_eq!(reports, ["3: 3 columns instead of 8", "5: 1 columns instead of 8"]);
    assert_eq!(rows.left_out, Tally { invoices: 2, rows: 1 });
}

#[test]
fn an_invoice_has_one_customer() {
    let other = sound("1").replace("17850", "");
    let (ids, reports, _) = read_rows(&[sound("1"), other, sound("2")]);
    assert_eq!(ids, ["2"]);
    assert_eq!(reports, ["3: customer \"\", where the rows of 1 above have \"17850\""]);
}

#[test]
fn an_invoice_has_a_bounded_number_of_lines() {
    let mut rows = vec![sound("1"); 5_000];
    assert_eq!(read_rows(&rows).0, ["1"]);
    rows.push(sound("1"));
    rows.push(sound("1"));
    let (ids, reports, counts) = read_rows(&rows);
    assert_eq!(ids, [""; 0]);
    assert_eq!(reports, ["5002: 1 has more than 5000 lines"]);
    assert_eq!(counts.left_out, Tally { invoices: 1, rows: 5_001 });
}

#[test]
fn the_highest_total_is_exact() {
    let rows = vec![row("1", "A", "4294967295", "999999999.9999"); 5_000];
    let file = write(format!("{HEADER}\n{}", rows.concat()));
    let invoice = read_csv(&file.path).and_then(|file| file.invoices()).expect("readable").next();
    let total = invoice.expect("one").expect("sound").total();
    assert_eq!(total.to_string(), "21474836474997852516352.5000");
}

#[test]
fn bytes_before_and_between_rows_do_not_matter() {
    let rows = [sound("1"), "\n".into(), row("2", "A", "x", "1")].concat();
    let windows = format!("\u{feff}{HEADER}\n{rows}").replace('\n', "\r\n");
    let (ids, reports, rows) = read_text(windows);
    assert_eq!((ids.len(), rows.read), (1, 2));
    assert_eq!(reports, ["4: Quantity \"x\" is not a whole number"]);
}

#[test]
fn non_utf_8_text_is_read_as_windows_1252() {
    let mut text = format!("{HEADER}\n{}", sound("1")).into_bytes();
    text.extend_from_slice(b"2,A,\xa340 VOUCHER,1,2010-12-01T08:26,1,17850,United Kingdom\n");
    let (ids, reports, rows) = read_text(text);
    assert_eq!((ids.len(), reports, rows.recoded), (2, Vec::new(), 1));
}

/// Covers rows of commas at the end of the file, where spreadsheets write such rows, and in other places.
#[test]
fn rows_of_only_commas_are_ignored() {
    let rows = [sound("1"), ",,,,,,,\n".into(), sound("1"), sound("2"), ",,,,,,,\r\n".into(), ",,,,,,,".into()];
    let (ids, reports, rows) = read_rows(&rows);
    assert_eq!((ids, reports), (vec!["1".to_owned(), "2".to_owned()], Vec::new()));
    assert_eq!((rows.read, rows.left_out), (3, Tally::default()));
}

#[test]
fn columns_are_found_by_name() {
    let text = "Country,CustomerID,UnitPrice,InvoiceDate,Quantity,Description,StockCode,InvoiceNo\n\
                UK,,1.25,2010-12-01T08:26,4,\"A, B\",S,77\n";
    let file = write(text);
    let invoice = read_csv(&file.path).and_then(|file| file.invoices()).expect("readable").next();
    let line = Line { sku: "S".into(), quantity: 4, unit_price: Decimal::new(125, 2) };
    let expected = Invoice::Order { id: "77".into(), customer: None, lines: vec![line] };
    assert_eq!(invoice.expect("one").expect("sound"), expected);
}

#[test]
fn unusable_input_gives_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(matches!(read_csv(folder.path()), Err(InputError::NotAFile { .. })));
    let missing = read_csv(folder.path().join("b.csv"));
    assert!(
        matches!(&missing, Err(InputError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound)
    );
    for empty in ["", "\n\r\n", "\u{feff}"] {
        assert!(matches!(read_csv(&write(empty).path), Err(InputError::Empty { .. })), "{empty:?}");
    }
    let short = write("InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,Country\n1");
    let message = read_csv(&short.path).expect_err("a column short").to_string();
    assert_eq!(
        message,
        format!(
            "{}:1: no column CustomerID; the first line must name the columns InvoiceNo, StockCode, Description, \
             Quantity, InvoiceDate, UnitPrice, CustomerID, Country",
            short.path.display()
        )
    );
    assert!(read_csv(&write(HEADER).path).is_ok_and(|file| file.is_empty()));
}

#[test]
fn changed_file_is_not_read_further() {
    let text = format!("{HEADER}\n{}", sound("1"));
    let file = write(&text);
    let opened = read_csv(&file.path).expect("readable");
    let mut reading = opened.invoices().expect("readable");
    fs::write(&file.path, format!("{text}{}", sound("2"))).expect("written");
    assert!(matches!(opened.invoices(), Err(InputError::Changed { .. })));
    assert_eq!(reading.next().map(|item| item.expect("the file was readable").id().to_owned()), Some("1".to_owned()));
    assert!(matches!(reading.next(), Some(Err(ReadError::Input(InputError::Changed { .. })))));
    assert!(reading.next().is_none());
}
