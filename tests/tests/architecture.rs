//! The allowed dependencies between packages, and other promises of ARCHITECTURE.md and the README that the compiler
//! cannot check.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

#[path = "architecture/sources.rs"]
mod sources;

/// The maximum number of lines of a function. A longer function holds more than one idea.
const FUNCTION_LINES_MAX: usize = 80;
/// For each package, the number of files that import one another in a circle. The numbers may only decrease. In the
/// core, these files are the parts of the model checker.
const FILES_IN_CIRCLES: [(&str, usize); 3] = [("bench", 20), ("core", 3), ("store-postgres", 10)];
/// The maximum number of rooms of the core. A room is a file or a folder at the top of the sources.
const CORE_ROOMS_MAX: usize = 20;
/// The maximum number of arrows between the rooms of the core. An arrow leads from a room to another room that it uses.
const CORE_ARROWS_MAX: usize = 100;
/// Drivers of databases and brokers. The core must not depend on them, not even indirectly.
const DRIVERS: [&str; 8] =
    ["sqlx", "sqlx-core", "sqlx-postgres", "libsqlite3-sys", "rusqlite", "tokio-postgres", "rdkafka", "rdkafka-sys"];

#[derive(Deserialize)]
struct Workspace {
    workspace_root: PathBuf,
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for a normal dependency, otherwise `dev` or `build`.
    kind: Option<String>,
}

impl Workspace {
    fn read() -> Self {
        annals_tests::cargo_metadata()
    }

