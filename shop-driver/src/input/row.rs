use chrono::{DateTime, NaiveDate, NaiveDateTime};
use rust_decimal::Decimal;

use super::{columns::Columns, record::Record};

/// The maximum length of an invoice number, SKU or customer id, in bytes. A stream id has room for a category and a
/// text of this length.
const ID_BYTES_MAX: usize = 200;
/// The maximum number of digits before the decimal point of a price. With a quantity of 32 bits, four decimals and
/// [`LINES_MAX`](super::invoice::LINES_MAX) lines, a total has at most 27 digits. A `Decimal` holds 28 digits, so no
/// total can overflow or be rounded.
const PRICE_DIGITS_MAX: usize = 9;
/// The maximum number of decimals of a price. Amounts of money have at most four decimals in any currency; more
/// decimals are a sign of a rounded float.
const PRICE_DECIMALS_MAX: usize = 4;

/// The format of times in spreadsheets from the United States.
const MONTH_FIRST: [&str; 4] = ["%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %I:%M %p", "%m/%d/%Y %I:%M:%S %p"];

/// The content of a well-formed row, without its invoice number.
#[derive(Debug, PartialEq)]
pub(super) struct Row<'a> {
    pub sku: &'a str,
    /// The quantity: not zero, and at most 32 bits without its sign.
    pub quantity: i64,
    pub price: Decimal,
    pub customer: Option<&'a str>,
}

/// Returns the invoice number of a row. The error says why the number cannot be read.
///
/// If the row has too few or too many fields, the number can still be read if it is in the first column, because no
/// missing or extra field can have moved it.
pub(super) fn number<'a>(record: &'a Record, columns: &Columns) -> Result<&'a str, String> {
    let moved = record.flaw.is_none() && record.len() != columns.count && columns.number > 0;
    match record.get(columns.number) {
        Some(number) if !moved => identifier("InvoiceNo", number),
        _ => Err(flaw(record, columns).unwrap_or_else(|| "InvoiceNo is missing".to_owned())),
    }
}

/// Reads a row.
pub(super) fn parse<'a>(record: &'a Record, columns: &Columns) -> Result<Row<'a>, String> {
    if let Some(flaw) = flaw(record, columns) {
        return Err(flaw);
    }
    let field = |at: usize| record.get(at).unwrap_or_default();
    let sku = identifier("StockCode", field(columns.sku))?;
    let quantity = quantity(field(columns.quantity))?;
    date(field(columns.date))?;
    let price = price(field(columns.price))?;
    let customer = match field(columns.customer) {
        "" => None,
        customer => Some(identifier("CustomerID", customer)?),
    };
    Ok(Row { sku, quantity, price, customer })
}

fn flaw(record: &Record, columns: &Columns) -> Option<String> {
    if let Some(flaw) = record.flaw {
        return Some(flaw.to_owned());
    }
    (record.len() != columns.count).then(|| format!("{} columns instead of {}", record.len(), columns.count))
}

/// Quotes text for a message. Long text is shortened, because being too long may be exactly what is wrong with the
/// field.
fn quoted(text: &str) -> String {
    const CHARACTERS_MAX: usize = 40;
    let mut start: String = text.chars().take(CHARACTERS_MAX).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    format!("{start:?}")
}

fn identifier<'a>(name: &str, text: &'a str) -> Result<&'a str, String> {
    if text.trim().is_empty() {
        return Err(format!("{name} is empty"));
    }
    if text.len() > ID_BYTES_MAX {
        return Err(format!("{name} {} has {} bytes; the limit is {ID_BYTES_MAX}", quoted(text), text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{name} {} has a control character", quoted(text)));
    }
    Ok(text)
}

fn quantity(text: &str) -> Result<i64, String> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("Quantity {} is not a whole number", quoted(text)));
    }
    let size: u32 = digits.parse().map_err(|_| format!("Quantity {} is beyond {}", quoted(text), u32::MAX))?;
    match size {
        0 => Err("Quantity is 0".to_owned()),
        size if digits.len() < text.len() => Ok(-i64::from(size)),
        size => Ok(i64::from(size)),
    }
}

