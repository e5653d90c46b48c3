//! Deduplication of messages. For each relay, marks record the position up to which its messages have arrived. With
//! these marks, a consumer recognises repeated messages.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::bus::Message;

/// The maximum number of relay lanes for which a partition keeps marks. Messages of any other lanes are not
/// deduplicated, and are handled every time they arrive.
const RELAYS_MAX: usize = 256;
/// The source and lane that represent all lanes from which no message has arrived yet. No message has an empty source.
const UNKNOWN: &str = "";
/// The maximum number of runs (ranges of positions without a gap) that are kept per lane. If there are more runs,
/// messages that were lost in the oldest gap count as handled.
const RUNS_MAX: usize = 32;

/// The marks of one partition.
///
/// A relay sends the messages of each of its lanes in log order. After a crash, the relay starts again at its
/// checkpoint. Therefore, once a message has arrived, all messages of the same lane with lower positions have arrived
/// too, even if the relay was restarted several times. If a message has a lower position than an earlier message, it is
/// a repetition.
///
/// This is no longer true after a topic was wiped, because messages that had not arrived yet are lost. The next message
/// then starts a new run. If a relay was reset to an earlier position and sends a message from the gap between the two
/// runs again, that message counts as new.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Deduplication(BTreeMap<Arc<str>, BTreeMap<Arc<str>, HighWater>>);

/// The progress of one relay lane of one service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct HighWater {
    #[serde(flatten)]
    last: Run,
    /// The earlier runs, in order. Each run ends below the start of the next run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier: Vec<Run>,
    /// Whether messages may be missing after the last run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    interrupted: bool,
}

/// A run: a range of positions whose messages have arrived without a gap.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Run {
    /// The first position; 0 for the start of the log.
    #[serde(default, skip_serializing_if = "is_zero")]
    start: i64,
    /// The last position.
    position: i64,
    /// The ids of the messages received at the last position. There may be several ids, because one event of a saga may
    /// cause several commands.
    ids: Vec<Uuid>,
}

impl HighWater {
    fn pass(&mut self, position: i64, id: Uuid) -> bool {
        if position > self.last.position && self.interrupted {
            let next = Run { start: position, position, ids: Vec::new() };
            self.earlier.push(std::mem::replace(&mut self.last, next));
            self.interrupted = false;
            if self.earlier.len() == RUNS_MAX {
                let oldest = self.earlier.remove(0);
                self.earlier[0].start = oldest.start;
            }
        }
        // Finds the last run that starts at or before this position. A position after the end of this run lies in the
        // gap after the run, or after all runs.
        let mut runs = self.earlier.iter_mut().chain([&mut self.last]).rev();
        let Some(run) = runs.find(|run| run.start <= position) else { return true };
        if position < run.position || (position == run.position && run.ids.contains(&id)) {
            return false;
        }
        if position > run.position {
            run.position = position;
            run.ids.clear();
        }
        run.ids.push(id);
        true
    }
}

impl Deduplication {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Marks a gap after the topic was wiped or messages were removed. Before the next message of each lane, messages
    /// may be missing. This also applies to lanes from which no message has arrived yet.
    pub(crate) fn interrupt(&mut self) {
        self.0.entry(UNKNOWN.into()).or_default().entry(UNKNOWN.into()).or_default();
        self.0.values_mut().flat_map(BTreeMap::values_mut).for_each(|mark| mark.interrupted = true);
    }

    /// Records a message and returns whether the message is new. Messages without a lane, which no relay sent or which
    /// were redriven, always count as new.
    pub(crate) fn pass(&mut self, message: &Message) -> bool {
        let Some(lane) = &message.lane else { return true };
        let position = message.position.0;
        let known = self.0.get_mut(&message.source).and_then(|lanes| lanes.get_mut(lane));
        if let Some(mark) = known {
            return mark.pass(position, message.id);
        }
        if self.0.values().map(BTreeMap::len).sum::<usize>() < RELAYS_MAX {
            let interrupted = self.0.contains_key(UNKNOWN);
            let mut mark = HighWater { interrupted, ..HighWater::default() };
            mark.pass(position, message.id);
            self.0.entry(message.source.clone()).or_default().insert(lane.clone(), mark);
        }
        true
    }
}

pub(crate) fn is_zero(number: &i64) -> bool {
    *number == 0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
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
    fn messages_that_a_relay_sent_twice_are_recognized() {
        let mut marks = Deduplication::default();
        let sent = |source: &str, lane: Option<u32>, position, id: u128| {
            let mut message = message();
            (message.source, message.lane, message.position) =
                (source.into(), lane.map(|lane| lane.to_string().into()), Position(position));
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

    #[test]
    fn messages_lost_before_the_first_of_their_lane_are_new_once() {
        let mut marks = Deduplication::default();
        marks.interrupt();
        let mut pass = |position: i64| {
            let lane = Some("0".into());
            marks.pass(&Message {
                lane,
                position: Position(position),
                id: Uuid::from_u128(position as u128),
                ..message()
            })
        };
        // The messages at positions 3 and 4 were removed before the message at position 5 arrived. Then the relay is
        // reset to an earlier position.
        assert_eq!([5, 3, 4, 5, 6].map(&mut pass), [true, true, true, false, true]);
        assert_eq!([3, 4, 5, 6].map(pass), [false; 4], "sent again, they are known");
    }

    #[test]
    fn messages_lost_with_a_topic_are_new_when_sent_again() {
        let mut marks = Deduplication::default();
        let pass = |marks: &mut Deduplication, positions: &[i64]| {
            let sent = |position: &i64| {
                let mut message = message();
                (message.lane, message.position, message.id) =
                    (Some("0".into()), Position(*position), Uuid::from_u128(*position as u128));
                message
            };
            positions.iter().map(|position| marks.pass(&sent(position))).collect::<Vec<_>>()
        };
        assert_eq!(pass(&mut marks, &[1, 3]), [true, true]);
        // The messages at positions 5 and 6 were still in the topic when the topic was wiped.
        marks.interrupt();
        assert_eq!(pass(&mut marks, &[3, 7, 9]), [false, true, true]);
        let stored = serde_json::to_string(&marks).unwrap();
        let mut marks: Deduplication = serde_json::from_str(&stored).unwrap();
        assert_eq!(
            pass(&mut marks, &[1, 3, 5, 6, 7, 9, 11]),
            [false, false, true, true, false, false, true],
            "the log once more: {stored}"
        );
        assert_eq!(pass(&mut marks, &[5, 6, 9, 11]), [false; 4]);
        for interruption in 1..100 {
            marks.interrupt();
            assert_eq!(pass(&mut marks, &[20 * interruption, 20 * interruption]), [true, false]);
        }
        assert_eq!(
            pass(&mut marks, &[21, 1_970, 1_970, 1_980]),
            [false, true, false, false],
            "of the latest gaps only"
        );
        assert!(serde_json::to_string(&marks).unwrap().len() < 10_000);
    }
}
