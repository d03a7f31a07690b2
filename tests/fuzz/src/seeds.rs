//! First inputs for each target, made by the code that makes such bytes anyway. A fuzzer finds the
//! rest.

use std::collections::BTreeMap;
use std::path::Path;

use lockstep_core::compile::compile;
use lockstep_core::plan::Plan;
use lockstep_proto::action::migration::Tool;
use lockstep_proto::action::postgres::Level;
use lockstep_proto::approval::{Signature, Signed};
use lockstep_proto::floor::{self, Floor, OTHERS};
use lockstep_proto::ids::{
    Digest, Direction, Epoch, HostId, InstanceId, RolloutId, StepKey, StepRef,
};
use lockstep_proto::order::{Binding, Fact, Order};
use lockstep_proto::report::{Cause, Failure, Refusal, Report, ReportBody, StepOutcome};
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::{agent_v1 as agent, control_v1 as control, host_v1 as host};
use lockstep_proto::witness::{Head, Witness};
use prost::Message;

use crate::{plans, rollouts, trust};

/// Inputs with the names of their targets. `root` is the repository.
pub fn all(root: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let mut seeds = vec![];
    plan_files(root, &mut seeds);
    messages(&mut seeds);
    journals(root, &mut seeds);
    names(&mut seeds);
    texts(&mut seeds);
    seeds
}

