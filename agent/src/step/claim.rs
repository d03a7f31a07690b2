//! Claims: at most one process ever acts for a step key (INV-1).

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use lockstep_proto::ids::BootId;
use lockstep_proto::json;
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::{Keep, StepDir};
use crate::faults::{planted, reached};
use crate::journal::{sync_all, sync_dir};

/// Who claimed an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    /// The process, which leads a session of its own.
    pub(crate) pid: i32,
    /// When it started, in the kernel's ticks since boot: a process id alone may be used again.
    pub(crate) started: u64,
    /// The boot that both belong to.
    pub(crate) boot: BootId,
    /// Whether it was claimed to act; false if it was exec, so that nobody ever will.
    #[serde(default = "acts")]
    pub(crate) acts: bool,
}

/// A claim without the word is of a release whose exec said the same as a step process.
fn acts() -> bool {
    true
}

/// What came of claiming.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Claimed {
    /// The caller has it, and nobody else ever will.
    Now,
    /// It was claimed before: the caller must not act.
    Before,
}

impl Claim {
    /// A claim of the calling process, which is to act.
    pub(crate) fn own(boot: BootId) -> io::Result<Self> {
        let pid = own_pid();
        let started =
            start_time(pid).ok_or_else(|| io::Error::other("/proc does not show this process"))?;
        Ok(Self {
            pid,
            started,
            boot,
            acts: true,
        })
    }

    /// A claim of the calling process, by which the attempt never begins.
    pub(crate) fn never(boot: BootId) -> io::Result<Self> {
        let own = Self::own(boot)?;
        Ok(Self { acts: false, ..own })
    }

    /// Claims the attempt for ever, and durably if its files are kept so. Whoever sees the claim sees
    /// all of it: it is written under a name of its own, and whoever links that first has claimed.
    pub(crate) fn take(&self, dir: &StepDir, keep: Keep) -> io::Result<Claimed> {
        if dir.claim().exists() {
            return Ok(Claimed::Before);
        }
        let own = dir.claim_of(self.pid);
        let linked = self.write(&own, keep).and_then(|()| {
            reached("claim: to be made");
            std::fs::hard_link(&own, dir.claim())
        });
        if linked.is_ok() {
            reached("claim: made");
        }
        // Its room is wanted where the disk is full; the claim itself stays.
        let removed = std::fs::remove_file(&own);
        match linked {
            Ok(()) => removed?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Ok(Claimed::Before);
            }
            Err(error) => return Err(error),
        }
        if keep.is_durable() && !planted!(ClaimSkipsSync) {
            sync_dir(dir.path())?;
        }
        reached("claim: taken");
        Ok(Claimed::Now)
    }

    fn write(&self, path: &Path, keep: Keep) -> io::Result<()> {
        // Another process of this id may have been killed here. Overwritten, it could be the claim.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        reached("claim: to be written");
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        let text = serde_json::to_vec(self).expect("a claim is plain data");
        file.write_all(&text)?;
        reached("claim: written");
        if keep.is_durable() && !planted!(ClaimSkipsSync) {
            sync_all(&file, path)?;
        }
        reached("claim: synchronised");
        Ok(())
    }

    /// The claim of an attempt; `None` if it is not claimed.
    pub(crate) fn read(dir: &StepDir) -> Option<Self> {
        json::read(&std::fs::read(dir.claim()).ok()?).ok()
    }

    /// Whether the process that claimed is alive.
    pub(crate) fn is_alive(&self, boot: &BootId) -> bool {
        (self.boot == *boot || planted!(IgnoreBoot)) && start_time(self.pid) == Some(self.started)
    }

    /// The processes of the attempt that are alive: those of its session. Daemons that left it,
    /// such as a service that the step started, do not count.
    pub(crate) fn alive(&self, boot: &BootId) -> Vec<Pid> {
        if !self.acts || (self.boot != *boot && !planted!(IgnoreBoot)) {
            return vec![];
        }
        // Another process has the id now, so that the session it names is not ours.
        if start_time(self.pid).is_some_and(|started| started != self.started) {
            return vec![];
        }
        #[cfg(feature = "faults")]
        if let Some(world) = crate::simulation::world() {
            let own = world.started(self.pid);
            let own = own.and_then(|_| Pid::from_raw(self.pid));
            return own.into_iter().collect();
        }
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return vec![];
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| stat(*pid).is_some_and(|stat| stat.session == self.pid && !stat.zombie))
            .filter_map(Pid::from_raw)
            .collect()
    }
}

