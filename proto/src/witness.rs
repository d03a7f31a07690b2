//! Witnesses: what one side has written down of the other side's journal (INV-11).
//!
//! A journal's chain shows a change to whoever has its newest hash from elsewhere; whoever can
//! change the journal can chain it anew. So each side tells the other its head, with what it says
//! anyway, and the other keeps it in a journal of its own.
//!
//! ```text
//! controller -- Welcome, Acknowledged + its head --> agent        agent's journal
//! controller <-- Report + the head that reaches it -- agent       controller's journal
//! ```

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::ids::Digest;

/// The longest name of a journal, in bytes.
const MAX_NAME: usize = 64;

/// The newest record of a journal at some time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Whose: a controller's journal by its id, an agent's by its installation.
    pub journal: String,
    /// The record's number, from 1.
    pub number: u64,
    /// Its hash, which stands for it and all before it.
    pub hash: Digest,
}

impl Head {
    /// Whether it can name a journal at all: 1 to 64 of a-z, 0-9 and `_`.
    pub fn is_named(&self) -> bool {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        (1..=MAX_NAME).contains(&self.journal.len()) && self.journal.bytes().all(ok)
    }
}

/// A line of a file of witnesses: a head, and who has it in a journal of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Witness {
    /// Who says so: `app-1` of an agent, `controller` of a controller.
    pub by: String,
    /// The counter of the controller's term at the time; 0 where none is known.
    #[serde(default)]
    pub term: u64,
    /// The head.
    #[serde(flatten)]
    pub head: Head,
}

/// A line that is no witness.
#[derive(Debug, thiserror::Error)]
#[error("line {line} is no witness")]
pub struct NoWitness {
    /// From 1.
    pub line: usize,
    /// Why not.
    #[source]
    pub source: serde_json::Error,
}

/// Reads a file of witnesses, one in JSON on each line. Empty lines are passed over.
pub fn read(text: &str) -> Result<Vec<Witness>, NoWitness> {
    let lines = text.lines().zip(1..);
    let lines = lines.filter(|(text, _)| !text.trim().is_empty());
    let read = lines.map(|(text, line)| {
        serde_json::from_str(text).map_err(|source| NoWitness { line, source })
    });
    read.collect()
}

/// A journal that is whole by itself, as others are asked about it.
#[derive(Debug, Clone, Copy)]
pub struct Account<'a> {
    /// Its name.
    pub journal: &'a str,
    /// The first record that can be read here; those before are in archives that are elsewhere.
    pub first: u64,
    /// The newest record; 0 if there is none.
    pub last: u64,
    /// Records by which a controller took over, each with its term. What a controller of an earlier
    /// term recorded from there on is lost, and known to be.
    pub taken_over: &'a [(u64, u64)],
}

/// How a journal stands against what others have written down of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Judgement {
    /// The journal's newest record.
    pub last: u64,
    /// The newest record that is not here, since archives are elsewhere or gone; 0 if all are.
    pub not_here: u64,
    /// How many witnesses are of records that are not here, so that they say nothing.
    pub not_held: usize,
    /// Who has witnessed what is here.
    pub by: BTreeSet<String>,
    /// The highest record that a witness has, and that is the same here; 0 if there is none.
    pub through: u64,
    /// Witnesses of records that are not here, or are others here, by number.
    pub against: Vec<Witness>,
    /// The same, of what was lost when a controller took over.
    pub superseded: Vec<Witness>,
}

/// Holds a journal against witnesses of it. `here` answers with the hash of a record; none if the
/// journal has no such record. Of the record before its first one it may know the hash alone.
pub fn judge(
    witnesses: &[Witness],
    account: Account<'_>,
    here: impl Fn(u64) -> Option<Digest>,
) -> Judgement {
    let mut judgement = Judgement {
        last: account.last,
        not_here: account.first.saturating_sub(1),
        ..Judgement::default()
    };
    let mut of_this: Vec<&Witness> = witnesses
        .iter()
        .filter(|witness| witness.head.journal == account.journal)
        .collect();
    of_this.sort_by_key(|witness| witness.head.number);
    for witness in of_this {
        let number = witness.head.number;
        let hash = here(number);
        if number < account.first && hash.is_none() {
            judgement.not_held += 1;
            continue;
        }
        judgement.by.insert(witness.by.clone());
        let lost = |(record, term): &(u64, u64)| number >= *record && witness.term < *term;
        if hash == Some(witness.head.hash) {
            judgement.through = number;
        } else if account.taken_over.iter().any(lost) {
            judgement.superseded.push(witness.clone());
        } else {
            judgement.against.push(witness.clone());
        }
    }
    judgement
}

