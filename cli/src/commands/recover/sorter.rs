//! Sorts messages by position: in memory, and in temporary files once there are many.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Seek, SeekFrom, Write},
};

use annals::archive::{
    Stored,
    line::{EventLine, write_line},
};
use uuid::Uuid;

use crate::failure::Failure;

/// The maximum number of bytes held in memory before they are moved to a file.
const MEMORY_BYTES: usize = 64 << 20;
/// The memory that an event takes in addition to its strings.
const EVENT_BYTES: usize = 200;

/// A message that a service sent, with what the message says about its event.
pub(super) struct SentMessage {
    pub position: i64,
    /// The id of the message. A message that carries an event has the id of the event. A command has an id of its own.
    pub id: Uuid,
    pub causation: Uuid,
    /// The event itself, if the message carries it. A saga's command does not carry its event.
    pub event: Option<Stored<'static>>,
    /// The topic, partition and offset of the message, for people.
    pub place: String,
}

/// Accepts messages in any order.
#[derive(Default)]
pub(super) struct MessageSorter {
    held: Vec<SentMessage>,
    bytes: usize,
    files: Vec<BufReader<File>>,
}

impl MessageSorter {
    pub fn push(&mut self, sent: SentMessage) -> Result<(), Failure> {
        let texts = sent.event.as_ref().map_or(0, |event| event.data.len() + event.metadata.len() + event.stream.len());
        self.bytes += EVENT_BYTES + texts;
        self.held.push(sent);
        if self.bytes < MEMORY_BYTES {
            return Ok(());
        }
        self.spill().map_err(Failure::temporary_file)
    }

    fn spill(&mut self) -> io::Result<()> {
        let mut file = BufWriter::new(tempfile::tempfile()?);
        sort(&mut self.held);
        let mut line = Vec::new();
        for SentMessage { position, id, causation, event, place } in self.held.drain(..) {
            line.clear();
            writeln!(line, "{}", serde_json::to_string(&(position, id, causation, event.is_some(), place))?)?;
            if let Some(event) = event {
                write_line(&event, false, &mut line);
            }
            file.write_all(&line)?;
        }
        let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        self.files.push(BufReader::new(file));
        self.bytes = 0;
        Ok(())
    }

    /// Returns all messages in order.
    pub fn sorted(mut self) -> Result<SortedMessages, Failure> {
        sort(&mut self.held);
        let mut sorted = SortedMessages { held: self.held.into_iter(), files: self.files, next: BinaryHeap::new() };
        for source in 0..=sorted.files.len() {
            sorted.advance(source)?;
        }
        Ok(sorted)
    }
}

fn sort(sent: &mut [SentMessage]) {
    sent.sort_by_key(|sent| (sent.position, sent.id));
}

/// All messages, sorted by position and id.
pub(super) struct SortedMessages {
    held: std::vec::IntoIter<SentMessage>,
    files: Vec<BufReader<File>>,
    next: BinaryHeap<Reverse<NextMessage>>,
}

/// The first message of a source that [`SortedMessages::next`] has not yet returned.
struct NextMessage {
    source: usize,
    sent: SentMessage,
}

impl SortedMessages {
    pub fn next(&mut self) -> Result<Option<SentMessage>, Failure> {
        let Some(Reverse(NextMessage { source, sent })) = self.next.pop() else { return Ok(None) };
        self.advance(source)?;
        Ok(Some(sent))
    }

    fn advance(&mut self, source: usize) -> Result<(), Failure> {
        let sent = match source.checked_sub(1) {
            None => self.held.next(),
            Some(file) => read(&mut self.files[file])?,
        };
        self.next.extend(sent.map(|sent| Reverse(NextMessage { source, sent })));
        Ok(())
    }
}

fn read(file: &mut BufReader<File>) -> Result<Option<SentMessage>, Failure> {
    let mut line = String::new();
    if file.read_line(&mut line).map_err(Failure::temporary_file)? == 0 {
        return Ok(None);
    }
    let (position, id, causation, has_event, place) = serde_json::from_str(&line)?;
    let mut event = None;
    if has_event {
        line.clear();
        file.read_line(&mut line).map_err(Failure::temporary_file)?;
        let read: EventLine<'_> = serde_json::from_str(&line)?;
        event = Some(read.stored().map_err(Failure::new)?.into_owned());
    }
    Ok(Some(SentMessage { position, id, causation, event, place }))
}

impl PartialEq for NextMessage {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for NextMessage {}

impl PartialOrd for NextMessage {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for NextMessage {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.sent.position, self.sent.id).cmp(&(other.sent.position, other.sent.id))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn messages_in_files_and_memory_are_sorted_together() {
        let mut sorter = MessageSorter::default();
        for position in [5, 3, 9, 1, 7, 2, 8, 4, 6] {
            sorter
                .push(SentMessage {
                    position,
                    id: Uuid::from_u128(position as u128),
                    causation: Uuid::nil(),
                    event: None,
                    place: format!("offset {position}"),
                })
                .unwrap();
            if position % 3 == 0 {
                sorter.spill().unwrap();
            }
        }
        let mut sorted = sorter.sorted().unwrap();
        let mut positions = Vec::new();
        while let Some(sent) = sorted.next().unwrap() {
            assert_eq!(sent.place, format!("offset {}", sent.position));
            positions.push(sent.position);
        }
        assert_eq!(positions, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }
}
