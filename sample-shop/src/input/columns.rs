use super::record::Record;

/// The columns that the shop reads. `Description` and `Country` are nothing to it, but a file without them is not this file.
const NAMES: [&str; 8] =
    ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"];

pub(super) fn names() -> String {
    NAMES.join(", ")
}

/// Where each column stands, by its name in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    pub number: usize,
    pub sku: usize,
    pub quantity: usize,
    pub date: usize,
    pub price: usize,
    pub customer: usize,
    /// How many there are, with those the shop does not know.
    pub count: usize,
}

impl Columns {
    /// Reads the header, or says what is wrong with it.
    pub fn of(header: &Record) -> Result<Self, String> {
        if let Some(flaw) = header.flaw {
            return Err(flaw.to_owned());
        }
        let all = || (0..header.len()).filter_map(|at| header.get(at));
        let missing: Vec<&str> = NAMES.into_iter().filter(|name| !all().any(|found| found == *name)).collect();
        if !missing.is_empty() {
            return Err(format!("no column {}", missing.join(", ")));
        }
        if let Some(twice) = NAMES.into_iter().find(|name| all().filter(|found| found == name).count() > 1) {
            return Err(format!("two columns {twice}"));
        }
        let at = |name: &str| all().position(|found| found == name).unwrap_or_default();
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
    fn names_what_is_missing_or_doubled() {
        let header = "InvoiceNo,StockCode,Description,InvoiceDate,UnitPrice,CustomerID";
        assert_eq!(of(header), Err("no column Quantity, Country".to_owned()));
        assert_eq!(of(&format!("{},Quantity", names().replace(' ', ""))), Err("two columns Quantity".to_owned()));
    }
}