impl Judgement {
    /// What a journal lacks, or has otherwise than it was; none if nobody speaks against it.
    pub fn why(&self) -> Option<String> {
        let first = self.against.first()?;
        let Witness { by, head, .. } = first;
        Some(if head.number > self.last {
            format!(
                "it ends with record {}, and {by} was told of record {}: its end was cut off",
                self.last, head.number
            )
        } else if self.through + 1 >= head.number {
            format!(
                "record {} is not the one that {by} was told of",
                head.number
            )
        } else {
            let from = if self.through < head.number {
                self.through + 1
            } else {
                1
            };
            format!(
                "record {} is not the one that {by} was told of: the first that was changed is \
                 one of {from} to {}",
                head.number, head.number
            )
        })
    }

    /// The first record of those here that nobody has witnessed; none if there is no such record.
    pub fn unwitnessed_from(&self) -> Option<u64> {
        let known = self.through.max(self.not_here);
        (known < self.last).then_some(known + 1)
    }

    /// Lines for people: what is said of, and the words.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![];
        if self.not_here > 0 {
            lines.push((
                "not here",
                format!(
                    "records 1 to {}; witnesses of them that say nothing: {}",
                    self.not_here, self.not_held
                ),
            ));
        }
        if !self.by.is_empty() {
            let by: Vec<&str> = self.by.iter().map(String::as_str).collect();
            lines.push(("witnesses", by.join(", ")));
        }
        if self.through > 0 {
            lines.push(("witnessed", format!("up to record {}", self.through)));
        }
        if !self.superseded.is_empty() {
            lines.push((
                "superseded",
                format!(
                    "{} heads of a controller that another one has taken over from",
                    self.superseded.len()
                ),
            ));
        }
        if let Some(from) = self.unwitnessed_from() {
            lines.push((
                "unwitnessed",
                format!(
                    "records {from} to {}: a cut there, or a chain made anew, leaves no trace here",
                    self.last
                ),
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn witness(by: &str, number: u64, of: &str) -> Witness {
        Witness {
            by: by.into(),
            term: 1,
            head: Head {
                journal: "j".into(),
                number,
                hash: Digest::of(of.as_bytes()),
            },
        }
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let witnesses = [witness("a", 7, "x"), witness("b", 9, "y")];
        let lines: Vec<String> = witnesses
            .iter()
            .map(|it| serde_json::to_string(it).unwrap())
            .collect();
        assert_eq!(read(&lines.join("\n\n")).unwrap(), witnesses);
        assert_eq!(read("\n{}").unwrap_err().line, 2);
    }

    fn judged(witnesses: &[Witness], taken_over: &[(u64, u64)]) -> Judgement {
        let account = Account {
            journal: "j",
            first: 3,
            last: 9,
            taken_over,
        };
        judge(witnesses, account, |number| {
            (2..=9).contains(&number).then(|| Digest::of(b"x"))
        })
    }

    #[test]
    fn what_others_have_otherwise_speaks_against_a_journal() {
        let judgement = judged(&[witness("a", 7, "x"), witness("b", 5, "x")], &[]);
        assert_eq!((judgement.by.len(), judgement.through), (2, 7));
        assert_eq!(
            (judgement.why(), judgement.unwitnessed_from()),
            (None, Some(8))
        );
        let cut = judged(&[witness("a", 10, "x")], &[]).why().unwrap();
        assert!(cut.contains("cut off") && cut.contains("10"), "{cut}");
        let changed = judged(&[witness("a", 5, "x"), witness("b", 7, "y")], &[]);
        let why = changed.why().unwrap();
        assert!(
            why.contains("b was told of") && why.contains("6 to 7"),
            "{why}"
        );
        assert_eq!(changed.through, 5);
        let away = judged(&[witness("a", 1, "y")], &[]);
        assert_eq!((away.not_here, away.not_held), (2, 1), "in an archive");
        assert!(away.by.is_empty() && away.against.is_empty());
        assert_eq!(away.unwitnessed_from(), Some(3));
        let base = judged(&[witness("a", 2, "y")], &[]);
        assert_eq!(base.against.len(), 1, "its hash is known here");
        let mut foreign = witness("a", 7, "y");
        foreign.head.journal = "k".into();
        assert!(judged(&[foreign], &[]).by.is_empty());
        assert_eq!(judged(&[], &[]).unwitnessed_from(), Some(3));
    }

    #[test]
    fn what_was_lost_when_a_controller_took_over_is_told_apart() {
        let lost = [witness("a", 8, "y")];
        assert_eq!(judged(&lost, &[(6, 2)]).superseded.len(), 1);
        assert_eq!(judged(&lost, &[(6, 1)]).against.len(), 1, "its own term");
        assert_eq!(judged(&lost, &[(9, 2)]).against.len(), 1, "before it");
    }
}
