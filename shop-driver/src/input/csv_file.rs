use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use super::{
    columns::Columns,
    draft::Draft,
    error::{InputError, ReadError, RowError},
    invoice::Invoice,
    lines::Lines,
    record::Record,
    row,
    rows::Rows,
};

const BUFFER_BYTES: usize = 128 * 1024;

/// A CSV file of invoices, scanned once when it is opened.
///
/// Opening scans for invoices whose rows are not contiguous. Without this scan, the reader would make an order from the
/// first rows of such an invoice before it reads the other rows. The scan holds every invoice number in memory, about
/// 100 bytes each (2.5 MB for the 25,900 invoices of the full data set). After the scan, only the numbers of the
/// non-contiguous invoices stay in memory. Reading then holds one invoice at a time.
#[derive(Clone, Debug)]
pub struct CsvFile {
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
    columns: Columns,
    invoices: u64,
    /// The first line of each invoice whose rows are not contiguous.
    scattered: Arc<HashMap<String, u64>>,
}

/// Opens a CSV file of invoices. The columns may be in any order, the lines may end in LF or CRLF, the text may be
/// UTF-8 or Windows-1252, and the file may start with a byte order mark.
pub fn read_csv(path: impl AsRef<Path>) -> Result<CsvFile, InputError> {
    let path = path.as_ref();
    let (file, bytes, modified) = open(path)?;
    let mut lines = Lines::new(BufReader::with_capacity(BUFFER_BYTES, file));
    let mut record = Record::default();
    if !read(path, &mut lines, &mut record, 0)? {
        return Err(InputError::Empty { path: path.to_owned() });
    }
    let columns = Columns::of(&record).map_err(|reason| InputError::Header {
        path: path.to_owned(),
        line: record.line,
        reason,
    })?;

    let mut first_lines: HashMap<Box<str>, u64> = HashMap::new();
    let mut scattered = HashMap::new();
    let mut current = String::new();
    while read(path, &mut lines, &mut record, columns.count)? {
        let Ok(number) = row::number(&record, &columns) else { continue };
        if number == current {
            continue;
        }
        number.clone_into(&mut current);
        match first_lines.entry(number.into()) {
            Entry::Occupied(first) => {
                scattered.insert(number.to_owned(), *first.get());
            }
            Entry::Vacant(first) => {
                first.insert(record.line);
            }
        }
    }
    let invoices = first_lines.len() as u64;
    Ok(CsvFile { path: path.to_owned(), bytes, modified, columns, invoices, scattered: Arc::new(scattered) })
}

impl CsvFile {
    /// The size of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of distinct invoice numbers, including those of invoices that will be left out.
    pub fn len(&self) -> u64 {
        self.invoices
    }

    /// Whether the file holds no invoice.
    pub fn is_empty(&self) -> bool {
        self.invoices == 0
    }

    /// Reads the file from the start.
    pub fn invoices(&self) -> Result<FileInvoices, InputError> {
        let (file, bytes, modified) = open(&self.path)?;
        if (bytes, modified) != (self.bytes, self.modified) {
            return Err(InputError::Changed { path: self.path.clone() });
        }
        let mut lines = Lines::new(BufReader::with_capacity(BUFFER_BYTES, file));
        let mut record = Record::default();
        read(&self.path, &mut lines, &mut record, 0)?;
        Ok(FileInvoices {
            file: self.clone(),
            lines,
            record,
            rows: Rows::default(),
            draft: None,
            unknown_above: false,
            ready: VecDeque::new(),
            ended: false,
        })
    }
}

fn open(path: &Path) -> Result<(File, u64, Option<SystemTime>), InputError> {
    let unreadable = |source| InputError::Unreadable { path: path.to_owned(), source };
    // Checks the kind of the file before opening it, because opening a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(InputError::NotAFile { path: path.to_owned() });
    }
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    Ok((file, metadata.len(), metadata.modified().ok()))
}

fn read(
    path: &Path,
    lines: &mut Lines<BufReader<File>>,
    record: &mut Record,
    columns: usize,
) -> Result<bool, InputError> {
    lines.read(record, columns).map_err(|source| InputError::Unreadable { path: path.to_owned(), source })
}

