//! Versions are dense and rise with positions, and no id is there twice: for that, all events have to be sorted.

use annals::{Archive, LogQuery, Position, Recorded};

use super::{Faults, place, sorter::Sorter};
use crate::failure::Failure;

pub(super) struct Order {
    /// Stream, position, version.
    streams: Sorter<2>,
    /// Event id, position.
    ids: Sorter<1>,
}

impl Order {
    pub fn new() -> Result<Self, Failure> {
        Ok(Self { streams: Sorter::new()?, ids: Sorter::new()? })
    }

    pub fn event(&mut self, event: &Recorded) -> Result<(), Failure> {
        self.streams.push((stream_key(event.stream.as_str()), [event.position.0, event.version.0]))?;
        self.ids.push((event.id.as_u128(), [event.position.0]))
    }

    pub async fn end(self, archive: &dyn Archive, faults: &mut Faults<'_>) -> Result<(), Failure> {
        for records in self.streams.sorted() {
            let (mut stream, mut next) = (None, 1);
            for (key, [position, version]) in records? {
                if stream != Some(key) {
                    (stream, next) = (Some(key), 1);
                }
                if version != next {
                    let what = match version {
                        missing if missing == next + 1 => format!("version {next} of the stream is missing before it"),
                        missing if missing > next => {
                            format!("versions {next} to {} of the stream are missing before it", missing - 1)
                        }
                        _ => format!("the stream stands at version {} already", next - 1),
                    };
                    faults.add(at(archive, position).await?, what)?;
                }
                next = version.max(next - 1) + 1;
            }
        }
        for records in self.ids.sorted() {
            for pair in records?.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
                let what = format!("its id is that of the event at position {}", pair[0].1[0]);
                faults.add(at(archive, pair[1].1[0]).await?, what)?;
            }
        }
        Ok(())
    }
}

/// What a stream is told by: as good as its name, and always as long.
pub(super) fn stream_key(stream: &str) -> u128 {
    blake3::hash(stream.as_bytes()).as_bytes()[..16].iter().fold(0, |key, byte| key << 8 | u128::from(*byte))
}

/// Where the event of a position is.
pub(super) async fn at(archive: &dyn Archive, position: i64) -> Result<String, Failure> {
    let page = archive.read_log(&LogQuery::all(), Position(position - 1), 1).await?;
    let found = page.events.first().filter(|event| event.position.0 == position);
    Ok(found.map_or_else(|| format!("position {position}"), |event| place(event)))
}
