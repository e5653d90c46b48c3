//! Reads the parts of a package's Rust sources that the tests of the architecture need: the modules, the imports, and
//! the names of the types.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The maximum number of re-exports that are followed to the definition of a name.
const REEXPORTS_MAX: usize = 20;
/// The keywords that start an item, except the keyword for modules.
const ITEMS: [&str; 8] = ["const", "enum", "fn", "static", "struct", "type", "union", "use"];

/// The files of one crate, and the arrows between them. An arrow leads from a file that uses a name to the file that
/// defines the name.
#[derive(Default)]
pub struct Crate {
    modules: BTreeMap<Vec<String>, Module>,
    pub arrows: BTreeMap<PathBuf, BTreeSet<PathBuf>>,
    /// The files that define each type, by the name of the type.
    pub types: BTreeMap<String, Vec<PathBuf>>,
}

#[derive(Default)]
struct Module {
    file: PathBuf,
    /// The paths that `use` brings into the module, by the name that each path has there.
    imports: BTreeMap<String, Vec<String>>,
    /// The modules from which the module imports every name.
    globs: Vec<Vec<String>>,
    /// Other paths in the code.
    paths: Vec<Vec<String>>,
}

impl Crate {
    /// Reads the crate that starts with this file. `name` is the name by which the crate may refer to itself.
    pub fn read(root: &Path, name: &str) -> Self {
        let mut this = Self::default();
        this.read_file(root, Vec::new(), name);
        for module in this.modules.values() {
            let used = module.imports.values().chain(&module.paths).filter_map(|path| this.definition(path));
            let globs = module.globs.iter().flat_map(|glob| this.offered(glob));
            let arrows: BTreeSet<PathBuf> = used.chain(globs).filter(|file| *file != module.file).collect();
            this.arrows.entry(module.file.clone()).or_default().extend(arrows);
        }
        this
    }

    fn read_file(&mut self, file: &Path, module: Vec<String>, name: &str) {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let tokens = tokens(&text);
        let is_root = module.is_empty() || file.ends_with("mod.rs");
        let folder = if is_root { file.parent().unwrap().to_owned() } else { file.with_extension("") };
        let mut reader = Reader { of: self, file, name, tokens: &tokens, at: 0, submodules: Vec::new() };
        reader.read_module(module);
        for submodule in reader.submodules {
            let stem = folder.join(submodule.last().unwrap());
            let found = [stem.with_extension("rs"), stem.join("mod.rs")].into_iter().find(|path| path.exists());
            // If an attribute names a file in another folder, the module belongs to another package.
            if let Some(found) = found {
                self.read_file(&found, submodule, name);
            }
        }
    }

    /// Returns the file that defines the name at the end of a path, or `None` if the path leads out of the crate or
    /// only names a module. The names that the code uses from such a module have their own paths.
    fn definition(&self, path: &[String]) -> Option<PathBuf> {
        let (module, rest) = self.resolved(path.to_vec(), 0)?;
        (!rest.is_empty()).then(|| self.modules[&module].file.clone())
    }

    /// Follows a path through modules and re-exports. Returns the last module, and the names in it.
    fn resolved(&self, path: Vec<String>, followed: usize) -> Option<(Vec<String>, Vec<String>)> {
        let mut module: Vec<String> = Vec::new();
        for (index, name) in path.iter().enumerate() {
            let mut inner = module.clone();
            inner.push(name.clone());
            if self.modules.contains_key(&inner) {
                module = inner;
                continue;
            }
            let here = &self.modules[&module];
            let named = here.imports.get(name).into_iter().cloned();
            let globbed = here.globs.iter().map(|glob| [glob.clone(), vec![name.clone()]].concat());
            let is_defined_here = self.types.get(name).is_some_and(|files| files.contains(&here.file));
            for target in named.chain(globbed.filter(|_| !is_defined_here)) {
                let target = [target, path[index + 1..].to_vec()].concat();
                if followed < REEXPORTS_MAX
                    && target != path
                    && let Some(found) = self.resolved(target, followed + 1)
                {
                    return Some(found);
                }
            }
            return Some((module, path[index..].to_vec()));
        }
        Some((module, Vec::new()))
    }