type Seeds = Vec<(&'static str, Vec<u8>)>;

const PLANS: [&str; 11] = [
    "controller/core/tests/plans/s0.yaml",
    "controller/core/tests/plans/bad/arguments.yaml",
    "controller/core/tests/plans/bad/eight.yaml",
    "controller/core/tests/plans/bad/order.yaml",
    "controller/core/tests/plans/bad/shape.yaml",
    "controller/core/tests/plans/bad/yaml.yaml",
    "controller/core/tests/plans/bad/documents.yaml",
    "controller/core/tests/plans/bad/tab.yaml",
    "deploy/examples/employee-system/install.yaml",
    "deploy/examples/employee-system/plan.yaml",
    "tests/faults/src/chaos/reference.yaml",
];

fn plan_files(root: &Path, seeds: &mut Seeds) {
    let mut texts: Vec<String> = PLANS
        .iter()
        .map(|file| std::fs::read_to_string(root.join(file)).expect("a file of the repository"))
        .collect();
    texts.push(rollouts::PLAN.to_owned());
    for text in texts {
        let plan = Plan::parse("plan.yaml", &text);
        if let Ok(plan) = plan {
            let given: BTreeMap<String, String> = plan.inputs().iter().map(plans::given).collect();
            if let Ok(sealed) = compile(&plan, &given, 7, plans::NOW) {
                seeds.push(("compiled_plan", sealed.bytes().to_vec()));
            }
        }
        // Longer ones in parts: each is a plan by its first lines, and perhaps a wrong one.
        seeds.push(("plan", text.clone().into_bytes()));
        let (head, phases) = text.split_once("\nphases:\n").unwrap_or((&text, ""));
        for phase in phases
            .split("\n  - name:")
            .filter(|phase| !phase.trim().is_empty())
        {
            let part = format!("{head}\nphases:\n  - name: {phase}");
            seeds.push(("plan", part.into_bytes()));
        }
    }
}

pub(crate) fn key(host: &str) -> StepKey {
    StepKey {
        rollout: RolloutId::from_random([9; 6]),
        host: host.parse().expect("a host's name"),
        at: StepRef { phase: 2, step: 0 },
        direction: Direction::Do,
        attempt: 1,
    }
}

fn facts() -> Vec<Fact> {
    let (database, digest) = ("employee_system".to_owned(), Digest::of(b"x"));
    let id = "b-1".to_owned();
    let signed = Signed {
        hosts: vec!["app-1".parse().expect("a host's name")],
        sql: vec![digest],
        requester: "dora".to_owned(),
        signatures: vec![Signature {
            approver: "ann".to_owned(),
            expires: Timestamp(9),
            signature: "-----BEGIN".to_owned(),
        }],
        broken: vec![],
    };
    vec![
        Fact::Backup {
            database: database.clone(),
            id: id.clone(),
            digest,
            size: 9,
            taken_at: Timestamp(1),
            fence: Some("f".to_owned()),
        },
        Fact::BackupVerified {
            database: database.clone(),
            id,
            digest,
            fence: None,
            level: Level::Equal,
            taken_at: Some(Timestamp(1)),
        },
        Fact::Integrity {
            database: database.clone(),
            id: "a-1".to_owned(),
            digest,
            taken_at: Timestamp(1),
        },
        Fact::RestorePoint {
            database: database.clone(),
            name: "lockstep_a".to_owned(),
            lsn: "0/1".to_owned(),
            archived: "000000010000000000000001".to_owned(),
            taken_at: Timestamp(1),
        },
        Fact::ExternalBackup {
            database: database.clone(),
            label: "20260101-000000F".to_owned(),
            holds: "full".to_owned(),
            from: "0/1".to_owned(),
            to: "0/2".to_owned(),
        },
        Fact::Fenced {
            database: database.clone(),
            fence: "f".to_owned(),
        },
        Fact::Revision {
            database: database.clone(),
            before: String::new(),
            after: "1a".to_owned(),
        },
        Fact::SqlPlan {
            database: database.clone(),
            from: String::new(),
            to: "1a".to_owned(),
            digest,
            sql: "select 1".to_owned(),
            tool: Some(Tool::Alembic),
            files: Some(digest),
            opaque: vec!["o".to_owned()],
            hazards: vec!["h".to_owned()],
        },
        Fact::Resolved {
            done: true,
            by: "dora".to_owned(),
        },
        Fact::LossAccepted {
            loss: "lo_0123456789abcdef".parse().expect("it is one"),
            by: "dora".to_owned(),
        },
        Fact::Approved {
            by: vec!["ann (dba)".to_owned()],
            evidence: digest,
            signed: Some(Box::new(signed)),
        },
        Fact::PreviousRelease {
            app: "a".to_owned(),
            release: String::new(),
        },
        Fact::Rows {
            database,
            tables: vec![("users".to_owned(), 7)],
        },
        Fact::State {
            name: "service web".to_owned(),
            digest,
            text: "active".to_owned(),
        },
        Fact::Refused {
            address: "localhost:80".to_owned(),
        },
        Fact::Healthy {
            url: "http://localhost/".to_owned(),
        },
        Fact::Note {
            name: "n".to_owned(),
            value: "v".to_owned(),
        },
    ]
}

fn bodies() -> Vec<ReportBody> {
    let rollout = || RolloutId::from_random([9; 6]);
    let finished = |outcome| ReportBody::Finished {
        key: key("app-1"),
        outcome,
        facts: facts(),
        took: Period::seconds(2),
        signatures: vec!["ab".repeat(64)],
    };
    vec![
        ReportBody::Consented {
            rollout: rollout(),
            plan: rollouts::plan().digest(),
            state: facts(),
            round: 0,
        },
        ReportBody::Declined {
            rollout: rollout(),
            refusals: vec![Refusal {
                at: Some(StepRef { phase: 0, step: 0 }),
                reason: "no".to_owned(),
            }],
        },
        ReportBody::Started { key: key("app-1") },
        finished(StepOutcome::Ok {
            changed: true,
            summary: "done".to_owned(),
        }),
        finished(StepOutcome::Unknown {
            why: "nobody knows".to_owned(),
        }),
        finished(StepOutcome::Failed(Failure {
            cause: Cause::CheckUnmet,
            message: "it failed".to_owned(),
            hint: Some("look".to_owned()),
            last_lines: vec!["\u{1b}[2J".to_owned()],
            changed: true,
        })),
        ReportBody::Surveyed {
            rollout: rollout(),
            state: facts(),
        },
    ]
}

fn messages(seeds: &mut Seeds) {
    use agent::down::Message as Down;
    let epoch = Epoch { counter: 1, id: 1 };
    let head = Head {
        journal: "in_0101010101010101".to_owned(),
        number: 7,
        hash: Digest::of(b"h"),
    };
    let binding = |fact| Binding {
        origin: key("db-1"),
        fact,
        signature: Some("ab".repeat(64)),
    };
    let order = |bindings| Order {
        key: key("app-1"),
        plan: Digest::of(b"p"),
        epoch,
        not_after: Timestamp(9),
        bindings,
    };
    let rollout = || key("app-1").rollout.into();
    let mut downs: Vec<Down> = facts()
        .into_iter()
        .map(|fact| Down::Order(order(vec![binding(fact)]).into()))
        .collect();
    downs.extend([
        Down::Order(order(facts().into_iter().map(binding).collect()).into()),
        Down::Acknowledged(7),
        Down::Offer(agent::Offer {
            rollout: rollout(),
            plan_digest: vec![7; 32].into(),
            epoch: Some(epoch.into()),
            dry_run: true,
            signatures: vec![trust::genuine(0).into_bytes().into()],
            round: 0,
        }),
        Down::Release(agent::Release {
            rollout: rollout(),
            epoch: Some(epoch.into()),
            comes_back: false,
        }),
        Down::Cancel(agent::Cancel {
            rollout: rollout(),
            epoch: Some(epoch.into()),
        }),
        Down::Survey(agent::Survey {
            rollout: rollout(),
            epoch: Some(epoch.into()),
        }),
        Down::Welcome(agent::Welcome {
            version: 1,
            epoch: Some(epoch.into()),
            clock_ms: 9,
            acknowledged: 3,
            earlier: 3,
        }),
        Down::Drain(agent::Drain {
            reconnect_after_ms: 9,
        }),
    ]);
    for message in downs {
        let down = agent::Down {
            message: Some(message),
            head: Some(head.clone().into()),
        };
        seeds.push(("order", down.encode_to_vec()));
        let alone = agent::Down { head: None, ..down };
        let frame = host::ToExec {
            message: Some(host::to_exec::Message::Down(alone)),
        };
        seeds.push(("bridge", framed(0, &frame)));
    }
    let hello = agent::Hello {
        min_version: 1,
        max_version: 1,
        host: "app-1".to_owned(),
        instance: "in_0101010101010101".to_owned(),
        boot: "bt_0101010101010101".to_owned(),
        highest_epoch: Some(epoch.into()),
        last_report: 2,
        labels: [("role".to_owned(), "app".to_owned())].into(),
        agent_version: "0.1.0".to_owned(),
        held_rollout: rollout(),
        acknowledged: 1,
    };
    up(hello.clone(), seeds);
    let mut session = vec![];
    for body in bodies() {
        let report = agent::Report::from(Report {
            number: 0,
            body,
            head: Some(head.clone()),
        });
        let alone = part(b'r', &report);
        seeds.push(("session", [&b"aat"[..], &alone].concat()));
        session.extend(alone);
        let message = host::to_link::Message::Report(report.clone());
        to_link(message, seeds);
        let message = agent::up::Message::Report(report);
        let up = agent::Up {
            message: Some(message),
        };
        seeds.push(("report", up.encode_to_vec()));
    }
    seeds.push(("session", session));
    seeds.push((
        "session",
        [&b"aalalatalaltdt"[..], &part(b'h', &hello)].concat(),
    ));
    let call = [
        b"c\x02\x00\x80".as_slice(),
        &"why not".to_owned().encode_length_delimited_to_vec(),
    ];
    seeds.push(("session", [b"aalaa", &*call.concat()].concat()));
    for message in [
        host::to_link::Message::Fetch(vec![7; 32].into()),
        host::to_link::Message::Refuse("no".to_owned()),
        host::to_link::Message::Log(agent::LogChunk {
            key: key("app-1").to_string(),
            offset: 9,
            data: b"x\n".to_vec().into(),
            progress_permille: Some(7),
            progress_text: "half".to_owned(),
        }),
    ] {
        to_link(message, seeds);
    }
    for message in [
        host::to_exec::Message::Dial(host::Dial {}),
        host::to_exec::Message::Disconnected(host::Disconnected {}),
        host::to_exec::Message::Connected(host::Connected {
            session: 1,
            welcome: Some(agent::Welcome {
                epoch: Some(epoch.into()),
                ..agent::Welcome::default()
            }),
        }),
        host::to_exec::Message::Plan(host::Plan {
            digest: vec![7; 32].into(),
            answer: Some(host::plan::Answer::Content(b"{}".to_vec().into())),
        }),
    ] {
        let frame = host::ToExec {
            message: Some(message),
        };
        seeds.push(("bridge", framed(0, &frame)));
    }
    events(seeds);
}

fn up(hello: agent::Hello, seeds: &mut Seeds) {
    to_link(host::to_link::Message::Hello(hello.clone()), seeds);
    let up = agent::Up {
        message: Some(agent::up::Message::Hello(hello)),
    };
    seeds.push(("report", up.encode_to_vec()));
}

fn to_link(message: host::to_link::Message, seeds: &mut Seeds) {
    let frame = host::ToLink {
        session: 1,
        message: Some(message),
    };
    seeds.push(("bridge", framed(1, &frame)));
}

fn events(seeds: &mut Seeds) {
    let mut all = vec![b'E'];
    for kind in 0..20 {
        let event = control::RolloutEvent {
            number: 1,
            at_ms: 9,
            kind,
            state: "running".to_owned(),
            phase: "p".to_owned(),
            step: "0.0".to_owned(),
            action: "service.stop".to_owned(),
            host: "app-1".to_owned(),
            direction: "do".to_owned(),
            attempt: 2,
            message: "a\u{1b}[2Jb\u{9b}31m".to_owned(),
            detail: vec!["x\ny".to_owned()],
            took_ms: 7,
            progress_permille: Some(500),
        };
        all.extend(event.encode_length_delimited_to_vec());
    }
    seeds.push(("shown", all));
}

fn part(kind: u8, message: &impl Message) -> Vec<u8> {
    [vec![kind], message.encode_length_delimited_to_vec()].concat()
}

fn framed(kind: u8, message: &impl Message) -> Vec<u8> {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).expect("it is short");
    [&[kind][..], &length.to_le_bytes(), &message].concat()
}

