use std::fmt::Write;

use super::number::grouped;
use crate::input::{Rows, Tally};

/// Reports the outcome of the rows of a file: one line, followed by the first malformed rows if there are any.
pub fn rows(rows: &Rows) -> String {
    let mut text = format!("{} read:", counted(rows.read, "row"));
    let parts = [("order", rows.orders), ("return", rows.returns), ("adjustment", rows.adjustments)];
    for (at, (name, Tally { invoices, rows })) in parts.into_iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        let _ = write!(text, "{comma} {} ({})", counted(invoices, name), counted(rows, "row"));
    }
    text.push('\n');
    if rows.recoded > 0 {
        let _ = writeln!(text, "{} not UTF-8, and read as Windows-1252", counted(rows.recoded, "row"));
    }
    if rows.malformed == 0 && rows.left_out == Tally::default() {
        return text;
    }
    let Tally { invoices, rows: sound } = rows.left_out;
    let _ = writeln!(
        text,
        "{} malformed; {} left out, with {} that {} sound",
        counted(rows.malformed, "row"),
        counted(invoices, "invoice"),
        counted(sound, "row"),
        if sound == 1 { "is" } else { "are" },
    );
    for message in &rows.messages {
        let _ = writeln!(text, "  {message}");
    }
    let more = rows.malformed.saturating_sub(rows.messages.len() as u64);
    if more > 0 {
        let _ = writeln!(text, "  and {} more", grouped(more));
    }
    text
}

fn counted(count: u64, name: &str) -> String {
    format!("{} {name}{}", grouped(count), if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> Rows {
        Rows {
            read: 43_665,
            orders: Tally { invoices: 1_595, rows: 42_769 },
            returns: Tally { invoices: 333, rows: 742 },
            adjustments: Tally { invoices: 1, rows: 1 },
            ..Rows::default()
        }
    }

    #[test]
    fn sound_rows_take_one_line() {
        let expected = "43,665 rows read: 1,595 orders (42,769 rows), 333 returns (742 rows), 1 adjustment (1 row)\n";
        assert_eq!(rows(&sound()), expected);
    }

    #[test]
    fn other_encoding_is_reported() {
        let text = rows(&Rows { recoded: 2, ..sound() });
        assert!(text.ends_with("\n2 rows not UTF-8, and read as Windows-1252\n"), "{text}");
    }

    #[test]
    fn malformed_rows_are_listed_up_to_a_limit() {
        let one = Rows {
            malformed: 1,
            left_out: Tally { invoices: 1, rows: 6 },
            messages: vec!["a.csv:9: Quantity is 0".into()],
            ..sound()
        };
        let expected = "1 row malformed; 1 invoice left out, with 6 rows that are sound\n  a.csv:9: Quantity is 0\n";
        assert_eq!(rows(&one).split_once('\n').map(|(_, rest)| rest), Some(expected));

        let many = Rows { malformed: 1_234, messages: vec!["x".into(); 10], ..one };
        assert_eq!(rows(&many).lines().count(), 13);
        assert!(rows(&many).ends_with("\n  x\n  and 1,224 more\n"));
    }
}
