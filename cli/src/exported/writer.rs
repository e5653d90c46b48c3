//! Writes an export, or resumes an interrupted export.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::Path,
};

use annals::Document;
use serde::Serialize;

use super::{DocumentLine, Header, Reader, Section, Step};
use crate::{event::Lines, failure::Failure};

/// A section ends after this many lines or bytes. An interrupted export loses at most one section, and an import holds
/// one section in memory.
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

pub(crate) struct Writer {
    sink: Sink,
    hasher: blake3::Hasher,
    so_far: Section,
    /// Lines and bytes since the last section.
    open: (u64, usize),
    line: Vec<u8>,
}

impl Writer {
    /// Begins a new file. The file must not exist.
    pub fn begin(path: &Path, header: &Header) -> Result<Self, Failure> {
        let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| told(path, &error))?;
        let mut writer =
            Self::to(file, path, blake3::Hasher::new(), Section::default()).map_err(|error| told(path, &error))?;
        // Flushes the header at once, so that the export can be resumed from the start.
        writer.put(header).and_then(|()| writer.flush()).map_err(|error| told(path, &error))?;
        Ok(writer)
    }

    /// Resumes a file after its last complete section, and overwrites anything after that section. Returns `None` if
    /// the file is complete.
    pub fn go_on(path: &Path) -> Result<Option<(Self, Header)>, Failure> {
        let mut reader = Reader::open(path)?;
        let mut whole = None;
        loop {
            // An interrupted file ends in the middle of an item. It is truncated after its last complete section.
            match reader.step() {
                Ok(Step::Section(section)) if section.complete => return Ok(None),
                Ok(Step::Section(section)) => whole = Some((section, reader.offset(), reader.hasher().clone())),
                Ok(Step::Event(_) | Step::Document(_)) => {}
                Ok(Step::End) | Err(_) => break,
            }
        }
        let header = reader.header().clone();
        let open = || -> io::Result<Self> {
            let mut file = OpenOptions::new().write(true).open(path)?;
            let (so_far, hasher) = match whole {
                Some((section, offset, hasher)) => {
                    file.set_len(offset)?;
                    file.seek(SeekFrom::End(0))?;
                    (section, hasher)
                }
                None => {
                    file.set_len(0)?;
                    (Section::default(), blake3::Hasher::new())
                }
            };
            let begins = so_far == Section::default();
            let mut writer = Self::to(file, path, hasher, so_far)?;
            if begins {
                writer.put(&header)?;
            }
            Ok(writer)
        };
        open().map(|writer| Some((writer, header))).map_err(|error| told(path, &error))
    }

    fn to(file: File, path: &Path, hasher: blake3::Hasher, so_far: Section) -> io::Result<Self> {
        let file = BufWriter::with_capacity(1 << 20, file);
        let sink = if is_compressed(path) { Sink::Zstd(Some(frame(file)?)) } else { Sink::Plain(file) };
        Ok(Self { sink, hasher, so_far, open: (0, 0), line: Vec::new() })
    }

    /// The totals of everything written so far.
    pub fn so_far(&self) -> &Section {
        &self.so_far
    }

    pub fn events(&mut self, events: &Lines) -> io::Result<()> {
        self.write(&events.bytes)?;
        self.so_far.position = events.position;
        self.so_far.events += events.count;
        self.ends_section(events.count, events.bytes.len())
    }

    pub fn document(&mut self, document: &Document) -> io::Result<()> {
        #[derive(Serialize)]
        struct Line<'a> {
            document: DocumentLine<'a>,
        }
        self.put(&Line { document: DocumentLine::of(document) })?;
        self.so_far.documents += 1;
        self.so_far.document = Some((document.key.collection.to_string(), document.key.id.to_string()));
        self.ends_section(1, self.line.len())
    }

    /// Ends the documents. `head` is the last position that the export will include.
    pub fn until(&mut self, head: i64) -> io::Result<()> {
        self.so_far.until = Some(head);
        self.section(false)
    }

    /// Ends the section, so that everything written so far is valid.
    pub fn section(&mut self, complete: bool) -> io::Result<()> {
        #[derive(Serialize)]
        struct Line<'a> {
            section: &'a Section,
        }
        self.so_far.blake3 = self.hasher.finalize().to_hex().to_string();
        self.so_far.complete = complete;
        let section = self.so_far.clone();
        self.put(&Line { section: &section })?;
        self.open = (0, 0);
        match &mut self.sink {
            Sink::Plain(file) => file.flush()?,
            Sink::Zstd(encoder) => {
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

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.sink {
            Sink::Plain(file) => file.flush(),
            Sink::Zstd(Some(encoder)) => encoder.flush().and_then(|()| encoder.get_mut().flush()),
            Sink::Zstd(None) => Ok(()),
        }
    }

    fn ends_section(&mut self, lines: u64, bytes: usize) -> io::Result<()> {
        self.open = (self.open.0 + lines, self.open.1 + bytes);
        if self.open.0 >= SECTION_LINES || self.open.1 >= SECTION_BYTES { self.section(false) } else { Ok(()) }
    }

    fn put(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut text = std::mem::take(&mut self.line);
        text.clear();
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
        let written = self.write(&text);
        self.line = text;
        written
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        self.hasher.update(lines);
        match &mut self.sink {
            Sink::Plain(file) => file.write_all(lines),
            Sink::Zstd(Some(encoder)) => encoder.write_all(lines),
            Sink::Zstd(None) => Err(io::Error::other("the export is complete")),
        }
    }
}

fn frame(file: BufWriter<File>) -> io::Result<zstd::Encoder<'static, BufWriter<File>>> {
    let mut encoder = zstd::Encoder::new(file, COMPRESSION)?;
    encoder.include_checksum(true)?;
    Ok(encoder)
}

/// Returns whether the file is compressed, which its extension `.zst` says.
fn is_compressed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "zst")
}

fn told(path: &Path, error: &io::Error) -> Failure {
    Failure::new(match error.kind() {
        io::ErrorKind::AlreadyExists => format!(
            "{} exists already: --resume goes on with it if it was broken off; else name another file",
            path.display()
        ),
        _ => format!("{} cannot be written: {error}", path.display()),
    })
}