fn journals(root: &Path, seeds: &mut Seeds) {
    for host in ["app-1", "db-1"] {
        let file = root.join("tests/fixtures/journals/agent-1").join(host);
        let journal = std::fs::read(file.join("journal")).expect("a file of the repository");
        let payloads = payloads(&journal);
        // The first records as they are, the others in groups of a few.
        let whole: usize = payloads
            .iter()
            .take(5)
            .map(|payload| payload.len() + 44)
            .sum();
        seeds.push(("agent_journal", journal[..whole].to_vec()));
        for group in payloads.chunks(4) {
            seeds.push(("agent_journal", group.join(&b'\n')));
        }
        let head = std::fs::read(file.join("head")).expect("a file of the repository");
        seeds.push(("agent_journal", head[..80].to_vec()));
    }
    let (lines, document) = rollouts::seeds();
    seeds.push((
        "export",
        lockstep::fuzzing::export_of(&lines[..lines.len().min(4)]),
    ));
    seeds.push(("export", lockstep::fuzzing::export_of(&lines[..1])));
    seeds.push(("controller_journal", lines.join(&b'\n')));
    for group in lines.chunks(3) {
        seeds.push(("controller_journal", group.join(&b'\n')));
    }
    seeds.push(("shown", document));
    let head = root.join("tests/fixtures/journals/controller-1/journal/head");
    let head = std::fs::read(head).expect("a file of the repository");
    seeds.push(("statements", head[..84].to_vec()));
}

