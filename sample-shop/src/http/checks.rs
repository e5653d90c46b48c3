//! Checks the fields of submissions that the aggregates do not check.

use annals_http::{Problem, check_name};
use axum::http::StatusCode;

use crate::order::{LINES_MAX, Line};

fn unprocessable(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
}

/// Checks that the customer and the lines can be stored. The order itself checks the sum of the lines.
pub fn order_lines(customer: Option<&str>, lines: &[Line]) -> Result<(), Problem> {
    if let Some(customer) = customer {
        check_name("the customer", customer).map_err(unprocessable)?;
    }
    if lines.len() > LINES_MAX {
        return Err(unprocessable(format!("there are {} lines; the limit is {LINES_MAX}", lines.len())));
    }
    lines.iter().try_for_each(|line| sku(&line.sku))
}

/// Checks that the string can be a SKU.
pub fn sku(sku: &str) -> Result<(), Problem> {
    check_name("the SKU", sku).map_err(unprocessable)
}
