//! The agent as a process, with real TLS, against a controller that the test plays.

use lockstep_proto::ids::{Direction, StepKey};
use lockstep_proto::report::{Cause, Failure, ReportBody, StepOutcome};
use lockstep_proto::wire::agent_v1::down;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Controller, Host, epoch, key, plan, rollout, wait_for};

pub(crate) const ALLOW_RUN: &str = "[[allow]]\naction = 'exec.run'\n";

/// Appends a line to a file, after a pause.
fn append(line: &str, pause: &str) -> (&'static str, Value) {
    let script = format!(
        "import sys,time; print('begin', flush=True); time.sleep({pause}); \
         open(sys.argv[1], 'a').write('{line}\\n'); print('end')"
    );
    let argv = json!(["python3", "-c", script, "${host.root}/effects"]);
    ("exec.run", json!({"name": line, "argv": argv}))
}

/// Why sessions were refused, and how often, by the journal.
fn refused(host: &Host) -> Vec<(Value, u64)> {
    let lines = host.journal();
    let records = lines.iter().map(|line| &line["record"]["sessions_refused"]);
    let records = records.filter(|record| !record.is_null());
    records
        .map(|record| (record["why"].clone(), record["count"].as_u64().unwrap()))
        .collect()
}

fn effects(host: &Host) -> Vec<String> {
    let text = std::fs::read_to_string(host.path("effects")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn do_key(step: u16, attempt: u16) -> StepKey {
    key(&rollout(1), step, Direction::Do, attempt)
}

fn failed(outcome: StepOutcome) -> Failure {
    match outcome {
        StepOutcome::Failed(failure) => failure,
        other => panic!("{other:?} is no failure"),
    }
}

#[tokio::test]
async fn a_step_is_done_once_however_often_it_is_ordered() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let plan = plan(&[append("one", "0"), append("two", "0")]);
    let mut session = controller.accept(epoch(1), 0).await;
    assert_eq!(session.hello.last_report, 0);
    session.consented(&controller, &rollout(1), &plan).await;
    for step in [0, 1] {
        let key = do_key(step, 1);
        session.order(&plan, &key).await;
        let outcome = session.outcome(&key).await;
        assert!(matches!(outcome, StepOutcome::Ok { .. }), "{outcome:?}");
    }
    // Asked again, it says the same again.
    session.order(&plan, &do_key(1, 1)).await;
    let again = session.outcome(&do_key(1, 1)).await;
    assert!(matches!(again, StepOutcome::Ok { .. }), "{again:?}");
    assert_eq!(effects(&host), ["one", "two"]);
    // Its output has come on a stream of its own.
    let mut output = String::new();
    while !output.contains("end") {
        let chunk = controller.logs.recv().await.unwrap();
        output.push_str(&String::from_utf8_lossy(&chunk.data));
    }
    // The step directories go with the rollout, and its orders are no longer taken.
    session.release(&rollout(1)).await;
    wait_for("release", || {
        let left = std::fs::read_dir(host.path("state/steps")).unwrap().count();
        (left == 0).then_some(())
    })
    .await;
    session.order(&plan, &do_key(0, 2)).await;
    let refused = failed(session.outcome(&do_key(0, 2)).await);
    assert_eq!(refused.cause, Cause::Refused);
    session.offer(&rollout(1), &plan, false).await;
    match session.report().await {
        ReportBody::Declined { refusals, .. } => {
            assert!(refusals[0].reason.contains("has ended"), "{refusals:?}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(host.stop(), Some(0));
}

#[tokio::test]
async fn another_rollout_is_told_what_it_waits_for() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let plan = plan(&[append("slow", "5")]);
    let mut session = controller.accept(epoch(1), 0).await;
    session.consented(&controller, &rollout(1), &plan).await;
    session.order(&plan, &do_key(0, 1)).await;
    host.claimed(&do_key(0, 1)).await;
    for words in ["end that rollout first", "a step of it runs here"] {
        session.offer(&rollout(2), &plan, false).await;
        let refusals = loop {
            match session.report().await {
                ReportBody::Declined { refusals, .. } => break refusals,
                ReportBody::Started { .. } => {}
                other => panic!("{other:?}"),
            }
        };
        assert!(refusals[0].reason.contains(words), "{refusals:?}");
        assert!(refusals[0].reason.contains(&rollout(1).to_string()));
        session.release(&rollout(1)).await;
    }
}

#[tokio::test]
async fn a_killed_daemon_finds_the_step_and_its_outcome_again() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let plan = plan(&[append("slow", "3")]);
    let mut session = controller.accept(epoch(1), 0).await;
    session.consented(&controller, &rollout(1), &plan).await;
    session.order(&plan, &do_key(0, 1)).await;
    host.claimed(&do_key(0, 1)).await;
    host.kill();
    drop(session);

    host.start();
    // It has one report that was acknowledged, and says again what was not.
    let mut session = controller.accept(epoch(1), 1).await;
    assert_eq!(session.hello.held_rollout, Some(rollout(1)));
    session.order(&plan, &do_key(0, 1)).await;
    let outcome = session.outcome(&do_key(0, 1)).await;
    assert!(matches!(outcome, StepOutcome::Ok { .. }), "{outcome:?}");
    assert_eq!(effects(&host), ["slow"]);
}

#[tokio::test]
async fn a_killed_step_process_of_a_blind_action_is_unknown_and_leaves_nothing_running() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let plan = plan(&[append("never", "20")]);
    let mut session = controller.accept(epoch(1), 0).await;
    session.consented(&controller, &rollout(1), &plan).await;
    session.order(&plan, &do_key(0, 1)).await;
    let step = host.claimed(&do_key(0, 1)).await;
    let log = host
        .path("state/steps")
        .join(do_key(0, 1).to_string())
        .join("log");
    wait_for("output", || {
        std::fs::read_to_string(&log)
            .ok()
            .filter(|text| text.contains("begin"))
    })
    .await;
    kill_process(step, Signal::KILL).unwrap();
    let outcome = session.outcome(&do_key(0, 1)).await;
    assert!(
        matches!(outcome, StepOutcome::Unknown { .. }),
        "{outcome:?}"
    );
    // The program that the step process had started is gone too: that was waited for.
    let alive = std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        command.contains("python3") && command.contains(host.path("effects").to_str().unwrap())
    });
    assert!(!alive && effects(&host).is_empty());
}

