//! What people and other hosts have said, forged: approvals, facts, resolutions.

use anyhow::Result;
use lockstep_proto::approval::{self, Approval, STATEMENT, Signature, Signed};
use lockstep_proto::evidence::{self, RESOLVE_NAMESPACE};
use lockstep_proto::ids::{Digest, HostId, PlanDigest, RolloutId, StepKey, StepRef};
use lockstep_proto::order::{Binding, Fact, controller_host};
use lockstep_proto::values::Timestamp;
use serde_json::json;

use super::place::{HOST, key};
use super::thief::{Must, Thief};

const GATE: StepRef = StepRef { phase: 0, step: 0 };
const NEVER: Timestamp = Timestamp(u32::MAX as u64 * 1000);

/// Plays them.
pub(super) async fn play(thief: &mut Thief) -> Result<()> {
    approvals(thief).await?;
    facts(thief).await
}

/// What somebody signs at a gate, and what is then claimed of it.
struct Word {
    rollout: RolloutId,
    plan: PlanDigest,
    hosts: Vec<HostId>,
    gate: StepRef,
    evidence: Digest,
    requester: String,
    approver: String,
    expires: Timestamp,
    namespace: &'static str,
    seed: u8,
}

impl Word {
    /// A good one of bob's.
    fn new(rollout: &RolloutId, plan: PlanDigest) -> Self {
        let hosts = vec![HOST.parse().expect("a host's name")];
        Self {
            rollout: rollout.clone(),
            plan,
            gate: GATE,
            evidence: approval::evidence(plan, &hosts, &[]),
            hosts,
            requester: "alice".into(),
            approver: "bob".into(),
            expires: NEVER,
            namespace: approval::NAMESPACE,
            seed: 5,
        }
    }

    fn carol(rollout: &RolloutId, plan: PlanDigest) -> Self {
        Self {
            approver: "carol".into(),
            seed: 6,
            ..Self::new(rollout, plan)
        }
    }

    fn sign(&self) -> Signature {
        let statement = Approval {
            statement: STATEMENT,
            rollout: &self.rollout,
            plan: self.plan,
            hosts: &self.hosts,
            gate: self.gate,
            evidence: self.evidence,
            requester: &self.requester,
            approver: &self.approver,
            expires: self.expires,
        };
        Signature {
            approver: self.approver.clone(),
            expires: self.expires,
            signature: key(self.seed).sign(self.namespace, &statement.encode()),
        }
    }
}

/// A binding that claims these signatures for a gate of a rollout.
fn approved(rollout: &RolloutId, plan: PlanDigest, signatures: Vec<Signature>) -> Binding {
    let hosts = vec![HOST.parse().expect("a host's name")];
    let mut key = Thief::at(rollout, (GATE.phase, GATE.step), 1);
    key.host = controller_host();
    Binding {
        origin: key,
        fact: Fact::Approved {
            by: vec!["bob (dba)".into(), "carol (qa_lead)".into()],
            evidence: approval::evidence(plan, &hosts, &[]),
            signed: Some(Box::new(Signed {
                hosts,
                sql: vec![],
                requester: "alice".into(),
                signatures,
                broken: vec![],
            })),
        },
        signature: None,
    }
}

