//! For fuzzers: what must hold of a journal's head and of exports, whoever wrote them. For whoever
//! counts: batches.

use super::offline::{Records, read_export, verify_export};
use super::{Head, JournalId, Layout, chain, head, sled};

/// A slot of a head file: one that is read is the one that would be written.
pub fn head_slot(bytes: &[u8]) {
    head::fuzz(bytes);
}

/// An export, or an archive, that is held against the journal and the head that it names itself.
pub fn export(bytes: &[u8]) {
    let Ok(records) = read_export(&mut &bytes[..]) else {
        return;
    };
    let named: (JournalId, Head) = (records.id, records.head);
    let Ok(_before) = verify_export(&mut &bytes[..], named.0, named.1) else {
        return;
    };
    let last = records
        .payloads
        .iter()
        .fold(records.base, |at, payload| at.next(payload));
    assert_eq!(last, records.head);
    // Written again it says the same.
    let mut text = vec![];
    records.write(&mut text).expect("memory can be written");
    let again = read_export(&mut &text[..]).expect("it was just written");
    assert_eq!(again.payloads, records.payloads);
    assert_eq!(
        (again.id, again.base, again.head),
        (records.id, records.base, records.head)
    );
    assert!(verify_export(&mut &text[..], records.id, records.head).is_ok());
    for payload in &records.payloads {
        let mut other = records.payloads.clone();
        other.retain(|it| it != payload);
        let last = other
            .iter()
            .fold(records.base, |at, payload| at.next(payload));
        assert!(
            last.hash != records.head.hash,
            "a record that is cut out is missed"
        );
    }
}

/// An export of these payloads, for seeds.
pub fn export_of(payloads: &[Vec<u8>]) -> Vec<u8> {
    let id = JournalId([7; 16]);
    let base = id.anchor();
    let records = Records {
        id,
        base,
        head: payloads.iter().fold(base, |at, payload| at.next(payload)),
        payloads: payloads.to_vec(),
        entries: vec![],
    };
    let mut text = vec![];
    records.write(&mut text).expect("memory can be written");
    text
}

/// Batches of a journal that is new.
#[derive(Debug)]
pub struct Batches(Head);

impl Default for Batches {
    fn default() -> Self {
        Self(JournalId([7; 16]).anchor())
    }
}

impl Batches {
    /// Chains payloads to the one before, and makes of them what the store takes.
    pub fn make(&mut self, payloads: &[Vec<u8>]) {
        let heads = chain(self.0, payloads).expect("they are small");
        self.0 = heads.last().copied().unwrap_or(self.0);
        std::hint::black_box(sled::batch(Layout::Bundles, &heads, payloads));
    }
}
