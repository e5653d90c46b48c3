//! Which events a client follows, as the query of its request says.

use std::sync::Arc;

use annals::{EventStore, LogQuery, Position, Recorded, StoreError, StreamId, Version};

use crate::{problem::Problem, request::bad};

/// The parameter with the number of events that the server may send over a WebSocket at first.
pub(super) const CREDITS: &str = "credits";
/// The maximum number of names in a selection.
const NAMES_MAX: usize = 50;
/// The number of events read per page from a stream.
const STREAM_PAGE: usize = 100;

/// The parameters of a request, in their order.
pub(super) type Parameters = Vec<(String, String)>;

/// Which events a client follows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selection {
    pub query: LogQuery,
    /// Only events of this stream.
    pub stream: Option<StreamId>,
}

/// Reads the query of a request: the selection, and the position to start after.
///
/// # Errors
/// A 400 that says what is unknown or invalid.
pub(super) fn read(parameters: &Parameters) -> Result<(Selection, Option<Position>), Problem> {
    let mut selection = Selection::default();
    let mut after = None;
    for (name, value) in parameters {
        match &**name {
            "category" => names(&mut selection.query.categories, value)?,
            "type" => names(&mut selection.query.types, value)?,
            "stream" if selection.stream.is_none() => {
                let stream = StreamId::parse(value).map_err(|error| bad(format!("stream={value:.200}: {error}")))?;
                selection.stream = Some(stream);
            }
            "after" if after.is_none() => after = Some(position("after", value)?),
            "stream" | "after" => return Err(bad(format!("there must be one parameter {name}"))),
            // The WebSocket reads its own parameter.
            CREDITS => {}
            other => {
                return Err(bad(format!("unknown parameter {other:.40}: use category, type, stream and after")));
            }
        }
    }
    Ok((selection, after))
}

/// Reads a position.
pub(super) fn position(name: &str, text: &str) -> Result<Position, Problem> {
    let position = text.parse().ok().filter(|position| *position >= 0);
    position.map(Position).ok_or_else(|| bad(format!("{name}={text:.40} is not a position: a number from 0")))
}

fn names(names: &mut Vec<Arc<str>>, value: &str) -> Result<(), Problem> {
    if value.chars().any(char::is_control) {
        return Err(bad(format!("{value:.40?} has a control character, which no category and no type has")));
    }
    names.extend(value.split(',').filter(|name| !name.is_empty()).map(Arc::from));
    if names.len() > NAMES_MAX {
        return Err(bad(format!("there are more than {NAMES_MAX} names")));
    }
    Ok(())
}

impl Selection {
    pub fn has(&self, event: &Recorded) -> bool {
        self.query.matches(event) && self.stream.as_ref().is_none_or(|stream| event.stream == *stream)
    }

    /// Returns at most `limit` selected events after `after`, and the position up to which there are no others. If the
    /// selection names a stream, events after `until` are left out. `known` is the version of an event of that stream
    /// that is not after `after`; the call raises `known` to the last such version that it reads.
    pub async fn page(
        &self,
        store: &dyn EventStore,
        known: &mut Version,
        after: Position,
        until: Position,
        limit: usize,
    ) -> Result<(Vec<Arc<Recorded>>, Position), StoreError> {
        let Some(stream) = &self.stream else {
            let page = store.read_log(&self.query, after, limit).await?;
            return Ok((page.events, page.next));
        };
        let mut found = Vec::new();
        let mut version = *known;
        loop {
            let page = store.read_stream(stream, version, STREAM_PAGE).await?;
            let Some(last) = page.last() else { return Ok((found, until)) };
            version = last.version;
            let is_last = page.len() < STREAM_PAGE;
            for event in page {
                // Later events come through the channel.
                if event.position > until {
                    return Ok((found, until));
                }
                if event.position <= after {
                    *known = event.version;
                } else if !self.has(&event) {
                    if found.is_empty() {
                        *known = event.version;
                    }
                } else {
                    found.push(Arc::new(event));
                    if let Some(last) = found.last().filter(|_| found.len() == limit) {
                        let next = last.position;
                        return Ok((found, next));
                    }
                }
            }
            if is_last {
                return Ok((found, until));
            }
        }
    }
}