#[tokio::test]
async fn a_cancelled_step_ends_soon_and_says_so() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let plan = plan(&[append("never", "20")]);
    let mut session = controller.accept(epoch(1), 0).await;
    session.consented(&controller, &rollout(1), &plan).await;
    session.order(&plan, &do_key(0, 1)).await;
    host.claimed(&do_key(0, 1)).await;
    session.cancel(&rollout(1)).await;
    let failure = failed(session.outcome(&do_key(0, 1)).await);
    assert_eq!(failure.cause, Cause::Cancelled);
    assert!(effects(&host).is_empty());
}

#[tokio::test]
async fn an_older_controller_is_refused_even_after_a_restart() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let mut session = controller.accept(epoch(5), 0).await;
    let empty = plan(&[("check.port", json!({"port": 1}))]);
    session.consented(&controller, &rollout(1), &empty).await;
    host.kill();
    drop(session);
    host.start();
    for stale in [epoch(4), lockstep_proto::ids::Epoch { id: 1, ..epoch(5) }] {
        let mut session = controller.accept(stale, 1).await;
        assert_eq!(session.hello.highest_epoch, epoch(5));
        assert!(session.next().await.is_none(), "the agent ends the stream");
    }
    assert!(host.log().contains("is refused"), "{}", host.log());
    // Both counters are one kind each: neither waits for the other.
    wait_for("records", || (refused(&host).len() == 2).then_some(())).await;
    let term = |counter: u64| json!({"term": {"counter": counter}});
    assert_eq!(refused(&host), [(term(4), 1), (term(5), 1)]);
}

#[tokio::test]
async fn a_controller_that_knows_more_reports_than_the_journal_is_refused() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let mut session = controller.accept(epoch(1), 9).await;
    assert!(session.next().await.is_none());
    assert!(
        host.log().contains("put back to an earlier time"),
        "{}",
        host.log()
    );
}

#[tokio::test]
async fn only_a_controllers_certificate_makes_a_controller() {
    let controller = Controller::start_as("agent/app-2").await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    wait_for("refusal", || {
        host.log().contains("its role is `agent`").then_some(())
    })
    .await;
    let said = host.log();
    assert!(
        said.contains("hint") && !said.contains("OtherError"),
        "not in words: {said}"
    );
    wait_for("record", || (!refused(&host).is_empty()).then_some(())).await;
    // The agent goes on dialling, and that is one record.
    let dialled = || host.log().matches("its role is `agent`").count();
    wait_for("dials", || (dialled() >= 3).then_some(())).await;
    assert_eq!(refused(&host), [(json!("certificate"), 1)]);
}

