//! Sorts more records than fit into memory. The records are distributed over files by their keys, so that each single
//! file fits.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
};

use crate::failure::Failure;

/// The number of files. With 64 files, a hundred million records with two numbers each need 50 MB of memory at a time.
const FILES: usize = 64;
const KEY_BYTES: usize = 16;
const NUMBER_BYTES: usize = 8;

/// A key whose last bits are evenly distributed, and numbers.
pub(super) type KeyedRecord<const NUMBERS: usize> = (u128, [i64; NUMBERS]);

/// Collects records in files, and then sorts each file in memory.
pub(super) struct Sorter<const NUMBERS: usize> {
    files: Vec<BufWriter<File>>,
    bytes: Vec<u8>,
}

impl<const NUMBERS: usize> Sorter<NUMBERS> {
    pub fn new() -> Result<Self, Failure> {
        let file = |_| tempfile::tempfile().map(|file| BufWriter::with_capacity(16 << 10, file));
        let files = (0..FILES).map(file).collect::<io::Result<_>>().map_err(Failure::temporary_file)?;
        Ok(Self { files, bytes: Vec::new() })
    }

    pub fn push(&mut self, (key, numbers): KeyedRecord<NUMBERS>) -> Result<(), Failure> {
        self.bytes.clear();
        self.bytes.extend(key.to_be_bytes());
        numbers.iter().for_each(|number| self.bytes.extend(number.to_be_bytes()));
        self.files[(key % FILES as u128) as usize].write_all(&self.bytes).map_err(Failure::temporary_file)
    }

    /// Returns the records of each file, sorted. Records with the same key are in the same file.
    pub fn sorted(self) -> impl Iterator<Item = Result<Vec<KeyedRecord<NUMBERS>>, Failure>> {
        self.files.into_iter().map(|file| read(file).map_err(Failure::temporary_file))
    }
}

fn read<const NUMBERS: usize>(file: BufWriter<File>) -> io::Result<Vec<KeyedRecord<NUMBERS>>> {
    let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.seek(SeekFrom::Start(0))?;
    let mut file = BufReader::new(file);
    let mut records = Vec::new();
    let mut bytes = vec![0; KEY_BYTES + NUMBERS * NUMBER_BYTES];
    loop {
        match file.read_exact(&mut bytes) {
            Ok(()) => records.push(record(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
    }
    records.sort_unstable();
    Ok(records)
}

fn record<const NUMBERS: usize>(bytes: &[u8]) -> KeyedRecord<NUMBERS> {
    let (key, rest) = bytes.split_at(KEY_BYTES);
    let key = key.iter().fold(0, |key, byte| key << 8 | u128::from(*byte));
    let mut numbers = [0; NUMBERS];
    for (number, bytes) in numbers.iter_mut().zip(rest.chunks_exact(NUMBER_BYTES)) {
        *number = bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)).cast_signed();
    }
    (key, numbers)
}
