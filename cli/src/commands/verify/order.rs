//! Versions are dense and rise with positions, no id is there twice, and each stream has its chain of hashes: for that, all
//! events have to be sorted. They are spread over files by what they are sorted by, so that one after the other fits into
//! memory.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
};

use annals::{Archive, LogQuery, Position};
use serde::{Deserialize, Serialize};

use super::{Event, Faults, place, seal::Digest};
use crate::failure::Failure;

/// A hundred million events take 100 MB at a time.
const FILES: usize = 64;
const RECORD_BYTES: usize = 64;

/// What is kept of an event: a key, two numbers, its hash.
type Record = (u128, i64, i64, Digest);

/// Records that are sorted file by file.
struct Sorter {
    files: Vec<BufWriter<File>>,
}

impl Sorter {
    fn new() -> io::Result<Self> {
        let file = |_| tempfile::tempfile().map(|file| BufWriter::with_capacity(16 << 10, file));
        (0..FILES).map(file).collect::<io::Result<_>>().map(|files| Self { files })
    }

    fn push(&mut self, (key, first, second, digest): Record) -> io::Result<()> {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..16].copy_from_slice(&key.to_be_bytes());
        bytes[16..24].copy_from_slice(&first.to_be_bytes());
        bytes[24..32].copy_from_slice(&second.to_be_bytes());
        bytes[32..].copy_from_slice(&digest);
        // By its last bits, which are as good as random in both kinds of key.
        self.files[(key % FILES as u128) as usize].write_all(&bytes)
    }

    /// The records of each file, sorted.
    fn sorted(self) -> impl Iterator<Item = io::Result<Vec<Record>>> {
        self.files.into_iter().map(|file| {
            let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.seek(SeekFrom::Start(0))?;
            let (mut file, mut records, mut bytes) = (BufReader::new(file), Vec::new(), [0; RECORD_BYTES]);
            loop {
                match file.read_exact(&mut bytes) {
                    Ok(()) => records.push(record(&bytes)),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                    Err(error) => return Err(error),
                }
            }
            records.sort_unstable();
            Ok(records)
        })
    }
}

fn record(bytes: &[u8; RECORD_BYTES]) -> Record {
    let number = |at: usize| bytes[at..at + 8].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let key = u128::from(number(0)) << 64 | u128::from(number(8));
    let mut digest = Digest::default();
    digest.copy_from_slice(&bytes[32..]);
    (key, number(16).cast_signed(), number(24).cast_signed(), digest)
}

/// The chains of all streams, in one hash: of each stream's key, how many events it has, and where its chain stands. A chain
/// stands at the hash of where it stood before and of the event.
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

/// Where the chains of all streams stand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Chained {
    /// With the events up to this position.
    pub until: i64,
    pub streams: i64,
    pub hash: String,
}

pub(super) struct Order {
    /// Stream, position, version.
    streams: Sorter,
    /// Event id, position.
    ids: Sorter,
}

impl Order {
    pub fn new() -> Result<Self, Failure> {
        let sorters = || Ok(Self { streams: Sorter::new()?, ids: Sorter::new()? });
        sorters().map_err(|error: io::Error| no_room(&error))
    }

    pub fn event(&mut self, event: &Event) -> Result<(), Failure> {
        let version = (event.key, event.position, event.version, event.digest);
        let id = (event.id.as_u128(), event.position, 0, Digest::default());
        self.streams.push(version).and_then(|()| self.ids.push(id)).map_err(|error| no_room(&error))
    }

    /// Gives where the chains of all streams stand with the events up to each of these positions.
    pub async fn end(
        self,
        archive: &dyn Archive,
        faults: &mut Faults<'_>,
        (before, now): (i64, i64),
    ) -> Result<[Chained; 2], Failure> {
        let mut chains = [Chains::new(before), Chains::new(now)];
        for records in self.streams.sorted() {
            let (mut stream, mut next) = (None, 1);
            let mut stands = [(0, Digest::default()); 2];
            for (key, position, version, digest) in records.map_err(|error| no_room(&error))? {
                if stream != Some(key) {
                    if let Some(ended) = stream {
                        chains.iter_mut().zip(stands).for_each(|(chains, stands)| chains.stream(ended, stands));
                    }
                    (stream, next, stands) = (Some(key), 1, Default::default());
                }
                for (chains, stands) in chains.iter().zip(&mut stands) {
                    if position <= chains.until {
                        let mut hasher = blake3::Hasher::new();
                        *stands = (stands.0 + 1, *hasher.update(&stands.1).update(&digest).finalize().as_bytes());
                    }
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
            if let Some(ended) = stream {
                chains.iter_mut().zip(stands).for_each(|(chains, stands)| chains.stream(ended, stands));
            }
        }
        for records in self.ids.sorted() {
            let records = records.map_err(|error| no_room(&error))?;
            for pair in records.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
                let what = format!("its id is that of the event at position {}", pair[0].1);
                faults.add(at(archive, pair[1].1).await?, what)?;
            }
        }
        Ok(chains.map(Chains::end))
    }
}

/// What a stream is told by: as good as its name, and always as long.
pub(crate) fn stream_key(stream: &str) -> u128 {
    blake3::hash(stream.as_bytes()).as_bytes()[..16].iter().fold(0, |key, byte| key << 8 | u128::from(*byte))
}

async fn at(archive: &dyn Archive, position: i64) -> Result<String, Failure> {
    let page = archive.read_log(&LogQuery::all(), Position(position - 1), 1).await?;
    let found = page.events.first().filter(|event| event.position.0 == position);
    Ok(found.map_or_else(|| format!("position {position}"), |event| place(event)))
}

fn no_room(error: &io::Error) -> Failure {
    Failure::new(format!("temporary files cannot be used (TMPDIR says where they are): {error}"))
}
