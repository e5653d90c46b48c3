//! The guide: every block of Rust is copied from code that is compiled and tested, and the summary lists every page.
//!
//! A page quotes a file with `<!-- quote:FILE#ANCHOR -->` before the block. The anchor is the code between the lines
//! `// ANCHOR: name` and `// ANCHOR_END: name` of the file. `ANNALS_QUOTES=write cargo test -p annals-examples --test
//! guide` copies the code into the pages.

use std::{
    collections::BTreeSet,
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

type Outcome = Result<(), Box<dyn Error>>;

const RUST: &str = "```rust\n";
const QUOTE: &str = "<!-- quote:";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(path: &str) -> Result<String, Box<dyn Error>> {
    fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}").into())
}

/// Returns the pages of the guide, as paths from the root of the repository.
fn pages() -> Result<Vec<String>, Box<dyn Error>> {
    let mut pages = vec!["examples/README.md".to_owned()];
    for entry in fs::read_dir(root().join("docs/guide"))? {
        pages.push(format!("docs/guide/{}", entry?.file_name().to_string_lossy()));
    }
    pages.sort();
    assert!(pages.len() > 10, "only {pages:?} were found");
    Ok(pages)
}

/// Returns the code between the marks of an anchor, without its indent and without the marks of other anchors.
fn anchored(file: &str, anchor: &str) -> Result<String, Box<dyn Error>> {
    let source = text(file)?;
    let missing = || format!("{file} has no anchor {anchor}");
    let after = source.split_once(&format!("// ANCHOR: {anchor}\n")).ok_or_else(missing)?.1;
    let code = after.split_once(&format!("// ANCHOR_END: {anchor}\n")).ok_or_else(missing)?.0;
    let lines: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("// ANCHOR")).collect();
    let indent = lines.iter().filter(|line| !line.is_empty()).map(|line| line.len() - line.trim_start().len()).min();
    let lines: Vec<&str> = lines.iter().map(|line| line.get(indent.unwrap_or(0)..).unwrap_or("")).collect();
    Ok(lines.join("\n").trim_end().to_owned())
}

/// Returns the page, with each quote replaced by the present code of its file.
fn quoted(page: &str, content: &str) -> Result<String, Box<dyn Error>> {
    let mut parts = content.split(QUOTE);
    let mut whole = parts.next().unwrap_or_default().to_owned();
    assert!(!whole.contains(RUST), "{page}: a block of Rust before the first quote");
    for part in parts {
        let unclosed = || format!("{page}: no block of Rust after {:?}", part.lines().next());
        let (name, rest) = part.split_once(&format!(" -->\n{RUST}")).ok_or_else(unclosed)?;
        let (_, rest) = rest.split_once("```\n").ok_or_else(unclosed)?;
        assert!(!rest.contains(RUST), "{page}: a block of Rust after the quote of {name} is no quote");
        let (file, anchor) = name.split_once('#').ok_or_else(|| format!("{page}: {name} names no anchor"))?;
        whole += &format!("{QUOTE}{name} -->\n{RUST}{}\n```\n{rest}", anchored(file, anchor)?);
    }
    Ok(whole)
}

#[test]
fn every_block_of_rust_is_compiled_code() -> Outcome {
    let mut quotes = 0;
    for page in pages()? {
        let content = text(&page)?;
        let wanted = quoted(&page, &content)?;
        quotes += content.matches(QUOTE).count();
        if env::var("ANNALS_QUOTES").is_ok_and(|value| value == "write") {
            fs::write(root().join(&page), wanted)?;
        } else {
            assert!(content == wanted, "{page} quotes other code than its files have: ANNALS_QUOTES=write mends it");
        }
    }
    assert!(quotes > 20, "only {quotes} quotes were found");
    Ok(())
}

/// mdBook shows only the pages that the summary lists.
#[test]
fn summary_lists_every_page_once() -> Outcome {
    let summary = text("docs/SUMMARY.md")?;
    let listed: Vec<String> = links(&summary);
    let once: BTreeSet<&String> = listed.iter().collect();
    assert_eq!(once.len(), listed.len(), "the summary lists a page twice: {listed:?}");
    let mut pages: Vec<String> =
        pages()?.iter().filter_map(|page| page.strip_prefix("docs/")).map(str::to_owned).collect();
    for folder in ["", "adr/"] {
        for entry in fs::read_dir(root().join("docs").join(folder))? {
            pages.push(format!("{folder}{}", entry?.file_name().to_string_lossy()));
        }
    }
    let is_page = |name: &&String| name.ends_with(".md") && *name != "SUMMARY.md";
    let missing: Vec<&String> = pages.iter().filter(is_page).filter(|page| !once.contains(page)).collect();
    assert!(missing.is_empty(), "docs/SUMMARY.md does not list {missing:?}");
    Ok(())
}

/// The page of counters must name each counter of the library.
#[test]
fn page_of_counters_names_each_counter() -> Outcome {
    let page = text("docs/guide/logs-and-metrics.md")?;
    let mut folders = vec![root().join("core/src")];
    let mut counters = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let source = fs::read_to_string(path)?;
            let strings = source.split('"').filter(|text| text.starts_with("annals_") && text.ends_with("_total"));
            counters.extend(strings.map(str::to_owned));
        }
    }
    assert!(counters.len() > 5, "only {counters:?} were found");
    let missing: Vec<&String> = counters.iter().filter(|name| !page.contains(&format!("| `{name}` |"))).collect();
    assert!(missing.is_empty(), "docs/guide/logs-and-metrics.md does not name {missing:?}");
    Ok(())
}

/// Returns the links of a page to files of the repository.
fn links(page: &str) -> Vec<String> {
    let ends = page.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    let links = ends.map(|(link, _)| link).filter(|link| !link.contains("://") && !link.starts_with('#'));
    links.map(str::to_owned).collect()
}
