use lockstep_proto::ids::{Digest, Direction, Epoch, RolloutId, StepKey};
use lockstep_proto::sshsig::SigningKey;
use serde_json::json;

use super::super::policy::trust::tests::key;
use super::*;

const NOW: u64 = 1_000_000_000;
const GATE: StepRef = StepRef { phase: 0, step: 0 };
const STEP: StepRef = StepRef { phase: 1, step: 0 };

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

fn approvers() -> Vec<Approver> {
    [
        (1, "ann", &["dba"][..]),
        (2, "ben", &["qa"]),
        (3, "cat", &["dba", "qa"]),
    ]
    .map(|(seed, name, groups)| Approver {
        name: name.into(),
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        key: key(seed).public(),
    })
    .into()
}

fn breakers() -> Vec<Breaker> {
    let person = |(seed, name): (u8, &str)| Breaker {
        name: name.into(),
        key: key(seed).public(),
    };
    [(5, "ira"), (6, "joe")].map(person).into()
}

/// What a controller sends, and what people have signed.
struct Case {
    rollout: RolloutId,
    plan: Digest,
    hosts: Vec<HostId>,
    sql: Vec<Digest>,
    evidence: Option<Digest>,
    requester: String,
    gate: StepRef,
    expires: u64,
    signers: Vec<(SigningKey, &'static str)>,
    /// Who broke the glass of the gate, and until when that holds.
    broke: Vec<(SigningKey, &'static str)>,
    holds: u64,
    /// Changes what is sent after it was signed.
    forge: fn(&mut Signed),
    at: StepRef,
    action: Action,
    bindings: Vec<Binding>,
    begun: bool,
}

impl Case {
    fn good() -> Self {
        Self {
            rollout: RolloutId::from_random([1; 6]),
            plan: Digest::of(b"plan"),
            hosts: vec![host("app-1"), host("app-2")],
            sql: vec![],
            evidence: None,
            requester: "olga".into(),
            gate: GATE,
            expires: NOW + 1,
            signers: vec![(key(1), "ann"), (key(2), "ben")],
            broke: vec![],
            holds: NOW + 1,
            forge: |_| {},
            at: STEP,
            action: action("service.stop", json!({"service": "web"})),
            bindings: vec![],
            begun: false,
        }
    }

    fn check(self) -> Result<(), String> {
        let evidence = self
            .evidence
            .unwrap_or_else(|| approval::evidence(self.plan, &self.hosts, &self.sql));
        let sign = |what, space: &str, until, (key, name): &(SigningKey, &'static str)| {
            let statement = Approval {
                statement: what,
                rollout: &self.rollout,
                plan: self.plan,
                hosts: &self.hosts,
                gate: self.gate,
                evidence,
                requester: &self.requester,
                approver: name,
                expires: Timestamp(until),
            };
            Signature {
                approver: (*name).to_owned(),
                expires: Timestamp(until),
                signature: key.sign(space, &statement.encode()),
            }
        };
        let signatures = self.signers.iter();
        let signatures =
            signatures.map(|one| sign(STATEMENT, approval::NAMESPACE, self.expires, one));
        let broken = self.broke.iter();
        let broken =
            broken.map(|one| sign(GLASS_STATEMENT, approval::GLASS_NAMESPACE, self.holds, one));
        let mut signed = Signed {
            hosts: self.hosts.clone(),
            sql: self.sql.clone(),
            requester: self.requester.clone(),
            signatures: signatures.collect(),
            broken: broken.collect(),
        };
        (self.forge)(&mut signed);
        let step = |at, host| StepKey {
            rollout: RolloutId::from_random([1; 6]),
            host,
            at,
            direction: Direction::Do,
            attempt: 1,
        };
        let mut bindings = self.bindings;
        bindings.push(Binding {
            origin: step(GATE, controller_host()),
            fact: Fact::Approved {
                by: vec![],
                evidence,
                signed: Some(Box::new(signed)),
            },
            signature: None,
        });
        let order = Order {
            key: step(self.at, host("app-1")),
            plan: Digest::of(b"plan"),
            epoch: Epoch { counter: 1, id: 1 },
            not_after: Timestamp(0),
            bindings,
        };
        let gates = Gates {
            approvals: vec![Gate {
                at: GATE,
                from: [("dba".to_owned(), 1), ("qa".to_owned(), 1)].into(),
            }],
            shown: vec![],
            after_rollback: 9,
        };
        check(
            Some(&gates),
            People {
                approvers: &approvers(),
                breakers: &breakers(),
            },
            &Asked {
                host: &host("app-1"),
                order: &order,
                action: &self.action,
                now: Timestamp(NOW),
                begun_after: &|_| self.begun,
            },
        )
    }
}

fn action(name: &str, args: serde_json::Value) -> Action {
    Action::deserialize_args(name, args).unwrap().unwrap()
}

#[test]
fn a_step_after_a_gate_needs_what_people_signed_for_it() {
    Case::good().check().unwrap();
    let refused = |change: fn(&mut Case), words: &str| {
        let mut case = Case::good();
        change(&mut case);
        let why = case.check().expect_err(words);
        assert!(why.contains(words), "{words}: {why}");
    };
    refused(|case| case.signers.truncate(1), "1 of qa missing");
    refused(|case| case.signers[1] = (key(1), "ann"), "1 of qa missing");
    refused(|case| case.signers = vec![(key(3), "cat")], "missing");
    refused(|case| case.signers[1] = (key(9), "ben"), "no approver's");
    refused(|case| case.signers[1] = (key(1), "ben"), "it is ann's key");
    refused(
        |case| case.requester = "ben".into(),
        "has submitted the rollout",
    );
    refused(
        |case| case.rollout = RolloutId::from_random([2; 6]),
        "does not match",
    );
    refused(|case| case.plan = Digest::of(b"other"), "not this plan");
    refused(|case| case.hosts.truncate(0), "app-1 is not among");
    refused(|case| case.gate = STEP, "does not match");
    refused(
        |case| case.evidence = Some(Digest::of(b"x")),
        "not this plan",
    );
    refused(|case| case.expires = NOW - 300_001, "expired");
    refused(
        |case| case.forge = |it| it.requester = "zoe".into(),
        "does not match",
    );
    refused(
        |case| case.forge = |it| it.signatures[0].expires = Timestamp(NOW + 2),
        "does not match",
    );
    refused(
        |case| case.forge = |it| it.hosts.truncate(1),
        "not this plan",
    );
    refused(
        |case| case.forge = |it| it.signatures.clear(),
        "1 of dba, 1 of qa missing",
    );
}

#[test]
fn an_approval_is_fresh_when_the_first_step_after_it_begins() {
    let mut case = Case::good();
    (case.expires, case.begun) = (NOW - 300_001, true);
    case.check().unwrap();
}

#[test]
fn two_people_whom_the_host_names_break_the_glass_for_an_hour() {
    let good = || Case {
        signers: vec![],
        broke: vec![(key(5), "ira"), (key(6), "joe")],
        ..Case::good()
    };
    good().check().unwrap();
    let refused = |change: fn(&mut Case), words: &str| {
        let mut case = good();
        change(&mut case);
        let why = case.check().expect_err(words);
        assert!(why.contains(words), "{words}: {why}");
    };
    refused(|case| case.broke.truncate(1), "missing");
    refused(|case| case.broke[1] = (key(5), "ira"), "missing");
    refused(|case| case.broke[1] = (key(5), "joe"), "it is ira's key");
    // An approver is none of them, whatever the plan or the controller says.
    refused(|case| case.broke[1] = (key(1), "ann"), "may break no glass");
    refused(|case| case.requester = "ira".into(), "has submitted");
    refused(
        |case| case.holds = NOW + 3_600_000 + 300_001,
        "more than 1h",
    );
    refused(|case| case.holds = NOW - 300_001, "has ended");
    refused(|case| case.gate = STEP, "does not match");
    refused(|case| case.hosts.truncate(0), "app-1 is not among");
    refused(|case| case.plan = Digest::of(b"other"), "not this plan");
    refused(
        |case| case.rollout = RolloutId::from_random([2; 6]),
        "does not match",
    );
    // An approval is no such word, and such a word is no approval.
    refused(
        |case| {
            case.signers = std::mem::take(&mut case.broke);
            case.forge = |it| it.broken = std::mem::take(&mut it.signatures);
        },
        "not for `lockstep-break-glass`",
    );
    refused(
        |case| case.forge = |it| it.signatures = std::mem::take(&mut it.broken),
        "not for `lockstep-approval`",
    );
    refused(
        |case| case.forge = |it| it.broken[1].expires = Timestamp(NOW + 2),
        "does not match",
    );
    let mut begun = good();
    (begun.holds, begun.begun) = (NOW - 300_001, true);
    begun.check().unwrap();
}

#[test]
fn only_what_comes_after_a_gate_needs_it() {
    let mut case = Case::good();
    (case.at, case.signers) = (GATE, vec![]);
    case.check().unwrap();
    let mut case = Case::good();
    (case.at.phase, case.signers) = (9, vec![]);
    assert!(case.check().is_err(), "nothing is changed after a rollback");
    let mut case = Case::good();
    (case.at.phase, case.signers) = (9, vec![]);
    case.action = action("check.port", json!({"port": 1}));
    case.check().unwrap();
}

#[test]
fn a_migration_runs_the_sql_that_was_approved() {
    let args = json!({"tool": "alembic", "app": "shop", "release": "v1", "dir": "backend", "database": "sales", "to": "head"});
    let apply = action("migration.apply", args);
    let order = |digests: &[&[u8]]| {
        let bindings = digests.iter().map(|sql| Binding {
            origin: "ro_010101010101.0.0.do.1@app-1".parse().unwrap(),
            fact: Fact::SqlPlan {
                database: "sales".into(),
                from: String::new(),
                to: "1".into(),
                digest: Digest::of(sql),
                sql: String::new(),
                tool: None,
                files: None,
                opaque: vec![],
                hazards: vec![],
            },
            signature: None,
        });
        Order {
            key: "ro_010101010101.2.0.do.1@app-1".parse().unwrap(),
            plan: Digest::of(b"plan"),
            epoch: Epoch { counter: 1, id: 1 },
            not_after: Timestamp(0),
            bindings: bindings.collect(),
        }
    };
    let gates = |database: &str| Gates {
        approvals: vec![],
        shown: vec![(GATE, database.to_owned())],
        after_rollback: 9,
    };
    let signed = Signed {
        hosts: vec![],
        sql: vec![Digest::of(b"good")],
        requester: String::new(),
        signatures: vec![],
        broken: vec![],
    };
    let holds = |digests: &[&[u8]], database: &str| {
        let order = order(digests);
        let asked = Asked {
            host: &host("app-1"),
            order: &order,
            action: &apply,
            now: Timestamp(NOW),
            begun_after: &|_| false,
        };
        check_sql(&gates(database), STEP, &asked, &signed).is_ok()
    };
    assert!(holds(&[b"good"], "sales"));
    assert!(!holds(&[b"bad"], "sales"));
    assert!(!holds(&[b"good", b"bad"], "sales"));
    assert!(!holds(&[], "sales"), "what was shown is not left out");
    assert!(holds(&[], "other"));
}
