//! A panic in a user's code is an error like others: it says so, and takes nothing else with it.

use std::{any::Any, panic::AssertUnwindSafe};

use futures::FutureExt;

/// What a user's code said as it panicked.
#[derive(Debug, Clone, thiserror::Error)]
#[error("panicked: {0}")]
pub(crate) struct Panicked(String);

/// Runs a user's code to its end or its panic. The caller throws away what the code was given to change.
pub(crate) async fn caught<T>(code: impl Future<Output = T>) -> Result<T, Panicked> {
    AssertUnwindSafe(code).catch_unwind().await.map_err(|panic| Panicked(text(&*panic)))
}

/// The same for code that waits for nothing.
pub(crate) fn caught_now<T>(code: impl FnOnce() -> T) -> Result<T, Panicked> {
    std::panic::catch_unwind(AssertUnwindSafe(code)).map_err(|panic| Panicked(text(&*panic)))
}

fn text(panic: &(dyn Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    literal.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".to_owned())
}
