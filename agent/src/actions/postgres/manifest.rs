//! Where backups are kept: `<backup_dir>/<id>/` with the archive, `manifest.json`, and, once the
//! backup was proven, `verified.json`. The directory gets its name last, so one
//! that has it is complete.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lockstep_proto::action::postgres::{Aspect, Compress, CopyTo, Format, Level};
use lockstep_proto::ids::{Digest, StepKey};
use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Timestamp;
use serde::{Deserialize, Serialize};

use super::archive::Dir;
use super::measure::{Contents, summary};
use super::written::Moment;
use crate::actions::files;
use crate::actions::places::Place;
use crate::faults::reached;
use crate::sql::Database;
use crate::step::{Context, failure};

/// What a backup is, and what it must restore to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The name of its directory.
    pub(super) id: String,
    /// The attempt that made it.
    pub(super) key: StepKey,
    /// The database, as plans name it.
    pub(super) database: String,
    /// Its name on the server.
    pub(super) dbname: String,
    /// The archive's format.
    pub(super) format: Format,
    /// The digest of the archive: of the file, or of the lines `<hex>  <name>` of its files.
    pub(super) digest: Digest,
    /// The archive's size in bytes.
    pub(super) size: u64,
    /// When the snapshot was taken, by the server's clock.
    pub(super) taken_at: Timestamp,
    /// The rows of the snapshot; empty if they were not measured.
    pub(super) contents: Contents,
    /// The fingerprint of its schema; of nothing, if that was not measured.
    pub(super) schema: Digest,
    /// The server's version: 150018 for 15.18.
    pub(super) server_version: u32,
    /// The fence that was up, if one was.
    pub(super) fence: Option<String>,
    /// The rows of the migration tool's table.
    pub(super) revisions: Vec<String>,
    /// When, in the server's transactions; releases of before did not say.
    #[serde(default)]
    pub(super) moment: Option<Moment>,
    /// What of the snapshot was measured; releases that always measured all did not say.
    #[serde(default = "all_aspects")]
    pub(super) measured: Vec<Aspect>,
    /// How the archive is compressed.
    #[serde(default)]
    pub(super) compress: Compress,
    /// The version of pg_dump, as it says itself; empty if an older release made the backup.
    #[serde(default)]
    pub(super) tool_version: String,
    /// Where the server's log of changes was just after the snapshot was taken; on a standby, how
    /// far it was replayed.
    #[serde(default)]
    pub(super) lsn: Option<String>,
    /// The server's roles and tablespaces, in [`GLOBALS`] beside the archive.
    #[serde(default)]
    pub(super) globals: Option<Beside>,
    /// Where the copies are.
    #[serde(default)]
    pub(super) copies: Vec<CopyTo>,
    /// Whether it is the agent's own file; `os_user` can put others into its directory.
    #[serde(skip)]
    pub(super) is_own: bool,
}

/// A file beside the archive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Beside {
    pub(super) digest: Digest,
    /// In bytes.
    pub(super) size: u64,
}

impl Manifest {
    /// Whether its tables and rows were counted.
    pub(super) fn is_counted(&self) -> bool {
        let counts = [Aspect::RowCounts, Aspect::Checksums];
        counts.iter().any(|aspect| self.measured.contains(aspect))
    }

    /// Whether all was measured that a restored database can be held against.
    pub(super) fn is_measured(&self) -> bool {
        let all = all_aspects();
        all.iter().all(|aspect| self.measured.contains(aspect))
    }

    /// What it holds, for people.
    pub(super) fn summary(&self) -> String {
        if self.is_counted() {
            summary(&self.contents)
        } else {
            "rows were not counted".to_owned()
        }
    }

    /// The files beside the archive, that go wherever it goes.
    pub(super) fn beside(&self) -> Vec<&'static str> {
        let globals = self.globals.as_ref().map(|_| GLOBALS);
        std::iter::once(MANIFEST).chain(globals).collect()
    }

    /// Reads that of a backup of a database in the backup's directory, if there is one.
    pub(super) fn read(directory: &Path, database: &str) -> Option<Self> {
        let file = Dir::open(directory).ok()?.file(MANIFEST).ok()?;
        let owner = file.metadata().ok()?.uid();
        let is_own = owner == rustix::process::geteuid().as_raw();
        let manifest = Self {
            is_own,
            ..read(file)?
        };
        (manifest.is_named_well() && manifest.database == database).then_some(manifest)
    }

    /// Whether its id is one that this program gives: what it names is removed one day, and the
    /// manifest is a file that `os_user` can write.
    fn is_named_well(&self) -> bool {
        let stamp = self
            .id
            .strip_prefix(&format!("{}-", file_name(&self.database)));
        let stamp = stamp.and_then(|rest| rest.strip_suffix(&format!("-{}", self.key)));
        stamp.is_some_and(|stamp| stamp.bytes().all(|byte| byte.is_ascii_alphanumeric()))
    }
}

