/// The decoded fields of one CSV record. All fields are in one buffer, which the next record reuses.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// The physical line on which the record starts.
    pub line: u64,
    /// The fault in the record, if there is one. The record then has only the fields before the fault.
    pub flaw: Option<&'static str>,
    /// Whether a field is not UTF-8 and was therefore read as Windows-1252.
    pub recoded: bool,
    text: String,
    ends: Vec<usize>,
}

/// The characters that Windows-1252 assigns to the bytes 0x80 to 0x9f. Every other byte means the code point with the
/// same number, as in Latin-1.
const WINDOWS_1252: &str = "€\u{81}‚ƒ„…†‡ˆ‰Š‹Œ\u{8d}Ž\u{8f}\u{90}‘’“”•–—˜™š›œ\u{9d}žŸ";

/// The result of splitting a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Split {
    /// The record was split to its end.
    Whole,
    /// The record ends inside quotes.
    Open,
    /// The record is not CSV.
    Flawed(&'static str),
}

const BARE_QUOTE: &str = "a quote inside a field must be doubled, and the field must stand in quotes";

impl Record {
    /// The number of fields that were decoded.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns the field at this position, if it was decoded.
    pub fn get(&self, at: usize) -> Option<&str> {
        let end = *self.ends.get(at)?;
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        self.text.get(start..end)
    }

    /// Splits `bytes`, which hold line endings inside quotes only.
    ///
    /// The `csv` crate is not suitable here: it reads a stray quote as text, or as the start of a field that extends to
    /// the next quote in the file, no matter how far away that quote is. Here, one bad row must not damage any other
    /// row.
    pub fn split(&mut self, bytes: &[u8]) -> Split {
        self.text.clear();
        self.ends.clear();
        self.recoded = false;
        let mut rest = bytes;
        loop {
            let taken = match rest.strip_prefix(b"\"") {
                Some(quoted) => self.quoted(quoted).map(|taken| taken + 1),
                None => self.plain(rest),
            };
            match taken {
                Err(fault) => return fault,
                Ok(taken) => {
                    self.ends.push(self.text.len());
                    rest = &rest[taken..];
                }
            }
            match rest.split_first() {
                None => return Split::Whole,
                Some((b',', after)) => rest = after,
                Some(_) => return Split::Flawed(BARE_QUOTE),
            }
        }
    }

    fn plain(&mut self, bytes: &[u8]) -> Result<usize, Split> {
        let end = bytes.iter().position(|b| *b == b',').unwrap_or(bytes.len());
        if bytes[..end].contains(&b'"') {
            return Err(Split::Flawed(BARE_QUOTE));
        }
        self.push(&bytes[..end]);
        Ok(end)
    }

    /// Returns the length of the field in bytes, including its closing quote.
    fn quoted(&mut self, bytes: &[u8]) -> Result<usize, Split> {
        let mut from = 0;
        loop {
            let Some(quote) = bytes[from..].iter().position(|b| *b == b'"').map(|at| from + at) else {
                return Err(Split::Open);
            };
            if bytes.get(quote + 1) == Some(&b'"') {
                self.push(&bytes[from..=quote]);
                from = quote + 2;
            } else {
                self.push(&bytes[from..quote]);
                return Ok(quote + 1);
            }
        }
    }

    /// Old spreadsheets write text in Windows-1252. Non-ASCII letters in Windows-1252 are hardly ever valid UTF-8, so a
    /// field that is not UTF-8 is read as Windows-1252.
    fn push(&mut self, bytes: &[u8]) {
        match std::str::from_utf8(bytes) {
            Ok(text) => self.text.push_str(text),
            Err(_) => {
                self.recoded = true;
                self.text.extend(bytes.iter().map(|byte| windows_1252(*byte)));
            }
        }
    }
}

fn windows_1252(byte: u8) -> char {
    let special = byte.checked_sub(0x80).and_then(|at| WINDOWS_1252.chars().nth(at.into()));
    special.unwrap_or_else(|| byte.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], expected: Split, fields: &[&str]) {
        let mut record = Record::default();
        assert_eq!(record.split(bytes), expected, "{}", bytes.escape_ascii());
        let found: Vec<_> = (0..record.len()).filter_map(|at| record.get(at)).collect();
        assert_eq!(found, fields, "{}", bytes.escape_ascii());
    }

    #[test]
    fn splits_plain_and_quoted_fields() {
        check(b"a,b,c", Split::Whole, &["a", "b", "c"]);
        check(b",,", Split::Whole, &["", "", ""]);
        check(b"", Split::Whole, &[""]);
        check(b"a,\"b, \"\"c\"\"\",d", Split::Whole, &["a", "b, \"c\"", "d"]);
        check(b"\"\",\"\"\"\"", Split::Whole, &["", "\""]);
        check("£40,\"é\"".as_bytes(), Split::Whole, &["£40", "é"]);
        check(b"a,\"two\nlines\"", Split::Whole, &["a", "two\nlines"]);
    }

    #[test]
    fn keeps_the_fields_before_a_fault() {
        check(b"1,7\" RECORD,3", Split::Flawed(BARE_QUOTE), &["1"]);
        check(b"1,\"a\"b,3", Split::Flawed(BARE_QUOTE), &["1", "a"]);
        check(b"1,2,\"three,4", Split::Open, &["1", "2"]);
    }

    #[test]
    fn non_utf_8_fields_are_read_as_windows_1252() {
        check(b"1,\xa340 \x80 \x9f,\"caf\xe9 \"\"\x93x\x94\"\"\"", Split::Whole, &["1", "£40 € Ÿ", "café \"“x”\""]);
        // Each field is decoded separately.
        check(b"\xc3\xa9,\xe9", Split::Whole, &["é", "é"]);
        let mut record = Record::default();
        record.split(b"a,\xa3");
        assert!(record.recoded);
        record.split("a,£".as_bytes());
        assert!(!record.recoded);
    }

    #[test]
    fn forgets_the_previous_record() {
        let mut record = Record::default();
        record.split(b"long,longer,longest");
        record.split(b"a,b");
        assert_eq!((record.len(), record.get(1), record.get(2)), (2, Some("b"), None));
    }
}
