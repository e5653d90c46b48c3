//! Upcasters for data from the time when the bank had pounds only.

use std::convert::Infallible;

use serde_json::Value;

// ANCHOR: upcaster
/// The upcaster of all events and commands that were written when the bank had pounds only.
pub(crate) fn in_pounds(mut old: Value) -> Result<Value, Infallible> {
    old["currency"] = "GBP".into();
    Ok(old)
}

/// The currency of transfers that began when the bank had pounds only.
pub(crate) fn pounds() -> String {
    "GBP".to_owned()
}
// ANCHOR_END: upcaster
