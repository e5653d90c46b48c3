use std::{
    collections::VecDeque,
    io::{self, BufRead},
};

use super::record::{Record, Split};

/// The longest physical line that is kept; the rows of the source data have at most 110 bytes. A longer line is cut off
/// after this length.
const LINE_BYTES_MAX: usize = 65_536;
/// The maximum number of further lines that a quoted field may span. If the quote is still open after these lines, the
/// line with the open quote counts as flawed.
const CONTINUATION_LINES_MAX: usize = 16;

const TOO_LONG: &str = "longer than 65,536 bytes";
const OPEN_QUOTE: &str = "a quote is not closed";

/// A physical line without its ending.
#[derive(Debug)]
struct Physical {
    line: u64,
    bytes: Vec<u8>,
    too_long: bool,
}

/// The records of a CSV file, each with the physical line on which it starts. Blank lines are not records. Lines of
/// commas only, which spreadsheets write for empty rows, are not records either.
///
/// A record may span several lines inside quotes. If the quotes never close, or if the lines up to the closing quote do
/// not form a valid row, only the line with the open quote is flawed. The following lines are then read as separate
/// records.
#[derive(Debug)]
pub(super) struct Lines<R> {
    reader: R,
    line: u64,
    bytes: u64,
    ahead: VecDeque<Physical>,
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, line: 0, bytes: 0, ahead: VecDeque::new() }
    }

    /// The number of bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads the next record. Returns false at the end. A record that spans several lines must have `columns` fields.
    pub fn read(&mut self, record: &mut Record, columns: usize) -> io::Result<bool> {
        let first = loop {
            let Some(physical) = self.take()? else { return Ok(false) };
            if physical.too_long || !physical.bytes.iter().all(|byte| b", \t".contains(byte)) {
                break physical;
            }
        };
        record.line = first.line;
        record.flaw = match record.split(&first.bytes) {
            _ if first.too_long => Some(TOO_LONG),
            Split::Whole => None,
            Split::Flawed(flaw) => Some(flaw),
            Split::Open if self.go_on(record, &first.bytes, columns)? => None,
            Split::Open => {
                record.split(&first.bytes);
                Some(OPEN_QUOTE)
            }
        };
        Ok(true)
    }

    /// Looks for the lines that close the quote opened in `start`. Consumes those lines if they complete a row, and
    /// otherwise leaves them for the next reads.
    fn go_on(&mut self, record: &mut Record, start: &[u8], columns: usize) -> io::Result<bool> {
        let mut joined = start.to_vec();
        for lines in 1..=CONTINUATION_LINES_MAX {
            if self.ahead.len() < lines {
                match self.physical()? {
                    Some(physical) => self.ahead.push_back(physical),
                    None => return Ok(false),
                }
            }
            let next = &self.ahead[lines - 1];
            if next.too_long || joined.len() + next.bytes.len() > LINE_BYTES_MAX {
                return Ok(false);
            }
            joined.push(b'\n');
            joined.extend_from_slice(&next.bytes);
            match record.split(&joined) {
                Split::Open => continue,
                Split::Whole if record.len() == columns => {
                    self.ahead.drain(..lines);
                    return Ok(true);
                }
                Split::Whole | Split::Flawed(_) => return Ok(false),
            }
        }
        Ok(false)
    }

    fn take(&mut self) -> io::Result<Option<Physical>> {
        match self.ahead.pop_front() {
            Some(physical) => Ok(Some(physical)),
            None => self.physical(),
        }
    }

    fn physical(&mut self) -> io::Result<Option<Physical>> {
        let mut physical = Physical { line: self.line + 1, bytes: Vec::new(), too_long: false };
        let mut any = false;
        loop {
            let available = match self.reader.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                available => available?,
            };
            if available.is_empty() {
                if !any {
                    return Ok(None);
                }
                break;
            }
            any = true;
            let newline = available.iter().position(|b| *b == b'\n');
            let text = &available[..newline.unwrap_or(available.len())];
            // Only the beginning of a line that is too long is kept. This beginning contains the invoice number.
            let room = LINE_BYTES_MAX - physical.bytes.len();
            physical.too_long |= text.len() > room;
            physical.bytes.extend_from_slice(&text[..text.len().min(room)]);
            let taken = newline.map_or(available.len(), |at| at + 1);
            self.reader.consume(taken);
            self.bytes += taken as u64;
            if newline.is_some() {
                break;
            }
        }
        self.line += 1;
        if physical.bytes.last() == Some(&b'\r') {
            physical.bytes.pop();
        }
        if physical.line == 1 && physical.bytes.starts_with(b"\xef\xbb\xbf") {
            physical.bytes.drain(..3);
        }
        Ok(Some(physical))
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    /// Returns the line, the first field and the flaw of each record in a file with two columns. Reads through a buffer
    /// of five bytes.
    fn records(text: &[u8]) -> Vec<(u64, String, Option<&'static str>)> {
        let mut lines = Lines::new(BufReader::with_capacity(5, text));
        let mut record = Record::default();
        let mut found = Vec::new();
        while lines.read(&mut record, 2).expect("bytes in memory") {
            found.push((record.line, record.get(0).unwrap_or_default().to_owned(), record.flaw));
        }
        assert_eq!(lines.bytes(), text.len() as u64);
        found
    }

    fn sound(line: u64, first: &str) -> (u64, String, Option<&'static str>) {
        (line, first.to_owned(), None)
    }

    #[test]
    fn counts_physical_lines_past_blank_lines_and_both_endings() {
        let expected = [sound(1, "a"), sound(3, "c"), sound(6, "e")];
        assert_eq!(records(b"a,b\n\nc,d\n\n\ne,f"), expected);
        assert_eq!(records(b"a,b\r\n\r\nc,d\r\n\r\n\r\ne,f\r\n"), expected);
    }

    #[test]
    fn empty_rows_are_skipped() {
        assert_eq!(records(b"a,b\n,\n , \t\nc,d\n,,\r\n,"), [sound(1, "a"), sound(4, "c")]);
    }

    #[test]
    fn takes_a_byte_order_mark_only_from_the_first_line() {
        assert_eq!(records(b"\xef\xbb\xbfa,b\nc,d"), [sound(1, "a"), sound(2, "c")]);
        assert_eq!(records(b"a,b\n\xef\xbb\xbfc,d"), [sound(1, "a"), sound(2, "\u{feff}c")]);
    }

    #[test]
    fn a_quoted_field_may_span_lines() {
        assert_eq!(records(b"a,\"one\ntwo\n\"\nc,d\n"), [sound(1, "a"), sound(4, "c")]);
    }

    #[test]
    fn open_quote_affects_no_other_line() {
        let flawed = (1, "a".to_owned(), Some(OPEN_QUOTE));
        assert_eq!(records(b"a,\"b\nc,d\ne,f\n"), [flawed.clone(), sound(2, "c"), sound(3, "e")]);
        assert_eq!(records(b"a,\"b\nc,\"d\"\ne,f\n"), [flawed.clone(), sound(2, "c"), sound(3, "e")]);
        // The quote closes, but the record does not have two columns.
        let found = records(b"a,\"b\nc\",d\ne,f\n");
        assert_eq!((&found[0], found[1].0, &found[2]), (&flawed, 2, &sound(3, "e")));
        let far = format!("a,\"b\n{}\"\n", "c,d\n".repeat(20));
        let mut expected = vec![flawed];
        expected.extend((2..22).map(|line| sound(line, "c")));
        expected.push((22, String::new(), Some(OPEN_QUOTE)));
        assert_eq!(records(far.as_bytes()), expected);
    }

    #[test]
    fn a_line_without_end_is_skipped() {
        let text = format!("a,b\nc,{}\ne,f\n", "x".repeat(LINE_BYTES_MAX));
        assert_eq!(records(text.as_bytes()), [sound(1, "a"), (2, "c".to_owned(), Some(TOO_LONG)), sound(3, "e")]);
    }
}
