//! Whose signatures this host asks for: the part of the policy that says whom it trusts.
//!
//! ```toml
//! [seal]
//! fleet = "prod"
//! threshold = 2
//! keys = ["ssh-ed25519 AAAA... ann", "sk-ssh-ed25519@openssh.com AAAA... ben"]
//! ```

use std::collections::BTreeSet;

use lockstep_proto::ids::PlanDigest;
use lockstep_proto::plan::check_fleet_name;
use lockstep_proto::seal;
use lockstep_proto::sshsig::NamedKey;
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
        assert!(parse("").unwrap().seal().is_none());
        assert!(parse(&table("prod", 2, &[1, 2])).unwrap().seal().is_some());
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
    fn a_plan_runs_where_enough_people_sealed_it_for_this_fleet() {
        let policy = parse(&table("prod", 2, &[1, 2, 3])).unwrap();
        let seal = policy.seal().unwrap();
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