/// That a backup was proven.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Verified {
    /// The attempt that did it.
    pub(super) key: StepKey,
    /// The digest of the archive that was looked at.
    pub(super) digest: Digest,
    /// How far. Releases without levels restored what they proved, and did not say so.
    #[serde(default = "restored")]
    pub(super) level: Level,
    /// When the backup's snapshot was taken; releases without levels did not say.
    #[serde(default)]
    pub(super) taken_at: Option<Timestamp>,
    /// What was compared.
    pub(super) compared: Vec<Aspect>,
}

fn all_aspects() -> Vec<Aspect> {
    vec![Aspect::Schema, Aspect::RowCounts, Aspect::Checksums]
}

fn restored() -> Level {
    Level::Restored
}

pub(super) const MANIFEST: &str = "manifest.json";
/// What pg_dumpall has written, readable for its owner only: it may hold hashes of passwords.
pub(super) const GLOBALS: &str = "globals.sql";
const VERIFIED: &str = "verified.json";

/// No manifest is longer, in bytes: a hundred thousand tables have less.
const LONGEST: u64 = 64 << 20;

/// The end of the name of what is not complete.
pub(super) const PARTIAL: &str = ".partial";

/// The backups of one database on this host.
#[derive(Debug)]
pub(super) struct Store {
    /// The backup directory.
    pub(super) directory: PathBuf,
    database: String,
}

impl Store {
    /// That of a database, which need not exist yet.
    pub(super) fn of(cx: &Context, database: &Database) -> Self {
        let default = || cx.config.state_dir.join("backups");
        let directory = database.config.backup_dir.clone().unwrap_or_else(default);
        Self {
            directory,
            database: database.name.clone(),
        }
    }

    /// The complete ones, newest first.
    pub(super) fn all(&self) -> Vec<Manifest> {
        let entries = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        let manifests = entries.filter_map(|entry| {
            let manifest = Manifest::read(&entry.path(), &self.database)?;
            (entry.file_name().to_str() == Some(&manifest.id)).then_some(manifest)
        });
        let mut manifests: Vec<Manifest> = manifests.collect();
        manifests.sort_by_key(|manifest| std::cmp::Reverse(manifest.taken_at));
        manifests
    }

    /// The directory of a backup.
    pub(super) fn path(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// Whether, and how far, a backup was verified.
    pub(super) fn verified(&self, manifest: &Manifest) -> Option<Verified> {
        let verified: Verified = read_json(&self.path(&manifest.id), VERIFIED)?;
        (verified.digest == manifest.digest).then_some(verified)
    }

    /// Whether a backup was restored: one that was only read may still not be one.
    pub(super) fn was_restored(&self, manifest: &Manifest) -> bool {
        let verified = self.verified(manifest);
        verified.is_some_and(|verified| verified.level >= Level::Restored)
    }

    /// Notes that a backup was verified.
    pub(super) fn mark_verified(&self, id: &str, verified: &Verified) -> Result<(), Failure> {
        write_json(&self.path(id), VERIFIED, verified)
    }

    /// Removes what earlier attempts of this host have left unfinished for the database.
    pub(super) fn remove_partials(&self, cx: &Context) {
        let prefix = format!("{}-", file_name(&self.database));
        for entry in fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            let key = name
                .strip_prefix(&prefix)
                .and_then(|name| name.strip_suffix(PARTIAL))
                .and_then(|name| name.split_once('-'))
                .and_then(|(_, key)| key.parse::<StepKey>().ok());
            if key.is_some_and(|key| key.host == cx.key.host && key != cx.key)
                && fs::remove_dir_all(entry.path()).is_ok()
            {
                cx.log.line(&format!(
                    "removed {name}, which an earlier attempt had left"
                ));
            }
        }
    }

    /// Removes the oldest beyond `keep`, but never the newest that was restored, nor one of this
    /// rollout.
    pub(super) fn retain(&self, cx: &Context, keep: u32) {
        let all = self.all();
        let proven = all.iter().find(|manifest| self.was_restored(manifest));
        let kept = usize::try_from(keep).unwrap_or(usize::MAX).max(1);
        for manifest in all.iter().skip(kept) {
            if proven == Some(manifest) || manifest.key.rollout == cx.key.rollout {
                continue;
            }
            remove(cx, &self.directory, &manifest.id);
        }
    }