#[tokio::test]
async fn what_the_policy_does_not_allow_is_declined_with_its_line() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, "");
    host.start();
    let plan = plan(&[("check.port", json!({"port": 1})), append("no", "0")]);
    controller.keep(&plan);
    let mut session = controller.accept(epoch(1), 0).await;
    session.offer(&rollout(1), &plan, false).await;
    match session.report().await {
        ReportBody::Declined { refusals, .. } => {
            assert_eq!(refusals.len(), 1, "{refusals:?}");
            assert_eq!(refusals[0].at.map(|at| at.step), Some(1));
            for word in ["`exec.run`", "\n[[allow]]\n", "policy.toml"] {
                assert!(refusals[0].reason.contains(word), "{}", refusals[0].reason);
            }
        }
        other => panic!("{other:?}"),
    }
    // An order without consent is refused, whoever gives it.
    session.order(&plan, &do_key(1, 1)).await;
    assert_eq!(
        failed(session.outcome(&do_key(1, 1)).await).cause,
        Cause::Refused
    );
    assert!(effects(&host).is_empty());
}

#[tokio::test]
async fn a_dry_run_looks_and_takes_no_hold() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let plan = plan(&[append("no", "0")]);
    controller.keep(&plan);
    let mut session = controller.accept(epoch(1), 0).await;
    session.offer(&rollout(7), &plan, true).await;
    assert!(matches!(
        session.report().await,
        ReportBody::Consented { .. }
    ));
    let probe = key(&rollout(7), 0, Direction::Probe, 1);
    session.order(&plan, &probe).await;
    let outcome = session.outcome(&probe).await;
    assert!(
        matches!(outcome, StepOutcome::Ok { changed: false, .. }),
        "{outcome:?}"
    );
    assert!(effects(&host).is_empty());
    // Another rollout may have the host.
    session.consented(&controller, &rollout(1), &plan).await;
    session.offer(&rollout(2), &plan, false).await;
    match session.report().await {
        ReportBody::Declined { refusals, .. } => {
            assert!(
                refusals[0].reason.contains(rollout(1).as_str()),
                "{refusals:?}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_dry_run_says_which_steps_would_fail() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(
        &controller,
        "[[allow]]\naction = 'exec.run'\n\
         where = { env = ['(default)', { A = 'secret://nosuch' }] }\n",
    );
    host.start();
    let disk = || ("check.disk", json!({"path": "/", "free": "100TiB"}));
    let run = |more: Value| {
        let mut args = json!({"name": "x", "argv": ["/bin/true"]});
        args.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        ("exec.run", args)
    };
    let mut session = controller.accept(epoch(1), 0).await;
    for (number, (steps, would)) in [
        (vec![disk()], "would fail: "),
        (vec![run(json!({})), disk()], "depends on an earlier step: "),
        (vec![run(json!({"dir": "/nodir"}))], "would fail: "),
        (vec![run(json!({"argv": ["no-such-tool"]}))], "would fail: "),
        (
            vec![
                run(json!({})),
                run(json!({"env": {"A": "secret://nosuch"}})),
            ],
            "would fail: there is no secret `nosuch`",
        ),
        (vec![run(json!({}))], "would act: "),
    ]
    .into_iter()
    .enumerate()
    {
        let rollout = rollout(u8::try_from(number).unwrap());
        let plan = plan(&steps);
        controller.keep(&plan);
        session.offer(&rollout, &plan, true).await;
        let answer = session.report().await;
        assert!(matches!(answer, ReportBody::Consented { .. }), "{answer:?}");
        let last = u16::try_from(steps.len() - 1).unwrap();
        let probe = key(&rollout, last, Direction::Probe, 1);
        session.order(&plan, &probe).await;
        let said = match session.outcome(&probe).await {
            StepOutcome::Ok { summary, .. } => summary,
            StepOutcome::Failed(failure) => failure.message,
            StepOutcome::Unknown { why } => why,
        };
        assert!(said.starts_with(would), "{steps:?}: {said}");
    }
}

#[tokio::test]
async fn a_dry_run_asks_nothing_that_the_policy_does_not_allow_any_more() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let plan = plan(&[append("no", "0")]);
    controller.keep(&plan);
    let mut session = controller.accept(epoch(1), 0).await;
    session.offer(&rollout(7), &plan, true).await;
    session.report().await;
    std::fs::write(host.path("policy.toml"), "").unwrap();
    let probe = key(&rollout(7), 0, Direction::Probe, 1);
    session.order(&plan, &probe).await;
    let refused = failed(session.outcome(&probe).await);
    assert_eq!(refused.cause, Cause::Refused, "INV-9: {refused:?}");
}

