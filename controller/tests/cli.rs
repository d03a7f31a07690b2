//! The command line against a real controller: a rollout of gates only, which needs no hosts.

#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
mod support;

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::{Controller, Place, SOON};

const PLAN: &str = "version: 1
plan: gates
deadline: 10m
fleet: {}
phases:
  - name: approve
    steps:
      - gate.approval: {from: {dba: 1}, timeout: 5m}
  - name: confirm
    steps:
      - gate.checklist: {items: [one, two], timeout: 5m}
signoff: [dba]
";

/// A person at a command line.
struct Person {
    profile: PathBuf,
}

impl Person {
    fn new(place: &Place, address: &str, name: &str, groups: &[&str]) -> Self {
        place.operator(name, groups);
        let profile = place.path().join(format!("{name}.toml"));
        let text = format!(
            "controller = \"{address}\"\nca = \"ca-controllers.crt\"\n\
             cert = \"operator-{name}.crt\"\nkey = \"operator-{name}.key\"\n"
        );
        fs::write(&profile, text).unwrap();
        Self { profile }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
        command
            .args(arguments)
            .env_clear()
            .env("LOCKSTEP_PROFILE", &self.profile)
            .current_dir(self.profile.parent().unwrap())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Said {
        Said::from(self.command(arguments).output().unwrap())
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let said = self.run(&[arguments, &["--output", "json"]].concat());
        assert_eq!(said.code, 0, "{arguments:?}: {said:?}");
        serde_json::from_str(&said.out).unwrap()
    }

    fn spawn(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Submits the plan, and leaves it alone.
    fn submit(&self) -> String {
        let submitted = self.json(&["apply", "plan.yaml", "--detach"]);
        submitted["rollout"].as_str().unwrap().to_owned()
    }
}

#[derive(Debug)]
struct Said {
    code: i32,
    out: String,
    err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

fn finish(child: Child) -> Said {
    Said::from(child.wait_with_output().unwrap())
}

/// Reads what a command says until a text has come.
fn read_until(child: &mut Child, text: &str) -> String {
    let mut said = Vec::new();
    let mut byte = [0];
    let stderr = child.stderr.as_mut().unwrap();
    while stderr.read(&mut byte).unwrap() == 1 {
        said.extend(byte);
        if said.ends_with(text.as_bytes()) {
            return String::from_utf8(said).unwrap();
        }
    }
    panic!(
        "ended without saying {text:?}:\n{}",
        String::from_utf8_lossy(&said)
    );
}

fn wait_for_gate(person: &Person, rollout: &str, at: &str) {
    let begun = Instant::now();
    loop {
        let document = person.json(&["status", rollout]);
        let steps = document["phases"].as_array().unwrap().iter();
        let mut steps = steps.flat_map(|phase| phase["steps"].as_array().unwrap());
        if steps.any(|step| step["at"] == at && step["gate"].is_object()) {
            return;
        }
        assert!(begun.elapsed() < SOON, "gate {at} is not open: {document}");
    }
}

/// A controller at an address that stays the same when it comes back, and two people.
fn office() -> (Place, Controller, Person, Person) {
    let place = Place::new();
    fs::write(place.path().join("plan.yaml"), PLAN).unwrap();
    let controller = place.start();
    let address = controller.address.to_string();
    let config = place.path().join("controller.toml");
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace("127.0.0.1:0", &address);
    fs::write(&config, text).unwrap();
    let dora = Person::new(&place, &address, "dora", &["devops"]);
    let abel = Person::new(&place, &address, "abel", &["dba"]);
    (place, controller, dora, abel)
}

#[test]
fn a_killed_controller_does_not_end_who_watches() {
    let (place, controller, dora, abel) = office();
    let mut apply = dora.spawn(&["apply", "plan.yaml"]);
    let said = read_until(&mut apply, "  lockstep approve ro_");
    let rollout = dora.json(&["status"])["rollouts"][0]["rollout"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(said.contains("waiting for 1 of dba"), "{said}");

    // Whoever started it may not approve it; whoever does not say so does not approve either.
    assert_eq!(dora.run(&["approve", &rollout, "--yes"]).code, 8);
    let list = dora.run(&["status"]);
    assert!(list.out.contains("waits for 1 of dba"), "{list:?}");
    let confirmed = abel.run(&["confirm", &rollout, "--yes"]);
    assert_eq!(confirmed.code, 2, "{confirmed:?}");
    let right = format!("hint: lockstep approve {rollout} --gate 0.0");
    assert!(confirmed.err.contains(&right), "{confirmed:?}");
    let unasked = abel.run(&["approve", &rollout]);
    assert_eq!(unasked.code, 2, "{unasked:?}");
    assert!(unasked.err.contains("--yes"), "{unasked:?}");

    controller.signal(Signal::KILL);
    read_until(&mut apply, "trying again");
    drop(controller);
    let _controller = place.start();
    read_until(&mut apply, "the controller is back after ");

    let approved = abel.run(&["approve", &rollout, "--yes", "--comment", "read it"]);
    assert_eq!(approved.code, 0, "{approved:?}");
    assert!(approved.err.contains("evidence  sha256:"), "{approved:?}");
    wait_for_gate(&dora, &rollout, "1.0");
    let approved = abel.run(&["approve", &rollout, "--yes"]);
    assert_eq!(approved.code, 2, "{approved:?}");
    assert!(approved.err.contains("lockstep confirm"), "{approved:?}");
    let half = dora.json(&["confirm", &rollout, "--items", "2", "--yes"]);
    assert_eq!(half["missing"], "one");
    assert_eq!(
        dora.json(&["confirm", &rollout, "--items", "1", "--yes"])["missing"],
        ""
    );

    let said = finish(apply);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.out.starts_with("succeeded: gates"), "{said:?}");
    // What was said before the outage is not said again after it.
    assert_eq!(said.err.matches("abel approves").count(), 1, "{said:?}");
    assert_eq!(said.err.matches("submitted by dora").count(), 0, "{said:?}");

    let signed = abel.run(&["signoff", &rollout, "--role", "dba", "--comment", "fine"]);
    assert_eq!(signed.code, 0, "{signed:?}");
    let report = dora.run(&["report", &rollout]);
    for words in [
        "| Result | SUCCEEDED |",
        "| abel | dba | approved |",
        "| [x] dba | abel |",
        "[x] one",
    ] {
        assert!(report.out.contains(words), "{words}:\n{}", report.out);
    }
    let page = place.path().join("report.html");
    let written = dora.run(&["report", &rollout, "-o", page.to_str().unwrap()]);
    assert!(written.code == 0 && written.out.is_empty(), "{written:?}");
    assert!(
        fs::read_to_string(page)
            .unwrap()
            .starts_with("<!DOCTYPE html>")
    );
}

#[test]
fn an_interrupted_watch_leaves_the_rollout_alone() {
    let (_place, _controller, dora, _) = office();
    let rollout = dora.submit();
    let mut watch = dora.spawn(&["watch", &rollout]);
    read_until(&mut watch, "waiting for 1 of dba");
    kill_process(Pid::from_child(&watch), Signal::INT).unwrap();
    let said = finish(watch);
    assert_eq!(said.code, 7, "{said:?}");
    assert!(
        said.err.contains(&format!("lockstep watch {rollout}")),
        "{said:?}"
    );
    assert_eq!(dora.json(&["status", &rollout])["state"], "running");

    let cancelled = dora.run(&["cancel", &rollout, "--reason", "not today"]);
    assert_eq!(cancelled.code, 0, "{cancelled:?}");
    assert!(
        cancelled.err.contains("cancelled by dora: not today"),
        "{cancelled:?}"
    );
    let said = dora.run(&["watch", &rollout]);
    assert_eq!(said.code, 6, "{said:?}");
    assert!(said.out.contains("not today"), "{said:?}");
}

#[test]
fn programs_read_one_document_per_line() {
    let (_place, _controller, dora, abel) = office();
    let rollout = dora.submit();
    wait_for_gate(&dora, &rollout, "0.0");
    assert_eq!(abel.run(&["reject", &rollout, "--comment", "no"]).code, 0);
    let said = dora.run(&["watch", &rollout, "--output", "json"]);
    let lines: Vec<Value> = said
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let (last, events) = lines.split_last().unwrap();
    assert_eq!(last["format"], "lockstep.result/1");
    assert_eq!(last["exit_code"], said.code);
    assert_ne!(said.code, 0, "a rejected rollout has not succeeded: {last}");
    assert!(
        events
            .iter()
            .all(|event| event["format"] == "lockstep.event/1"),
        "{said:?}"
    );
    assert!(
        events.iter().any(|event| event["kind"] == "gate_decided"),
        "{said:?}"
    );
    assert_eq!(
        dora.json(&["report", &rollout])["format"],
        "lockstep.rollout/1"
    );
    assert_eq!(dora.json(&["hosts"])["format"], "lockstep.hosts/1");
}

#[test]
fn exit_codes_tell_a_bad_plan_from_an_absent_controller() {
    let (place, controller, dora, _) = office();
    let bad = place.path().join("bad.yaml");
    fs::write(&bad, PLAN.replace("deadline: 10m", "deadlin: 10m")).unwrap();
    let said = dora.run(&["apply", bad.to_str().unwrap()]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.err.contains("did you mean `deadline`?"), "{said:?}");
    let said = dora.run(&["status", "ro_000000000000"]);
    assert_eq!(said.code, 8, "{said:?}");

    drop(controller);
    let said = dora.run(&["hosts"]);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(
        said.err.contains("hint: is `lockstep serve` running there"),
        "{said:?}"
    );
    let said = dora.run(&["hosts", "--profile", "absent.toml"]);
    assert_eq!(said.code, 2, "{said:?}");
}

#[test]
fn what_was_mistyped_is_named() {
    let (place, _controller, dora, _) = office();
    let rollout = dora.submit();
    for (arguments, words) in [
        (["--step", "x"], "expected PHASE.STEP"),
        (["--step", "9.9"], "has no step 9.9"),
        (["--host", "nope"], "has no host nope"),
    ] {
        let said = dora.run(&[&["logs", &rollout], &arguments[..]].concat());
        assert_eq!(said.code, 2, "{said:?}");
        assert!(said.err.contains(words), "{said:?}");
    }
    let said = dora.run(&["validate", "plan.yaml", "-i", "a=1", "-i", "a=2"]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.err.contains("`a` is given twice"), "{said:?}");
    assert_eq!(dora.run(&["history", "-n", "0"]).code, 2);
    let said = dora.run(&["status", "ro_000000000000", "--output", "json"]);
    let error: Value = serde_json::from_str(&said.err).unwrap();
    assert_eq!(error["format"], "lockstep.error/1");
    assert_eq!(error["exit_code"], said.code);
    assert!(
        error["hint"].as_str().unwrap().contains("lockstep history"),
        "{error}"
    );

    let with_inputs = PLAN.replace(
        "deadline: 10m",
        "deadline: 10m\ninputs: {release: {pattern: '^v'}, ticks: {default: '3'}}",
    );
    fs::write(place.path().join("inputs.yaml"), with_inputs).unwrap();
    let said = dora.run(&["validate", "inputs.yaml"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(
        said.out.contains("without values for release (--input"),
        "{said:?}"
    );

    let key = place.path().join("operator-dora.key");
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(&key, everybody).unwrap();
    let said = dora.run(&["hosts"]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.err.contains("hint: chmod 0600"), "{said:?}");
}

#[test]
fn another_installations_controller_is_not_believed() {
    let (place, controller, dora, _) = office();
    let elsewhere = Place::new();
    let ca = elsewhere.path().join("ca-controllers.crt");
    let said = dora.run(&["hosts", "--ca", ca.to_str().unwrap()]);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(said.err.contains("is not trusted"), "{said:?}");

    // An operator of another installation is turned away by the controller.
    let eve = Person::new(&elsewhere, &controller.address.to_string(), "eve", &["dba"]);
    let ours = place.path().join("ca-controllers.crt");
    let said = eve.run(&["hosts", "--ca", ours.to_str().unwrap()]);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(
        said.err.contains("is your certificate an operator's"),
        "{said:?}"
    );
    assert!(Path::new(&eve.profile).exists());
}

#[test]
fn whoever_signs_without_a_question_says_what_is_meant() {
    let place = Place::new();
    // Nobody listens there: what is refused is refused before anything is shown.
    let person = Person::new(&place, "127.0.0.1:1", "dana", &["dba"]);
    let approve = ["approve", "ro_0123456789ab"];
    let glass = ["break-glass", "ro_0123456789ab", "--reason", "x"];
    for command in [&approve[..], &glass] {
        let run =
            |more: &[&str]| person.run(&[command, &["--sign", "key", "--yes"], more].concat());
        let digest = format!("sha256:{}", "0".repeat(64));
        for vague in [&[][..], &["--gate", "0.0"], &["--evidence", &digest]] {
            let said = run(vague);
            assert_eq!(said.code, 2, "{command:?} {vague:?}: {said:?}");
            assert!(
                said.err.contains("whatever the controller shows"),
                "{said:?}"
            );
        }
        let said = run(&["--gate", "0.0", "--evidence", &digest]);
        assert_eq!(said.code, 3, "it goes and looks: {said:?}");
    }
}

#[tokio::test]
async fn who_breaks_the_glass_holds_what_is_shown_against_their_own() {
    let place = Place::new();
    let controller = place.start();
    let address = controller.address.to_string();
    let olga = Person::new(&place, &address, "olga", &[]);
    let ira = Person::new(&place, &address, "ira", &["incident"]);
    fs::write(place.path().join("plan.yaml"), PLAN).unwrap();
    fs::write(
        place.path().join("other.yaml"),
        PLAN.replace("two", "three"),
    )
    .unwrap();
    for name in ["plan", "other"] {
        let (from, to) = (format!("{name}.yaml"), format!("{name}.json"));
        let said = olga.run(&["compile", &from, "-o", &to]);
        assert_eq!(said.code, 0, "{said:?}");
    }
    let submitted = olga.json(&["apply", "plan.json", "--detach"]);
    let rollout = submitted["rollout"].as_str().unwrap();
    let word = ["break-glass", rollout, "--reason", "x", "--yes"];
    let other = ira.run(&[&word[..], &["--plan", "other.json"]].concat());
    assert_eq!(other.code, 2, "{other:?}");
    assert!(other.err.contains("and your plan is"), "{other:?}");
    let digest = format!("sha256:{}", "0".repeat(64));
    let other = ira.run(&[&word[..], &["--evidence", &digest]].concat());
    assert_eq!(other.code, 2, "{other:?}");
    assert!(other.err.contains("not sha256:0000"), "{other:?}");
    // The right one is sent, to a controller that knows of no group.
    let own = ira.run(&[&word[..], &["--plan", "plan.json"]].concat());
    assert!(own.err.contains("[break_glass]"), "{own:?}");
}
