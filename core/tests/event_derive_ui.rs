//! The definitions that `#[derive(Event)]` rejects, and the error messages.
//!
//! To update the files after a deliberate change of a message, run `TRYBUILD=overwrite cargo test -p annals --test
//! event_derive_ui`.

#[test]
fn compile_errors_are_clear() {
    trybuild::TestCases::new().compile_fail("tests/ui/event_*.rs");
}
