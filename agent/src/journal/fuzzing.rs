//! For fuzzers: what must hold of a journal's bytes, whoever wrote them.

use super::head::{self, SLOT};
use super::{Hash, Link, MAX_RECORD, Record, Scan, ScanError, genesis, push_frame};

/// The bytes of a journal, or of a slot of its head file. A text that begins with `{` or `+` stands
/// for records, one in JSON on each line, that are chained as whoever can write the file can chain
/// them; a line that begins with `+` was appended together with the next one.
pub fn journal(bytes: &[u8]) {
    match bytes.first() {
        Some(b'{' | b'+') => records(bytes),
        Some(b'L') => slot(bytes),
        _ => file(bytes),
    }
}

fn records(lines: &[u8]) {
    let (mut bytes, mut hash) = (vec![], genesis());
    for (line, number) in lines.split(|byte| *byte == b'\n').zip(1..) {
        let (payload, more) = match line {
            [b'+', payload @ ..] => (payload, true),
            payload => (payload, false),
        };
        if payload.len() > MAX_RECORD {
            return;
        }
        hash = push_frame(&mut bytes, hash, number, payload, more);
    }
    file(&bytes);
}

fn file(bytes: &[u8]) {
    let records = scan(bytes);
    let Some((last, _)) = records.last() else {
        return;
    };
    // INV-11: one changed byte, and the record with it is none any more.
    let place = usize::from(last.hash[0]) << 8 | usize::from(last.hash[1]);
    let place = place % usize::try_from(last.position.0).unwrap_or(1).max(1);
    let mut changed = bytes.to_vec();
    changed[place] ^= 1 << (last.hash[2] & 7);
    assert!(scan(&changed).len() < records.len(), "byte {place}");

    // What a record says does not change by being written again.
    let (mut again, mut hash) = (vec![], genesis());
    for (link, record) in &records {
        let payload = serde_json::to_vec(record).expect("a record can be written");
        hash = push_frame(&mut again, hash, link.number, &payload, false);
        if payload.len() > MAX_RECORD {
            return;
        }
    }
    let read = scan(&again);
    assert_eq!(read.len(), records.len());
    for ((_, read), (_, written)) in read.iter().zip(&records) {
        assert_eq!(read, written);
    }
    crate::exec::fold_fuzzed(&records);
}

fn scan(bytes: &[u8]) -> Vec<(Link, Record)> {
    let mut records: Vec<(Link, Record)> = vec![];
    let scan = Scan::run(bytes, None, &mut |link, record| {
        records.push((link, record));
    });
    match scan {
        Ok(scan) => {
            let whole: Option<(u64, Hash)> = records.last().map(|(it, _)| (it.number, it.hash));
            assert_eq!(
                whole.unwrap_or_else(|| (0, genesis())),
                (scan.number, scan.hash)
            );
            assert!(usize::try_from(scan.length).expect("a length") <= bytes.len());
        }
        Err(ScanError::Newer(..)) => {}
        Err(ScanError::Io(error)) => unreachable!("memory can be read: {error}"),
    }
    records
}

fn slot(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<SLOT>() else {
        return;
    };
    // With the checksum that the content asks for, as whoever can write the file can make it.
    let (number, hash) = (&bytes[8..16], &bytes[16..48]);
    let number = u64::from_le_bytes(number.try_into().expect("8 bytes"));
    let hash: Hash = hash.try_into().expect("32 bytes");
    let whole = head::encode(number, hash);
    let whole = whole.first_chunk::<SLOT>().expect("a slot");
    assert_eq!(head::decode(whole), Some((number, hash)));
    assert_eq!(head::decode(bytes).is_some(), bytes == whole);
}
