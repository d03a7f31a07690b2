//! Controllers, and whatever poses as one, that this host has refused, in its journal (INV-11).
//! What a controller asked for, and was refused, is a report, and a record by that.

use lockstep_proto::refusals::{Bounds, Counted, Ledger};
use lockstep_proto::values::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Exec, ExecError, wall_clock};
use crate::journal::{AppendError, Need, Record};

/// A record has less than 200 bytes, and a day has 24 of a kind that goes on.
pub(super) const BOUNDS: Bounds = Bounds {
    kinds: 16,
    a_minute: 6,
};

/// Why a session was refused: words of this host only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Refusal {
    /// What answered showed no certificate of a controller of this fleet, or none that is valid.
    Certificate,
    /// What it says breaks the contract.
    Contract,
    /// Its term has ended, or is claimed by two (INV-4).
    Term {
        /// The counter of that term.
        counter: u64,
    },
    /// It welcomed this host with another term than it gives orders in.
    OtherTerm,
    /// It has reports of this host that the journal has not.
    Ahead,
    /// It orders, and acknowledges nothing.
    Unacknowledged,
    /// It asks for more than this host answers: too often, or on a full disk.
    Unanswered,
    /// More different ones than are told apart.
    Others,
}

/// Refusals of one kind, since the last record of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionsRefused {
    /// Why.
    pub(crate) why: Refusal,
    /// How often.
    pub(crate) count: u64,
    /// When the first of them was, on the host's own clock.
    pub(crate) since: Timestamp,
}

/// None yet.
pub(super) fn ledger() -> Ledger<Refusal> {
    Ledger::new(BOUNDS, Refusal::Others)
}

impl Exec {
    /// Notes that a session was refused. It is written when it is due.
    pub(super) fn note_refused(&mut self, why: Refusal) {
        self.refusals.note(wall_clock(), why);
    }

    /// Resolves when refusals are to be written.
    pub(super) fn refusals_due(&mut self) -> impl Future<Output = ()> + use<> {
        let next = self.refusals.next(wall_clock());
        async move {
            match next {
                Some(at) => tokio::time::sleep(at.since(wall_clock()).to_std()).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Writes what is due. On a full disk the log alone has it.
    pub(super) fn write_refusals(&mut self) -> Result<(), ExecError> {
        let due = self.refusals.take_due(wall_clock());
        self.write_counted(due)
    }

    /// Writes whatever waits, before the end.
    pub(super) fn write_last_refusals(&mut self) -> Result<(), ExecError> {
        let all = self.refusals.take_all();
        self.write_counted(all)
    }

    fn write_counted(&mut self, counted: Vec<Counted<Refusal>>) -> Result<(), ExecError> {
        let records: Vec<Record> = counted
            .into_iter()
            .map(|refused| {
                Record::SessionsRefused(SessionsRefused {
                    why: refused.kind,
                    count: refused.count,
                    since: refused.since,
                })
            })
            .collect();
        if records.is_empty() {
            return Ok(());
        }
        match self.commit(records, Need::Opens) {
            Err(AppendError::Full(_)) => Ok(()),
            done => Ok(done?),
        }
    }
}
