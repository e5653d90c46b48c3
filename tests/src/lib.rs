//! The code that several tests share: stores that fail, brokers, terminals, and small aggregates and sagas.

// This is test code: an unexpected error fails the test by panicking.
#![allow(clippy::unwrap_used)]

pub mod distance;
pub mod faulty;
pub mod kafka;
pub mod log_output;
pub mod tally;
#[cfg(unix)]
pub mod terminal;
pub mod trip;

/// Returns what `cargo metadata` reports about the packages of this workspace.
pub fn cargo_metadata<T: serde::de::DeserializeOwned>() -> T {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["metadata", "--format-version", "1", "--no-deps", "--offline"];
    let folder = env!("CARGO_MANIFEST_DIR");
    let output = std::process::Command::new(cargo).args(arguments).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}