/// The payloads of an agent's journal: length, number and hash stand before each.
fn payloads(mut journal: &[u8]) -> Vec<&[u8]> {
    let mut payloads = vec![];
    while let Some((length, rest)) = journal.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) & !(1 << 31);
        let (payload, rest) = rest[40..].split_at(length as usize);
        payloads.push(payload);
        journal = rest;
    }
    payloads
}

fn names(seeds: &mut Seeds) {
    for index in 0..2 {
        let made = trust::genuine(index);
        seeds.push(("signature", made.clone().into_bytes()));
        // The same in lines of another length: it does not count.
        let (head, rest) = made.split_at(made.find('\n').map_or(0, |end| end + 1));
        let (line, rest) = rest.split_at(50);
        let wrapped = format!("{head}{line}\n{rest}");
        seeds.push(("signature", wrapped.into_bytes()));
        let body: String = made.lines().filter(|line| !line.starts_with('-')).collect();
        seeds.push(("signature", [vec![0], unpacked(&body)].concat()));
    }
    seeds.push((
        "signature",
        [trust::genuine(0), trust::genuine(1)]
            .join("\n")
            .into_bytes(),
    ));
    // As other tools make them: `ssh-keygen -Y sign -n lockstep-plan`, `ssh-keygen -t ed25519`.
    for text in include_str!("seeds.txt").split("\n%%\n") {
        seeds.push(("signature", text.as_bytes().to_vec()));
    }
    for uri in [
        "spiffe://example.com/agent/app-1",
        "spiffe://example.com/operator/Dora.x_1",
        "spiffe://example.com/controller/c1",
        "spiffe://example.com/agent/app-1/",
        "spiffe://example.co/agent/a/operator/b",
        "https://example.com/agent/app-1",
    ] {
        seeds.push(("san", uri.as_bytes().to_vec()));
        seeds.extend(lockstep::fuzzing::csr_of(uri).map(|csr| ("enrolment", csr)));
        let certificate = lockstep::fuzzing::certificate_of(uri);
        seeds.extend(certificate.map(|certificate| ("certificate", certificate)));
    }
    let host: HostId = "app-1".parse().expect("a host's name");
    let floor = Floor {
        statement: floor::STATEMENT.to_owned(),
        fleet: "prod".to_owned(),
        host,
        instance: InstanceId::from_random([1; 8]),
        serials: [(OTHERS.to_owned(), 7), ("p".to_owned(), 9)].into(),
        expires: Timestamp(9),
    };
    seeds.push(("statements", floor.encode()));
    seeds.push(("statements", [floor.encode(), b"\n".to_vec()].concat()));
    let witness = |number| Witness {
        by: "app-1".to_owned(),
        term: 1,
        head: Head {
            journal: "j".to_owned(),
            number,
            hash: Digest::of(b"x"),
        },
    };
    let lines =
        [5, 7, 12].map(|number| serde_json::to_string(&witness(number)).expect("plain data"));
    seeds.push(("statements", lines.join("\n").into_bytes()));
    for text in [
        "app-1.prod",
        "ro_010203040506",
        "in_0102030405060708",
        "ro_010203040506.3.14.undo.2@db-1.prod",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "90s",
        "250ms",
        "100MiB",
        "0a:1b:2c",
        "host:app-1",
        "operator:Dora",
        "serial:1b2c",
        "3.14",
    ] {
        seeds.push(("statements", text.as_bytes().to_vec()));
    }
}

