//! Conversion of panics in user code into errors. The error contains the text of the panic, and other code is not
//! affected.

use std::{any::Any, panic::AssertUnwindSafe};

use futures::FutureExt;

/// The text of a panic in user code.
#[derive(Debug, Clone, thiserror::Error)]
#[error("panicked: {0}")]
pub(crate) struct Panicked(String);

/// Runs user code until it returns or panics. After a panic, the caller discards everything that the code could change.
pub(crate) async fn caught<T>(code: impl Future<Output = T>) -> Result<T, Panicked> {
    AssertUnwindSafe(code).catch_unwind().await.map_err(|panic| Panicked(text(&*panic)))
}

/// Like [`caught`], for code that is not async.
pub(crate) fn caught_now<T>(code: impl FnOnce() -> T) -> Result<T, Panicked> {
    std::panic::catch_unwind(AssertUnwindSafe(code)).map_err(|panic| Panicked(text(&*panic)))
}

fn text(panic: &(dyn Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    literal.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".to_owned())
}
