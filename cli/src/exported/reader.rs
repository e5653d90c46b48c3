//! Reads an export, and checks it while reading.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use annals::{Document, archive::Stored};

use super::format::{ExportLine, FORMAT, Header, LINE_BYTES_MAX, Section};
use crate::failure::Failure;

/// <https://www.rfc-editor.org/rfc/rfc8878#section-3.1.1>
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The number of bytes that are hashed at once.
const HASHED_BYTES: usize = 128 << 10;

/// The next item of an export.
pub(crate) enum ExportItem {
    Event(Box<Stored<'static>>),
    Document(Document),
    /// The end of a section. The checksum matches everything before this point.
    Section(Section),
    /// The end of the file, complete or not.
    End,
}

/// The source of lines. A compressed file has one frame per section.
enum Source {
    Plain(BufReader<File>),
    Zstd(Option<BufReader<zstd::Decoder<'static, BufReader<File>>>>),
}

pub(crate) struct ExportReader {
    path: PathBuf,
    source: Source,
    header: Header,
    hasher: blake3::Hasher,
    /// Bytes that have been read but not yet hashed. Hashing many bytes at once is faster.
    unhashed: Vec<u8>,
    /// The offset of the next line in a plain file, or of the next frame in a compressed one.
    offset: u64,
    so_far: Section,
    line: Vec<u8>,
    number: u64,
}

impl ExportReader {
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let unreadable = |error: io::Error| Failure::new(format!("{} cannot be read: {error}", path.display()));
        let mut file = File::open(path).map_err(unreadable)?;
        let mut magic = Vec::new();
        Read::by_ref(&mut file).take(4).read_to_end(&mut magic).map_err(unreadable)?;
        file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
        let file = BufReader::with_capacity(1 << 20, file);
        let source = match magic == ZSTD_MAGIC {
            true => Source::Zstd(Some(frame(file).map_err(unreadable)?)),
            false => Source::Plain(file),
        };
        let header = Header {
            annals_export: 0,
            id: uuid::Uuid::nil(),
            store: String::new(),
            taken_at: chrono::DateTime::UNIX_EPOCH,
            archive: None,
        };
        let mut reader = Self {
            path: path.to_owned(),
            source,
            header,
            hasher: blake3::Hasher::new(),
            unhashed: Vec::with_capacity(2 * HASHED_BYTES),
            offset: 0,
            so_far: Section::default(),
            line: Vec::new(),
            number: 0,
        };
        let no_export =
            |_| Failure::new(format!("{} is not an export: `annals export` writes such files", path.display()));
        reader.next_line()?;
        reader.header = serde_json::from_slice(&reader.line).map_err(no_export)?;
        let found = reader.header.annals_export;
        if found != FORMAT {
            let path = path.display();
            return Err(Failure::new(format!(
                "{path} has format {found}; this build reads {FORMAT}: use a newer build"
            )));
        }
        reader.take_in();
        Ok(reader)
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The offset at which to truncate the file to keep everything up to the last section that was read.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The hash of everything read so far.
    pub fn hasher(&mut self) -> &blake3::Hasher {
        self.hasher.update(&self.unhashed);
        self.unhashed.clear();
        &self.hasher
    }

    pub fn step(&mut self) -> Result<ExportItem, Failure> {
        if !self.next_line()? {
            return Ok(ExportItem::End);
        }
        let text = std::str::from_utf8(&self.line).map_err(|error| self.damaged(&error.to_string()))?;
        let step = match ExportLine::parse(text).map_err(|error| self.damaged(&error.to_string()))? {
            ExportLine::Event(event) => {
                let event = event.stored().map_err(|error| self.damaged(error))?.into_owned();
                if event.position.0 <= self.so_far.position {
                    return Err(self.damaged("the events are not in log order"));
                }
                self.so_far.position = event.position.0;
                self.so_far.events += 1;
                ExportItem::Event(Box::new(event))
            }
            ExportLine::Document(document) => {
                let document = document.document().map_err(|error| self.damaged(&error))?;
                self.so_far.documents += 1;
                self.so_far.document = Some((document.key.collection.to_string(), document.key.id.to_string()));
                ExportItem::Document(document)
            }
            ExportLine::Section(section) => {
                let blake3 = self.hasher().finalize().to_hex().to_string();
                self.so_far.until = section.until;
                let read = Section { blake3, complete: section.complete, ..self.so_far.clone() };
                if read != section {
                    return Err(self.damaged("the checksum is wrong: the file was changed or damaged before this line"));
                }
                ExportItem::Section(section)
            }
        };
        self.take_in();
        if matches!(step, ExportItem::Section(_)) {
            self.next_frame()?;
        }
        Ok(step)
    }

    fn take_in(&mut self) {
        self.unhashed.extend_from_slice(&self.line);
        if self.unhashed.len() >= HASHED_BYTES {
            self.hasher();
        }
        if matches!(self.source, Source::Plain(_)) {
            self.offset += self.line.len() as u64;
        }
    }

    /// Reads a line into `line`; returns false at the end.
    fn next_line(&mut self) -> Result<bool, Failure> {
        self.line.clear();
        self.number += 1;
        let read = match &mut self.source {
            Source::Plain(file) => file.take(LINE_BYTES_MAX).read_until(b'\n', &mut self.line),
            Source::Zstd(Some(frame)) => frame.take(LINE_BYTES_MAX).read_until(b'\n', &mut self.line),
            Source::Zstd(None) => Ok(0),
        };
        match read {
            Ok(0) => Ok(false),
            Ok(_) if self.line.ends_with(b"\n") => Ok(true),
            Ok(_) => Err(self.damaged("the line is incomplete")),
            Err(error) => Err(self.damaged(&error.to_string())),
        }
    }

    /// Moves on to the next frame. A section is the last line of its frame.
    fn next_frame(&mut self) -> Result<(), Failure> {
        let Source::Zstd(frame_now) = &mut self.source else { return Ok(()) };
        let Some(mut ended) = frame_now.take() else { return Ok(()) };
        let mut rest = Vec::new();
        let next = (|| {
            // The checksum of the frame follows its last byte.
            ended.read_to_end(&mut rest)?;
            let mut file = ended.into_inner().finish();
            let offset = file.stream_position()?;
            let has_more = !file.fill_buf()?.is_empty();
            Ok::<_, io::Error>((offset, has_more.then(|| frame(file)).transpose()?))
        })();
        let (offset, next) = next.map_err(|error| self.damaged(&error.to_string()))?;
        if !rest.is_empty() {
            return Err(self.damaged("unexpected data follows the end of a section"));
        }
        self.offset = offset;
        self.source = Source::Zstd(next);
        Ok(())
    }

    fn damaged(&self, reason: &str) -> Failure {
        Failure::new(format!("{}, line {}: {reason}", self.path.display(), self.number))
    }
}

fn frame(file: BufReader<File>) -> io::Result<BufReader<zstd::Decoder<'static, BufReader<File>>>> {
    Ok(BufReader::new(zstd::Decoder::with_buffer(file)?.single_frame()))
}
