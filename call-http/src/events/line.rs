//! An event as clients get it.

use std::sync::Arc;

use annals::{Position, Recorded, archive::line::write_line};

/// An event as a line of JSON, without its line break.
#[derive(Debug)]
pub(super) struct Line {
    pub position: Position,
    pub type_name: Arc<str>,
    pub json: String,
}

impl Line {
    pub fn of(event: &Recorded) -> Arc<Self> {
        let mut line = Vec::with_capacity(event.data.len() + 400);
        write_line(&event.into(), false, &mut line);
        line.pop();
        let json = String::from_utf8(line).unwrap_or_default();
        Arc::new(Self { position: event.position, type_name: event.type_name.clone(), json })
    }
}
