//! What a restore point leaves on its host, so that a later recovery knows where it leads, and what
//! would be lost: `<state_dir>/points/<name>.json`.
//!
//! ```text
//! moment -> rows of every database -> the point in the log -> the record
//! ```
//!
//! What is written between the moment and the point counts as written since: a count may be too
//! large, never too small.

use std::fs;
use std::path::{Path, PathBuf};

use lockstep_proto::ids::{RolloutId, StepRef};
use lockstep_proto::json;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Timestamp;
use serde::{Deserialize, Serialize};

use super::server::Held;
use crate::actions::files::{self, OrFailed as _};
use crate::actions::postgres::written::{Ledgers, Moment};
use crate::step::{Context, failure, hinted};

/// How many of other rollouts' are kept.
const KEPT: usize = 5;

/// A restore point that a server can be recovered to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::actions::postgres) struct Record {
    /// The point's name in the log.
    pub(super) name: String,
    /// The database that its step named.
    pub(super) database: String,
    /// Whose it is.
    rollout: RolloutId,
    /// The step that made it.
    at: StepRef,
    /// When, by the server's clock.
    taken_at: Timestamp,
    /// Its place in the log, as a number.
    pub(super) lsn: u64,
    /// The timeline that it is on.
    pub(super) timeline: u32,
    /// The server's own number, the same in all of its copies.
    pub(super) system: u64,
    /// The server's files.
    pub(super) data: PathBuf,
    /// The server's major version.
    pub(super) major: u32,
    /// The token of the database's fence, if one was up.
    pub(super) fence: Option<String>,
    /// What migration tools had written down.
    pub(super) ledgers: Ledgers,
    /// The moment before it.
    pub(super) moment: Moment,
    /// What there was to be lost.
    pub(super) held: Held,
}

/// What is known before the point is made.
#[derive(Debug)]
pub(in crate::actions::postgres) struct Draft {
    pub(super) timeline: u32,
    pub(super) system: u64,
    pub(super) data: PathBuf,
    pub(super) major: u32,
    pub(super) fence: Option<String>,
    pub(super) ledgers: Ledgers,
    pub(super) moment: Moment,
    pub(super) held: Held,
}

impl Draft {
    /// Writes down, durably, that the point is there.
    pub(in crate::actions::postgres) fn keep(
        self,
        cx: &Context,
        database: &str,
        name: &str,
        lsn: &str,
        taken_at: Timestamp,
    ) -> Result<(), Failure> {
        let record = Record {
            name: name.to_owned(),
            database: database.to_owned(),
            rollout: cx.key.rollout.clone(),
            at: cx.key.at,
            taken_at,
            lsn: position(lsn).ok_or_else(|| {
                failure(
                    Cause::Step,
                    format!("`{lsn}` is no place in a server's log"),
                )
            })?,
            timeline: self.timeline,
            system: self.system,
            data: self.data,
            major: self.major,
            fence: self.fence,
            ledgers: self.ledgers,
            moment: self.moment,
            held: self.held,
        };
        let text = serde_json::to_vec_pretty(&record).expect("texts and numbers are JSON");
        let path = directory(cx).join(format!("{name}.json"));
        let what = || format!("cannot write {}", path.display());
        files::private_dir(&directory(cx)).or_failed(what)?;
        files::write(&path, &text, 0o600, None).or_failed(what)?;
        remove_old(cx);
        Ok(())
    }
}

impl Record {
    /// The rollout's newest point before the step of the context.
    pub(super) fn newest(cx: &Context, database: &str) -> Result<Option<Self>, Failure> {
        let mut found = vec![];
        for path in paths(cx) {
            let record = read(&path)?;
            let before = record.at < cx.key.at && record.rollout == cx.key.rollout;
            if before && record.database == database {
                found.push(record);
            }
        }
        Ok(found.into_iter().max_by_key(|record| record.taken_at))
    }

    /// The same, or what to do without one.
    pub(super) fn required(cx: &Context, database: &str) -> Result<Self, Failure> {
        Self::newest(cx, database)?.ok_or_else(|| {
            hinted(
                Cause::Refused,
                format!("no restore point of this rollout leads back for `{database}`"),
                "put `postgres.restore_point` with `recoverable: true` before this step, on the \
                 same host",
            )
        })
    }
}

/// Where an attempt has found the server's log to end, before it stopped the server.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct End {
    pub(super) name: String,
    place: u64,
    /// The backup from which it can be reached.
    pub(super) base: String,
    /// Who has accepted that something is lost, if anybody has.
    pub(super) accepted: Option<Fact>,
}

const END: &str = "recovery-end.json";

impl End {
    /// The name for the attempt of the context, while this is the server's next transaction. A
    /// recovery ends at the first point of a name, and a server may be stopped several times.
    pub(super) fn name(cx: &Context, next: u64) -> String {
        let key = &cx.key;
        format!(
            "lockstep_{}_{}_end_{}_{next:x}",
            key.rollout, key.at, key.attempt
        )
    }

    /// Writes down that the log is archived up to a point of this name.
    pub(super) fn keep(
        cx: &Context,
        name: String,
        lsn: &str,
        base: &str,
        accepted: Option<Fact>,
    ) -> Result<(), Failure> {
        let end = Self {
            name,
            place: position(lsn).unwrap_or_default(),
            base: base.to_owned(),
            accepted,
        };
        let text = serde_json::to_vec(&end).expect("texts and numbers are JSON");
        files::write(&cx.dir.join(END), &text, 0o600, None)
            .or_failed(|| "keep where the server's log ends")
    }

    /// The last of them.
    pub(super) fn last(cx: &Context) -> Option<Self> {
        let files = files::attempts(cx).into_iter();
        let ends = files.filter_map(|dir| fs::read(dir.join(END)).ok());
        let ends = ends.filter_map(|text| json::read::<Self>(&text).ok());
        ends.max_by_key(|end| end.place)
    }
}

/// A place in a server's log, such as `0/3000158`, as a number.
pub(in crate::actions::postgres) fn position(lsn: &str) -> Option<u64> {
    let (high, low) = lsn.split_once('/')?;
    let part = |text| u32::from_str_radix(text, 16).ok().map(u64::from);
    Some(part(high)? << 32 | part(low)?)
}

fn directory(cx: &Context) -> PathBuf {
    cx.config.state_dir.join("points")
}

fn paths(cx: &Context) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory(cx)).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|it| it == "json"))
        .collect()
}

/// What is there and cannot be read is not nothing.
fn read(path: &Path) -> Result<Record, Failure> {
    let unread = |why: String| {
        let message = format!(
            "the restore point in {} cannot be read: {why}",
            path.display()
        );
        failure(Cause::Host, message)
    };
    let text = fs::read(path).map_err(|error| unread(error.to_string()))?;
    json::read(&text).map_err(|error| unread(error.to_string()))
}

/// Removes the oldest, but none of this rollout.
fn remove_old(cx: &Context) {
    let of_others = paths(cx).into_iter().filter_map(|path| {
        let record = read(&path).ok()?;
        (record.rollout != cx.key.rollout).then_some((record.taken_at, path))
    });
    let mut of_others: Vec<_> = of_others.collect();
    of_others.sort();
    let surplus = of_others.len().saturating_sub(KEPT);
    for (_, path) in &of_others[..surplus] {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_a_log_are_numbers() {
        assert_eq!(position("0/3000158"), Some(0x300_0158));
        assert_eq!(position("A/1"), Some(0xA_0000_0001));
        for text in ["", "3000158", "x/1", "1/100000000"] {
            assert_eq!(position(text), None, "{text}");
        }
    }
}
