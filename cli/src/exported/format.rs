//! The lines of an export.

use std::borrow::Cow;

use annals::{
    Document, DocumentKey,
    archive::line::{EventLine, raw},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

/// The version of the format that this build writes and reads.
pub(crate) const FORMAT: u32 = 1;
/// The maximum length of a line. A longer line is not part of an export: payloads and documents are limited in size,
/// and escaping makes them at most six times as long.
pub(super) const LINE_BYTES_MAX: u64 = 32 << 20;

/// The first line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Header {
    pub annals_export: u32,
    /// The id of this export. A resumed export keeps its id.
    pub id: Uuid,
    /// The store that was exported, without its password.
    pub store: String,
    pub taken_at: DateTime<Utc>,
    /// Set if the file is an archive of some streams, not an export of the whole store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive: Option<Archived>,
}

/// The streams of an archive. All of them were finished when the archive was written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Archived {
    pub categories: Vec<String>,
    /// The last event of each stream was recorded before this time.
    pub quiet_before: DateTime<Utc>,
    /// The number of streams.
    #[serde(default)]
    pub streams: usize,
    /// The hash of the names of all streams. A resumed archive must find the same streams.
    #[serde(default)]
    pub blake3: String,
}

/// The end of a section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Section {
    /// The number of documents so far.
    pub documents: u64,
    /// The collection and the id of the last document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<(String, String)>,
    /// The last position of the log, read after all documents were written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
    /// The number of events so far.
    pub events: u64,
    /// The position of the last event so far.
    pub position: i64,
    /// The hash of every byte before this line, uncompressed.
    pub blake3: String,
    /// Whether the file is complete, with nothing after this section.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub complete: bool,
}

/// The document that a line holds.
#[derive(Serialize, Deserialize)]
pub(super) struct DocumentLine<'a> {
    #[serde(borrow)]
    collection: Cow<'a, str>,
    #[serde(borrow)]
    id: Cow<'a, str>,
    version: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    due: Option<DateTime<Utc>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    body: Option<&'a RawValue>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    body_text: Option<Cow<'a, str>>,
}

impl<'a> DocumentLine<'a> {
    pub fn of(document: &'a Document) -> Self {
        let body = raw(&document.body);
        Self {
            collection: (&*document.key.collection).into(),
            id: (&*document.key.id).into(),
            version: document.version,
            due: document.due,
            body_text: body.is_none().then(|| (&*document.body).into()),
            body,
        }
    }

    pub fn document(self) -> Result<Document, String> {
        let body = match (self.body, self.body_text) {
            (Some(body), None) => body.get().into(),
            (None, Some(text)) => text.into(),
            _ => return Err("a document has either `body` or `body_text`".into()),
        };
        let key = DocumentKey::new(self.collection, self.id);
        Ok(Document { key, version: self.version, body, due: self.due })
    }
}

/// The document that a line holds.
#[derive(Serialize, Deserialize)]
pub(super) struct DocumentEntry<'a> {
    #[serde(borrow)]
    pub document: DocumentLine<'a>,
}

/// The last line of a section.
#[derive(Serialize, Deserialize)]
pub(super) struct SectionEntry {
    pub section: Section,
}

/// Any line except the first. The first field of the line says which kind of line it is.
pub(super) enum ExportLine<'a> {
    Event(EventLine<'a>),
    Document(DocumentLine<'a>),
    Section(Section),
}

impl<'a> ExportLine<'a> {
    pub fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        if text.starts_with(r#"{"document":"#) {
            return serde_json::from_str::<DocumentEntry>(text).map(|line| Self::Document(line.document));
        }
        if text.starts_with(r#"{"section":"#) {
            return serde_json::from_str::<SectionEntry>(text).map(|line| Self::Section(line.section));
        }
        serde_json::from_str(text).map(Self::Event)
    }
}
