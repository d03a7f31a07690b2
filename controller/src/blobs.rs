//! Content by digest: compiled plans, and beside each the text that it was compiled from.
//!
//! ```text
//! STATE/blobs/<64 hexadecimal digits>           the content
//! STATE/blobs/<64 hexadecimal digits>.source    the plan file's text, for the report
//! ```

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use lockstep_proto::ids::{Digest, PlanDigest};
use lockstep_proto::seal::{self, InvalidPlan, SealedPlan};

/// The directory of content. Its functions block: they read and sync files.
#[derive(Debug)]
pub(crate) struct Blobs {
    dir: PathBuf,
    /// Plans that were read or stored. The coordinator holds almost every one of them anyway: but for
    /// those whose rollouts went out of the journal since.
    plans: Mutex<HashMap<PlanDigest, Arc<SealedPlan>>>,
}

/// Content that cannot be stored or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlobError {
    /// The operating system refuses.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A stored plan is not what it was.
    #[error("the stored plan {path} is damaged; put it back from a backup of the state directory")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        #[source]
        source: InvalidPlan,
    },
}

/// A plan's bytes, lent to the network without a copy.
struct Lent(Arc<SealedPlan>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl Blobs {
    /// Opens the directory, or makes it.
    pub(crate) fn open(dir: PathBuf) -> Result<Self, BlobError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|source| error(&dir, source))?;
        Ok(Self {
            dir,
            plans: Mutex::default(),
        })
    }

    /// Stores a plan and its source; when it returns, both are on the disk. A plan that is
    /// stored already keeps its first source. Returns whether it was not there before.
    pub(crate) fn store_plan(
        &self,
        plan: &Arc<SealedPlan>,
        source: &str,
    ) -> Result<bool, BlobError> {
        let path = self.path(plan.digest());
        let source_path = path.with_extension("source");
        if !source.is_empty() && !path.exists() {
            self.write(&source_path, source.as_bytes())?;
        }
        let is_new = !path.exists();
        if is_new {
            self.write(&path, plan.bytes())?;
        }
        self.plans().insert(plan.digest(), Arc::clone(plan));
        Ok(is_new)
    }

    /// Removes a plan that no record names, and its source.
    pub(crate) fn remove_plan(&self, digest: PlanDigest) -> Result<(), BlobError> {
        self.plans().remove(&digest);
        let path = self.path(digest);
        // The plan first: a source alone is written over.
        for path in [&path, &path.with_extension("source")] {
            match fs::remove_file(path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(error(path, source));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A stored plan; none if there is none of that digest.
    pub(crate) fn plan(&self, digest: PlanDigest) -> Result<Option<Arc<SealedPlan>>, BlobError> {
        if let Some(plan) = self.plans().get(&digest) {
            return Ok(Some(Arc::clone(plan)));
        }
        let path = self.path(digest);
        let Some(bytes) = read(&path)? else {
            return Ok(None);
        };
        let plan = seal::open_expecting(&bytes, digest);
        let plan = Arc::new(plan.map_err(|source| BlobError::Damaged { path, source })?);
        self.plans().insert(digest, Arc::clone(&plan));
        Ok(Some(plan))
    }

    /// A plan's bytes, shared with everyone who asked for them.
    pub(crate) fn plan_bytes(&self, digest: PlanDigest) -> Result<Option<Bytes>, BlobError> {
        let plan = self.plan(digest)?;
        Ok(plan.map(|plan| Bytes::from_owner(Lent(plan))))
    }

    /// The text that a plan was compiled from; empty if it was not given.
    pub(crate) fn source(&self, digest: PlanDigest) -> Result<String, BlobError> {
        let bytes = read(&self.path(digest).with_extension("source"))?;
        Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    }

    fn plans(&self) -> std::sync::MutexGuard<'_, HashMap<PlanDigest, Arc<SealedPlan>>> {
        // A map of immutable values is whole whatever its holder did.
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    /// Writes a file as a whole or not at all.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), BlobError> {
        // Two who store the same at once must not write into one file.
        let unique: u64 = rand::random();
        let temporary = path.with_extension(format!("{unique:016x}.tmp"));
        let attempt = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            let options = options.write(true).create_new(true).mode(0o600);
            let mut file = options.open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, path)?;
            File::open(&self.dir)?.sync_all()
        };
        attempt().map_err(|source| error(path, source))
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, BlobError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(error(path, source)),
    }
}

fn error(path: &Path, source: io::Error) -> BlobError {
    BlobError::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use lockstep_proto::plan::{CompiledPlan, FORMAT, Slo};
    use lockstep_proto::values::{Period, Timestamp};

    use super::*;

    /// A plan without phases.
    pub(crate) fn plan(serial: u64) -> Arc<SealedPlan> {
        let plan = CompiledPlan {
            format: FORMAT,
            plan: "empty".into(),
            serial,
            fleet_name: String::new(),
            not_before: Timestamp(0),
            expires: Timestamp(u64::MAX),
            deadline: Period::seconds(60),
            inputs: BTreeMap::new(),
            fleet: BTreeMap::new(),
            phases: vec![],
            after_rollback: None,
            max_failures: None,
            notices: vec![],
            slo: Slo::default(),
            signoff: vec![],
        };
        Arc::new(seal::seal(plan).unwrap())
    }

    #[test]
    fn a_plan_is_found_again_with_its_first_source() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(1);
        let blobs = Blobs::open(dir.path().to_owned()).unwrap();
        blobs.store_plan(&plan, "phases: []").unwrap();
        blobs.store_plan(&plan, "something else").unwrap();
        let blobs = Blobs::open(dir.path().to_owned()).unwrap();
        assert_eq!(blobs.plan(plan.digest()).unwrap(), Some(Arc::clone(&plan)));
        let bytes = blobs.plan_bytes(plan.digest()).unwrap().unwrap();
        assert_eq!(bytes, plan.bytes());
        assert_eq!(blobs.source(plan.digest()).unwrap(), "phases: []");
        assert_eq!(blobs.plan(Digest::of(b"other")).unwrap(), None);
    }

    #[test]
    fn a_damaged_plan_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(1);
        let blobs = Blobs::open(dir.path().to_owned()).unwrap();
        blobs.store_plan(&plan, "").unwrap();
        let mut bytes = plan.bytes().to_vec();
        bytes[30] ^= 1;
        fs::write(dir.path().join(plan.digest().hex()), bytes).unwrap();
        let blobs = Blobs::open(dir.path().to_owned()).unwrap();
        assert!(matches!(
            blobs.plan(plan.digest()),
            Err(BlobError::Damaged { .. })
        ));
    }
}