#[tokio::test]
async fn a_release_that_comes_before_the_consent_is_heeded() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, "[[allow]]\naction = 'service.stop'\n");
    // Its state takes long to tell.
    let text = std::fs::read_to_string(&host.config).unwrap();
    let service = "[services.slow]\nstart = ['true']\nstop = ['true']\nstatus = ['sleep', '1']\n";
    std::fs::write(&host.config, text + service).unwrap();
    host.start();
    let stop = json!({"service": "slow", "driver": "command"});
    let plan = plan(&[("service.stop", stop)]);
    controller.keep(&plan);
    let mut session = controller.accept(epoch(1), 0).await;
    // First while the plan is fetched, then while the host is looked at.
    for first in [1, 3] {
        let (released, next) = (rollout(first), rollout(first + 1));
        session.offer(&released, &plan, false).await;
        session.release(&released).await;
        session.offer(&next, &plan, false).await;
        match session.report().await {
            ReportBody::Consented { rollout: of, .. } => assert_eq!(of, next),
            other => panic!("{other:?}"),
        }
        session.release(&next).await;
    }
}

#[tokio::test]
async fn reports_that_were_not_acknowledged_come_again_after_a_reconnect() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let plan = plan(&[append("one", "0")]);
    let mut session = controller.accept(epoch(1), 0).await;
    session.consented(&controller, &rollout(1), &plan).await;
    session.order(&plan, &do_key(0, 1)).await;
    let started = session.next().await.unwrap();
    let finished = session.next().await.unwrap();
    assert_eq!((started.number, finished.number), (2, 3));
    session
        .send(down::Message::Drain(
            lockstep_proto::wire::agent_v1::Drain {
                reconnect_after_ms: 10,
            },
        ))
        .await;
    drop(session);
    let mut session = controller.accept(epoch(2), 2).await;
    assert_eq!(session.hello.last_report, 3);
    assert_eq!(session.next().await.unwrap(), finished);
    assert_eq!(effects(&host), ["one"]);
}

/// A small file system of its own for the agent's state; ended with the value.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        let mount = ["-t", "tmpfs", "-o", "size=8m,mode=0700", "none"];
        let status = std::process::Command::new("mount")
            .args(mount)
            .arg(&at)
            .status();
        assert!(status.unwrap().success(), "a tmpfs can be mounted by root");
        Self(at)
    }

    fn fill(&self, leaving: u64) {
        let stat = rustix::fs::statvfs(&self.0).unwrap();
        let size = (stat.f_bavail * stat.f_frsize).saturating_sub(leaving);
        let ballast = vec![1; usize::try_from(size).unwrap()];
        match std::fs::write(self.0.join("ballast"), ballast) {
            // The agent took some of it in between.
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {}
            written => written.unwrap(),
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
    }
}

