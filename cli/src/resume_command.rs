//! Builds the command line that continues an interrupted command. The line is complete: an operator can paste the
//! printed line into a shell.

use clap::{ArgMatches, parser::ValueSource};

use crate::common::CommonArgs;

/// The first and the last words of every command line that continues this command.
#[derive(Clone)]
pub(crate) struct ResumeCommand {
    name: &'static str,
    /// The common options from the command line. Options from environment variables are not repeated, because the
    /// variables stay set.
    typed: Vec<String>,
}

impl ResumeCommand {
    pub fn of(name: &'static str, matches: &ArgMatches, common: &CommonArgs) -> Self {
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

    /// Returns the command line with these words in the middle.
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
