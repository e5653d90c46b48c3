//! How far the messages of each relay have come, by which those that it sent twice are known.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::bus::Message;

/// Relays that a partition keeps marks of. Messages of more than these are handled as often as they arrive.
const RELAYS_MAX: usize = 256;

/// The marks of one partition.
///
/// A relay sends what its lane of the log says, in log order, and after a crash once more from its checkpoint on. So
/// whatever several runs of it have sent, up to the highest position that arrived there is nothing missing, and what
/// comes with a lower one has been here before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Marks(BTreeMap<Arc<str>, BTreeMap<u32, Mark>>);

/// Where one lane of one service has come to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Mark {
    position: i64,
    /// What arrived of that position: an event of a saga may lead to several commands.
    ids: Vec<Uuid>,
}

impl Marks {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Notes a message; whether it is new. One that no relay sent, or that was redriven, always is.
    pub(crate) fn pass(&mut self, message: &Message) -> bool {
        let Some(lane) = message.lane else { return true };
        let position = message.position.0;
        let known = self.0.get_mut(&message.source).and_then(|lanes| lanes.get_mut(&lane));
        if let Some(mark) = known {
            if position < mark.position || (position == mark.position && mark.ids.contains(&message.id)) {
                return false;
            }
            if position > mark.position {
                mark.position = position;
                mark.ids.clear();
            }
            mark.ids.push(message.id);
        } else if self.0.values().map(BTreeMap::len).sum::<usize>() < RELAYS_MAX {
            let mark = Mark { position, ids: vec![message.id] };
            self.0.entry(message.source.clone()).or_default().insert(lane, mark);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Metadata, Position, Version};

    fn message() -> Message {
        Message {
            id: Uuid::nil(),
            type_name: "order.placed".into(),
            schema_version: 1,
            source: "order".into(),
            subject: "order-1".into(),
            key: "order-1".into(),
            data: "{}".into(),
            metadata: Metadata::default(),
            time: chrono::DateTime::UNIX_EPOCH,
            position: Position::START,
            version: Version::START,
            lane: None,
            extensions: BTreeMap::new(),
        }
    }

    #[test]
    fn what_a_relay_sent_twice_is_known() {
        let mut marks = Marks::default();
        let sent = |source: &str, lane, position, id: u128| {
            let mut message = message();
            (message.source, message.lane, message.position) = (source.into(), lane, Position(position));
            message.id = Uuid::from_u128(id);
            message
        };
        assert!(marks.pass(&sent("order", Some(0), 5, 1)));
        assert!(marks.pass(&sent("order", Some(0), 5, 2)), "a second command of the same event");
        assert!(!marks.pass(&sent("order", Some(0), 5, 2)));
        assert!(marks.pass(&sent("order", Some(0), 7, 3)));
        assert!(!marks.pass(&sent("order", Some(0), 5, 1)));
        assert!(marks.pass(&sent("order", Some(1), 5, 1)), "another lane");
        assert!(marks.pass(&sent("payment", Some(0), 5, 1)), "another service");
        assert!(marks.pass(&sent("order", None, 1, 9)), "redriven");
    }
}