    /// Removes what earlier attempts at the same step have made, from here and from where it was
    /// copied to, but by commands: a step makes one backup, and nobody was told of the others. One
    /// that was verified stays.
    pub(super) fn supersede(&self, cx: &Context, newest: &Manifest, copies: &[&str]) {
        let place = |of: &StepKey| (of.rollout.clone(), of.host.clone(), of.at);
        for old in self.all() {
            let same_step = place(&old.key) == place(&newest.key);
            if old.id == newest.id || !same_step || self.verified(&old).is_some() {
                continue;
            }
            for directory in copies {
                let Ok(place) = Place::find(&cx.config, Path::new(directory)) else {
                    continue;
                };
                // Half a copy is none; there is hardly ever one.
                let _ = fs::remove_dir_all(place.path().join(format!("{}{PARTIAL}", old.id)));
                if place.path().join(&old.id).is_dir() {
                    remove(cx, &place.path(), &old.id);
                }
            }
            remove(cx, &self.directory, &old.id);
        }
    }
}

/// Removes a backup from a directory: under a name that says so, for a crash leaves no backup
/// without its archive.
fn remove(cx: &Context, directory: &Path, id: &str) {
    let gone = directory.join(format!("{id}{PARTIAL}"));
    reached("backup: to be removed");
    let removed = fs::rename(directory.join(id), &gone)
        .inspect(|()| reached("backup: put aside"))
        .and_then(|()| fs::remove_dir_all(&gone));
    reached("backup: removed");
    match removed {
        Ok(()) => cx.log.line(&format!("removed the old backup {id}")),
        Err(error) => cx
            .log
            .line(&format!("cannot remove the backup {id}: {error}")),
    }
}

/// The name of a new backup: database, time and step key.
pub(super) fn id(database: &str, stamp: &str, key: &StepKey) -> String {
    format!("{}-{stamp}-{key}", file_name(database))
}

/// A name as a part of a file's.
pub(super) fn file_name(name: &str) -> String {
    let fit = |c: char| {
        if c.is_ascii_alphanumeric() || c == '_' {
            c
        } else {
            '_'
        }
    };
    name.chars().map(fit).collect()
}

/// Writes a backup's manifest into its directory, durably.
pub(super) fn write_manifest(directory: &Path, manifest: &Manifest) -> Result<(), Failure> {
    write_json(directory, MANIFEST, manifest)
}

fn read_json<T: serde::de::DeserializeOwned>(directory: &Path, name: &str) -> Option<T> {
    read(Dir::open(directory).ok()?.file(name).ok()?)
}

fn read<T: serde::de::DeserializeOwned>(file: File) -> Option<T> {
    let mut text = vec![];
    file.take(LONGEST).read_to_end(&mut text).ok()?;
    json::read(&text).ok()
}

/// Writes a file that is there as a whole or not at all, and outlives a power loss.
fn write_json(directory: &Path, name: &str, value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_vec_pretty(value).expect("texts and numbers are JSON");
    let write = || {
        reached("manifest: to be written");
        let directory = Dir::open(directory)?;
        files::write(&directory.path(name), &text, 0o600, None)?;
        reached("manifest: there");
        Ok(())
    };
    write().map_err(|error: std::io::Error| {
        failure(
            Cause::Host,
            format!("cannot write {}: {error}", directory.join(name).display()),
        )
    })
}

/// Runs work on files beside the connection's task.
pub(super) async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    done.map_err(|error| {
        let hint = (error.kind() == std::io::ErrorKind::StorageFull)
            .then(|| "make room on that volume".to_owned());
        Failure {
            hint,
            ..failure(Cause::Host, format!("{what}: {error}"))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::Host;

    #[test]
    fn what_the_tools_user_plants_beside_a_backup_is_not_followed() {
        let host = Host::new();
        let (backup, target) = (host.path().join("shop-1"), host.path().join("passwd"));
        let verified = Verified {
            key: host.context().key,
            digest: Digest::of(b"archive"),
            level: Level::Equal,
            taken_at: None,
            compared: vec![],
        };
        let mark = || write_json(&backup, VERIFIED, &verified);
        fs::create_dir(&backup).unwrap();
        for name in ["verified.tmp", VERIFIED] {
            fs::write(&target, "root:").unwrap();
            symlink(&target, backup.join(name)).unwrap();
            mark().unwrap();
            assert_eq!(fs::read(&target).unwrap(), b"root:", "{name}");
            assert_eq!(read_json(&backup, VERIFIED), Some(verified.clone()));
            fs::remove_file(backup.join(VERIFIED)).unwrap();
        }
        // Another directory in its place.
        let elsewhere = host.path().join("elsewhere");
        fs::rename(&backup, &elsewhere).unwrap();
        symlink(&elsewhere, &backup).unwrap();
        mark().unwrap_err();
        assert!(!elsewhere.join(VERIFIED).exists());
    }
}