/// The invoices of a file, in the order of the file, with a report for each malformed row.
///
/// Leaves out every invoice that has a malformed row or whose rows are not contiguous, so that no order is ever
/// incomplete. A row whose invoice number cannot be read may belong to the invoice above or below, so both are left
/// out. [`rows`](Self::rows) counts everything that is left out.
#[derive(Debug)]
pub struct FileInvoices {
    file: CsvFile,
    lines: Lines<BufReader<File>>,
    record: Record,
    rows: Rows,
    draft: Option<Draft>,
    /// Whether the last row that was read had no readable invoice number.
    unknown_above: bool,
    ready: VecDeque<Result<Invoice, ReadError>>,
    ended: bool,
}

impl FileInvoices {
    /// The outcome of the rows that have been read so far.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// The number of bytes that have been read so far.
    pub fn bytes_read(&self) -> u64 {
        self.lines.bytes()
    }

    /// Reads the next row. Returns false at the end.
    fn step(&mut self) -> Result<bool, InputError> {
        if !read(&self.file.path, &mut self.lines, &mut self.record, self.file.columns.count)? {
            if self.lines.bytes() != self.file.bytes {
                return Err(InputError::Changed { path: self.file.path.clone() });
            }
            self.close();
            return Ok(false);
        }
        self.rows.read += 1;
        self.rows.recoded += u64::from(self.record.recoded);
        let line = self.record.line;
        let fault = match row::number(&self.record, &self.file.columns) {
            Err(reason) => {
                self.unknown_above = true;
                Some(format!(
                    "{reason}; the invoices above and below are left out, because the row may belong to either"
                ))
            }
            Ok(number) => {
                let number = number.to_owned();
                self.turn_to(&number, line);
                self.take(line)
            }
        };
        if let Some(reason) = fault {
            if let Some(draft) = &mut self.draft {
                draft.spoil();
            }
            self.reject(line, reason);
        }
        Ok(true)
    }

    /// Starts a new draft unless the current draft is for this invoice.
    fn turn_to(&mut self, number: &str, line: u64) {
        let unknown_above = std::mem::take(&mut self.unknown_above);
        if self.draft.as_ref().is_some_and(|draft| draft.number == number) {
            return;
        }
        self.close();
        let mut draft = Draft::new(number, line);
        if unknown_above || self.file.scattered.contains_key(number) {
            draft.spoil();
        }
        self.draft = Some(draft);
    }

    /// Adds the row to the draft. Returns what is wrong with the row, if anything.
    fn take(&mut self, line: u64) -> Option<String> {
        let draft = self.draft.as_mut()?;
        if let Some(first) = self.file.scattered.get(&draft.number).filter(|first| **first != draft.first_line) {
            return Some(format!(
                "{} appears again: it starts on line {first}, with other invoices in between",
                draft.number
            ));
        }
        row::parse(&self.record, &self.file.columns).and_then(|row| draft.take(line, row)).err()
    }

    /// Turns the draft into an invoice, or counts the draft as left out.
    fn close(&mut self) {
        let Some(draft) = self.draft.take() else { return };
        // An invoice whose rows are not contiguous counts once, together with its first group of rows.
        let again = self.file.scattered.get(&draft.number).is_some_and(|first| *first != draft.first_line);
        let sound = draft.sound;
        if draft.flawed {
            if !again {
                self.rows.left_out.add(sound);
            }
            return;
        }
        match draft.finish() {
            Ok(invoice) => {
                self.rows.became(&invoice);
                self.ready.push_back(Ok(invoice));
            }
            Err(faults) => {
                self.rows.left_out.add(sound - faults.len() as u64);
                for (line, reason) in faults {
                    self.reject(line, reason);
                }
            }
        }
    }

    fn reject(&mut self, line: u64, reason: String) {
        let error = RowError { file: self.file.path.clone(), line, reason };
        self.rows.malformed(&error);
        self.ready.push_back(Err(error.into()));
    }
}

impl Iterator for FileInvoices {
    type Item = Result<Invoice, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Some(item);
            }
            if self.ended {
                return None;
            }
            match self.step() {
                Ok(more) => self.ended = !more,
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error.into()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
