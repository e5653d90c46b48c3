//! The refusals of `#[derive(Event)]`, and their messages.
//!
//! After a deliberate change of a message: `TRYBUILD=overwrite cargo test -p annals --test event_derive_ui`.

#[test]
fn refusals_are_clear() {
    trybuild::TestCases::new().compile_fail("tests/ui/event_*.rs");
}
