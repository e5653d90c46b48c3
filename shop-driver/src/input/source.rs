use std::path::Path;

use super::{
    csv_file::{CsvFile, FileInvoices, read_csv},
    demand::{self, Demand, StockFactor},
    error::{InputError, ReadError},
    generate::{Generated, generate},
    invoice::Invoice,
    rows::Rows,
};

/// A source of invoices. The source can be read any number of times, and returns the same invoices each time.
#[derive(Clone, Debug)]
pub enum Source {
    /// A CSV file.
    File(CsvFile),
    /// A seed.
    Generated(Generated),
}

impl Source {
    /// Opens a CSV file of invoices.
    pub fn file(path: impl AsRef<Path>) -> Result<Self, InputError> {
        Ok(Self::File(read_csv(path)?))
    }

    /// Generates `count` orders from `seed`.
    pub fn generated(count: u64, seed: u64) -> Self {
        Self::Generated(generate(count, seed))
    }

    /// The number of invoices, including those that will be left out. A progress bar needs this number.
    pub fn len(&self) -> u64 {
        match self {
            Self::File(file) => file.len(),
            Self::Generated(generated) => generated.size_hint().0 as u64,
        }
    }

    /// Whether there are no invoices.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the source once, and adds up the units of each SKU that its orders and write-offs take. Invoices that are
    /// left out do not count.
    pub fn demand(&self) -> Result<Demand, InputError> {
        let mut demand = Demand::new();
        for item in self.invoices()? {
            match item {
                Ok(invoice) => demand::add(&mut demand, &invoice),
                Err(ReadError::Row(_)) => {}
                Err(ReadError::Input(error)) => return Err(error),
            }
        }
        Ok(demand)
    }

    /// Returns the opening stock: [`demand`](Self::demand) times `factor`.
    pub fn stock(&self, factor: StockFactor) -> Result<Demand, InputError> {
        Ok(factor.stock(&self.demand()?))
    }

    /// Reads the source from the start.
    pub fn invoices(&self) -> Result<Invoices, InputError> {
        Ok(match self {
            Self::File(file) => Invoices::File(Box::new(file.invoices()?)),
            Self::Generated(generated) => Invoices::Generated(generated.clone(), Rows::default()),
        })
    }
}

/// The invoices of a [`Source`], one at a time.
#[derive(Debug)]
pub enum Invoices {
    /// The invoices of a file.
    File(Box<FileInvoices>),
    /// Generated invoices, and their number so far.
    Generated(Generated, Rows),
}

impl Invoices {
    /// The outcome of the rows that have been read so far. Each generated line counts as a row.
    pub fn rows(&self) -> &Rows {
        match self {
            Self::File(file) => file.rows(),
            Self::Generated(_, rows) => rows,
        }
    }
}

impl Iterator for Invoices {
    type Item = Result<Invoice, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::File(file) => file.next(),
            Self::Generated(generated, rows) => {
                let invoice = generated.next()?;
                rows.read += invoice.rows();
                rows.became(&invoice);
                Some(Ok(invoice))
            }
        }
    }
}
