//! Writes an export, or resumes an interrupted export.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use annals::Document;
use serde::Serialize;

use super::{
    format::{DocumentEntry, DocumentLine, Header, Section, SectionEntry},
    reader::{ExportItem, ExportReader},
};
use crate::{event_lines::Lines, failure::Failure};

/// A section ends after this many lines or bytes. An interrupted export loses at most one section. An import reads a
/// whole section into memory before writing any of it.
const SECTION_LINES: u64 = 5_000;
const SECTION_BYTES: usize = 16 << 20;
/// The default level of zstd.
const COMPRESSION: i32 = 3;

/// The destination of the lines. Each section is a compression frame of its own, so that the file can be truncated
/// after any section and resumed.
enum Sink {
    Plain(BufWriter<File>),
    Zstd(Option<zstd::Encoder<'static, BufWriter<File>>>),
}

impl Sink {
    fn new(file: File, path: &Path) -> io::Result<Self> {
        let file = BufWriter::with_capacity(1 << 20, file);
        // The extension `.zst` says that the file is compressed.
        let is_compressed = path.extension().is_some_and(|extension| extension == "zst");
        Ok(if is_compressed { Self::Zstd(Some(frame(file)?)) } else { Self::Plain(file) })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.write_all(bytes),
            Self::Zstd(Some(encoder)) => encoder.write_all(bytes),
            Self::Zstd(None) => Err(io::Error::other("the export is complete")),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.flush(),
            Self::Zstd(Some(encoder)) => encoder.flush().and_then(|()| encoder.get_mut().flush()),
            Self::Zstd(None) => Ok(()),
        }
    }

    fn end_section(&mut self, complete: bool) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.flush()?,
            Self::Zstd(encoder) => {
                if let Some(open) = encoder.take() {
                    let mut file = open.finish()?;
                    file.flush()?;
                    if !complete {
                        *encoder = Some(frame(file)?);
                    }
                }
            }
        }
        Ok(())
    }
}

fn frame(file: BufWriter<File>) -> io::Result<zstd::Encoder<'static, BufWriter<File>>> {
    let mut encoder = zstd::Encoder::new(file, COMPRESSION)?;
    encoder.include_checksum(true)?;
    Ok(encoder)
}

/// Writes an export, and totals what was written.
pub(crate) struct ExportWriter {
    path: PathBuf,
    sink: Sink,
    hasher: blake3::Hasher,
    so_far: Section,
    /// Lines and bytes since the last section.
    open: (u64, usize),
    line: Vec<u8>,
}

impl ExportWriter {
    /// Begins a new file. The file must not exist.
    pub fn begin(path: &Path, header: &Header) -> Result<Self, Failure> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let sink = file.and_then(|file| Sink::new(file, path)).map_err(|error| unwritable(path, &error))?;
        let mut writer = Self::to(sink, path, blake3::Hasher::new(), Section::default());
        // Flushes the header at once, so that the export can be resumed from the start.
        writer.put(header)?;
        writer.sink.flush().map_err(|error| unwritable(path, &error))?;
        Ok(writer)
    }

    /// Resumes a file after its last complete section, and overwrites anything after that section. Returns `None` if
    /// the file is complete.
    pub fn resume(path: &Path) -> Result<Option<(Self, Header)>, Failure> {
        let mut reader = ExportReader::open(path)?;
        let mut whole = None;
        loop {
            // An interrupted file ends in the middle of an item. The file is truncated after its last complete section.
            match reader.step() {
                Ok(ExportItem::Section(section)) if section.complete => return Ok(None),
                Ok(ExportItem::Section(section)) => whole = Some((section, reader.offset(), reader.hasher().clone())),
                Ok(ExportItem::Event(_) | ExportItem::Document(_)) => {}
                Ok(ExportItem::End) | Err(_) => break,
            }
        }
        let header = reader.header().clone();
        let (so_far, offset, hasher) = whole.unwrap_or_default();
        let sink = truncated(path, offset).and_then(|file| Sink::new(file, path));
        let sink = sink.map_err(|error| unwritable(path, &error))?;
        let mut writer = Self::to(sink, path, hasher, so_far);
        if offset == 0 {
            writer.put(&header)?;
        }
        Ok(Some((writer, header)))
    }

    fn to(sink: Sink, path: &Path, hasher: blake3::Hasher, so_far: Section) -> Self {
        Self { path: path.to_owned(), sink, hasher, so_far, open: (0, 0), line: Vec::new() }
    }

    /// The totals of everything written so far.
    pub fn so_far(&self) -> &Section {
        &self.so_far
    }

    pub fn events(&mut self, events: &Lines) -> Result<(), Failure> {
        self.write(&events.bytes)?;
        self.so_far.position = events.position;
        self.so_far.events += events.count;
        self.ends_section(events.count, events.bytes.len())
    }

    pub fn document(&mut self, document: &Document) -> Result<(), Failure> {
        self.put(&DocumentEntry { document: DocumentLine::of(document) })?;
        self.so_far.documents += 1;
        self.so_far.document = Some((document.key.collection.to_string(), document.key.id.to_string()));
        self.ends_section(1, self.line.len())
    }

    /// Ends the documents. `head` is the last position that the export will include.
    pub fn until(&mut self, head: i64) -> Result<(), Failure> {
        self.so_far.until = Some(head);
        self.section(false)
    }

    /// Ends the section, so that everything written so far is valid.
    pub fn section(&mut self, complete: bool) -> Result<(), Failure> {
        self.so_far.blake3 = self.hasher.finalize().to_hex().to_string();
        self.so_far.complete = complete;
        let section = self.so_far.clone();
        self.put(&SectionEntry { section })?;
        self.open = (0, 0);
        self.sink.end_section(complete).map_err(|error| unwritable(&self.path, &error))
    }

    fn ends_section(&mut self, lines: u64, bytes: usize) -> Result<(), Failure> {
        self.open = (self.open.0 + lines, self.open.1 + bytes);
        if self.open.0 >= SECTION_LINES || self.open.1 >= SECTION_BYTES { self.section(false) } else { Ok(()) }
    }

    fn put(&mut self, line: &impl Serialize) -> Result<(), Failure> {
        let mut text = std::mem::take(&mut self.line);
        text.clear();
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
        let written = self.write(&text);
        self.line = text;
        written
    }

    fn write(&mut self, lines: &[u8]) -> Result<(), Failure> {
        self.hasher.update(lines);
        self.sink.write(lines).map_err(|error| unwritable(&self.path, &error))
    }
}

/// Opens a file at `offset`, and removes everything after that.
fn truncated(path: &Path, offset: u64) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.set_len(offset)?;
    file.seek(SeekFrom::End(0))?;
    Ok(file)
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::new(match error.kind() {
        io::ErrorKind::AlreadyExists => format!(
            "{} exists already: name another file, or continue an interrupted file with --resume",
            path.display()
        ),
        _ => format!("{} cannot be written: {error}", path.display()),
    })
}
