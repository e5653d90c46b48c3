//! The key of a stream.

/// Returns the key of a stream, which is as unique as the stream's name but has a fixed length.
pub(crate) fn stream_key(stream: &str) -> u128 {
    blake3::hash(stream.as_bytes()).as_bytes()[..16].iter().fold(0, |key, byte| key << 8 | u128::from(*byte))
}
