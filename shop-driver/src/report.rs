//! The output of the shop: progress during the run, and a summary at the end.

mod histogram;
mod number;
mod outcome;
mod progress;
mod remarks;
mod rows;
mod summary;
mod terminal;

pub use self::{
    number::grouped,
    outcome::show,
    progress::Progress,
    remarks::{repeated, stopped, stopped_there},
    rows::rows,
    summary::{Cancelled, Summary},
    terminal::Terminal,
};