fn unpacked(base64: &str) -> Vec<u8> {
    let six = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let letters: Vec<u8> = base64.bytes().filter(|c| *c != b'=').map(six).collect();
    let mut bytes = vec![];
    for four in letters.chunks(4) {
        let number = four
            .iter()
            .fold(0_u32, |number, six| number << 6 | u32::from(*six));
        let number = number << (6 * (4 - four.len()));
        bytes.extend(&number.to_be_bytes()[1..four.len()]);
    }
    bytes
}

fn texts(seeds: &mut Seeds) {
    for text in [
        "[[allow]]\naction = \"postgres.*\"\nwhere = { database = [\"employee_system\"] }\n",
        "[[allow]]\naction = 'release.build'\n[allow.where]\napp = ['e']\nrun = [['python3', '-m', 'venv', 'venv'], ['venv/bin/pip', 'install', '**']]\n[[deny]]\naction = 'exec.run'\n%%\nrelease.build {\"app\":\"e\",\"release\":\"v1\",\"run\":[[\"python3\",\"-m\",\"venv\",\"venv\"]]}",
        "[[allow]]\naction = '*'\n[[deny]]\naction = 'service.*'\nwhere = { service = ['ssh*'] }\n%%\nservice.stop {\"service\":\"web\",\"refuses\":[8000]}",
        "[[allow]]\naction = 'migration.apply'\nper_hour = 2\nwindows = [{ days = ['tue', 'thu'], utc = '14:00-18:00' }, { utc = '22:00-02:00' }]\n",
        "[[allow]]\naction = 'check.http'\nwhere = { url = ['http://127.*:8000/*', '*'], method = ['(default)', 'post'] }\n%%\ncheck.http {\"url\":\"http://127.0.0.1:8000/x?y=%2e%2e\",\"method\":\"post\"}",
        "[[allow]]\naction = 'exec.run'\nwhere = { argv = [['/bin/x', '**']], env = [{ A = 'secret://x' }] }\n",
        "approvals = 'signed'\n[seal]\nfleet = 'prod'\nthreshold = 1\nkeys = ['ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c ann']\n[[approver]]\nname = 'ann'\ngroups = ['dba']\nkey = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c'\n",
        "bindings = 'signed'\n[[evidence]]\nhost = 'db-1'\nkey = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c'\n",
    ] {
        seeds.push(("policy", text.as_bytes().to_vec()));
    }
    for text in [
        "/srv/*\n/srv/a/../b",
        "a*b*c\nabxbc",
        "url\nhttp://*:8000/*\nhttp://app-1:8000/api/x?y=1#z",
        "url\nhttp://[::1]:*/x\nHTTP://[::1]:81/x",
        "url\nhttps://*.example.com/health\nhttps://a.b.example.com:443/%2e%2e/health",
        "url\nhttp://127.*:80/\nhttp://127.1/",
        "service\nemployee-*\nemployee-backend.service",
        "argv\n[\"/bin/x\",\"**\"]\n[\"/bin/x\",\"a\",\"b\"]",
        "env\n{\"A\":\"*\"}\n{\"A\":\"secret://x\"}",
        "run\n[[\"a\"],[\"b\"]]\n[{\"argv\":[\"a\"],\"in\":\"x\"}]",
        "database\n(default)\nx",
    ] {
        seeds.push(("policy_patterns", text.as_bytes().to_vec()));
    }
    for text in [
        "{\"data\":{\"password\":\"x\"}}",
        "{\"data\":{\"data\":{\"password\":\"x\"},\"metadata\":{\"version\":1}}}",
        "{\"data\":{\"user\":\"x\",\"n\":1,\"l\":[true,null,1.5]}}",
        "{\"errors\":[\"permission denied\",\"token hvs.CANARY\"]}",
        "{\"data\":null}",
    ] {
        seeds.push(("vault_answer", text.as_bytes().to_vec()));
    }
    for text in [
        "a\u{1b}[2Jb\u{9b}31mc\rd\u{7}e\u{202e}f\ng",
        "\u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{7}",
        "[\"Zo\u{eb}\",{\"x\\u001b\":1}]",
    ] {
        seeds.push(("shown", text.as_bytes().to_vec()));
    }
}
