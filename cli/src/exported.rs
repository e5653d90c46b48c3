//! The file that an export is: lines of JSON, compressed or not. Sections end with a line that has the checksum of all
//! before it, so that a part of a file is as good as far as it goes.
//!
//! ```text
//! {"annals_export":1,"id":"…","store":"sqlite:shop.db","taken_at":"…"}
//! {"document":{"collection":"checkpoint","id":"…",…}}      documents, by collection and id
//! {"section":{"documents":24,…,"until":5958,"blake3":"…"}}
//! {"position":1,"stream":"order-1",…}                      events, in log order, up to that position
//! {"section":{…,"complete":true}}
//! ```
//!
//! An archive is the same with some streams and no documents, and says so in its first line.
//!
//! Documents come first: a checkpoint that is older than the events after it is caught up by its service, one that is newer
//! would have it skip some.

mod reader;
mod writer;

use std::borrow::Cow;

use annals::{Document, DocumentKey};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

pub(crate) use self::{
    reader::{Reader, Step},
    writer::Writer,
};
use crate::event::{EventLine, raw};

/// What this version writes, and reads.
pub(crate) const FORMAT: u32 = 1;
/// A longer line is none of ours: payloads and documents have limits, and escaping makes them at most six times as long.
const LINE_BYTES_MAX: u64 = 32 << 20;

/// The first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Header {
    pub annals_export: u32,
    /// Of this export: one that goes on keeps it.
    pub id: Uuid,
    /// Where it was taken from; no password.
    pub store: String,
    pub taken_at: DateTime<Utc>,
    /// That it is no whole store, but an archive of some streams.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive: Option<Archived>,
}

/// Which streams an archive has: those that were finished.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Archived {
    pub categories: Vec<String>,
    /// Before which their last events were recorded.
    pub quiet_before: DateTime<Utc>,
    /// How many.
    #[serde(default)]
    pub streams: usize,
    /// Of all their names: whoever goes on has to find the same ones.
    #[serde(default)]
    pub blake3: String,
}

/// The end of a section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Section {
    /// How many documents so far.
    pub documents: u64,
    /// Collection and id of the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<(String, String)>,
    /// The last position of the log, read once all documents were written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
    /// How many events so far.
    pub events: u64,
    /// Of the last event so far.
    pub position: i64,
    /// Of every byte before this line, uncompressed.
    pub blake3: String,
    /// Whether nothing follows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub complete: bool,
}

/// A document as a line holds it.
#[derive(Serialize, Deserialize)]
pub(crate) struct DocumentLine<'a> {
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
    fn of(document: &'a Document) -> Self {
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

    fn document(self) -> Result<Document, String> {
        let body = match (self.body, self.body_text) {
            (Some(body), None) => body.get().into(),
            (None, Some(text)) => text.into(),
            _ => return Err("a document has either `body` or `body_text`".into()),
        };
        let key = DocumentKey::new(self.collection, self.id);
        Ok(Document { key, version: self.version, body, due: self.due })
    }
}

/// Every line but the first. Told apart by its first field.
enum Line<'a> {
    Event(EventLine<'a>),
    Document(DocumentLine<'a>),
    Section(Section),
}

impl<'a> Line<'a> {
    fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct OfDocument<'a> {
            #[serde(borrow)]
            document: DocumentLine<'a>,
        }
        #[derive(Deserialize)]
        struct OfSection {
            section: Section,
        }
        if text.starts_with(r#"{"document":"#) {
            return serde_json::from_str::<OfDocument>(text).map(|line| Self::Document(line.document));
        }
        if text.starts_with(r#"{"section":"#) {
            return serde_json::from_str::<OfSection>(text).map(|line| Self::Section(line.section));
        }
        serde_json::from_str(text).map(Self::Event)
    }
}
