//! The faults that `verify` finds.

use serde::Serialize;

use crate::{
    failure::Failure,
    output::{Output, grouped, shown},
};

/// The maximum number of faults to print. Further faults are only counted.
const PRINTED_MAX: u64 = 1_000;

/// A fault, and where it was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Fault {
    #[serde(rename = "where")]
    place: String,
    what: String,
}

/// Prints faults as they are found.
pub(super) struct Faults<'a> {
    output: &'a mut Output,
    count: u64,
}

impl<'a> Faults<'a> {
    pub fn new(output: &'a mut Output) -> Self {
        Self { output, count: 0 }
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn add(&mut self, place: impl Into<String>, what: impl Into<String>) -> Result<(), Failure> {
        self.count += 1;
        if self.count > PRINTED_MAX {
            return Ok(());
        }
        let fault = Fault { place: place.into(), what: what.into() };
        if self.output.json {
            return self.output.value(&fault);
        }
        self.output.line(&shown(&format!("{}: {}", fault.place, fault.what)).replace('\n', " "))
    }

    /// Prints how many faults were only counted. Returns the output, so that the caller can print the result.
    pub fn end(&mut self) -> Result<&mut Output, Failure> {
        if self.count > PRINTED_MAX && !self.output.json {
            self.output.line(&format!("and {} more", grouped((self.count - PRINTED_MAX) as i64)))?;
        }
        Ok(self.output)
    }
}
