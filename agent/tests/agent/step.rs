//! The step process by itself: a claim is for ever (INV-1).

use lockstep_proto::ids::Direction;
use serde_json::{Value, json};

use crate::support::{Controller, Host, key, rollout};

fn job(host: &Host, attempt: u16) -> std::path::PathBuf {
    let key = key(&rollout(1), 0, Direction::Do, attempt);
    let dir = host.path("state/steps").join(key.to_string());
    std::fs::create_dir_all(dir.join("files")).unwrap();
    let script = "import sys; open(sys.argv[1], 'a').write('x\\n')";
    let effects = host.path("effects");
    let job = json!({
        "key": key,
        "action": {"exec.run": {"name": "x", "argv": ["python3", "-c", script, effects]}},
        "before": null,
        "bindings": [],
        "timeout": "30s",
        "log_offsets": {},
    });
    std::fs::write(dir.join("job.json"), job.to_string()).unwrap();
    dir
}

fn run(host: &Host, attempt: u16) -> std::process::Command {
    let mut command = host.command("step");
    command.arg(key(&rollout(1), 0, Direction::Do, attempt).to_string());
    command
}

fn effects(host: &Host) -> usize {
    std::fs::read_to_string(host.path("effects")).map_or(0, |text| text.lines().count())
}

#[tokio::test]
async fn an_attempt_has_one_effect_however_often_it_is_started() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let dir = job(&host, 1);
    let racing: Vec<_> = (0..8).map(|_| run(&host, 1).spawn().unwrap()).collect();
    let codes: Vec<_> = racing
        .into_iter()
        .map(|mut child| child.wait().unwrap().code())
        .collect();
    assert_eq!(
        codes.iter().filter(|code| **code == Some(0)).count(),
        1,
        "{codes:?}"
    );
    assert_eq!(
        codes.iter().filter(|code| **code == Some(10)).count(),
        7,
        "{codes:?}"
    );
    assert_eq!(effects(&host), 1);
    let outcome = std::fs::read(dir.join("outcome.json")).unwrap();
    let outcome: Value = serde_json::from_slice(&outcome).unwrap();
    assert_eq!(outcome["outcome"]["ok"]["changed"], true, "{outcome}");
    assert_eq!(run(&host, 1).status().unwrap().code(), Some(10));
    assert_eq!(effects(&host), 1);
}

#[tokio::test]
async fn a_claim_without_an_outcome_is_not_carried_out_again() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let dir = job(&host, 1);
    std::fs::write(dir.join("claim"), "").unwrap();
    assert_eq!(run(&host, 1).status().unwrap().code(), Some(10));
    assert_eq!(effects(&host), 0);
    assert!(!dir.join("outcome.json").exists());
}

#[tokio::test]
async fn what_was_cancelled_before_it_began_does_nothing() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let dir = job(&host, 1);
    std::fs::write(dir.join("cancel"), "").unwrap();
    assert_eq!(run(&host, 1).status().unwrap().code(), Some(0));
    let outcome = std::fs::read(dir.join("outcome.json")).unwrap();
    let outcome: Value = serde_json::from_slice(&outcome).unwrap();
    let failed = &outcome["outcome"]["failed"];
    assert_eq!(failed["cause"], "cancelled", "{outcome}");
    assert_eq!(failed["changed"], false, "{outcome}");
    assert_eq!(effects(&host), 0);
}

#[tokio::test]
async fn an_attempt_without_a_job_does_nothing() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let output = run(&host, 1).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
}
