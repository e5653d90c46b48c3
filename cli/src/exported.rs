//! The format of an export: lines of JSON, compressed or not. Each section ends with a line that holds the checksum of
//! all bytes before that line, so an incomplete file is valid up to the end of its last section.
//!
//! ```text
//! {"annals_export":1,"id":"…","store":"sqlite:shop.db","taken_at":"…"}
//! {"document":{"collection":"checkpoint","id":"…",…}}      documents, by collection and id
//! {"section":{"documents":24,…,"until":5958,"blake3":"…"}}
//! {"position":1,"stream":"order-1",…}                      events, in log order, up to that position
//! {"section":{…,"complete":true}}
//! ```
//!
//! An archive has the same format, but holds only some of the streams and no documents. The first line of the file says
//! that it is an archive.
//!
//! Documents come first, so that a checkpoint is never newer than the events in the file. With a checkpoint
//! older than the events, the service catches up. With a newer checkpoint, the service would skip events.

mod format;
mod reader;
mod writer;

pub(crate) use self::{
    format::{Archived, FORMAT, Header, Section},
    reader::{ExportItem, ExportReader},
    writer::ExportWriter,
};