#[tokio::test]
async fn a_full_disk_refuses_what_is_new_and_records_what_ends() {
    if !rustix::process::geteuid().is_root() {
        // Only root may mount a disk that is small enough to fill.
        return;
    }
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    let disk = SmallDisk::mount(host.path("state"));
    host.start();
    let plan = plan(&[append("one", "1"), append("two", "0")]);
    controller.keep(&plan);
    let mut session = controller.accept(epoch(1), 0).await;
    disk.fill(2 << 20);
    session.offer(&rollout(1), &plan, false).await;
    match session.report().await {
        ReportBody::Declined { refusals, .. } => {
            assert!(refusals[0].reason.contains("make room"), "{refusals:?}");
        }
        other => panic!("{other:?}"),
    }
    disk.free();
    session.consented(&controller, &rollout(1), &plan).await;
    session.order(&plan, &do_key(0, 1)).await;
    host.claimed(&do_key(0, 1)).await;
    disk.fill(0);
    let outcome = session.outcome(&do_key(0, 1)).await;
    assert!(matches!(outcome, StepOutcome::Ok { .. }), "{outcome:?}");
    session.order(&plan, &do_key(1, 1)).await;
    let refused = failed(session.outcome(&do_key(1, 1)).await);
    assert_eq!(
        (refused.cause, refused.changed),
        (Cause::Host, false),
        "{refused:?}"
    );
    assert_eq!(effects(&host), ["one"]);
    disk.free();
    session.order(&plan, &do_key(1, 2)).await;
    let outcome = session.outcome(&do_key(1, 2)).await;
    assert!(matches!(outcome, StepOutcome::Ok { .. }), "{outcome:?}");
    host.kill();
    host.start();
    let session = controller.accept(epoch(1), 0).await;
    assert_eq!(
        session.hello.held_rollout,
        Some(rollout(1)),
        "the journal is whole"
    );
}

#[tokio::test]
async fn refusals_on_a_full_disk_leave_the_reserve_to_what_runs() {
    if !rustix::process::geteuid().is_root() {
        // Only root may mount a disk that is small enough to fill.
        return;
    }
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    let disk = SmallDisk::mount(host.path("state"));
    host.start();
    let plan = plan(&[append("one", "2")]);
    let mut session = controller.accept(epoch(1), 0).await;
    session.consented(&controller, &rollout(1), &plan).await;
    session.order(&plan, &do_key(0, 1)).await;
    host.claimed(&do_key(0, 1)).await;
    disk.fill(0);
    let size = || std::fs::metadata(host.path("state/reserve")).map(|reserve| reserve.len());
    assert_eq!(size().unwrap(), 1 << 20);
    // It takes one step at a time. Some of these fit into the journal's last page.
    for attempt in 2..100 {
        session.order(&plan, &do_key(0, attempt)).await;
    }
    let mut acknowledged = 1;
    while let Some(report) = session.next().await {
        acknowledged = report.number;
    }
    assert_eq!(size().unwrap(), 1 << 20, "INV-2");
    assert!(host.log().contains("make room"), "{}", host.log());
    let mut session = controller.accept(epoch(1), acknowledged).await;
    let outcome = loop {
        match session.report().await {
            ReportBody::Finished { key, outcome, .. } if key == do_key(0, 1) => break outcome,
            _ => {}
        }
    };
    assert!(matches!(outcome, StepOutcome::Ok { .. }), "{outcome:?}");
    assert_eq!(effects(&host), ["one"]);
}

#[tokio::test]
async fn a_daemon_killed_at_any_instant_loses_nothing_and_repeats_nothing() {
    const STEPS: u16 = 24;
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, ALLOW_RUN);
    host.start();
    let lines: Vec<String> = (0..STEPS).map(|step| step.to_string()).collect();
    let actions: Vec<_> = lines.iter().map(|line| append(line, "0.03")).collect();
    let plan = plan(&actions);
    let mut session = controller.accept(epoch(1), 0).await;
    session.consented(&controller, &rollout(1), &plan).await;
    let mut acknowledged = 1;
    for step in 0..STEPS {
        let mut key = do_key(step, 1);
        session.order(&plan, &key).await;
        // Before the intent, between intent and claim, while it runs, after its outcome.
        tokio::time::sleep(std::time::Duration::from_millis(u64::from(step) * 6)).await;
        host.kill();
        drop(session);
        host.start();
        session = controller.accept(epoch(1), acknowledged).await;
        session.order(&plan, &key).await;
        loop {
            let report = session.next().await.unwrap();
            assert_eq!(report.number, acknowledged + 1, "numbers have no gaps");
            acknowledged = report.number;
            session
                .send(down::Message::Acknowledged(report.number))
                .await;
            match report.body {
                ReportBody::Finished { outcome, .. } => {
                    if matches!(outcome, StepOutcome::Ok { .. }) {
                        break;
                    }
                    // It had not begun: it is ordered again.
                    let never = failed(outcome);
                    assert_eq!((never.cause, never.changed), (Cause::Interrupted, false));
                    assert_eq!(key.attempt, 1, "{never:?}");
                    key = do_key(step, 2);
                    session.order(&plan, &key).await;
                }
                ReportBody::Started { key: of } => assert_eq!(of, key),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(effects(&host), lines);
}
