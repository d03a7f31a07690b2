//! A journal that was put back to an earlier time does not know which serials were licensed since.
//! Where plans must be sealed, the host then takes no order until people have signed from which
//! serials on it may go on.

use std::collections::BTreeSet;

use lockstep_proto::floor::{self, Floor, InvalidFloor};
use lockstep_proto::ids::{Digest, InstanceId};
use lockstep_proto::sshsig;

use super::machine::Memory;
use super::{Exec, Refusal, any_bytes, wall_clock};
use crate::config::Config;
use crate::identity::{IdentityError, StateLock};
use crate::journal::{AppendError, Journal, JournalError, Need, Record};

use super::policy::{Policy, PolicyError};

/// A floor that is not taken. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnchorError {
    /// Another process has the state directory.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal cannot be written.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The policy cannot be used.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Nobody's signature would be asked for.
    #[error("the policy has no table `[seal]`: it does not say whose signatures count")]
    NoSeal,
    /// There is nothing to anchor.
    #[error("there is no journal: start the agent once, then stop it")]
    NoJournal,
    /// It is no floor.
    #[error(transparent)]
    Invalid(#[from] InvalidFloor),
    /// It is for something else, or has expired, or is not signed.
    #[error("{0}")]
    Refused(String),
}

/// What has been anchored.
#[derive(Debug)]
pub(crate) struct Anchored {
    /// Who signed.
    pub(crate) signers: BTreeSet<String>,
    /// The instance from now on.
    pub(crate) instance: InstanceId,
}

/// Takes a signed floor, while no agent runs.
pub(crate) fn anchor(
    config: &Config,
    floor: &[u8],
    signatures: &str,
) -> Result<Anchored, AnchorError> {
    let refused = |why: String| Err(AnchorError::Refused(why));
    if !config.state_dir.join("journal").exists() {
        return Err(AnchorError::NoJournal);
    }
    let _lock = StateLock::take(&config.state_dir)?;
    let policy = Policy::load(config.policy_path())?;
    let seal = policy.trust().seal().ok_or(AnchorError::NoSeal)?;
    let mut memory = Memory::default();
    let mut journal = Journal::open(&config.state_dir, |at, record| memory.apply(at, &record))?;
    let Some((_, own)) = memory.opened.clone() else {
        return Err(AnchorError::NoJournal);
    };
    let statement = Floor::read(floor)?;
    let words = [
        ("fleet", statement.fleet.as_str(), seal.fleet()),
        ("host", statement.host.as_str(), config.host.as_str()),
        ("instance", statement.instance.as_str(), own.as_str()),
    ];
    if let Some((what, said, here)) = words.into_iter().find(|(_, said, here)| said != here) {
        let said = said.escape_debug();
        return refused(format!(
            "the floor is for the {what} `{said}`, and here it is `{here}`"
        ));
    }
    if wall_clock() > statement.expires {
        let late = wall_clock().since(statement.expires);
        return refused(format!(
            "the floor expired {late} ago by this host's clock; make a new one with `lockstep \
             floor`"
        ));
    }
    let signatures = match sshsig::split(signatures) {
        Ok(signatures) => signatures,
        Err(error) => return refused(format!("the file of signatures: {error}")),
    };
    let signers = match seal.check_signed(floor::NAMESPACE, floor, &signatures) {
        Ok(signers) => signers,
        Err(why) => {
            return refused(format!(
                "the floor is not signed as this host asks for: {why}"
            ));
        }
    };
    let instance = InstanceId::from_random(any_bytes());
    let anchored = Record::Anchored {
        floor: Digest::of(floor),
        raised: statement.into(),
        instance: instance.clone(),
    };
    journal.append(&[anchored], Need::Closes)?;
    Ok(Anchored { signers, instance })
}

impl Exec {
    /// Whether the host asks for sealed plans. A policy that cannot be read does not say.
    pub(super) fn is_sealed(&self) -> Result<bool, String> {
        let policy = self.policy()?;
        Ok(policy.trust().seal().is_some())
    }

    /// From here on no order is taken, also after a restart.
    pub(super) fn quarantine(&mut self, acknowledged: u64) -> Result<(), AppendError> {
        if self.memory.quarantined.is_some() {
            return Ok(());
        }
        self.commit(vec![Record::Quarantined { acknowledged }], Need::Closes)
    }

    /// Whether no order is taken; then the controller has been told so.
    pub(super) fn is_quarantined(&mut self) -> bool {
        let Some(acknowledged) = self.memory.quarantined else {
            return false;
        };
        let config = &self.host.config;
        let policy = self.policy().ok();
        let fleet = policy.as_ref().and_then(|policy| policy.trust().seal());
        let fleet = fleet.map_or("FLEET", |seal| seal.fleet());
        let why = format!(
            "this host is quarantined: a controller had {acknowledged} reports of this host, and its \
             journal had fewer: the state directory was put back to an earlier time, or lost, and \
             which serials were licensed since is not known here. Let people sign from where it may go \
             on: `lockstep floor --fleet {fleet} --host {} --instance {} -o floor.json`, `lockstep \
             sign floor.json --key KEY`; then stop this agent and run `lockstep-agent anchor \
             --floor floor.json --sig floor.json.sig`",
            config.host, self.instance
        );
        self.refuse_session(Refusal::Ahead, why);
        true
    }
}
