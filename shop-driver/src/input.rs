//! The input of the shop: the invoices of a file, or generated invoices.
//!
//! | an invoice with | is |
//! |---|---|
//! | a number without `C`, a total above zero | an [order](Invoice::Order) of all its lines |
//! | a number that starts with `C`, only negative quantities | a [return](Invoice::Return) |
//! | a number without `C`, a total of zero | an [adjustment](Invoice::Adjustment) of stock |
//!
//! Any other invoice is invalid and is reported with its line. [`FileInvoices`] describes which rows and invoices are
//! left out.
//!
//! ```
//! # use shop_driver::input::{Invoice, ReadError, Source};
//! # fn place(_: Invoice) {}
//! let source = Source::generated(100, 7);
//! let demand = source.demand()?;
//! let mut invoices = source.invoices()?;
//! for invoice in &mut invoices {
//!     match invoice {
//!         Ok(invoice) => place(invoice),
//!         Err(ReadError::Row(row)) => eprintln!("{row}"),
//!         Err(ReadError::Input(error)) => return Err(error),
//!     }
//! }
//! assert_eq!(invoices.rows().orders.invoices, 100);
//! # Ok::<(), shop_driver::input::InputError>(())
//! ```

mod columns;
mod csv_file;
mod demand;
mod draft;
mod error;
mod generate;
mod invoice;
mod lines;
mod record;
mod row;
mod rows;
mod source;

pub use self::{
    csv_file::{CsvFile, FileInvoices, read_csv},
    demand::{Demand, StockFactor, StockFactorError, demand},
    error::{InputError, ReadError, RowError},
    generate::{Generated, generate},
    invoice::{Change, Invoice, LINES_MAX, Line},
    rows::{MESSAGES_MAX, Rows, Tally},
    source::{Invoices, Source},
};
