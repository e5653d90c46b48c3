use super::record::Record;

/// The columns of the data set. The shop ignores `Description` and `Country`, but a file that lacks them is not an
/// edition of this data set.
const NAMES: [&str; 8] =
    ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"];

pub(super) fn names() -> String {
    NAMES.join(", ")
}

/// The position of each column, by its name in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    pub number: usize,
    pub sku: usize,
    pub quantity: usize,
    pub date: usize,
    pub price: usize,
    pub customer: usize,
    /// The number of columns, including columns that the shop ignores.
    pub count: usize,
}

impl Columns {
    /// Reads the header. The error says what is wrong with the header.
    pub fn of(header: &Record) -> Result<Self, String> {
        if let Some(flaw) = header.flaw {
            return Err(flaw.to_owned());
        }
        let first = header.get(0).unwrap_or_default();
        if first.contains('\0') || first.starts_with("ÿþ") || first.starts_with("þÿ") {
            return Err("the file is UTF-16; save it as CSV in UTF-8".to_owned());
        }
        if let Some(other) = [';', '\t'].into_iter().find(|other| header.len() == 1 && first.contains(*other)) {
            return Err(format!("the columns are separated by {other:?}; save the file with commas"));
        }
        let found: Vec<Option<&str>> = (0..header.len()).map(|at| header.get(at).and_then(known)).collect();
        let missing: Vec<&str> = NAMES.into_iter().filter(|name| !found.contains(&Some(name))).collect();
        if !missing.is_empty() {
            return Err(format!("no column {}", missing.join(", ")));
        }
        if let Some(twice) =
            NAMES.into_iter().find(|name| found.iter().filter(|other| **other == Some(name)).count() > 1)
        {
            return Err(format!("two columns {twice}"));
        }
        let at = |name: &str| found.iter().position(|other| *other == Some(name)).unwrap_or_default();
        Ok(Self {
            number: at("InvoiceNo"),
            sku: at("StockCode"),
            quantity: at("Quantity"),
            date: at("InvoiceDate"),
            price: at("UnitPrice"),
            customer: at("CustomerID"),
            count: header.len(),
        })
    }
}

/// Returns the shop's name for a column. Ignores case and blanks, and recognises the two columns that the second
/// edition of the data set renamed.
fn known(header: &str) -> Option<&'static str> {
    let plain: String = header.chars().filter(|c| !c.is_whitespace()).collect();
    let name = match &*plain.to_ascii_lowercase() {
        "invoice" => "InvoiceNo",
        "price" => "UnitPrice",
        _ => &plain,
    };
    NAMES.into_iter().find(|known| known.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(header: &str) -> Result<Columns, String> {
        let mut record = Record::default();
        record.split(header.as_bytes());
        Columns::of(&record)
    }

    #[test]
    fn finds_columns_by_name_in_any_order() {
        let columns = of("Country,Extra,CustomerID,UnitPrice,InvoiceDate,Quantity,Description,StockCode,InvoiceNo");
        let expected = Columns { number: 8, sku: 7, quantity: 5, date: 4, price: 3, customer: 2, count: 9 };
        assert_eq!(columns, Ok(expected));
    }

    #[test]
    fn case_and_blanks_of_names_do_not_count() {
        let header = "invoiceno,STOCKCODE, Description ,Quantity,Invoice Date,Unit Price,Customer ID,country";
        assert_eq!(of(header), of(&names().replace(' ', "")));
        assert_eq!(of("Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country"), of(header));
    }

    #[test]
    fn other_formats_are_named() {
        assert!(of(&names().replace(", ", ";")).is_err_and(|reason| reason.contains("separated by ';'")));
        assert!(of(&names().replace(", ", "\t")).is_err_and(|reason| reason.contains("separated by '\\t'")));
        let mut record = Record::default();
        record.split(b"\xff\xfeI\0n\0v\0");
        assert!(Columns::of(&record).is_err_and(|reason| reason.contains("UTF-16")));
    }

    #[test]
    fn missing_and_repeated_columns_are_named() {
        let header = "InvoiceNo,StockCode,Description,InvoiceDate,UnitPrice,CustomerID";
        assert_eq!(of(header), Err("no column Quantity, Country".to_owned()));
        assert_eq!(of(&format!("{},Quantity", names().replace(' ', ""))), Err("two columns Quantity".to_owned()));
    }
}
