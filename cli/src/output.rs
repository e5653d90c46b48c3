//! Prints the output: a table for people, or one JSON value per line for programs.

use std::{
    borrow::Cow,
    io::{self, BufWriter, IsTerminal, Stdout, Write},
};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::failure::{Failure, Verdict};

/// Standard output.
pub(crate) struct Output {
    /// Whether the output is JSON, for programs.
    pub json: bool,
    stdout: BufWriter<Stdout>,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json, stdout: BufWriter::new(io::stdout()) }
    }

    /// Prints a line unchanged. Text from a store must go through [`shown`] first.
    pub fn line(&mut self, text: &str) -> Result<(), Failure> {
        writeln!(self.stdout, "{text}")?;
        Ok(())
    }

    /// Prints a line of JSON.
    pub fn value(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(value)?;
        self.line(&line)
    }

    /// Prints lines unchanged, each with its line ending.
    pub fn lines(&mut self, lines: &[u8]) -> Result<(), Failure> {
        self.stdout.write_all(lines)?;
        Ok(())
    }

    /// Prints rows under their headings, or one JSON value for each item.
    pub fn list<T: Serialize>(
        &mut self,
        headings: &[&str],
        items: &[T],
        row: impl Fn(&T) -> Vec<String>,
    ) -> Result<(), Failure> {
        if self.json {
            return items.iter().try_for_each(|item| self.value(item));
        }
        let rows: Vec<Vec<String>> =
            items.iter().map(|item| row(item).iter().map(|cell| one_line(cell)).collect()).collect();
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(headings).add_rows(rows.clone());
        // A file or a pipe has no width limit. Each cell has one space on each side.
        let width = table.column_max_content_widths().iter().map(|width| usize::from(*width) + 2).sum::<usize>();
        if io::stdout().is_terminal() && table.width().is_some_and(|terminal| usize::from(terminal) < width) {
            return rows.iter().try_for_each(|row| self.record(headings, row));
        }
        for line in table.set_content_arrangement(ContentArrangement::Disabled).lines() {
            // Removes the leading space.
            self.line(line.strip_prefix(' ').unwrap_or(&line).trim_end())?;
        }
        Ok(())
    }

    /// Prints a row one cell per line, for a terminal that is too narrow for the table.
    fn record(&mut self, headings: &[&str], row: &[String]) -> Result<(), Failure> {
        let widest = headings.iter().map(|heading| heading.len()).max().unwrap_or(0);
        for (heading, cell) in headings.iter().zip(row).filter(|(_, cell)| !cell.is_empty()) {
            self.line(&format!("{heading:widest$}  {cell}"))?;
        }
        self.line("")
    }

    /// Prints text to the right of a margin. On a narrow terminal, the text wraps between words and never inside a
    /// word, so that the reader can copy each word.
    pub fn with_margin(&mut self, margin: &str, text: &str) -> Result<(), Failure> {
        let room = if io::stdout().is_terminal() { Table::new().width() } else { None };
        let room = room.map_or(usize::MAX, |width| usize::from(width).saturating_sub(margin.chars().count()));
        let mut margin = margin.to_owned();
        let mut line = String::new();
        for word in text.split(' ') {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > room {
                self.line(&format!("{margin}{line}"))?;
                margin = " ".repeat(margin.chars().count());
                line.clear();
            } else if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        self.line(&format!("{margin}{line}"))
    }

    /// Flushes the output and returns the verdict. If the reader closes the pipe early, the verdict stays the same.
    pub fn end(&mut self, outcome: Result<Verdict, Failure>) -> Result<Verdict, Failure> {
        let verdict = outcome?;
        match self.flush() {
            Ok(()) | Err(Failure::OutputClosed) => Ok(verdict),
            Err(failure) => Err(failure),
        }
    }

    /// Flushes the output, so that a reader that is waiting for a line receives it now.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.stdout.flush()?;
        Ok(())
    }
}

/// Returns text from a store without the control characters that a terminal would obey.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    let harmless = |c: char| !c.is_control() || c == '\n' || c == '\t';
    if text.chars().all(harmless) {
        return text.into();
    }
    text.chars().map(|c| if harmless(c) { c } else { '\u{fffd}' }).collect::<String>().into()
}

/// Returns the same text on one line, because a line break in a table cell would look like a new row.
pub(crate) fn one_line(text: &str) -> String {
    shown(text).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Returns the start of a string without line breaks.
pub(crate) fn short(text: &str, chars_max: usize) -> String {
    let one_line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(chars_max + 1).collect();
    if one_line.chars().count() <= chars_max {
        return one_line;
    }
    one_line.chars().take(chars_max.saturating_sub(1)).chain(['…']).collect()
}

/// Formats a number with separated thousands.
pub(crate) fn grouped(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::from(if number < 0 { "-" } else { "" });
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (-1_234_567, "-1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn control_characters_of_stored_text_are_replaced() {
        assert_eq!(shown("a\x1b[2Jb\n\tü"), "a\u{fffd}[2Jb\n\tü");
        assert_eq!(short("one\ntwo three", 9), "one two …");
        assert_eq!(one_line("a\x1b[2Jb\n\tü"), "a\u{fffd}[2Jb  ü");
    }
}