    /// Returns the files whose names `use module::*` brings in.
    fn offered(&self, module: &[String]) -> Vec<PathBuf> {
        let Some((module, rest)) = self.resolved(module.to_vec(), 0) else { return Vec::new() };
        let here = &self.modules[&module];
        let mut files = vec![here.file.clone()];
        if rest.is_empty() {
            files.extend(here.imports.values().filter_map(|path| self.definition(path)));
        }
        files
    }

    /// Returns each set of files that import one another in a circle.
    pub fn circles(&self) -> Vec<BTreeSet<PathBuf>> {
        let reached: BTreeMap<&PathBuf, BTreeSet<&PathBuf>> =
            self.arrows.keys().map(|file| (file, self.reached(file))).collect();
        let mut circles: Vec<BTreeSet<PathBuf>> = Vec::new();
        for (file, from_here) in reached.iter().filter(|(file, from_here)| from_here.contains(*file)) {
            let back = |other: &&&PathBuf| reached[**other].contains(file);
            let circle: BTreeSet<PathBuf> = from_here.iter().filter(back).map(|other| (*other).clone()).collect();
            if !circles.contains(&circle) {
                circles.push(circle);
            }
        }
        circles
    }

    /// Returns the files that this file imports, directly or through other files.
    fn reached(&self, file: &PathBuf) -> BTreeSet<&PathBuf> {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&PathBuf> = self.arrows[file].iter().collect();
        while let Some(file) = next.pop() {
            if reached.insert(file) {
                next.extend(&self.arrows[file]);
            }
        }
        reached
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    /// `::`
    Colons,
    Sign(char),
}

impl Token {
    fn word(&self) -> Option<&str> {
        match self {
            Self::Word(word) => Some(word),
            Self::Colons | Self::Sign(_) => None,
        }
    }
}

/// Returns the tokens of a source file, without comments, literals and lifetimes.
fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = skipped(rest);
        if length > 0 {
            // An attribute may name a function in a literal.
            let path = rest[..length].trim_matches('"');
            if path.starts_with("crate::") {
                tokens.extend(self::tokens(path));
            }
            rest = &rest[length..];
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len());
            tokens.push(Token::Word(rest[..end].to_owned()));
            rest = &rest[end..];
        } else if let Some(after) = rest.strip_prefix("::") {
            tokens.push(Token::Colons);
            rest = after;
        } else {
            if !first.is_whitespace() {
                tokens.push(Token::Sign(first));
            }
            rest = &rest[first.len_utf8()..];
        }
    }
    tokens
}

/// Returns the length of the comment, literal or lifetime at the start of the text; 0 if there is none.
fn skipped(text: &str) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return text.find("*/").map_or(text.len(), |end| end + 2);
    }
    let raw = text.strip_prefix("br").or_else(|| text.strip_prefix('r')).unwrap_or("");
    let hashes = raw.len() - raw.trim_start_matches('#').len();
    if raw[hashes..].starts_with('"') {
        let start = text.len() - raw.len() + hashes + 1;
        let end = format!("\"{}", "#".repeat(hashes));
        return text[start..].find(&end).map_or(text.len(), |at| start + at + end.len());
    }
    let literal = text.strip_prefix('b').unwrap_or(text);
    let Some(quote) = literal.chars().next().filter(|first| ['"', '\''].contains(first)) else { return 0 };
    let before = text.len() - literal.len();
    let is_lifetime = quote == '\'' && !literal[1..].starts_with('\\') && literal.chars().nth(2) != Some('\'');
    if is_lifetime {
        return before + 1;
    }
    let mut escaped = false;
    for (index, letter) in literal.char_indices().skip(1) {
        if letter == quote && !escaped {
            return before + index + 1;
        }
        escaped = letter == '\\' && !escaped;
    }
    text.len()
}

/// Walks over the tokens of one file.
struct Reader<'a> {
    of: &'a mut Crate,
    file: &'a Path,
    name: &'a str,
    tokens: &'a [Token],
    at: usize,
    /// The modules that have files of their own.
    submodules: Vec<Vec<String>>,
}