    fn text(&self, file: &str) -> String {
        let path = self.workspace_root.join(file);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Returns the folders of the packages. ARCHITECTURE.md names packages by their folders.
    fn rooms(&self) -> BTreeMap<&str, &str> {
        self.packages.iter().map(|package| (&*package.name, package.room())).collect()
    }
}

impl Package {
    fn room(&self) -> &str {
        self.manifest_path.parent().unwrap().file_name().unwrap().to_str().unwrap()
    }
}

/// Returns the ring of the package in the folder `room`. A package may depend only on packages in inner rings, which
/// have lower numbers.
fn ring(room: &str) -> u32 {
    match room {
        "macros" | "shop-driver" => 0,
        "core" => 1,
        room if room.starts_with("store-")
            || room.starts_with("bus-")
            || room.starts_with("call-")
            || room == "conformance" =>
        {
            2
        }
        "cli" => 3,
        "sample-shop" | "examples" => 4,
        "tests" | "bench" => 5,
        room => panic!("{room} has no place in ARCHITECTURE.md: give it one there and here"),
    }
}

#[test]
fn packages_depend_only_on_inner_packages() {
    let workspace = Workspace::read();
    let rooms = workspace.rooms();
    let mut wrong = Vec::new();
    for package in &workspace.packages {
        // A package in any ring may depend on `annals-tests` for its own tests.
        let for_tests =
            |dependency: &&Dependency| dependency.name == "annals-tests" && dependency.kind.as_deref() == Some("dev");
        let known = package.dependencies.iter().filter(|dependency| dependency.name != package.name);
        let known = known.filter(|dependency| !for_tests(dependency));
        for room in known.filter_map(|dependency| rooms.get(&*dependency.name)) {
            if ring(room) >= ring(package.room()) {
                wrong.push(format!("{} must not know {room}", package.room()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn core_depends_on_no_driver_even_indirectly() {
    let workspace = Workspace::read();
    let lock = workspace.text("Cargo.lock");
    let locked = locked(&lock);
    let core = workspace.packages.iter().find(|package| package.room() == "core").unwrap();
    let normal = core.dependencies.iter().filter(|dependency| dependency.kind.is_none());
    let mut met = BTreeSet::new();
    let mut next = normal.map(|dependency| &*dependency.name).collect::<Vec<_>>();
    while let Some(name) = next.pop() {
        if met.insert(name) {
            next.extend(locked.get(name).into_iter().flatten());
        }
    }
    // If the format of the lock file changes, this test could overlook drivers in the file. This check detects such a
    // change.
    assert!(met.contains("mio"), "tokio brings mio: the lock file was not understood");
    let wrong: Vec<_> = met.iter().filter(|name| DRIVERS.contains(*name)).collect();
    assert!(wrong.is_empty(), "core must not know {wrong:?}");
}

/// Returns the dependencies of each package in the lock file, by name. Several versions of a package count as one
/// package.
fn locked(lock: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut locked: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in lock.lines() {
        if let Some(rest) = line.strip_prefix("name = ") {
            name = rest.trim_matches('"');
        } else if let Some(dependency) = line.strip_prefix(" \"") {
            let dependency = dependency.trim_end_matches(['"', ',']);
            locked.entry(name).or_default().push(dependency.split(' ').next().unwrap());
        }
    }
    locked
}

#[test]
fn every_package_inherits_the_lints() {
    let workspace = Workspace::read();
    let inherits =
        |package: &&Package| fs::read_to_string(&package.manifest_path).unwrap().contains("[lints]\nworkspace = true");
    let wrong: Vec<_> = workspace.packages.iter().filter(|package| !inherits(package)).map(Package::room).collect();
    assert!(wrong.is_empty(), "these do not inherit the lints of the workspace: {wrong:?}");
}

#[test]
fn functions_have_at_most_80_lines() {
    let workspace = Workspace::read();
    let mut files = Vec::new();
    for package in &workspace.packages {
        rust_files(package.manifest_path.parent().unwrap(), &mut files);
    }
    assert!(files.len() > workspace.packages.len(), "only {} files were found", files.len());
    let mut long = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).unwrap();
        let name = file.strip_prefix(&workspace.workspace_root).unwrap().display();
        long.extend(long_functions(&text).into_iter().map(|function| format!("{name}: {function}")));
    }
    assert!(long.is_empty(), "more than {FUNCTION_LINES_MAX} lines: {long:#?}");
}

#[test]
fn each_let_binds_one_value() {
    let workspace = Workspace::read();
    let mut files = Vec::new();
    for package in &workspace.packages {
        rust_files(package.manifest_path.parent().unwrap(), &mut files);
    }
    let mut found = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).unwrap();
        let name = file.strip_prefix(&workspace.workspace_root).unwrap().display();
        let lets = text.lines().enumerate().filter(|(_, line)| binds_a_tuple_by_parts(line));
        found.extend(lets.map(|(number, line)| format!("{name}:{}: {}", number + 1, line.trim())));
    }
    assert!(found.is_empty(), "write one `let` for each value: {found:#?}");
}

/// Returns whether the line has the form `let (a, b) = (x, y)`.
fn binds_a_tuple_by_parts(line: &str) -> bool {
    let pattern = line.trim_start().strip_prefix("let (").and_then(|rest| rest.split_once(") = ("));
    // A pattern such as `(Some(a), Some(b))` checks both values, so it is not the same as two statements.
    pattern.is_some_and(|(names, _)| names.contains(',') && !names.contains(['(', '[']))
}

#[test]
fn let_of_a_tuple_is_found() {
    assert!(binds_a_tuple_by_parts("    let (mut one, two) = (first(), second);"));
    assert!(!binds_a_tuple_by_parts("    let (one, two) = pair;"));
    assert!(!binds_a_tuple_by_parts("    let (Some(one), Some(two)) = (first, second) else { return };"));
}

/// Returns the names of functions that are too long. With rustfmt, the closing brace of a function is in the same
/// column as the first word of the function.
fn long_functions(text: &str) -> Vec<String> {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let lines: Vec<_> = text.lines().collect();
    let mut long = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let words: Vec<_> = line.split_whitespace().take_while(|word| !word.contains('"')).collect();
        let Some(at) = words.iter().position(|word| *word == "fn") else { continue };
        let qualifier = |word: &&str| word.starts_with("pub") || ["const", "async", "unsafe"].contains(word);
        if !words[..at].iter().all(qualifier) || line.ends_with(';') || line.ends_with('}') {
            continue;
        }
        let ends = |line: &&str| line.trim_start().starts_with('}') && indent(line) == indent(lines[start]);
        let length = lines[start..].iter().position(ends).unwrap_or(0) + 1;
        if length > FUNCTION_LINES_MAX {
            let name = words[at + 1].split(['(', '<']).next().unwrap();
            long.push(name.to_owned());
        }
    }
    long
}

#[test]
fn long_function_is_found() {
    let body = "        1;\n".repeat(FUNCTION_LINES_MAX - 2);
    let text = |more: &str| format!("    pub async fn walk<T>(\n    ) {{\n{body}{more}    }}\n");
    assert_eq!(long_functions(&text("")), ["walk"], "one line more than the maximum");
    assert!(long_functions(&text("").replacen("        1;\n", "", 1)).is_empty(), "as long as the maximum");
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    files_of(folder, &["rs"], files);
}

fn files_of(folder: &Path, extensions: &[&str], files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") {
                files_of(&path, extensions, files);
            }
        } else if path.extension().is_some_and(|extension| extensions.iter().any(|wanted| extension == *wanted)) {
            files.push(path);
        }
    }
}

