//! Evidence: the host signs what its steps prove, and takes from orders only what the host signed
//! that proved it, where its policy asks for that.

use std::fs::hard_link;
use std::io;
use std::path::{Path, PathBuf};

use lockstep_proto::evidence::{self, LOSS_NAMESPACE, NAMESPACE, RESOLVE_NAMESPACE};
use lockstep_proto::ids::{Direction, HostId, LossId, PlanDigest};
use lockstep_proto::order::{Binding, Fact, Order};
use lockstep_proto::report::ReportBody;
use lockstep_proto::sshsig::{self, PublicKey, SigningKey};

use super::any_bytes;
use super::policy::Policy;
use crate::identity::write_durably;
use crate::journal::sync_dir;

/// The host's own key, made when there is none.
pub(crate) fn own_key(state_dir: &Path) -> io::Result<SigningKey> {
    let path = state_dir.join("evidence.key");
    if let Some(key) = read(&path)? {
        return Ok(key);
    }
    let fresh = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
    let seed = [any_bytes(), any_bytes(), any_bytes(), any_bytes()].concat();
    write_durably(&fresh, &seed)?;
    // Whoever links first has made it: two that start together agree.
    let linked = hard_link(&fresh, &path);
    std::fs::remove_file(&fresh)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => sync_dir(state_dir)?,
    }
    let invalid = || io::Error::other(format!("{} is no key", path.display()));
    read(&path)?.ok_or_else(invalid)
}

