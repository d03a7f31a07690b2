//! Records as sled's values.
//!
//! ```text
//! a key for each record    hash (32 bytes), payload
//! bundles                  length of the payload (4 bytes, big-endian), hash, payload; and so on
//! ```
//!
//! A bundle's key has the number of its first record.

use super::super::{Head, Layout, MAX_PAYLOAD};

/// The bytes of a length and a hash.
const FRONT: usize = 4 + 32;

/// A bundle is no larger than the largest record alone.
const LARGEST: usize = FRONT + MAX_PAYLOAD;

/// A value that ends within a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CutShort;

/// The values of records that are appended together, each with the number of its first record.
pub(super) fn values<P: AsRef<[u8]>>(
    layout: Layout,
    heads: &[Head],
    payloads: &[P],
) -> Vec<(u64, Vec<u8>)> {
    let mut values: Vec<(u64, Vec<u8>)> = Vec::new();
    for (head, payload) in heads.iter().zip(payloads) {
        let payload = payload.as_ref();
        match layout {
            Layout::Records => {
                let value = [head.hash.0.as_slice(), payload].concat();
                values.push((head.number, value));
            }
            Layout::Bundles => {
                let size = FRONT + payload.len();
                let has_room = |(_, value): &(u64, Vec<u8>)| value.len() + size <= LARGEST;
                if !values.last().is_some_and(has_room) {
                    values.push((head.number, Vec::new()));
                }
                if let Some((_, value)) = values.last_mut() {
                    let length = u32::try_from(payload.len()).expect("payloads are small");
                    value.extend_from_slice(&length.to_be_bytes());
                    value.extend_from_slice(&head.hash.0);
                    value.extend_from_slice(payload);
                }
            }
        }
    }
    values
}

/// Hash and payload of each record of a value.
pub(super) fn records(layout: Layout, value: &[u8]) -> Records<'_> {
    Records {
        layout,
        rest: Some(value),
    }
}

/// See [`records`].
#[derive(Debug)]
pub(super) struct Records<'a> {
    layout: Layout,
    /// None after the last record, or what is cut short.
    rest: Option<&'a [u8]>,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), CutShort>;

    fn next(&mut self) -> Option<Self::Item> {
        let value = self.rest.take()?;
        Some(self.split(value).ok_or(CutShort))
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
                self.rest = Some(rest).filter(|rest| !rest.is_empty());
                Some((hash, payload))
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
            let out: Vec<_> = values
                .iter()
                .flat_map(|(_, value)| records(layout, value).map(Result::unwrap))
                .collect();
            let expected = heads.iter().zip(&payloads);
            let expected: Vec<_> = expected
                .map(|(head, payload)| (head.hash.0.as_slice(), payload.as_slice()))
                .collect();
            assert!(out == expected, "{layout:?}");
        }
    }

    /// A journal of records is compacted into one of bundles.
    #[test]
    fn the_largest_record_is_the_same_in_both_layouts() {
        let payloads = vec![vec![9; MAX_PAYLOAD]];
        let heads = heads(&payloads);
        let size = |layout| values(layout, &heads, &payloads)[0].1.len();
        assert_eq!(size(Layout::Records), 32 << 10);
        assert_eq!(size(Layout::Bundles), LARGEST);
    }

    #[test]
    fn what_is_cut_short_is_said_once() {
        let payloads = vec![vec![1; 10], vec![2; 10]];
        let all = values(Layout::Bundles, &heads(&payloads), &payloads);
        let (_, value) = &all[0];
        for length in 0..value.len() {
            let found: Vec<_> = records(Layout::Bundles, &value[..length]).collect();
            let whole = usize::from(length >= 46);
            // Right after a record nothing is missing that could be told here.
            let cut = usize::from(length != 46);
            assert_eq!(found.len(), whole + cut, "{length}");
            assert_eq!(found.iter().filter(|it| it.is_err()).count(), cut);
        }
    }
}
