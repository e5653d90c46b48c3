//! Uses Kafka's own protocol to send a record that no client library can send: a record with a header whose name is not
//! UTF-8.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

/// Sends one record to partition 0 without a client library. The name of its one header may be any bytes.
pub fn send(broker: &str, topic: &str, key: &[u8], value: &[u8], header: &[u8]) {
    let mut record = vec![0];
    for number in [0, 0] {
        signed(&mut record, number);
    }
    for bytes in [key, value] {
        signed(&mut record, bytes.len());
        record.extend(bytes);
    }
    signed(&mut record, 1);
    for bytes in [header, b"x"] {
        signed(&mut record, bytes.len());
        record.extend(bytes);
    }
    let now = chrono::Utc::now().timestamp_millis().to_be_bytes();
    // The checksum covers everything from the attributes on.
    let mut checked =
        [&[0; 2][..], &[0; 4], &now, &now, &[0xff; 8], &[0xff; 2], &[0xff; 4], &1i32.to_be_bytes()].concat();
    signed(&mut checked, record.len());
    checked.extend(record);
    let magic = [&[0; 4][..], &[2], &checksum(&checked).to_be_bytes(), &checked].concat();
    let batch = [&[0; 8][..], &(magic.len() as i32).to_be_bytes(), &magic].concat();

    let topic_name = [&(topic.len() as i16).to_be_bytes()[..], topic.as_bytes()].concat();
    let one = 1i32.to_be_bytes();
    let produce_version_7 = [0, 0, 0, 7, 0, 0, 0, 1, 0xff, 0xff];
    let no_transaction = [0xff; 2];
    let all = [0xff; 2];
    let ten_seconds = 10_000i32.to_be_bytes();
    let size = (batch.len() as i32).to_be_bytes();
    let request = [
        &produce_version_7[..],
        &no_transaction,
        &all,
        &ten_seconds,
        &one,
        &topic_name,
        &one,
        &0i32.to_be_bytes(),
        &size,
        &batch,
    ]
    .concat();
    let mut stream = TcpStream::connect(broker).unwrap();
    stream.write_all(&[&(request.len() as i32).to_be_bytes()[..], &request].concat()).unwrap();
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut response = vec![0; i32::from_be_bytes(length) as usize];
    stream.read_exact(&mut response).unwrap();
    let error = 4 + 4 + topic_name.len() + 4 + 4;
    assert_eq!(response[error..error + 2], [0, 0], "the broker refused it: {response:?}");
}

/// Appends a number as a zigzag-encoded variable-length integer.
fn signed(bytes: &mut Vec<u8>, number: usize) {
    let mut rest = number << 1;
    while rest >= 0x80 {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.push(rest as u8);
}

/// Returns the CRC-32C, computed bit by bit.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(sum & 1)))
    })
}
