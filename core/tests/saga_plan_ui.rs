//! Saga plans that do not compile, and the compiler's messages.
//!
//! To update the files after a deliberate change of a message, run `TRYBUILD=overwrite cargo test -p annals --test
//! saga_plan_ui`.

#[test]
fn plans_with_wrong_order_do_not_compile() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/ui/saga_good_plans.rs");
    for wrong in [
        "build_empty",
        "build_without_undo",
        "compensatable_after_pivot",
        "compensatable_after_retriable",
        "pivot_after_retriable",
        "step_after_closing",
        "step_without_undo",
        "two_pivots",
        "undo_of_pivot",
        "undo_of_retriable",
    ] {
        cases.compile_fail(format!("tests/ui/saga_{wrong}.rs"));
    }
}
