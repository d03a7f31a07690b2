//! `lockstep-agent audit`: the journal as auditors read it (INV-11). Each command only reads, and an
//! agent may run meanwhile.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use lockstep_proto::ids::Digest;
use lockstep_proto::shown;
use lockstep_proto::witness::{self, Account, Head, Judgement, Witness};
use serde_json::json;

use crate::config::Config;
use crate::errors::chain;
use crate::journal::{self, JournalError, Link, Record, Verified};
use crate::{exit, say};

/// What is asked for.
#[derive(Debug)]
pub(crate) enum Audit<'a> {
    /// Whether the journal is what was written, and what its controller was told of it.
    Verify(&'a [PathBuf]),
    /// The heads of the controller's journal that this one has.
    Heads,
    /// Every record as JSON lines.
    Export,
}

/// Runs one of the commands.
pub(crate) fn run(config: &Config, audit: &Audit<'_>) -> u8 {
    match audit {
        Audit::Verify(files) => verify(config, files),
        Audit::Heads => print(config, |_, record, out| {
            if let Record::Acknowledged {
                seen: Some(seen), ..
            } = record
            {
                out.push(json!(Witness {
                    by: config.host.to_string(),
                    term: seen.term,
                    head: seen.head,
                }));
            }
        }),
        Audit::Export => print(config, |link, record, out| {
            let hash = Digest(link.hash);
            out.push(json!({"number": link.number, "hash": hash, "record": record}));
        }),
    }
}

/// Prints a line for each value that the records of a whole journal give.
fn print(config: &Config, mut each: impl FnMut(Link, Record, &mut Vec<serde_json::Value>)) -> u8 {
    let mut lines = vec![];
    let verified = match journal::walk(&config.state_dir, |link, record| {
        each(link, record, &mut lines);
    }) {
        Ok(verified) => verified,
        Err(error) => return cannot_read(&error),
    };
    let mut out = std::io::stdout().lock();
    for line in lines {
        // Whoever closes the pipe has read enough.
        if writeln!(out, "{}", shown::json(&line.to_string())).is_err() {
            break;
        }
    }
    broken(&verified).unwrap_or(exit::DONE)
}

fn verify(config: &Config, files: &[PathBuf]) -> u8 {
    let witnesses = match read(files) {
        Ok(witnesses) => witnesses,
        Err(why) => {
            say(&why);
            return exit::USAGE;
        }
    };
    let audited = match audit(&config.state_dir, &witnesses) {
        Ok(audited) => audited,
        Err(error) => return cannot_read(&error),
    };
    let mut text = audited.verified.text();
    for (name, words) in audited.judgement.lines() {
        let _ = writeln!(text, "{name:<14}{words}");
    }
    let _ = std::io::stdout().write_all(text.as_bytes());
    if let Some(code) = broken(&audited.verified) {
        return code;
    }
    let Some(why) = audited.judgement.why() else {
        return exit::DONE;
    };
    say(&format!("the journal is not what was written: {why}"));
    say(
        "hint: nothing was changed; keep a copy of the state directory and of the heads, then \
         see docs/recovery.md",
    );
    exit::BROKEN
}

/// What is found in a journal.
pub(crate) struct Audited {
    /// By itself.
    pub(crate) verified: Verified,
    /// Against what its controller was told.
    pub(crate) judgement: Judgement,
}

/// Reads the journal of a state directory, and holds it against witnesses.
pub(crate) fn audit(state: &Path, witnesses: &[Witness]) -> Result<Audited, JournalError> {
    let (mut hashes, mut names) = (vec![], vec![]);
    let verified = journal::walk(state, |link, record| {
        hashes.push(link.hash);
        // One that was anchored goes on under another name, and its chain with it.
        if let Record::Opened { instance, .. } | Record::Anchored { instance, .. } = record {
            names.push(instance.to_string());
        }
    })?;
    let name = names.first().cloned().unwrap_or_default();
    let mut witnesses = witnesses.to_vec();
    for witness in &mut witnesses {
        if names.contains(&witness.head.journal) {
            witness.head.journal.clone_from(&name);
        }
    }
    let account = Account {
        journal: &name,
        first: 1,
        last: verified.last.0,
        taken_over: &[],
    };
    let judgement = witness::judge(&witnesses, account, |number| {
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        hashes.get(index).map(|hash| Digest(*hash))
    });
    Ok(Audited {
        verified,
        judgement,
    })
}

/// The head of the journal at a record, as the controller is told of it.
pub(crate) fn head(instance: &impl ToString, link: Link) -> Head {
    Head {
        journal: instance.to_string(),
        number: link.number,
        hash: Digest(link.hash),
    }
}

fn read(files: &[PathBuf]) -> Result<Vec<Witness>, String> {
    let mut witnesses = vec![];
    for path in files {
        let text = std::fs::read_to_string(path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let read = witness::read(&text).map_err(|error| {
            let error = chain(&error);
            format!(
                "{}: {error}; `lockstep audit heads` prints such a file",
                path.display()
            )
        })?;
        witnesses.extend(read);
    }
    Ok(witnesses)
}

fn broken(verified: &Verified) -> Option<u8> {
    let broken = verified.broken.as_ref()?;
    say(&format!("the journal is broken: {}", broken.why));
    Some(exit::BROKEN)
}

fn cannot_read(error: &JournalError) -> u8 {
    say(&chain(error));
    exit::INTERNAL
}

#[cfg(test)]
mod tests;
