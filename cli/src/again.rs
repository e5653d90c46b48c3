//! The command that continues where this one ended: complete, so that it can be typed as it is printed.

use clap::{ArgMatches, parser::ValueSource};

use crate::arguments::Common;

/// The parts that all such commands begin and end with.
#[derive(Clone)]
pub(crate) struct Again {
    name: &'static str,
    /// The common options that were typed. Options from the environment are still set there.
    typed: Vec<String>,
}

impl Again {
    pub fn of(name: &'static str, matches: &ArgMatches, common: &Common) -> Self {
        let is_typed = |option: &str| matches.value_source(option) == Some(ValueSource::CommandLine);
        let mut typed = Vec::new();
        if let Some(url) = common.store.as_ref().filter(|_| is_typed("store")) {
            // The URL is printed without its password.
            typed.extend(["--store".to_owned(), url.to_string()]);
        }
        if is_typed("schema") {
            typed.extend(["--schema".to_owned(), common.schema.clone()]);
        }
        if common.json {
            typed.push("--json".to_owned());
        }
        Self { name, typed }
    }

    /// Returns the command with these words.
    pub fn command<W: AsRef<str>>(&self, words: impl IntoIterator<Item = W>) -> String {
        let words = words.into_iter().map(|word| quoted(word.as_ref()));
        let typed = self.typed.iter().map(|word| quoted(word));
        [self.name.to_owned()].into_iter().chain(words).chain(typed).collect::<Vec<_>>().join(" ")
    }
}

/// Quotes a word for a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.,:/@=".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}
