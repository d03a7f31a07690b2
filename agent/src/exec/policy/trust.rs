//! Whose signatures this host asks for: the part of the policy that says whom it trusts.
//!
//! ```toml
//! [seal]
//! fleet = "prod"
//! threshold = 2
//! keys = ["ssh-ed25519 AAAA... ann", "sk-ssh-ed25519@openssh.com AAAA... ben"]
//! ```
//!
//! ```toml
//! approvals = "signed"
//!
//! [[approver]]
//! name = "bob"
//! groups = ["dba"]
//! key = "ssh-ed25519 AAAA..."
//! ```
//!
//! ```toml
//! [[break_glass]]
//! name = "ira"
//! key = "ssh-ed25519 AAAA..."
//! ```
//!
//! ```toml
//! bindings = "signed"
//!
//! [[evidence]]
//! host = "db-1"
//! key = "ssh-ed25519 AAAA..."
//! ```

use std::collections::BTreeSet;

use lockstep_proto::ids::{HostId, PlanDigest};
use lockstep_proto::plan::check_fleet_name;
use lockstep_proto::seal;
use lockstep_proto::sshsig::{NamedKey, PublicKey};
use lockstep_proto::trust::Keyring;
use serde::Deserialize;
use toml::Spanned;

/// What is wrong, and where in the file, in bytes.
type Wrong = (usize, String);

/// The table as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenSeal {
    fleet: Spanned<String>,
    threshold: Spanned<usize>,
    keys: Vec<Spanned<String>>,
}

/// An approver as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenApprover {
    name: Spanned<String>,
    groups: Vec<String>,
    key: Spanned<String>,
}

/// Somebody who may break the glass of a gate as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenBreaker {
    name: Spanned<String>,
    key: Spanned<String>,
}

/// How the host knows of something that it has not seen itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Word {
    /// By the controller's word.
    #[default]
    Told,
    /// By what was signed.
    Signed,
}

/// A host's own key as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenEvidence {
    host: Spanned<HostId>,
    key: Spanned<String>,
}

/// A host whose signed facts count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Evidence {
    /// Its name.
    pub(crate) host: HostId,
    /// The key that its agent made.
    pub(crate) key: PublicKey,
}

/// Everything about trust as it is written.
#[derive(Debug)]
pub(super) struct WrittenTrust {
    pub(super) seal: Option<WrittenSeal>,
    pub(super) approvals: Word,
    pub(super) approver: Vec<WrittenApprover>,
    pub(super) break_glass: Vec<WrittenBreaker>,
    pub(super) bindings: Word,
    pub(super) evidence: Vec<WrittenEvidence>,
}

/// Whose signatures the host asks for.
#[derive(Debug, Default)]
pub(crate) struct Trust {
    seal: Option<Seal>,
    approvals: Word,
    approvers: Vec<Approver>,
    breakers: Vec<Breaker>,
    bindings: Word,
    evidence: Vec<Evidence>,
}

impl WrittenTrust {
    pub(super) fn check(self) -> Result<Trust, Wrong> {
        let Self {
            seal,
            approvals,
            approver,
            break_glass,
            bindings,
            evidence,
        } = self;
        Ok(Trust {
            seal: seal.map(WrittenSeal::check).transpose()?,
            approvals,
            approvers: check_approvers(approver)?,
            breakers: check_breakers(break_glass)?,
            bindings,
            evidence: check_evidence(evidence)?,
        })
    }
}

impl Trust {
    /// The seal that plans must have; none if they need none.
    pub(crate) fn seal(&self) -> Option<&Seal> {
        self.seal.as_ref()
    }

    /// The people whose signed approvals count; none if the host takes the controller's word.
    pub(crate) fn approvers(&self) -> Option<&[Approver]> {
        (self.approvals == Word::Signed).then_some(&self.approvers)
    }

    /// The people two of whom may break the glass of a gate.
    pub(crate) fn breakers(&self) -> &[Breaker] {
        &self.breakers
    }

    /// The people whose word on an outcome counts.
    pub(crate) fn people(&self) -> &[Approver] {
        &self.approvers
    }

    /// The hosts whose signed facts count; none if the host takes the controller's word.
    pub(crate) fn evidence(&self) -> Option<&[Evidence]> {
        (self.bindings == Word::Signed).then_some(&self.evidence)
    }
}

fn check_evidence(written: Vec<WrittenEvidence>) -> Result<Vec<Evidence>, Wrong> {
    let mut evidence: Vec<Evidence> = Vec::new();
    for WrittenEvidence { host, key } in written {
        let public = read_key(&key)?.key;
        if public.is_on_token() {
            let at = key.span().start;
            return Err((at, "an agent's own key is not on a token".to_owned()));
        }
        let at = host.span().start;
        let host = host.into_inner();
        if evidence.iter().any(|other| other.host == host) {
            return Err((at, format!("{host} has two keys")));
        }
        evidence.push(Evidence { host, key: public });
    }
    Ok(evidence)
}