async fn approvals(thief: &mut Thief) -> Result<()> {
    let gate = json!({"from": {"dba": 1, "qa_lead": 1}, "timeout": "5m"});
    let plan = thief.plan(&[("gate.approval", gate), thief.note("approved")]);
    let rollout = thief.hold(&plan).await?;
    let (digest, other) = (plan.digest(), thief.rollout());
    let bob = || Word::new(&rollout, digest);
    let carol = || Word::carol(&rollout, digest).sign();
    let with = |word: Word| vec![approved(&rollout, digest, vec![word.sign(), carol()])];
    let change = |change: &dyn Fn(&mut Signed)| {
        let mut binding = approved(&rollout, digest, vec![bob().sign(), carol()]);
        if let Fact::Approved { signed, .. } = &mut binding.fact {
            change(signed.as_mut().expect("it is signed"));
        }
        vec![binding]
    };
    let moved = |to: StepKey| {
        let binding = approved(&rollout, digest, vec![bob().sign(), carol()]);
        vec![Binding {
            origin: to,
            ..binding
        }]
    };
    let unsigned = || {
        let mut binding = approved(&rollout, digest, vec![]);
        if let Fact::Approved { signed, .. } = &mut binding.fact {
            *signed = None;
        }
        vec![binding]
    };
    let other_host: HostId = "app-2".parse()?;
    let cases: Vec<(&str, Vec<Binding>)> = vec![
        ("none", vec![]),
        ("the controller's word", unsigned()),
        ("no signatures", vec![approved(&rollout, digest, vec![])]),
        (
            "one of two",
            vec![approved(&rollout, digest, vec![bob().sign()])],
        ),
        (
            "one person twice",
            vec![approved(&rollout, digest, vec![bob().sign(), bob().sign()])],
        ),
        ("by a stranger", with(Word { seed: 9, ..bob() })),
        ("by a signer of plans", with(Word { seed: 1, ..bob() })),
        ("by a host", with(Word { seed: 8, ..bob() })),
        ("under another's name", with(Word { seed: 6, ..bob() })),
        (
            "by one who is not known",
            with(Word {
                approver: "mallory".into(),
                ..bob()
            }),
        ),
        (
            "of another rollout",
            with(Word {
                rollout: other.clone(),
                ..bob()
            }),
        ),
        (
            "of another plan",
            with(Word {
                plan: Digest::of(b"other"),
                ..bob()
            }),
        ),
        (
            "of another gate",
            with(Word {
                gate: StepRef { phase: 1, step: 0 },
                ..bob()
            }),
        ),
        (
            "of another evidence",
            with(Word {
                evidence: Digest::of(b"other"),
                ..bob()
            }),
        ),
        (
            "for another host",
            with(Word {
                hosts: vec![other_host.clone()],
                ..bob()
            }),
        ),
        (
            "for more hosts",
            with(Word {
                hosts: vec![HOST.parse()?, other_host.clone()],
                ..bob()
            }),
        ),
        (
            "of another requester",
            with(Word {
                requester: "eve".into(),
                ..bob()
            }),
        ),
        (
            "for another purpose",
            with(Word {
                namespace: "lockstep-plan",
                ..bob()
            }),
        ),
        (
            "expired",
            with(Word {
                expires: Timestamp(1000),
                ..bob()
            }),
        ),
        (
            "with a later end than was signed",
            change(&|signed| signed.signatures[0].expires = Timestamp(NEVER.0 + 1)),
        ),
        (
            "with another host than was signed",
            change(&|signed| signed.hosts.push("app-9".parse().expect("a name"))),
        ),
        (
            "with SQL that was not shown",
            change(&|signed| signed.sql.push(Digest::of(b"drop table"))),
        ),
        (
            "with another requester than was signed",
            change(&|signed| signed.requester = "carol".into()),
        ),
        ("with no hosts", change(&|signed| signed.hosts.clear())),
        (
            "with a bit changed",
            change(&|signed| {
                let text = &mut signed.signatures[0].signature;
                let middle = text.len() / 2;
                let with = if text.as_bytes()[middle] == b'A' {
                    "B"
                } else {
                    "A"
                };
                text.replace_range(middle..=middle, with);
            }),
        ),
        (
            "at another gate",
            moved(StepKey {
                at: StepRef { phase: 1, step: 0 },
                ..origin(&rollout)
            }),
        ),
        ("from a host", moved(Thief::at(&rollout, (0, 0), 1))),
        ("from another rollout", moved(origin(&other))),
    ];
    let kind = "approval";
    let mut attempt = 0;
    for (name, bindings) in cases {
        attempt += 1;
        let key = Thief::at(&rollout, (1, 0), attempt);
        thief.tally.play(kind, name);
        let answer = thief.order(digest, &key, bindings).await;
        thief.check(kind, name, answer, Must::BeRefused("")).await?;
    }
    // The requester is an approver, and approves himself.
    attempt += 1;
    let name = "by the requester";
    let hers = |word: Word| Word {
        requester: "bob".into(),
        ..word
    };
    let signatures = vec![
        hers(bob()).sign(),
        hers(Word::carol(&rollout, digest)).sign(),
    ];
    let mut binding = approved(&rollout, digest, signatures);
    if let Fact::Approved {
        signed: Some(signed),
        ..
    } = &mut binding.fact
    {
        signed.requester = "bob".into();
    }
    let key = Thief::at(&rollout, (1, 0), attempt);
    thief.tally.play(kind, name);
    let answer = thief.order(digest, &key, vec![binding]).await;
    let must = Must::BeRefused("has submitted the rollout");
    thief.check(kind, name, answer, must).await?;

    let key = Thief::at(&rollout, (1, 0), attempt + 1);
    let good = vec![approved(&rollout, digest, vec![bob().sign(), carol()])];
    thief.licensed_note(&plan, &key, good, "approved").await?;
    thief.release(&rollout).await
}

/// The gate's place, as approvals name it.
fn origin(rollout: &RolloutId) -> StepKey {
    StepKey {
        host: controller_host(),
        ..Thief::at(rollout, (GATE.phase, GATE.step), 1)
    }
}