struct Stat {
    session: i32,
    started: u64,
    zombie: bool,
}

/// The fields of `/proc/PID/stat` that matter here.
fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name stands in parentheses and may hold anything, parentheses too.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Stat {
        zombie: matches!(*fields.first()?, "Z" | "X"),
        session: fields.get(3)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

fn own_pid() -> i32 {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return world.process();
    }
    rustix::process::getpid().as_raw_nonzero().get()
}

/// When a live process started.
fn start_time(pid: i32) -> Option<u64> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return world.started(pid);
    }
    stat(pid)
        .filter(|stat| !stat.zombie)
        .map(|stat| stat.started)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(byte: u8) -> BootId {
        BootId::from_bytes([byte; 8])
    }

    #[test]
    fn an_attempt_is_claimed_once() {
        let root = tempfile::tempdir().unwrap();
        let dir = StepDir::at(root.path().to_owned());
        let claim = Claim::own(boot(1)).unwrap();
        assert_eq!(claim.take(&dir, Keep::Durably).unwrap(), Claimed::Now);
        assert_eq!(claim.take(&dir, Keep::Durably).unwrap(), Claimed::Before);
        assert_eq!(Claim::read(&dir), Some(claim));
    }

    #[test]
    fn a_claim_is_whole_or_absent_whenever_the_power_goes() {
        use rand::SeedableRng as _;
        let root = tempfile::tempdir().unwrap();
        let dir = StepDir::at(root.path().to_owned());
        let watch = lockstep_tests::power::Watch::begin(root.path());
        let claim = Claim::own(boot(1)).unwrap();
        claim.take(&dir, Keep::Durably).unwrap();
        let moments = watch.end();
        let mut random = rand::rngs::StdRng::seed_from_u64(1);
        let mut found = [0; 2];
        for moment in moments.iter().cycle().take(300) {
            let cut = tempfile::tempdir().unwrap();
            moment.cut(&mut random, cut.path());
            let cut = StepDir::at(cut.path().to_owned());
            let there = cut.claim().exists();
            assert_eq!(Claim::read(&cut), there.then(|| claim.clone()));
            found[usize::from(there)] += 1;
        }
        assert!(found.iter().all(|count| *count > 20), "{found:?}");
        let last = moments.last().unwrap();
        let cut = tempfile::tempdir().unwrap();
        last.cut(&mut random, cut.path());
        assert!(cut.path().join("claim").exists(), "INV-1: it is durable");
    }

    #[test]
    fn a_claim_that_was_cut_short_is_none_and_is_no_hindrance() {
        let root = tempfile::tempdir().unwrap();
        let dir = StepDir::at(root.path().to_owned());
        let claim = Claim::own(boot(1)).unwrap();
        // A process of the same id was killed while it wrote.
        std::fs::write(dir.claim_of(claim.pid), "{\"pi").unwrap();
        assert_eq!(Claim::read(&dir), None);
        assert_eq!(claim.take(&dir, Keep::Durably).unwrap(), Claimed::Now);
        // One was killed between its claim and what it had to tidy up.
        std::fs::hard_link(dir.claim(), dir.claim_of(claim.pid)).unwrap();
        let other = Claim::never(boot(2)).unwrap();
        assert_eq!(other.take(&dir, Keep::Durably).unwrap(), Claimed::Before);
        assert_eq!(Claim::read(&dir), Some(claim));
    }

    #[test]
    fn a_process_of_another_boot_or_with_a_used_id_is_gone() {
        let claim = Claim::own(boot(1)).unwrap();
        assert!(claim.is_alive(&boot(1)));
        assert!(!claim.is_alive(&boot(2)));
        let reused = Claim {
            started: claim.started + 1,
            ..claim
        };
        assert!(!reused.is_alive(&boot(1)));
        assert!(reused.alive(&boot(1)).is_empty());
    }
}