/// Somebody whose signed approvals count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Approver {
    /// As in the operator's certificate.
    pub(crate) name: String,
    /// What the person may approve.
    pub(crate) groups: BTreeSet<String>,
    /// The person's key.
    pub(crate) key: PublicKey,
}

fn check_approvers(written: Vec<WrittenApprover>) -> Result<Vec<Approver>, Wrong> {
    let mut approvers: Vec<Approver> = Vec::new();
    for WrittenApprover { name, groups, key } in written {
        let public = read_key(&key)?.key;
        if approvers.iter().any(|other| other.key == public) {
            let at = key.span().start;
            return Err((at, "two approvers have the same key".to_owned()));
        }
        approvers.push(Approver {
            name: name.into_inner(),
            groups: groups.into_iter().collect(),
            key: public,
        });
    }
    Ok(approvers)
}

/// Somebody who may, with another one, break the glass of a gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Breaker {
    /// As in the operator's certificate.
    pub(crate) name: String,
    /// The person's key.
    pub(crate) key: PublicKey,
}

fn check_breakers(written: Vec<WrittenBreaker>) -> Result<Vec<Breaker>, Wrong> {
    let mut breakers: Vec<Breaker> = Vec::new();
    for WrittenBreaker { name, key } in written {
        let public = read_key(&key)?.key;
        if breakers.iter().any(|other| other.key == public) {
            let at = key.span().start;
            return Err((
                at,
                "two people who break the glass have the same key".to_owned(),
            ));
        }
        let at = name.span().start;
        let name = name.into_inner();
        if breakers.iter().any(|other| other.name == name) {
            return Err((at, format!("{name} has two keys, and is one person")));
        }
        breakers.push(Breaker { name, key: public });
    }
    Ok(breakers)
}

/// The seal that a plan must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seal {
    fleet: String,
    keyring: Keyring,
}

impl WrittenSeal {
    /// The seal, or what is wrong with the table.
    pub(super) fn check(self) -> Result<Seal, Wrong> {
        let Self {
            fleet,
            threshold,
            keys,
        } = self;
        check_fleet_name(fleet.get_ref()).map_err(|why| (fleet.span().start, why))?;
        let keys: Vec<NamedKey> = keys.iter().map(read_key).collect::<Result<_, _>>()?;
        let at = threshold.span().start;
        let keyring = Keyring::new(threshold.into_inner(), keys);
        let keyring = keyring.map_err(|error| (at, format!("`[seal]`: {error}")))?;
        Ok(Seal {
            fleet: fleet.into_inner(),
            keyring,
        })
    }
}

fn read_key(line: &Spanned<String>) -> Result<NamedKey, Wrong> {
    let key = line.get_ref().parse();
    key.map_err(|error| (line.span().start, format!("a key cannot be used: {error}")))
}

impl Seal {
    /// The fleet that this host is of.
    pub(crate) fn fleet(&self) -> &str {
        &self.fleet
    }

    /// Refuses a plan that is of another fleet, or that too few trusted people have signed; who
    /// has signed it.
    pub(crate) fn check(
        &self,
        fleet: &str,
        plan: PlanDigest,
        signatures: &[String],
    ) -> Result<BTreeSet<String>, String> {
        if fleet != self.fleet {
            let own = &self.fleet;
            return Err(match fleet {
                "" => format!(
                    "the plan names no fleet, and this host takes only plans of `{own}`; compile \
                     it with `--fleet {own}`, then let it be signed"
                ),
                other => format!("the plan is of the fleet `{other}`, this host of `{own}`"),
            });
        }
        let message = seal::message(plan);
        let signers = self.check_signed(seal::NAMESPACE, message.as_bytes(), signatures);
        signers.map_err(|why| {
            format!("the plan is not sealed as this host asks for: {why}; see `lockstep sign`")
        })
    }

    /// Refuses what too few trusted people have signed.
    pub(crate) fn check_signed(
        &self,
        namespace: &str,
        message: &[u8],
        signatures: &[impl AsRef<[u8]>],
    ) -> Result<BTreeSet<String>, String> {
        let checked = self.keyring.check(namespace, message, signatures);
        checked.map_err(|error| error.to_string())
    }