/// Returns the crates of a package, without its tests.
fn crates(package: &Package) -> Vec<sources::Crate> {
    let folder = package.manifest_path.parent().unwrap().join("src");
    let roots = ["lib.rs", "main.rs"].map(|root| folder.join(root));
    let own_name = package.name.replace('-', "_");
    let crates: Vec<_> =
        roots.iter().filter(|root| root.exists()).map(|root| sources::Crate::read(root, &own_name)).collect();
    let mut files = Vec::new();
    rust_files(&folder, &mut files);
    let read: BTreeSet<_> = crates.iter().flat_map(|of| of.arrows.keys().cloned()).collect();
    let is_unread = |file: &PathBuf| !read.contains(file) && !file.ends_with("tests.rs");
    let unread: Vec<_> = files.into_iter().filter(is_unread).collect();
    assert!(unread.is_empty(), "no module declares these files: {unread:#?}");
    crates
}

#[test]
fn no_files_import_one_another_in_a_circle() {
    let workspace = Workspace::read();
    let mut wrong = Vec::new();
    for package in &workspace.packages {
        let circles: Vec<_> = crates(package).iter().flat_map(sources::Crate::circles).collect();
        let found: usize = circles.iter().map(BTreeSet::len).sum();
        let known = FILES_IN_CIRCLES.iter().find(|(room, _)| *room == package.room()).map_or(0, |(_, known)| *known);
        if found > known {
            wrong.push(format!("{}: break these circles: {circles:#?}", package.room()));
        } else if found < known {
            wrong.push(format!("{}: only {found} files are in circles now, lower the number", package.room()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_core_is_a_house_of_few_rooms() {
    let workspace = Workspace::read();
    let core = workspace.packages.iter().find(|package| package.room() == "core").unwrap();
    let sources = core.manifest_path.parent().unwrap().join("src");
    let room = |file: &Path| {
        let top = file.strip_prefix(&sources).unwrap().iter().next().unwrap();
        Path::new(top).with_extension("").display().to_string()
    };
    let mut rooms = BTreeSet::new();
    let mut arrows = BTreeSet::new();
    for (from, to) in crates(core).iter().flat_map(|of| &of.arrows).filter(|(file, _)| !file.ends_with("src/lib.rs")) {
        rooms.insert(room(from));
        let others = to.iter().map(|file| room(file)).filter(|other| *other != room(from));
        arrows.extend(others.map(|other| (room(from), other)));
    }
    assert!(rooms.len() <= CORE_ROOMS_MAX, "{} rooms: {rooms:#?}", rooms.len());
    assert!(arrows.len() <= CORE_ARROWS_MAX, "{} arrows: {arrows:#?}", arrows.len());
}

#[test]
fn no_two_types_of_a_package_have_one_name() {
    let workspace = Workspace::read();
    let mut shared = BTreeSet::new();
    for package in &workspace.packages {
        let mut types: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        for (name, files) in crates(package).into_iter().flat_map(|of| of.types) {
            types.entry(name).or_default().extend(files);
        }
        let twice = types.into_iter().filter(|(_, files)| files.len() > 1);
        shared.extend(twice.map(|(name, _)| (package.room().to_owned(), name)));
    }
    assert!(shared.is_empty(), "name these types apart: {shared:#?}");
}

#[test]
fn every_decision_is_listed_once_and_in_order() {
    let workspace = Workspace::read();
    let list = workspace.text("docs/adr/README.md");
    let rows = list.lines().filter_map(|line| line.strip_prefix("| ["));
    let listed: Vec<_> = rows.map(|row| row.split_once("](").unwrap().1.split_once(')').unwrap().0).collect();
    let files = fs::read_dir(workspace.workspace_root.join("docs/adr")).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut decisions: Vec<String> = names.filter(|name| name.ends_with(".md") && name != "README.md").collect();
    decisions.sort();
    assert!(!decisions.is_empty());
    assert_eq!(listed, decisions);
}

#[test]
fn every_promised_test_exists() {
    let workspace = Workspace::read();
    let promises = workspace.text("docs/promises.md");
    let is_test = |name: &&str| {
        let letters = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
        name.chars().all(letters) && name.matches('_').count() > 1
    };
    let promised: BTreeSet<&str> = between(&promises, "`", "`").filter(is_test).collect();
    assert!(promised.len() > 100, "only {} tests are named", promised.len());
    let mut files = Vec::new();
    rust_files(&workspace.workspace_root, &mut files);
    let mut missing = promised.clone();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let stem = file.file_stem().unwrap().to_string_lossy().into_owned();
        missing
            .retain(|name| *name != stem && !["(", "<"].iter().any(|next| text.contains(&format!("fn {name}{next}"))));
    }
    assert!(missing.is_empty(), "docs/promises.md names tests that are not there: {missing:#?}");
}

/// Words that this project does not use; docs/style.md names the plain words to use instead.
const DIALECT: [&str; 5] = ["all else", "beside", "likewise", "told", "whoever"];

#[test]
fn prose_is_in_plain_words() {
    let workspace = Workspace::read();
    let mut files = Vec::new();
    files_of(&workspace.workspace_root, &["rs", "md"], &mut files);
    let mut looked_at = 0;
    let mut found = Vec::new();
    for file in files.iter().filter(|file| !file.ends_with("docs/style.md")) {
        let text = fs::read_to_string(file).unwrap();
        let is_page = file.extension().is_some_and(|extension| extension == "md");
        let mut prose: Vec<(usize, String)> = (1..)
            .zip(text.lines())
            .filter(|(_, line)| is_page || line.trim_start().starts_with("//"))
            .map(|(number, line)| (number, line.to_owned()))
            .collect();
        if !is_page {
            prose.extend(test_names(&text).map(|(number, name)| (number, name.replace('_', " "))));
            // This file contains the forbidden words as literals.
            if !file.ends_with("tests/tests/architecture.rs") {
                prose.extend(literals(&text).into_iter().map(|(number, literal)| (number, without_code(literal))));
            }
        }
        looked_at += prose.len();
        for (number, text) in prose {
            let words = dialect(&text);
            if !words.is_empty() {
                found.push(format!("{}:{number}: {words:?}", file.display()));
            }
        }
    }
    assert!(looked_at > 20_000, "only {looked_at} lines, literals and names were looked at");
    assert!(found.is_empty(), "say it in the words of docs/style.md: {found:#?}");
}

/// Returns the words of `DIALECT` that occur in the text outside backticks.
fn dialect(text: &str) -> Vec<&'static str> {
    let prose: String = text.to_lowercase().split('`').step_by(2).collect::<Vec<_>>().join(" ");
    let words: Vec<&str> =
        prose.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let prose = format!(" {} ", words.join(" "));
    DIALECT.into_iter().filter(|word| prose.contains(&format!(" {word} "))).collect()
}

/// Returns the names of the tests in a Rust file, each with the number of its line.
fn test_names(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_test = false;
    (1..).zip(text.lines()).filter_map(move |(number, line)| {
        let line = line.trim_start();
        is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        let (_, name) = line.split_once("fn ").filter(|_| is_test && !line.starts_with("//"))?;
        is_test = false;
        Some((number, name.split('(').next().unwrap()))
    })
}

/// Returns the string literals of a Rust file, each with the number of its first line.
fn literals(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(next) = text[at..].find(['"', '/', '\'']) {
        at += next;
        let rest = &text[at..];
        if rest.starts_with("//") {
            at += rest.find('\n').unwrap_or(rest.len());
        } else if let Some(quote) = ["'\"'", "'\\\"'", "'\\''"].iter().find(|quote| rest.starts_with(**quote)) {
            at += quote.len();
        } else if let Some(inside) = rest.strip_prefix('"') {
            let before = text[..at].trim_end_matches('#');
            let hashes = "#".repeat(at - before.len());
            let length = if before.ends_with('r') {
                inside.find(&format!("\"{hashes}")).unwrap()
            } else {
                unescaped_quote(inside)
            };
            found.push((text[..at].matches('\n').count() + 1, &inside[..length]));
            at += length + 2;
        } else {
            at += 1;
        }
    }
    found
}

/// Returns the index of the first quote that no backslash escapes.
fn unescaped_quote(text: &str) -> usize {
    let mut is_escaped = false;
    let ends = |(_, byte): &(usize, u8)| {
        let ends = *byte == b'"' && !is_escaped;
        is_escaped = *byte == b'\\' && !is_escaped;
        ends
    };
    text.bytes().enumerate().find(ends).unwrap().0
}

/// Removes the parts of a literal in braces, which name variables.
fn without_code(literal: &str) -> String {
    let mut parts = literal.split('{');
    let first = parts.next().unwrap();
    parts.fold(first.to_owned(), |prose, part| prose + part.split_once('}').map_or("", |(_, after)| after))
}

#[test]
fn word_of_the_dialect_is_found() {
    assert_eq!(dialect("/// Whoever reads is (told) all else."), ["all else", "told", "whoever"]);
    assert!(dialect("/// Calls `told`, retold and besides.").is_empty());
}

#[test]
fn literals_and_test_names_are_found() {
    let text = "// \"not this\"\nlet a = ['\"', 'b'];\nlet c = \"one \\\" {told}\" + r#\"two \" \\\"#;\n\
                #[test]\n\nfn three() {}\nfn four() {}\n";
    assert_eq!(literals(text), [(3, "one \\\" {told}"), (3, "two \" \\")]);
    assert_eq!(test_names(text).collect::<Vec<_>>(), [(6, "three")]);
    assert_eq!(without_code("one {told} two {} three"), "one  two  three");
}

/// A document names a file in backticks, as in `core/src/handler.rs`, or in a link, as in `](docs/adr/README.md)`. A
/// path in backticks begins at the root of the repository or at the folder of the document.
#[test]
fn documents_name_existing_files() {
    let workspace = Workspace::read();
    let root = &workspace.workspace_root;
    let mut pages = Vec::new();
    files_of(root, &["md"], &mut pages);
    let mut looked_at = 0;
    let mut missing = Vec::new();
    for page in &pages {
        let text = fs::read_to_string(page).unwrap();
        let folder = page.parent().unwrap();
        for link in between(&text, "](", ")").filter(|link| !link.contains("://") && !link.starts_with('#')) {
            looked_at += 1;
            if !folder.join(link.split('#').next().unwrap()).exists() {
                missing.push(format!("{}: {link}", page.display()));
            }
        }
        for path in between(&text, "`", "`").filter(|quoted| is_path(quoted)) {
            looked_at += 1;
            if !root.join(path).exists() && !folder.join(path).exists() {
                missing.push(format!("{}: {path}", page.display()));
            }
        }
    }
    assert!(looked_at > 50, "only {looked_at} names were found");
    assert!(missing.is_empty(), "these files do not exist: {missing:#?}");
}

fn is_path(quoted: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-".contains(letter);
    quoted.contains('/')
        && quoted.chars().all(plain)
        && [".rs", ".sql", ".md", ".toml", "/"].iter().any(|end| quoted.ends_with(end))
}

fn between<'a>(text: &'a str, start: &'a str, end: &'a str) -> impl Iterator<Item = &'a str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, after) = rest.split_once(start)?;
        let (found, left) = after.split_once(end)?;
        rest = left;
        Some(found)
    })
}

