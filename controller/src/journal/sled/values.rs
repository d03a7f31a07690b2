//! Records as sled's values.
//!
//! ```text
//! a key for each record    hash (32 bytes), payload
//! bundles                  size of what follows when it is unpacked (4 bytes, big-endian), and LZ4 of:
//!                          length of the payload (4 bytes, big-endian), hash, payload; and so on
//! ```
//!
//! A bundle's key has the number of its first record. sled writes a value about three times until
//! its leaf is full; records of one moment are alike, and take a third of their bytes when packed.

use std::borrow::Cow;

use lz4_flex::block;

use super::super::{Head, Layout, MAX_PAYLOAD};

/// The bytes of a length and a hash.
const FRONT: usize = 4 + 32;

/// A bundle is no larger than the largest record alone, before it is packed.
const LARGEST: usize = FRONT + MAX_PAYLOAD;

/// A value that ends within a record, or cannot be unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CutShort;

/// The values of records that are appended together, each with the number of its first record.
pub(super) fn values<P: AsRef<[u8]>>(
    layout: Layout,
    heads: &[Head],
    payloads: &[P],
) -> Vec<(u64, Vec<u8>)> {
    let records = heads.iter().zip(payloads.iter().map(AsRef::as_ref));
    match layout {
        Layout::Records => records
            .map(|(head, payload)| (head.number, [&head.hash.0, payload].concat()))
            .collect(),
        Layout::Bundles => bundles(records),
    }
}

fn bundles<'a>(records: impl Iterator<Item = (&'a Head, &'a [u8])>) -> Vec<(u64, Vec<u8>)> {
    let mut packed = vec![];
    let mut first = 0;
    let mut bundle: Vec<u8> = Vec::with_capacity(LARGEST);
    for (head, payload) in records {
        if bundle.len() + FRONT + payload.len() > LARGEST {
            packed.push((first, pack(&bundle)));
            bundle.clear();
        }
        if bundle.is_empty() {
            first = head.number;
        }
        let length = u32::try_from(payload.len()).expect("payloads are small");
        bundle.extend_from_slice(&length.to_be_bytes());
        bundle.extend_from_slice(&head.hash.0);
        bundle.extend_from_slice(payload);
    }
    if !bundle.is_empty() {
        packed.push((first, pack(&bundle)));
    }
    packed
}

fn pack(bundle: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bundle.len()).expect("bundles are small");
    let packed = block::compress(bundle);
    [size.to_be_bytes().as_slice(), &packed].concat()
}

fn unpack(value: &[u8]) -> Option<Vec<u8>> {
    let (size, packed) = value.split_first_chunk()?;
    let size = usize::try_from(u32::from_be_bytes(*size)).ok()?;
    let bundle = (size <= LARGEST).then(|| block::decompress(packed, size))?;
    bundle.ok().filter(|bundle| bundle.len() == size)
}

/// A value as it was read.
#[derive(Debug)]
pub(super) struct Value<'a> {
    layout: Layout,
    unpacked: Result<Cow<'a, [u8]>, CutShort>,
}

impl<'a> Value<'a> {
    /// Unpacks it, if it is packed.
    pub(super) fn of(layout: Layout, value: &'a [u8]) -> Self {
        let unpacked = match layout {
            Layout::Records => Ok(Cow::Borrowed(value)),
            Layout::Bundles => unpack(value).map(Cow::Owned).ok_or(CutShort),
        };
        Self { layout, unpacked }
    }

    /// Whether it could be unpacked.
    pub(super) fn is_readable(&self) -> bool {
        self.unpacked.is_ok()
    }

    /// Hash and payload of each of its records.
    pub(super) fn records(&self) -> Records<'_> {
        Records {
            layout: self.layout,
            rest: Some(self.unpacked.as_deref().map_err(|why| *why)),
        }
    }
}

/// See [`Value::records`].
#[derive(Debug)]
pub(super) struct Records<'a> {
    layout: Layout,
    /// None after the last record, or what is cut short.
    rest: Option<Result<&'a [u8], CutShort>>,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), CutShort>;

    fn next(&mut self) -> Option<Self::Item> {
        let value = self.rest.take()?;
        Some(value.and_then(|value| self.split(value).ok_or(CutShort)))
    }
}