fn price(text: &str) -> Result<Decimal, String> {
    let wrong = || format!("UnitPrice {} is not a decimal number such as 2.55", quoted(text));
    let size = text.strip_prefix('-').unwrap_or(text);
    let (whole, decimals) = match size.split_once('.') {
        Some((whole, decimals)) if !decimals.is_empty() => (whole, decimals),
        Some(_) => return Err(wrong()),
        None => (size, ""),
    };
    if whole.is_empty() || !whole.bytes().chain(decimals.bytes()).all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    if size.len() < text.len() {
        return Err(format!("UnitPrice {} is below zero", quoted(text)));
    }
    if decimals.len() > PRICE_DECIMALS_MAX {
        return Err(format!(
            "UnitPrice {} has {} decimals; money has at most {PRICE_DECIMALS_MAX}",
            quoted(text),
            decimals.len()
        ));
    }
    if whole.trim_start_matches('0').len() > PRICE_DIGITS_MAX {
        return Err(format!("UnitPrice {} has more than {PRICE_DIGITS_MAX} digits before the point", quoted(text)));
    }
    text.parse().map_err(|_| wrong())
}

/// Checks a date: `2010-12-01` or `2010-12-01T08:26`, optionally with seconds, a fraction of a second and an offset. A
/// blank may replace the `T`. Also accepts the format of the published data set, with the month first: `12/1/2010
/// 8:26`.
///
/// The shop does not use the date. However, a date column without dates is a sign that the columns do not match their
/// names.
fn date(text: &str) -> Result<(), String> {
    let shaped = |shape: &str| {
        text.len() >= shape.len()
            && text.bytes().zip(shape.bytes()).all(|(b, like)| match like {
                b'9' => b.is_ascii_digit(),
                b'T' => b == b'T' || b == b' ',
                like => b == like,
            })
    };
    let known = if text.len() == "9999-99-99".len() {
        shaped("9999-99-99") && text.parse::<NaiveDate>().is_ok()
    } else if shaped("9999-99-99T99:99") {
        let text = text.replacen(' ', "T", 1);
        NaiveDateTime::parse_from_str(&text, "%Y-%m-%dT%H:%M").is_ok()
            || NaiveDateTime::parse_from_str(&text, "%Y-%m-%dT%H:%M:%S%.f").is_ok()
            || DateTime::parse_from_str(&text, "%Y-%m-%dT%H:%M%#z").is_ok()
            || DateTime::parse_from_rfc3339(&text).is_ok()
    } else {
        MONTH_FIRST.iter().any(|format| NaiveDateTime::parse_from_str(text, format).is_ok())
            || NaiveDate::parse_from_str(text, "%m/%d/%Y").is_ok()
    };
    let wrong = || {
        let text = quoted(text);
        format!("InvoiceDate {text} is neither like 2010-12-01T08:26 nor, with the month first, like 12/1/2010 8:26")
    };
    known.then_some(()).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: Columns = Columns { number: 0, sku: 1, quantity: 2, date: 3, price: 4, customer: 5, count: 6 };

    fn record(line: &str) -> Record {
        let mut record = Record::default();
        record.split(line.as_bytes());
        record
    }

    fn check(line: &str, expected: &str) {
        assert_eq!(parse(&record(line), &COLUMNS).expect_err(line), expected, "{line}");
    }

    #[test]
    fn reads_a_sound_row() {
        let record = record("536365,gift_0001_40,-6,2010-12-01T08:26,2.5,");
        let price = Decimal::new(25, 1);
        let expected = Row { sku: "gift_0001_40", quantity: -6, price, customer: None };
        assert_eq!(parse(&record, &COLUMNS), Ok(expected));
    }

    #[test]
    fn says_what_is_wrong() {
        check("1,A,6,2010-12-01,2.5", "5 columns instead of 6");
        check("1,A,6,2010-12-01,2.5,7,8", "7 columns instead of 6");
        check("1,,6,2010-12-01,2.5,7", "StockCode is empty");
        check("1, ,6,2010-12-01,2.5,7", "StockCode is empty");
        check("1,A\tB,6,2010-12-01,2.5,7", r#"StockCode "A\tB" has a control character"#);
        check("1,A,6,2010-12-01,2.5,\u{85}", "CustomerID is empty");
        let long = "é".repeat(101);
        let start = "é".repeat(40);
        check(
            &format!("1,{long},6,2010-12-01,2.5,7"),
            &format!("StockCode \"{start}…\" has 202 bytes; the limit is 200"),
        );
    }

    #[test]
    fn a_quantity_is_a_whole_number_of_32_bits_and_not_zero() {
        assert_eq!(quantity("4294967295"), Ok(4_294_967_295));
        assert_eq!(quantity("-4294967295"), Ok(-4_294_967_295));
        assert_eq!(quantity("4294967296"), Err(r#"Quantity "4294967296" is beyond 4294967295"#.to_owned()));
        assert_eq!(
            quantity("99999999999999999999"),
            Err(r#"Quantity "99999999999999999999" is beyond 4294967295"#.to_owned())
        );
        for zero in ["0", "-0", "000"] {
            assert_eq!(quantity(zero), Err("Quantity is 0".to_owned()));
        }
        for wrong in ["", "-", "--5", "+5", "6.0", "1e3", " 6", "six", "１"] {
            assert_eq!(quantity(wrong), Err(format!("Quantity {wrong:?} is not a whole number")));
        }
    }

    #[test]
    fn a_price_is_exact_money() {
        assert_eq!(price("13541.33"), Ok(Decimal::new(1_354_133, 2)));
        assert_eq!(price("0.001"), Ok(Decimal::new(1, 3)));
        assert_eq!(price("999999999.9999"), Ok(Decimal::new(9_999_999_999_999, 4)));
        assert_eq!(price("0"), Ok(Decimal::ZERO));
        assert_eq!(
            price("2.5500000000"),
            Err(r#"UnitPrice "2.5500000000" has 10 decimals; money has at most 4"#.to_owned())
        );
        assert_eq!(
            price("1000000000"),
            Err(r#"UnitPrice "1000000000" has more than 9 digits before the point"#.to_owned())
        );
        assert_eq!(price("-11062.06"), Err(r#"UnitPrice "-11062.06" is below zero"#.to_owned()));
        for wrong in ["", "-", ".", "2.", ".5", "+2", "1_000", "1,5", "1e3", "NaN", " 2", "2.5.5", "£2"] {
            assert_eq!(price(wrong), Err(format!("UnitPrice {wrong:?} is not a decimal number such as 2.55")));
        }
    }

    #[test]
    fn a_date_is_iso_8601_or_month_first() {
        for right in [
            "2010-12-01",
            "2010-12-01T08:26",
            "2010-12-01 08:26",
            "2010-12-01T08:26:59",
            "2010-12-01T08:26:59.123",
            "2010-12-01T08:26Z",
            "2010-12-01T08:26:00+01:00",
            "2012-02-29T00:00",
            "12/1/2010 8:26",
            "12/1/2010 08:26",
            "02/29/2012 23:59:59",
            "12/13/2010 8:26 PM",
            "12/1/2010",
            "12/1/10 8:26",
        ] {
            assert_eq!(date(right), Ok(()), "{right}");
        }
        for wrong in [
            "",
            "13/12/2010 8:26",
            "12/1/2010 24:26",
            "2/29/2011 8:26",
            "12/1/2010 8:26 uhr",
            "01.12.2010",
            "2010-13-01",
            "2010-12-32T08:26",
            "2011-02-29",
            "2010-12-01T24:01",
            "2010-12-01T8:26",
            "2010-12-01T08:26 ",
            "2010-12-01T",
            "20101201",
            "2010-12-01T08:26:00+1",
        ] {
            let start = format!("InvoiceDate {wrong:?} is neither like 2010-12-01T08:26 nor");
            assert!(date(wrong).is_err_and(|reason| reason.starts_with(&start)), "{wrong}");
        }
    }

    #[test]
    fn invoice_number_is_trusted_only_in_an_unshifted_row() {
        assert_eq!(number(&record("1,A"), &COLUMNS), Ok("1"));
        assert_eq!(number(&record(",A,6,2010-12-01,2.5,7"), &COLUMNS), Err("InvoiceNo is empty".to_owned()));
        let last = Columns { number: 5, customer: 0, ..COLUMNS };
        assert_eq!(number(&record("A,6,2010-12-01,2.5,7"), &last), Err("5 columns instead of 6".to_owned()));
        assert_eq!(number(&record("7,A,6,2010-12-01,2.5,1,x"), &last), Err("7 columns instead of 6".to_owned()));
        assert_eq!(number(&record("7,A,6,2010-12-01,2.5,1"), &last), Ok("1"));
    }
}