/// Removes what an agent that was killed left of a key that it was making.
pub(super) fn remove_left_over(state_dir: &Path) {
    for entry in std::fs::read_dir(state_dir).into_iter().flatten().flatten() {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with("evidence.key.")
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn read(path: &Path) -> io::Result<Option<SigningKey>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let seed = bytes.as_slice().try_into();
    let seed = seed.map_err(|_| io::Error::other(format!("{} is no key", path.display())))?;
    Ok(Some(SigningKey::from_seed(seed)))
}

/// Signs the facts of an attempt that may be bound to orders.
pub(super) fn sign(key: &SigningKey, plan: PlanDigest, body: &mut ReportBody) {
    let ReportBody::Finished {
        key: origin,
        facts,
        signatures,
        ..
    } = body
    else {
        return;
    };
    if !facts.iter().any(Fact::may_be_bound) {
        return;
    }
    let sign = |fact: &Fact| {
        if fact.may_be_bound() {
            hex::encode(key.sign_bare(NAMESPACE, &evidence::statement(plan, origin, fact)))
        } else {
            String::new()
        }
    };
    *signatures = facts.iter().map(sign).collect();
}

/// Refuses an order with a fact that nobody signed who could know it.
pub(super) fn check(
    policy: &Policy,
    own: (&HostId, &PublicKey),
    order: &Order,
) -> Result<(), String> {
    let Some(hosts) = policy.trust().evidence() else {
        return Ok(());
    };
    for binding in &order.bindings {
        let origin = &binding.origin;
        let refused = |why: String| format!("a fact that the order gives of {origin} is {why}");
        if origin.rollout != order.key.rollout {
            return Err(refused("of another rollout".to_owned()));
        }
        if order.key.direction == Direction::Do && origin.at > order.key.at {
            return Err(refused("of a step that comes after this one".to_owned()));
        }
        match &binding.fact {
            // Judged with the gate that it is of.
            Fact::Approved { .. } => {}
            Fact::Resolved { done, by } => {
                check_word(policy, order, binding, (*done, by)).map_err(refused)?;
            }
            Fact::LossAccepted { loss, by } => {
                check_loss(policy, order, binding, (loss, by)).map_err(refused)?;
            }
            fact => {
                let key = if origin.host == *own.0 {
                    Some(own.1)
                } else {
                    let known = hosts.iter().find(|known| known.host == origin.host);
                    known.map(|known| &known.key)
                };
                let key = key.ok_or_else(|| {
                    refused(format!(
                        "not known here; if it is right on this host, add `[[evidence]]` for {} \
                         to its policy",
                        origin.host
                    ))
                })?;
                check_fact(key, order.plan, binding, fact).map_err(refused)?;
            }
        }
    }
    Ok(())
}

fn check_fact(
    key: &PublicKey,
    plan: PlanDigest,
    binding: &Binding,
    fact: &Fact,
) -> Result<(), String> {
    let origin = &binding.origin;
    let signature = binding.signature.as_deref();
    let signature = signature.ok_or("not signed by its host")?;
    let signature = hex::decode(signature).map_err(|_| "not signed by its host")?;
    let statement = evidence::statement(plan, origin, fact);
    key.verify_bare(NAMESPACE, &statement, &signature)
        .map_err(|_| format!("not what {} has signed", origin.host))
}

/// A person's word on an outcome.
fn check_word(
    policy: &Policy,
    order: &Order,
    binding: &Binding,
    (done, by): (bool, &str),
) -> Result<(), String> {
    let statement = evidence::resolution(order.plan, &binding.origin, done, by);
    let signed = (RESOLVE_NAMESPACE, statement.as_slice());
    check_person(policy, binding, signed, by, "resolve")
}

/// A person's word on what an undo would lose.
fn check_loss(
    policy: &Policy,
    order: &Order,
    binding: &Binding,
    (loss, by): (&LossId, &str),
) -> Result<(), String> {
    let statement = evidence::acceptance(order.plan, &binding.origin, loss, by);
    let signed = (LOSS_NAMESPACE, statement.as_slice());
    check_person(policy, binding, signed, by, "accept-loss")
}

/// Whether an approver of this name has signed a statement.
fn check_person(
    policy: &Policy,
    binding: &Binding,
    (namespace, statement): (&str, &[u8]),
    by: &str,
    command: &str,
) -> Result<(), String> {
    let signature = binding.signature.as_deref();
    let signature =
        signature.ok_or_else(|| format!("not signed; see `lockstep {command} --sign`"))?;
    let key = sshsig::verify(signature.as_bytes(), namespace, statement)
        .map_err(|error| format!("a person's word, and of its signature is said: {error}"))?;
    let people = policy.trust().people();
    let known = people.iter().find(|person| person.key == key);
    match known {
        Some(person) if person.name == by => Ok(()),
        Some(person) => Err(format!("the word of {by}, signed by {}", person.name)),
        None => Err(format!(
            "signed with {}, which is no approver's key",
            key.fingerprint()
        )),
    }
}

#[cfg(test)]
mod tests {
    use lockstep_proto::ids::{Digest, Epoch, StepKey};
    use lockstep_proto::report::StepOutcome;
    use lockstep_proto::values::{Period, Timestamp};

    use super::super::policy::trust::tests::key;
    use super::*;

    fn policy() -> Policy {
        let [ann, db] = [1, 2].map(|seed| key(seed).public());
        let text = format!(
            "bindings = \"signed\"\n[[approver]]\nname = \"ann\"\ngroups = []\nkey = \"{ann}\"\n\
             [[evidence]]\nhost = \"db-1\"\nkey = \"{db}\"\n"
        );
        Policy::parse(Path::new("policy.toml"), &text).unwrap()
    }

    fn plan() -> PlanDigest {
        Digest::of(b"plan")
    }

    fn fenced(token: &str) -> Fact {
        Fact::Fenced {
            database: "sales".into(),
            fence: token.into(),
        }
    }

    fn origin(text: &str) -> StepKey {
        format!("ro_010101010101.0.0.do.{text}").parse().unwrap()
    }

    /// Signed as an agent does it.
    fn reported(seed: u8, origin: &StepKey, facts: Vec<Fact>) -> Vec<String> {
        let mut body = ReportBody::Finished {
            key: origin.clone(),
            outcome: StepOutcome::Unknown { why: String::new() },
            facts,
            took: Period(0),
            signatures: vec![],
        };
        sign(&key(seed), plan(), &mut body);
        match body {
            ReportBody::Finished { signatures, .. } => signatures,
            other => panic!("{other:?}"),
        }
    }

    fn taken(origin: StepKey, fact: Fact, signature: Option<String>) -> Result<(), String> {
        let order = Order {
            key: "ro_010101010101.1.0.do.1@app-1".parse().unwrap(),
            plan: plan(),
            epoch: Epoch { counter: 1, id: 1 },
            not_after: Timestamp(0),
            bindings: vec![Binding {
                origin,
                fact,
                signature,
            }],
        };
        let own = key(3).public();
        check(&policy(), (&"app-1".parse().unwrap(), &own), &order)
    }

    #[test]
    fn a_fact_is_taken_from_the_host_that_proved_it() {
        let db = origin("1@db-1");
        let note = Fact::Note {
            name: "a".into(),
            value: "b".into(),
        };
        let signatures = reported(2, &db, vec![note, fenced("t")]);
        assert_eq!(signatures[0], "");
        let good = || Some(signatures[1].clone());
        taken(db.clone(), fenced("t"), good()).unwrap();
        let refused = |origin: StepKey, fact: Fact, signature: Option<String>, words: &str| {
            let why = taken(origin, fact, signature).expect_err(words);
            assert!(why.contains(words), "{words}: {why}");
        };
        refused(db.clone(), fenced("x"), good(), "not what db-1 has signed");
        refused(db.clone(), fenced("t"), None, "not signed by its host");
        refused(origin("2@db-1"), fenced("t"), good(), "not what db-1");
        refused(origin("1@db-2"), fenced("t"), good(), "add `[[evidence]]`");
        let by_own = reported(3, &db, vec![fenced("t")]).remove(0);
        refused(db.clone(), fenced("t"), Some(by_own), "not what db-1");
        let old: StepKey = "ro_020202020202.0.0.do.1@db-1".parse().unwrap();
        let replayed = reported(2, &old, vec![fenced("t")]).remove(0);
        refused(old, fenced("t"), Some(replayed), "of another rollout");
        // What another plan's rollout of the same id has proven is no fact of this one.
        let mut elsewhere = ReportBody::Finished {
            key: db.clone(),
            outcome: StepOutcome::Unknown { why: String::new() },
            facts: vec![fenced("t")],
            took: Period(0),
            signatures: vec![],
        };
        sign(&key(2), Digest::of(b"other"), &mut elsewhere);
        let ReportBody::Finished { signatures, .. } = elsewhere else {
            unreachable!("as it was made")
        };
        let of_other = signatures.first().cloned();
        refused(
            db.clone(),
            fenced("t"),
            of_other,
            "not what db-1 has signed",
        );
        let later: StepKey = "ro_010101010101.2.0.do.1@db-1".parse().unwrap();
        let of_later = reported(2, &later, vec![fenced("t")]).remove(0);
        refused(later, fenced("t"), Some(of_later), "comes after this one");
        // Its own facts are held against its own key.
        let own = origin("1@app-1");
        let by_own = reported(3, &own, vec![fenced("t")]).remove(0);
        taken(own.clone(), fenced("t"), Some(by_own)).unwrap();
        let by_db = reported(2, &own, vec![fenced("t")]).remove(0);
        refused(own, fenced("t"), Some(by_db), "not what app-1");
    }

    #[test]
    fn a_word_on_an_outcome_is_an_approvers() {
        let of = origin("1@app-1");
        let said = |seed: u8, done: bool, by: &str| {
            let statement = evidence::resolution(Digest::of(b"plan"), &of, done, by);
            Some(key(seed).sign(RESOLVE_NAMESPACE, &statement))
        };
        let word = |done| Fact::Resolved {
            done,
            by: "ann".into(),
        };
        taken(of.clone(), word(false), said(1, false, "ann")).unwrap();
        assert!(taken(of.clone(), word(true), said(1, false, "ann")).is_err());
        assert!(taken(of.clone(), word(false), said(2, false, "ann")).is_err());
        assert!(taken(of.clone(), word(false), None).is_err());
        let ben = Fact::Resolved {
            done: false,
            by: "ben".into(),
        };
        assert!(taken(of.clone(), ben, said(1, false, "ben")).is_err());
    }

    #[test]
    fn a_loss_is_accepted_by_an_approver_and_for_nothing_else() {
        let of: StepKey = "ro_010101010101.1.0.undo.1@app-1".parse().unwrap();
        let [loss, other] = ["one", "other"].map(|line| LossId::of(&of, &[line.to_owned()]));
        let word = |loss: &LossId| Fact::LossAccepted {
            loss: loss.clone(),
            by: "ann".into(),
        };
        let statement = evidence::acceptance(plan(), &of, &loss, "ann");
        let said = |seed: u8, namespace| Some(key(seed).sign(namespace, &statement));
        taken(of.clone(), word(&loss), said(1, LOSS_NAMESPACE)).unwrap();
        for (loss, signature) in [
            (&other, said(1, LOSS_NAMESPACE)),
            (&loss, said(2, LOSS_NAMESPACE)),
            (&loss, said(1, RESOLVE_NAMESPACE)),
            (&loss, None),
        ] {
            assert!(taken(of.clone(), word(loss), signature).is_err());
        }
    }

    #[test]
    fn a_host_keeps_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let first = own_key(dir.path()).unwrap().public();
        assert_eq!(own_key(dir.path()).unwrap().public(), first);
        let file = std::fs::metadata(dir.path().join("evidence.key")).unwrap();
        let mode = std::os::unix::fs::MetadataExt::mode(&file);
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