impl<'a> Records<'a> {
    fn split(&mut self, value: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        match self.layout {
            Layout::Records => value.split_at_checked(32),
            Layout::Bundles => {
                let (length, rest) = value.split_first_chunk()?;
                let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
                let (hash, rest) = rest.split_at_checked(32)?;
                let (payload, rest) = rest.split_at_checked(length)?;
                self.rest = (!rest.is_empty()).then_some(Ok(rest));
                Some((hash, payload))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};
    use serde_json::json;

    use super::*;
    use crate::journal::JournalId;

    fn heads(payloads: &[Vec<u8>]) -> Vec<Head> {
        let mut head = JournalId([7; 16]).anchor();
        let next = |payload: &Vec<u8>| {
            head = head.next(payload);
            head
        };
        payloads.iter().map(next).collect()
    }

    #[test]
    fn records_come_out_as_they_went_in() {
        let sizes = [
            1,
            0,
            300,
            5000,
            MAX_PAYLOAD,
            20_000,
            20_000,
            7,
            MAX_PAYLOAD - 37,
            0,
            0,
        ];
        let payloads: Vec<Vec<u8>> = sizes.iter().map(|size| vec![9; *size]).collect();
        let heads = heads(&payloads);
        for (layout, keys) in [
            (Layout::Records, (1..=11).collect::<Vec<u64>>()),
            // As much in each as goes in: the last but one leaves room for one without a byte.
            (Layout::Bundles, vec![1, 5, 6, 7, 9, 11]),
        ] {
            let values = values(layout, &heads, &payloads);
            let found: Vec<u64> = values.iter().map(|(first, _)| *first).collect();
            assert_eq!(found, keys);
            assert!(values.iter().all(|(_, value)| value.len() <= LARGEST));
            let read = values.iter().map(|(_, value)| Value::of(layout, value));
            let read: Vec<Value<'_>> = read.collect();
            let out = read.iter().flat_map(Value::records);
            let out: Vec<_> = out.map(Result::unwrap).collect();
            let expected = heads.iter().zip(&payloads);
            let expected: Vec<_> = expected
                .map(|(head, payload)| (head.hash.0.as_slice(), payload.as_slice()))
                .collect();
            assert!(out == expected, "{layout:?}");
        }
    }

    /// A journal of records is compacted into one of bundles. What cannot be packed grows a little:
    /// sled would put what is over a mebibyte, with up to 16 others, where nobody syncs it.
    #[test]
    fn the_largest_record_fits_into_both_layouts() {
        let mut random = StdRng::seed_from_u64(1);
        let payloads = vec![(0..MAX_PAYLOAD).map(|_| random.random()).collect()];
        let heads = heads(&payloads);
        let size = |layout| values(layout, &heads, &payloads)[0].1.len();
        assert_eq!(size(Layout::Records), 32 << 10);
        assert!(size(Layout::Bundles) < (32 << 10) + 512);
    }

    #[test]
    fn records_of_one_moment_take_less_than_half() {
        let random = &mut StdRng::seed_from_u64(1);
        let mut record = |host: u16| {
            let hash: [u8; 32] = random.random();
            json!({"at": 1_795_370_745_851_u64 + u64::from(host), "record": {"reported": {
                "host": format!("app-{host:05}"),
                "number": 11,
                "body": {"finished": {
                    "key": {
                        "rollout": "ro_0a1b2c3d4e5f", "host": format!("app-{host:05}"), "phase": 3,
                        "step": 0, "direction": "do", "attempt": 1
                    },
                    "outcome": {"ok": {"changed": true, "summary": "stopped in 2.3 s"}},
                    "facts": [],
                    "took": 2341
                }},
                "head": {"journal": "in_0a1b2c3d4e5f6071", "number": 22, "hash": hex::encode(hash)}
            }}})
        };
        let payloads = (0..200).map(|host| record(host).to_string().into_bytes());
        let payloads: Vec<Vec<u8>> = payloads.collect();
        let heads = heads(&payloads);
        let bytes = |layout| -> usize {
            let values = values(layout, &heads, &payloads);
            values.iter().map(|(_, value)| value.len()).sum()
        };
        let (packed, plain) = (bytes(Layout::Bundles), bytes(Layout::Records));
        assert!(packed * 2 < plain, "{packed} of {plain} bytes");
    }

    #[test]
    fn what_is_cut_short_is_said_once() {
        let payloads = vec![vec![1; 10], vec![2; 10]];
        let all = values(Layout::Bundles, &heads(&payloads), &payloads);
        let (_, value) = &all[0];
        for length in 0..value.len() {
            let value = Value::of(Layout::Bundles, &value[..length]);
            let found: Vec<_> = value.records().collect();
            assert_eq!(found, [Err(CutShort)], "{length}");
        }
        // As it would be where it was packed like that.
        let unpacked = unpack(value).unwrap();
        for length in 1..unpacked.len() {
            let value = pack(&unpacked[..length]);
            let value = Value::of(Layout::Bundles, &value);
            let found: Vec<_> = value.records().collect();
            let whole = usize::from(length >= 46);
            // Right after a record nothing is missing that could be told here.
            let cut = usize::from(length != 46);
            assert_eq!(found.len(), whole + cut, "{length}");
            assert_eq!(found.iter().filter(|it| it.is_err()).count(), cut);
        }
    }

    /// Whatever stands there, it takes no more memory than a bundle.
    #[test]
    fn a_size_that_no_bundle_has_is_refused() {
        let payloads = vec![vec![1; 10]];
        let all = values(Layout::Bundles, &heads(&payloads), &payloads);
        let larger = [32_737_u32.to_be_bytes().as_slice(), &vec![1; 32 + 32_737]].concat();
        assert_eq!(larger.len(), LARGEST + 1);
        let value = pack(&larger);
        let value = Value::of(Layout::Bundles, &value);
        assert_eq!(value.records().collect::<Vec<_>>(), [Err(CutShort)]);
        for size in [0, 45, 47, u32::MAX as usize] {
            let mut value = all[0].1.clone();
            value[..4].copy_from_slice(&u32::try_from(size).unwrap().to_be_bytes());
            let value = Value::of(Layout::Bundles, &value);
            assert!(
                value.records().all(|record| record == Err(CutShort)),
                "{size}"
            );
        }
    }
}
