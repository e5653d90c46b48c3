//! Checks that versions have no gaps and rise with positions, and that ids are unique. Computes the hash chain of each
//! stream. All of this needs the events in sorted order.

use annals::Archive;
use serde::{Deserialize, Serialize};

use super::{
    event::{CheckedEvent, Digest, place_at},
    faults::Faults,
    sorter::Sorter,
};
use crate::failure::Failure;

/// One hash over the chains of all streams: the key of each stream, its number of events, and the state of its chain.
/// The state of a chain is the hash of its previous state and of the next event.
struct Chains {
    until: i64,
    all: blake3::Hasher,
    streams: i64,
}

impl Chains {
    fn new(until: i64) -> Self {
        Self { until, all: blake3::Hasher::new(), streams: 0 }
    }

    fn stream(&mut self, key: u128, (events, chain): (i64, Digest)) {
        if events > 0 {
            self.all.update(&key.to_be_bytes()).update(&events.to_be_bytes()).update(&chain);
            self.streams += 1;
        }
    }

    fn end(self) -> Chained {
        let hash = self.all.finalize().to_hex().to_string();
        Chained { until: self.until, streams: self.streams, hash }
    }
}

/// The state of the chains of all streams.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Chained {
    /// The chains cover the events up to this position.
    pub until: i64,
    pub streams: i64,
    pub hash: String,
}

pub(super) struct Order {
    /// Each record holds the stream, position, version and digest of an event.
    streams: Sorter<6>,
    /// Each record holds the id and position of an event.
    ids: Sorter<1>,
}

impl Order {
    pub fn new() -> Result<Self, Failure> {
        Ok(Self { streams: Sorter::new()?, ids: Sorter::new()? })
    }

    pub fn event(&mut self, event: &CheckedEvent) -> Result<(), Failure> {
        let [a, b, c, d] = words(&event.digest);
        self.streams.push((event.key, [event.position, event.version, a, b, c, d]))?;
        self.ids.push((event.id.as_u128(), [event.position]))
    }

    /// Returns the state of all chains at each of these positions.
    pub async fn end(
        self,
        archive: &dyn Archive,
        faults: &mut Faults<'_>,
        (before, now): (i64, i64),
    ) -> Result<[Chained; 2], Failure> {
        let mut chains = [Chains::new(before), Chains::new(now)];
        for records in self.streams.sorted() {
            let mut stream = None;
            let mut next = 1;
            let mut stands = [(0, Digest::default()); 2];
            for (key, [position, version, digest @ ..]) in records? {
                if stream != Some(key) {
                    if let Some(ended) = stream {
                        chains.iter_mut().zip(stands).for_each(|(chains, stands)| chains.stream(ended, stands));
                    }
                    (stream, next, stands) = (Some(key), 1, Default::default());
                }
                for (chains, stands) in chains.iter().zip(&mut stands) {
                    if position <= chains.until {
                        let mut hasher = blake3::Hasher::new();
                        *stands =
                            (stands.0 + 1, *hasher.update(&stands.1).update(&bytes(digest)).finalize().as_bytes());
                    }
                }
                if version != next {
                    let what = match version {
                        missing if missing == next + 1 => {
                            format!("version {next} of the stream is missing before this event")
                        }
                        missing if missing > next => {
                            format!("versions {next} to {} of the stream are missing before this event", missing - 1)
                        }
                        _ => format!("the stream is already at version {}", next - 1),
                    };
                    faults.add(place_at(archive, position).await?, what)?;
                }
                next = version.max(next - 1) + 1;
            }
            if let Some(ended) = stream {
                chains.iter_mut().zip(stands).for_each(|(chains, stands)| chains.stream(ended, stands));
            }
        }
        for records in self.ids.sorted() {
            for pair in records?.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
                let what = format!("the event at position {} has the same id", pair[0].1[0]);
                faults.add(place_at(archive, pair[1].1[0]).await?, what)?;
            }
        }
        Ok(chains.map(Chains::end))
    }
}

fn words(digest: &Digest) -> [i64; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(digest.chunks_exact(8)) {
        *word = bytes.iter().fold(0_u64, |word, byte| word << 8 | u64::from(*byte)).cast_signed();
    }
    words
}

fn bytes(words: [i64; 4]) -> Digest {
    let mut digest = Digest::default();
    for (bytes, word) in digest.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    digest
}
