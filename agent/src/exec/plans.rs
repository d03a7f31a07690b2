//! Plans on the disk: the compiled plan by its digest, and, for each rollout, the steps that this
//! host consented to, with its own variables put in. Later changes of the host's configuration do
//! not change what was consented to.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use lockstep_proto::ids::{Digest, PlanDigest, RolloutId};
use lockstep_proto::json;
use lockstep_proto::plan::CompiledPlan;
use lockstep_proto::seal::{self, InvalidPlan, SealedPlan};
use lockstep_proto::values::Timestamp;
use serde::{Deserialize, Serialize};

use super::approvals::Gates;
use super::consent::{self, HeldStep};
use super::licences::Serial;
use super::policy::Policy;
use crate::faults::reached;
use crate::identity::{replace_file, write_file};

/// Compiled plans that are kept. Those of dry runs go when there are more.
const KEPT: usize = 16;

/// The host's part of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeldPlan {
    /// No step is begun afterwards but to undo.
    pub(crate) expires: Timestamp,
    /// The steps meant for this host.
    pub(crate) steps: Vec<HeldStep>,
    /// The seal that came with the plan; none if it has no signatures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seal: Option<HeldSeal>,
    /// The plan's gates; none from an agent that did not keep them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gates: Option<Gates>,
}

/// The seal that came with a plan, and what is needed to find its steps in it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeldSeal {
    /// Fleet, name and serial of the plan.
    pub(crate) of: Serial,
    /// Armoured.
    pub(crate) signatures: Vec<String>,
    /// The host's labels at the time of its consent.
    pub(crate) labels: BTreeMap<String, String>,
    /// Its variables.
    pub(crate) vars: BTreeMap<String, String>,
}

/// Fleet, name and serial of a plan.
pub(crate) fn serial_of(plan: &CompiledPlan) -> Serial {
    Serial {
        fleet: plan.fleet_name.clone(),
        plan: plan.plan.clone(),
        number: plan.serial,
    }
}

/// Where plans are kept.
pub(crate) fn dir(state_dir: &Path) -> PathBuf {
    state_dir.join("plans")
}

fn compiled(state_dir: &Path, digest: PlanDigest) -> PathBuf {
    dir(state_dir).join(format!("{}.json", digest.hex()))
}

fn held(state_dir: &Path, rollout: &RolloutId) -> PathBuf {
    dir(state_dir).join(format!("{rollout}.steps.json"))
}

/// A compiled plan that is on the disk. One that has changed there is as good as none.
pub(crate) fn load(state_dir: &Path, digest: PlanDigest) -> Option<SealedPlan> {
    let bytes = std::fs::read(compiled(state_dir, digest)).ok()?;
    seal::open_expecting(&bytes, digest)
        .inspect_err(|error| tracing::warn!(%error, "a stored plan is not used"))
        .ok()
}

/// Checks and keeps a compiled plan that has arrived. `held` is kept whatever else is offered.
pub(crate) fn store(
    state_dir: &Path,
    digest: PlanDigest,
    bytes: &[u8],
    held: Option<PlanDigest>,
) -> Result<SealedPlan, StoreError> {
    let sealed = seal::open_expecting(bytes, digest)?;
    forget_old(state_dir, held)?;
    // Not synchronised: what a power loss tears has another digest, and is asked for again.
    let path = compiled(state_dir, digest);
    let fresh = path.with_extension("new");
    write_file(&fresh, bytes)?;
    std::fs::rename(fresh, path)?;
    reached("file: renamed");
    Ok(sealed)
}

/// A plan that is not kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// It is not what was asked for.
    #[error(transparent)]
    Invalid(#[from] InvalidPlan),
    /// It cannot be written.
    #[error("the plan cannot be stored")]
    Io(#[from] io::Error),
}

fn forget_old(state_dir: &Path, held: Option<PlanDigest>) -> io::Result<()> {
    let held = held.map(|digest| compiled(state_dir, digest));
    let mut plans: Vec<_> = std::fs::read_dir(dir(state_dir))?
        .flatten()
        .filter(|entry| !entry.file_name().to_string_lossy().contains(".steps."))
        .filter(|entry| Some(entry.path()) != held)
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    plans.sort();
    let surplus = (plans.len() + 1).saturating_sub(KEPT);
    for (_, path) in plans.into_iter().take(surplus) {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

impl HeldPlan {
    /// Keeps it for a rollout; answers with the digest that the hold records.
    pub(crate) fn write(&self, state_dir: &Path, rollout: &RolloutId) -> io::Result<Digest> {
        let text = serde_json::to_vec(self).expect("steps are plain data");
        replace_file(&held(state_dir, rollout), &text)?;
        Ok(Digest::of(&text))
    }

    /// Reads what was kept, if it is still the same. If its steps are not those of the plan that
    /// was sealed, it has no seal: then they can only be undone where a seal is asked for.
    pub(crate) fn read(
        state_dir: &Path,
        rollout: &RolloutId,
        expected: Digest,
        plan: PlanDigest,
    ) -> io::Result<Self> {
        let path = held(state_dir, rollout);
        let text = std::fs::read(&path)?;
        if Digest::of(&text) != expected {
            return Err(io::Error::other(format!("{} was changed", path.display())));
        }
        let mut held: Self = json::read(&text).map_err(io::Error::other)?;
        if held.seal.is_some() && !held.is_of(state_dir, plan) {
            tracing::error!(%rollout, plan = %plan.short(), "the plan that this host consented to \
                cannot be read, or its steps are others: they count as not sealed");
            held.seal = None;
        }
        Ok(held)
    }

    /// Refuses a plan that is not sealed as the host's policy asks for now.
    pub(super) fn check_seal(&self, policy: &Policy, plan: PlanDigest) -> Result<(), String> {
        let Some(asked) = policy.trust().seal() else {
            return Ok(());
        };
        match &self.seal {
            Some(seal) => asked.check(&seal.of.fleet, plan, &seal.signatures),
            None => asked.check(asked.fleet(), plan, &[]),
        }?;
        Ok(())
    }

    /// Whether these are the steps of a plan that is on the disk.
    fn is_of(&self, state_dir: &Path, plan: PlanDigest) -> bool {
        let (Some(seal), Some(sealed)) = (&self.seal, load(state_dir, plan)) else {
            return false;
        };
        let plan = sealed.plan();
        let steps = consent::steps_of(plan, &seal.labels, &seal.vars);
        plan.expires == self.expires
            && seal.of == serial_of(plan)
            && steps == Ok(self.steps.clone())
    }

    /// Forgets what was kept for a rollout that has ended.
    pub(crate) fn forget(state_dir: &Path, rollout: &RolloutId) {
        reached("held steps: to be removed");
        let _ = std::fs::remove_file(held(state_dir, rollout));
        reached("held steps: removed");
    }
}

/// Removes what an agent that was killed left half written, or was about to forget: all that was
/// kept for rollouts but the one that the host holds itself for.
pub(crate) fn remove_left_over(state_dir: &Path, held_for: Option<&RolloutId>) {
    let kept = held_for.map(|rollout| held(state_dir, rollout));
    for entry in std::fs::read_dir(dir(state_dir))
        .into_iter()
        .flatten()
        .flatten()
    {
        let (name, path) = (entry.file_name(), entry.path());
        let name = name.to_string_lossy();
        let stale = name.ends_with(".steps.json") && Some(&path) != kept.as_ref();
        if stale || name.ends_with(".new") {
            let _ = std::fs::remove_file(path);
        }
    }
}
