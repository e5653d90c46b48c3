use std::path::Path;

use super::{
    CsvFile, Demand, FileInvoices, Generated, InputError, Invoice, ReadError, Rows, StockFactor, demand, generate,
    read_csv,
};

/// Where invoices come from. It can be read any number of times, and gives the same invoices every time.
#[derive(Clone, Debug)]
pub enum Source {
    /// A CSV file.
    File(CsvFile),
    /// A seed.
    Generated(Generated),
}

impl Source {
    /// The invoices of a CSV file.
    pub fn file(path: impl AsRef<Path>) -> Result<Self, InputError> {
        Ok(Self::File(read_csv(path)?))
    }

    /// `count` orders out of `seed`.
    pub fn generated(count: u64, seed: u64) -> Self {
        Self::Generated(generate(count, seed))
    }

    /// How many invoices there are, with those that will be left out: the length of a progress bar.
    pub fn len(&self) -> u64 {
        match self {
            Self::File(file) => file.len(),
            Self::Generated(generated) => generated.size_hint().0 as u64,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads it once to sum what its orders and write-offs take of each SKU. What is left out takes nothing.
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

    /// The stock to start with: [`demand`](Self::demand) times `factor`.
    pub fn stock(&self, factor: StockFactor) -> Result<Demand, InputError> {
        Ok(factor.stock(&self.demand()?))
    }

    /// Reads it from the start.
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
    /// Of a file.
    File(Box<FileInvoices>),
    /// Out of a seed, and how many so far.
    Generated(Generated, Rows),
}

impl Invoices {
    /// What became of the rows so far; a generated line counts as a row.
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