    /// In a few words.
    pub(crate) fn describe(&self) -> String {
        format!(
            "plans of `{}` signed by {} of {} keys",
            self.fleet,
            self.keyring.threshold(),
            self.keyring.keys().len()
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use lockstep_proto::ids::Digest;
    use lockstep_proto::sshsig::SigningKey;

    use super::super::{Policy, PolicyError};
    use super::*;

    pub(crate) fn key(seed: u8) -> SigningKey {
        SigningKey::from_seed(&[seed; 32])
    }

    /// The table for a fleet, a number of signatures, and signers by seed.
    pub(crate) fn table(fleet: &str, threshold: usize, seeds: &[u8]) -> String {
        let line = |seed: &u8| format!("\"{} signer-{seed}\"", key(*seed).public());
        let keys: Vec<String> = seeds.iter().map(line).collect();
        format!(
            "[seal]\nfleet = \"{fleet}\"\nthreshold = {threshold}\nkeys = [\n{}\n]\n",
            keys.join(",\n")
        )
    }

    fn parse(text: &str) -> Result<Policy, PolicyError> {
        Policy::parse(Path::new("policy.toml"), text)
    }

    fn refused(text: &str) -> String {
        crate::errors::chain(&parse(text).unwrap_err())
    }

    #[test]
    fn a_table_that_cannot_hold_is_refused_with_its_line() {
        assert!(parse("").unwrap().trust().seal().is_none());
        assert!(
            parse(&table("prod", 2, &[1, 2]))
                .unwrap()
                .trust()
                .seal()
                .is_some()
        );
        let said = refused(&table("prod", 3, &[1, 2]));
        assert!(
            said.contains("line 3") && said.contains("there are 2"),
            "{said}"
        );
        let said = refused(&table("prod", 0, &[1]));
        assert!(said.contains("at least 1"), "{said}");
        let said = refused(&table("no name", 1, &[1]));
        assert!(
            said.contains("line 2") && said.contains("no name"),
            "{said}"
        );
        let said = refused(&table("prod", 1, &[1]).replace("AAAA", "BBBB"));
        assert!(said.contains("line 5"), "{said}");
        let said = refused(&format!("{}unknown = 1\n", table("prod", 1, &[1])));
        assert!(said.contains("unknown"), "{said}");
    }

    #[test]
    fn approvers_are_told_apart_by_their_keys() {
        let person = |name: &str, seed: u8| {
            let key = key(seed).public();
            format!("[[approver]]\nname = \"{name}\"\ngroups = [\"dba\"]\nkey = \"{key}\"\n")
        };
        let told = parse(&person("ann", 1)).unwrap();
        assert!(told.trust().approvers().is_none());
        let signed = format!("approvals = \"signed\"\n{}", person("ann", 1));
        assert_eq!(
            parse(&signed).unwrap().trust().approvers().unwrap().len(),
            1
        );
        let said = refused(&format!("{signed}{}", person("ben", 1)));
        assert!(said.contains("line 9"), "{said}");
        assert!(refused("approvals = \"no\"").contains("signed"));
        let breaker = |name: &str, seed: u8| {
            let key = key(seed).public();
            format!("[[break_glass]]\nname = \"{name}\"\nkey = \"{key}\"\n")
        };
        let two = format!("{}{}", breaker("ira", 1), breaker("joe", 2));
        assert_eq!(parse(&two).unwrap().trust().breakers().len(), 2);
        for other in [breaker("eve", 1), breaker("ira", 3)] {
            let said = refused(&format!("{two}{other}"));
            assert!(
                said.contains("same key") || said.contains("one person"),
                "{said}"
            );
        }
        let key = key(1).public();
        let host = format!("[[evidence]]\nhost = \"db-1\"\nkey = \"{key}\"\n");
        assert!(parse(&host).unwrap().trust().evidence().is_none());
        let signed = format!("bindings = \"signed\"\n{host}");
        assert_eq!(parse(&signed).unwrap().trust().evidence().unwrap().len(), 1);
        let said = refused(&format!("{signed}{host}"));
        assert!(
            said.contains("line 6") && said.contains("two keys"),
            "{said}"
        );
    }

    #[test]
    fn a_plan_runs_where_enough_people_sealed_it_for_this_fleet() {
        let policy = parse(&table("prod", 2, &[1, 2, 3])).unwrap();
        let seal = policy.trust().seal().unwrap();
        let digest = Digest::of(b"plan");
        let sign = |seed: u8| key(seed).sign(seal::NAMESPACE, seal::message(digest).as_bytes());
        let check = |fleet: &str, signatures: &[String]| seal.check(fleet, digest, signatures);
        assert_eq!(check("prod", &[sign(1), sign(3)]).unwrap().len(), 2);
        for signatures in [
            vec![],
            vec![sign(1)],
            vec![sign(1), sign(1)],
            vec![sign(1), sign(9)],
            vec![
                sign(1),
                key(2).sign("git", seal::message(digest).as_bytes()),
            ],
            vec![
                sign(1),
                key(2).sign(seal::NAMESPACE, seal::message(Digest::of(b"x")).as_bytes()),
            ],
        ] {
            let why = check("prod", &signatures).unwrap_err();
            assert!(why.contains("of 2 signatures"), "{why}");
        }
        let both = [sign(1), sign(2)];
        assert!(check("test", &both).unwrap_err().contains("`test`"));
        assert!(check("", &both).unwrap_err().contains("--fleet prod"));
    }
}
