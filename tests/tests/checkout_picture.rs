//! Checks that the pictures of the checkout saga in the documentation equal the library's drawings. `UPDATE=1 cargo
//! test` writes the pictures again.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

use sample_shop::checkout::checkout;

/// Compares the content of a file with the drawing, or writes the drawing to the file.
fn check(file: &str, drawn: impl Fn(&str) -> String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    let stands = fs::read_to_string(&path).unwrap_or_default();
    let drawn = drawn(&stands);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, drawn).unwrap();
        return;
    }
    assert_eq!(stands, drawn, "{file} is not what the library draws: run the tests with UPDATE=1");
}

#[test]
fn recorded_svg_equals_the_drawn_one() {
    check("docs/checkout.svg", |_| checkout().svg());
}

#[test]
fn readme_has_the_mermaid_text_of_the_library() {
    check("sample-shop/README.md", |readme| {
        let start = "<!-- saga:checkout -->\n";
        let end = "<!-- saga:end -->\n";
        let (before, rest) = readme.split_once(start).unwrap();
        let (_, after) = rest.split_once(end).unwrap();
        format!("{before}{start}```mermaid\n{}```\n{end}{after}", checkout().mermaid())
    });
}
