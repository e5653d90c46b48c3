//! Checks what a registry shows and requires of the packages that are meant to be published, and the Rust version that
//! these packages need.
#![allow(clippy::unwrap_used)]

use std::{fs, path::PathBuf};

use serde::Deserialize;

/// The limits of crates.io for the number and the length of keywords.
const KEYWORDS_MAX: usize = 5;
const KEYWORD_BYTES_MAX: usize = 20;

#[derive(Deserialize)]
struct Metadata {
    workspace_root: PathBuf,
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    /// The registries to which the package may go: `None` for all, an empty list for none.
    publish: Option<Vec<String>>,
    description: Option<String>,
    license: Option<String>,
    repository: Option<String>,
    readme: Option<PathBuf>,
    rust_version: Option<String>,
    keywords: Vec<String>,
    categories: Vec<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for a normal dependency, otherwise `dev` or `build`.
    kind: Option<String>,
    req: String,
    path: Option<PathBuf>,
}

impl Metadata {
    fn read() -> Self {
        annals_tests::cargo_metadata()
    }

    fn published(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| package.publish.is_none())
    }
}

#[test]
fn published_packages_have_what_a_registry_shows() {
    let workspace = Metadata::read();
    let names: Vec<_> = workspace.published().map(|package| &*package.name).collect();
    assert!(names.contains(&"annals") && names.contains(&"annals-conformance"), "only {names:?} are published");
    for package in workspace.published() {
        let name = &package.name;
        let folder = package.manifest_path.parent().unwrap();
        assert!(package.description.is_some() && package.license.is_some() && package.repository.is_some(), "{name}");
        assert!(package.readme.as_ref().is_some_and(|readme| folder.join(readme).exists()), "{name} has no README");
        assert!(!package.categories.is_empty(), "{name} has no category");
        assert!((1..=KEYWORDS_MAX).contains(&package.keywords.len()), "{name}: {:?}", package.keywords);
        assert!(package.keywords.iter().all(|keyword| keyword.len() <= KEYWORD_BYTES_MAX), "{name}");
        for license in ["LICENSE-MIT", "LICENSE-APACHE"] {
            let text = fs::read_to_string(folder.join(license)).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(text, fs::read_to_string(workspace.workspace_root.join(license)).unwrap(), "{name}");
        }
    }
}

/// A registry refuses a package that depends on a package that is not in the registry. Only dev-dependencies without a
/// version are left out of the published package.
#[test]
fn published_packages_depend_only_on_published_packages() {
    let workspace = Metadata::read();
    let names: Vec<_> = workspace.published().map(|package| &*package.name).collect();
    for package in workspace.published() {
        for dependency in package.dependencies.iter().filter(|dependency| dependency.path.is_some()) {
            let left_out = dependency.kind.as_deref() == Some("dev") && dependency.req == "*";
            let has_version = dependency.req != "*" && names.contains(&&*dependency.name);
            assert!(left_out || has_version, "{} depends on {} {}", package.name, dependency.name, dependency.req);
        }
    }
}

/// `rust-toolchain.toml` decides which Rust version CI builds with, so CI proves the stated version only if both agree.
#[test]
fn ci_builds_with_the_rust_version_that_is_stated() {
    let workspace = Metadata::read();
    let toolchain = fs::read_to_string(workspace.workspace_root.join("rust-toolchain.toml")).unwrap();
    let readme = fs::read_to_string(workspace.workspace_root.join("README.md")).unwrap();
    let channel = toolchain.lines().find_map(|line| line.strip_prefix("channel = ")).unwrap().trim_matches('"');
    for package in &workspace.packages {
        let stated = package.rust_version.as_deref().unwrap_or_else(|| panic!("{} states none", package.name));
        let agrees = channel == stated || channel.strip_prefix(stated).is_some_and(|patch| patch.starts_with('.'));
        assert!(agrees, "{} states Rust {stated}, and CI builds with {channel}", package.name);
        assert!(readme.contains(&format!("needs Rust {stated}.")), "{} states Rust {stated}", package.name);
    }
}
