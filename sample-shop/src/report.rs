//! What the shop says: while it runs, and how it all ended.

mod histogram;
mod number;
mod progress;
mod rows;
mod summary;
mod terminal;

pub use self::{
    progress::Progress,
    rows::rows,
    summary::{Cancelled, Summary, Units},
    terminal::Terminal,
};
