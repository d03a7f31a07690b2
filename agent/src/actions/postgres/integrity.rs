//! `postgres.integrity`: what a database holds, written down for a later comparison.
//!
//! ```text
//! one transaction -> Holdings -> <state_dir>/integrity/<id>.json -> its digest in the fact
//! ```

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use lockstep_proto::action::postgres::Integrity;
use lockstep_proto::ids::Digest;
use lockstep_proto::json;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::look;
use super::manifest::file_name;
use super::measure::rows_fact;
use crate::actions::files::{self, OrFailed as _};
use crate::actions::{Act, Done, Probe, bound};
use crate::sql::Database;
use crate::step::{Context, failure, hinted};

mod differences;
mod holdings;

pub(crate) use differences::{differences, unmet};
pub(crate) use holdings::Holdings;

/// How many of other rollouts' are kept for each database: to look at by hand.
const KEPT: usize = 5;

/// No file is longer, in bytes: a hundred thousand tables have less.
const LONGEST: u64 = 64 << 20;

impl Act for Integrity {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        // Reading every row only to say that it can be read is too much of a look.
        Database::find(cx, &self.database)?.connect(cx).await?;
        Ok(Probe::Absent(self.describe()))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let found = Holdings::take(cx, &database, self.values_up_to, None).await?;
        let digest = write(cx, &found)?;
        remove_old(cx, &database.name);
        for line in found.to_be_seen_to() {
            cx.log.line(&line);
        }
        let summary = found.summary();
        let fact = Fact::Integrity {
            database: self.database.clone(),
            id: found.id.clone(),
            digest,
            taken_at: found.taken_at,
        };
        let rows = found.rows();
        let note = Fact::Note {
            name: format!("integrity of {}", self.database),
            value: summary.clone(),
        };
        Ok(Done {
            changed: false,
            summary,
            facts: vec![fact, rows_fact(&self.database, rows.into_iter()), note],
        })
    }

    fn describe(&self) -> String {
        format!("looks at all that `{}` holds", self.database)
    }
}

/// Where they are written down.
fn directory(cx: &Context) -> PathBuf {
    cx.config.state_dir.join("integrity")
}

fn file(cx: &Context, id: &str) -> PathBuf {
    directory(cx).join(format!("{id}.json"))
}

/// Writes down what was found, durably. Returns the digest of the file.
fn write(cx: &Context, found: &Holdings) -> Result<Digest, Failure> {
    let text = serde_json::to_vec_pretty(found).expect("texts and numbers are JSON");
    let path = file(cx, &found.id);
    let what = || format!("cannot write {}", path.display());
    files::private_dir(&directory(cx)).or_failed(what)?;
    files::write(&path, &text, 0o600, None).or_failed(what)?;
    Ok(Digest::of(&text))
}

/// What the rollout's newest `postgres.integrity` has found. Fails if it is not there, or is not
/// what it was.
pub(super) fn newest(cx: &Context, database: &str) -> Result<Holdings, Failure> {
    let named = bound(&cx.bindings, |fact| match fact {
        Fact::Integrity {
            database: of,
            id,
            digest,
            ..
        } if of == database => Some((id, *digest)),
        _ => None,
    });
    let Some((id, digest)) = named else {
        return Err(hinted(
            Cause::Refused,
            format!("this rollout has not looked at what `{database}` holds"),
            "put `postgres.integrity` before this step",
        ));
    };
    let path = file(cx, id);
    let text = read(&path).ok_or_else(|| {
        hinted(
            Cause::Host,
            format!("{} is not there", path.display()),
            "run this step on the host that ran `postgres.integrity`",
        )
    })?;
    let unlike = || format!("{} is not what was written down", path.display());
    if Digest::of(&text) != digest {
        return Err(failure(Cause::Host, unlike()));
    }
    json::read(&text).map_err(|_| failure(Cause::Host, unlike()))
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut text = vec![];
    let file = fs::File::open(path).ok()?;
    file.take(LONGEST).read_to_end(&mut text).ok()?;
    Some(text)
}

/// Removes the oldest of a database, but none of this rollout.
fn remove_old(cx: &Context, database: &str) {
    let prefix = format!("{}-", file_name(database));
    let own = cx.key.rollout.to_string();
    let entries = fs::read_dir(directory(cx)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    // The name begins with the time, after the database.
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with(&prefix) && !name.contains(&own))
        .collect();
    names.sort();
    let surplus = names.len().saturating_sub(KEPT);
    for name in &names[..surplus] {
        let _ = fs::remove_file(directory(cx).join(name));
    }
}

/// The probe of a comparison, which reads every row, too.
pub(super) async fn probe(act: &impl Act, cx: &Context, database: &str) -> Result<Probe, Failure> {
    if cx.dry_run {
        Database::find(cx, database)?.connect(cx).await?;
        return Ok(match newest(cx, database) {
            Ok(_) => Probe::Absent(act.describe()),
            Err(missing) => Probe::Unmet(missing),
        });
    }
    look::probe(act, cx).await
}

#[cfg(test)]
mod tests;