impl Reader<'_> {
    fn word(&self, index: usize) -> Option<&str> {
        self.tokens.get(index).and_then(Token::word)
    }

    fn is(&self, index: usize, sign: char) -> bool {
        self.tokens.get(index) == Some(&Token::Sign(sign))
    }

    /// Reads up to the brace that closes the module, or to the end of the file.
    fn read_module(&mut self, path: Vec<String>) {
        let mut module = Module { file: self.file.to_owned(), ..Module::default() };
        // Whether each open brace belongs to an `impl` or a `trait`, whose types belong to the trait.
        let mut braces: Vec<bool> = Vec::new();
        let mut is_impl = false;
        let mut is_test = false;
        while self.at < self.tokens.len() {
            let start = self.at;
            match &self.tokens[start] {
                Token::Sign('{') => braces.push(std::mem::take(&mut is_impl)),
                Token::Sign('}') if braces.is_empty() => break,
                Token::Sign('}') => _ = braces.pop(),
                Token::Sign('#') if self.word(start + 2) == Some("cfg") && self.word(start + 4) == Some("test") => {
                    is_test = true;
                }
                Token::Word(word) if word == "mod" && self.is(start + 2, ';') => {
                    if !std::mem::take(&mut is_test) {
                        self.submodules.push([path.clone(), vec![self.word(start + 1).unwrap().to_owned()]].concat());
                    }
                }
                Token::Word(word) if word == "mod" && self.is(start + 2, '{') => {
                    let inner = [path.clone(), vec![self.word(start + 1).unwrap().to_owned()]].concat();
                    self.at = start + 3;
                    if std::mem::take(&mut is_test) { self.skip_module() } else { self.read_module(inner) }
                }
                Token::Word(word) if word == "use" => {
                    is_test = false;
                    self.at += 1;
                    self.read_use(Vec::new(), &path, &mut module);
                }
                Token::Word(word) if ["impl", "trait"].contains(&&**word) && self.starts_item(start) => {
                    is_impl = true;
                    is_test = false;
                    self.note_type(&braces);
                }
                Token::Word(word) => {
                    is_test &= !ITEMS.contains(&&**word);
                    self.note_type(&braces);
                    self.read_path(&path, &mut module);
                }
                Token::Sign(_) | Token::Colons => {}
            }
            self.at += 1;
        }
        self.of.modules.insert(path, module);
    }

    /// Skips a module of unit tests.
    fn skip_module(&mut self) {
        let mut open = 1;
        while open > 0 {
            open += i32::from(self.is(self.at, '{')) - i32::from(self.is(self.at, '}'));
            self.at += 1;
        }
        self.at -= 1;
    }

    fn starts_item(&self, index: usize) -> bool {
        let Some(before) = index.checked_sub(1) else { return true };
        let ends_other = ['}', '{', ';', ']', '(', ')'].iter().any(|sign| self.is(before, *sign));
        ends_other || self.word(before).is_some_and(|word| ["pub", "unsafe"].contains(&word))
    }

    /// Records the name of a type if its definition starts here.
    fn note_type(&mut self, braces: &[bool]) {
        let Some(keyword) = self.word(self.at) else { return };
        let defines = match keyword {
            "struct" | "enum" | "trait" | "union" => self.starts_item(self.at),
            "type" => self.starts_item(self.at) && braces.last() != Some(&true),
            _ => false,
        };
        let Some(name) = self.word(self.at + 1).filter(|_| defines) else { return };
        let files = self.of.types.entry(name.to_owned()).or_default();
        files.push(self.file.to_owned());
    }

    /// Reads a path such as `crate::a::B`, `super::B` or `a::B`.
    fn read_path(&mut self, module: &[String], to: &mut Module) {
        let is_continued = self.at > 0 && self.tokens[self.at - 1] == Token::Colons;
        if is_continued || self.tokens.get(self.at + 1) != Some(&Token::Colons) {
            return;
        }
        let mut path = vec![self.word(self.at).unwrap().to_owned()];
        while self.tokens.get(self.at + 1) == Some(&Token::Colons)
            && let Some(next) = self.word(self.at + 2)
        {
            path.push(next.to_owned());
            self.at += 2;
        }
        to.paths.push(self.absolute(path, module));
    }

    /// Reads one branch of the tree of a `use`.
    fn read_use(&mut self, mut path: Vec<String>, module: &[String], to: &mut Module) {
        loop {
            match self.tokens.get(self.at) {
                Some(Token::Word(word)) if word == "as" => {
                    let name = self.word(self.at + 1).unwrap().to_owned();
                    self.at += 2;
                    return self.import(path, name, module, to);
                }
                Some(Token::Word(word)) => path.push(word.clone()),
                Some(Token::Colons) => {}
                Some(Token::Sign('*')) => {
                    self.at += 1;
                    let glob = self.absolute(path, module);
                    return to.globs.push(glob);
                }
                Some(Token::Sign('{')) => {
                    while !self.is(self.at, '}') {
                        self.at += 1;
                        if !self.is(self.at, '}') {
                            self.read_use(path.clone(), module, to);
                        }
                    }
                    self.at += 1;
                    return;
                }
                Some(Token::Sign(_)) | None => {
                    let name = path.last().cloned().unwrap_or_default();
                    return self.import(path, name, module, to);
                }
            }
            self.at += 1;
        }
    }

    fn import(&self, mut path: Vec<String>, mut name: String, module: &[String], to: &mut Module) {
        if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path.pop();
            if name == "self" {
                name.clone_from(&path[path.len() - 1]);
            }
        }
        let path = self.absolute(path, module);
        // A trait and its derive macro may have the same name but come from different modules.
        to.paths.extend(to.imports.insert(name, path));
    }

    /// Returns the path from the root of the crate. A path that starts with another name starts in this module.
    fn absolute(&self, path: Vec<String>, module: &[String]) -> Vec<String> {
        let mut base = module.to_vec();
        let mut rest = path.as_slice();
        while let Some((first, after)) = rest.split_first() {
            match first.as_str() {
                "crate" => base.clear(),
                own if own == self.name && rest.len() == path.len() => base.clear(),
                "super" => _ = base.pop(),
                "self" => {}
                _ => break,
            }
            rest = after;
        }
        base.extend_from_slice(rest);
        base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes the files of a crate, and returns the folder and the crate that was read from the folder.
    fn written(files: &[(&str, &str)]) -> (tempfile::TempDir, Crate) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let read = Crate::read(&folder.path().join("lib.rs"), "house");
        (folder, read)
    }

    fn names(files: &BTreeSet<PathBuf>) -> Vec<String> {
        files.iter().map(|file| file.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn circle_through_a_reexport_is_found() {
        let (_folder, read) = written(&[
            ("lib.rs", "mod a; pub mod b; pub use self::b::inner::{self, Deep as Sea};"),
            ("a.rs", "pub struct Top; fn f(_: &'static str) { let _ = crate::Sea; }"),
            ("b.rs", "pub(crate) mod inner;"),
            ("b/inner.rs", "use super::super::a::{self as top};\n/* \" */ pub struct Deep(top::Top);"),
        ]);
        let circles = read.circles();
        assert_eq!(circles.iter().map(names).collect::<Vec<_>>(), [["a.rs", "inner.rs"]]);
    }

    #[test]
    fn module_that_only_reexports_closes_no_circle() {
        let (_folder, read) = written(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "mod deep; pub use deep::Deep; pub use crate::b::Other;"),
            ("a/deep.rs", "use super::Other; pub struct Deep(Other);"),
            ("b.rs", "pub struct Other; #[cfg(test)] mod tests { use crate::a::Deep; }"),
        ]);
        assert!(read.circles().is_empty(), "{:?}", read.circles());
    }

    #[test]
    fn path_in_an_attribute_is_an_arrow() {
        let (_folder, read) = written(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "pub struct A { #[serde(default = \"crate::b::zero\")] a: u8 }"),
            ("b.rs", "use house::a::A; pub fn zero() -> u8 { b'\\'' }"),
        ]);
        assert_eq!(read.circles().iter().map(names).collect::<Vec<_>>(), [["a.rs", "b.rs"]]);
    }

    #[test]
    fn types_of_impls_are_no_types_of_the_package() {
        let text = "struct A; impl X for A { type Out = u8; } impl X for B { type Out = u8; }\n\
                    fn f() { struct A; } type Out = A;";
        let (_folder, read) = written(&[("lib.rs", text)]);
        let count = |name: &str| read.types[name].len();
        assert_eq!((count("A"), count("Out")), (2, 1));
    }
}