/// The README quotes a file with `<!-- quote:FILE -->` and a code block after this mark. The block must equal the file,
/// or the part of the file between its `README` marks.
#[test]
fn readme_quotes_tested_code() {
    let workspace = Workspace::read();
    let readme = workspace.text("README.md");
    let quotes: Vec<(&str, &str)> = readme
        .split("<!-- quote:")
        .skip(1)
        .map(|quote| {
            let (file, rest) = quote.split_once(" -->\n```rust\n").unwrap();
            (file, rest.split_once("\n```").unwrap().0)
        })
        .collect();
    assert!(quotes.len() >= 2, "the README quotes only {quotes:?}");
    for (file, quoted) in quotes {
        let source = workspace.text(file);
        let marked: Vec<String> =
            between(&source, "// README: from here\n", "// README: up to here").map(unindented).collect();
        let wanted = if marked.is_empty() { source.trim_end().to_owned() } else { marked.join("\n\n") };
        assert_eq!(quoted, wanted, "{file} is not what the README quotes");
    }
}

fn unindented(text: &str) -> String {
    let indent = text.len() - text.trim_start_matches(' ').len();
    let lines: Vec<&str> = text.lines().map(|line| line.get(indent..).unwrap_or("")).collect();
    lines.join("\n").trim_end().to_owned()
}