async fn facts(thief: &mut Thief) -> Result<()> {
    let plan = thief.plan(&[thief.note("bound")]);
    let rollout = thief.hold(&plan).await?;
    let other = thief.rollout();
    let db: HostId = "db-1".parse()?;
    let from = |host: &HostId, rollout: &RolloutId, attempt: u16| StepKey {
        host: host.clone(),
        ..Thief::at(rollout, (0, 0), attempt)
    };
    let fenced = |token: &str| Fact::Fenced {
        database: "sales".into(),
        fence: token.into(),
    };
    let by = |seed: u8, origin: &StepKey, fact: &Fact| {
        let statement = evidence::statement(plan.digest(), origin, fact);
        Some(hex::encode(
            key(seed).sign_bare(evidence::NAMESPACE, &statement),
        ))
    };
    let proven = from(&db, &rollout, 1);
    let good = by(8, &proven, &fenced("t"));
    let bound = |origin: &StepKey, fact: Fact, signature: Option<String>| {
        vec![Binding {
            origin: origin.clone(),
            fact,
            signature,
        }]
    };
    let backup = Fact::Backup {
        database: "sales".into(),
        id: "../../etc".into(),
        digest: Digest::of(b"backup"),
        size: 1,
        taken_at: Timestamp(0),
        fence: None,
    };
    let replayed = from(&db, &other, 1);
    let own = from(&HOST.parse()?, &rollout, 1);
    let unknown: HostId = "db-2".parse()?;
    let word = |by: &str| Fact::Resolved {
        done: false,
        by: by.into(),
    };
    let said = |seed: u8, done: bool, by: &str| {
        let statement = evidence::resolution(plan.digest(), &own, done, by);
        Some(key(seed).sign(RESOLVE_NAMESPACE, &statement))
    };
    let flipped = good.as_ref().map(|text| {
        let with = if text.starts_with('0') { "1" } else { "0" };
        format!("{with}{}", &text[1..])
    });
    let cases: Vec<(&str, Vec<Binding>)> = vec![
        ("not signed", bound(&proven, fenced("t"), None)),
        (
            "signed by nobody",
            bound(&proven, fenced("t"), Some("00".repeat(64))),
        ),
        (
            "no signature",
            bound(&proven, fenced("t"), Some("zz".into())),
        ),
        ("with a bit changed", bound(&proven, fenced("t"), flipped)),
        (
            "by a stranger",
            bound(&proven, fenced("t"), by(9, &proven, &fenced("t"))),
        ),
        (
            "by a signer of plans",
            bound(&proven, fenced("t"), by(1, &proven, &fenced("t"))),
        ),
        ("another value", bound(&proven, fenced("u"), good.clone())),
        (
            "another attempt",
            bound(&from(&db, &rollout, 2), fenced("t"), good.clone()),
        ),
        (
            "another host",
            bound(&from(&unknown, &rollout, 1), fenced("t"), good.clone()),
        ),
        (
            "of this host, by another",
            bound(&own, fenced("t"), by(8, &own, &fenced("t"))),
        ),
        (
            "of another rollout",
            bound(&replayed, fenced("t"), by(8, &replayed, &fenced("t"))),
        ),
        (
            "a backup that is a path",
            bound(&proven, backup, good.clone()),
        ),
        (
            "a good one and a bad one",
            [
                bound(&proven, fenced("t"), good.clone()),
                bound(&proven, fenced("u"), good.clone()),
            ]
            .concat(),
        ),
        (
            "a word without a name",
            bound(&own, word(""), said(5, false, "")),
        ),
        ("a word that nobody signed", bound(&own, word("bob"), None)),
        (
            "a stranger's word",
            bound(&own, word("bob"), said(9, false, "bob")),
        ),
        (
            "another one's word",
            bound(&own, word("bob"), said(6, false, "bob")),
        ),
        (
            "the opposite of a word",
            bound(&own, word("bob"), said(5, true, "bob")),
        ),
        (
            "a host's word",
            bound(&own, word("bob"), by(8, &own, &word("bob"))),
        ),
    ];
    let kind = "fact";
    let mut attempt = 0;
    for (name, bindings) in cases {
        attempt += 1;
        let key = Thief::at(&rollout, (0, 0), attempt);
        thief.tally.play(kind, name);
        let answer = thief.order(plan.digest(), &key, bindings).await;
        let must = Must::BeRefused("a fact that the order gives");
        thief.check(kind, name, answer, must).await?;
    }
    let key = Thief::at(&rollout, (0, 0), attempt + 1);
    let good = bound(&proven, fenced("t"), good);
    thief.licensed_note(&plan, &key, good, "bound").await?;
    thief.release(&rollout).await
}
