//! A journal as auditors read it: with what is in its archives, held against what agents were told
//! of it, and with what it says of theirs.

use std::path::Path;

use lockstep_core::{Entry, Record};
use lockstep_proto::witness::{self, Account, Judgement, Witness};

use super::archive::{self, ArchiveState};
use super::offline::{ExportError, Offline};
use super::{Head, JournalId, OpenError};

/// Who witnesses for agents.
const CONTROLLER: &str = "controller";

/// All that can be read of a journal that is whole.
#[derive(Debug)]
pub(crate) struct Chain {
    /// The journal.
    pub(crate) id: JournalId,
    /// What the first of them is chained to.
    pub(crate) base: Head,
    /// Records with their places, without gaps; from the first on, unless archives are elsewhere.
    pub(crate) records: Vec<(Head, Entry)>,
}

impl Chain {
    /// Reads the journal of a state directory, and the archives that are beside it.
    pub(crate) fn read(state: &Path) -> Result<Self, ExportError> {
        let newest = Offline::open(state)?.read_all()?;
        let mut parts = vec![];
        for found in archive::follow_from(state, &newest) {
            match found.state {
                ArchiveState::Whole => parts.push(archive::read(state, &found.name)?),
                ArchiveState::Elsewhere => break,
                ArchiveState::Broken(why) => {
                    let what = format!("its archive {} is broken: {why}", found.name);
                    let dir = state.to_owned();
                    return Err(OpenError::Quarantined { dir, what }.into());
                }
            }
        }
        parts.reverse();
        parts.push(newest);
        let mut records = vec![];
        let (id, base) = (parts[0].id, parts[0].base);
        for part in parts {
            let mut head = part.base;
            for (payload, entry) in part.payloads.iter().zip(part.entries) {
                head = head.next(payload);
                records.push((head, entry));
            }
        }
        Ok(Self { id, base, records })
    }

    /// Holds it against what agents were told of it.
    pub(crate) fn judge(&self, witnesses: &[Witness]) -> Judgement {
        let number = |(head, _): &(Head, Entry)| head.number;
        let first = self.base.number + 1;
        let taken_over: Vec<(u64, u64)> = self
            .records
            .iter()
            .filter_map(|(head, entry)| match entry.record {
                // The term's own record is the one before.
                Record::TookOver { epoch } => Some((head.number - 1, epoch.counter)),
                _ => None,
            })
            .collect();
        let account = Account {
            journal: &self.id.to_string(),
            first,
            last: self.records.last().map_or(self.base.number, number),
            taken_over: &taken_over,
        };
        witness::judge(witnesses, account, |number| {
            if number > 0 && number == self.base.number {
                return Some(self.base.hash);
            }
            let index = usize::try_from(number.checked_sub(first)?).ok()?;
            self.records.get(index).map(|(head, _)| head.hash)
        })
    }

    /// What this journal has of the agents' journals.
    pub(crate) fn heads(&self) -> impl Iterator<Item = Witness> {
        self.records
            .iter()
            .filter_map(|(_, entry)| match &entry.record {
                Record::Reported { head, .. } => head.clone(),
                _ => None,
            })
            .map(|head| Witness {
                by: CONTROLLER.to_owned(),
                term: 0,
                head,
            })
    }
}

#[cfg(test)]
mod tests;
