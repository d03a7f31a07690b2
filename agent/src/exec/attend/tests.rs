use lockstep_proto::ids::{RolloutId, StepRef};
use lockstep_tests::power::{Moment, Watch};
use rand::SeedableRng as _;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::config::StepRunner;
use crate::testing;

fn host_of(config: Config) -> Host {
    Host {
        config: Arc::new(config),
        boot: BootId::from_bytes([1; 8]),
        runner: Runner::new(StepRunner::Session, "/agent.toml".as_ref()).unwrap(),
        logs: mpsc::channel(1).0,
        looks: Cell::new(0),
    }
}

/// An attempt at an action, with its job written.
async fn attempt(of: &testing::Host, action: &Action) -> (Host, StepKey) {
    let host = host_of(of.config.clone());
    let key = StepKey {
        rollout: RolloutId::from_random([1; 6]),
        host: host.config.host.clone(),
        at: StepRef { phase: 0, step: 0 },
        direction: Direction::Do,
        attempt: 1,
    };
    let mut job = Job {
        key: key.clone(),
        action: action.clone(),
        before: serde_json::Value::Null,
        bindings: vec![],
        timeout: Period::seconds(30),
        log_offsets: std::collections::BTreeMap::new(),
    };
    host.dir(&key).make(Keep::of(action)).unwrap();
    job.before = host.before(&job).await.unwrap();
    host.dir(&key).write_job(&job).unwrap();
    (host, key)
}

/// States in which the disk may be if the power goes now.
fn cuts(moment: &Moment, of: &testing::Host) -> impl Iterator<Item = (TempDir, Host)> {
    let mut random = rand::rngs::StdRng::seed_from_u64(1);
    (0..300).map(move |_| {
        let cut = tempfile::tempdir().unwrap();
        moment.cut(&mut random, cut.path());
        let state_dir = cut.path().to_owned();
        let config = of.config.clone();
        (
            cut,
            host_of(Config {
                state_dir,
                ..config
            }),
        )
    })
}

#[tokio::test]
async fn what_only_observes_waits_for_no_disk_and_is_told_right_after_a_power_loss() {
    let of = testing::Host::new();
    let action = Action::deserialize_args("check.port", json!({"port": 1}));
    let action = action.unwrap().unwrap();
    let watch = Watch::begin(&of.config.state_dir);
    let (host, key) = attempt(&of, &action).await;
    let (dir, keep) = (host.dir(&key), Keep::of(&action));
    let claim = Claim::own(host.boot.clone()).unwrap();
    assert_eq!(claim.take(&dir, keep).unwrap(), Claimed::Now);
    dir.reserve_outcome().unwrap();
    let told = failed(failure(Cause::CheckUnmet, "nothing listens"));
    dir.write_outcome(&told, keep).unwrap();
    let moments = watch.end();
    assert_eq!(moments.len(), 1, "nothing is synchronised but the journal");
    let mut found = [0; 2];
    for (_cut, host) in cuts(&moments[0], &of) {
        let ended = outcome(&host, &key, &host.dir(&key), Met::Over).await;
        let whole = ended == told;
        let without = failed(failure(Cause::Interrupted, NO_OUTCOME));
        assert!(whole || ended == without, "INV-1: {ended:?}");
        found[usize::from(whole)] += 1;
    }
    assert!(found.iter().all(|count| *count > 0), "{found:?}");
}

#[tokio::test]
async fn what_may_change_something_has_its_job_on_the_disk_before_its_intent() {
    let of = testing::Host::new();
    std::fs::create_dir(StepDir::parent(&of.config.state_dir)).unwrap();
    let action = Action::deserialize_args("exec.run", json!({"name": "x", "argv": ["true"]}));
    let watch = Watch::begin(&of.config.state_dir);
    let (host, key) = attempt(&of, &action.unwrap().unwrap()).await;
    let job = host.dir(&key).read_job().unwrap();
    let moments = watch.end();
    for (_cut, host) in cuts(moments.last().unwrap(), &of) {
        let dir = host.dir(&key);
        assert_eq!(dir.read_job().unwrap(), job, "INV-2");
        assert!(dir.files().is_dir(), "INV-2");
    }
}

#[tokio::test]
async fn what_is_not_done_and_not_as_before_either_is_left_to_an_undo() {
    let of = testing::Host::new();
    let file = of.path().join("app.env");
    let args = json!({"path": file, "set": {"A": "2"}});
    let action = Action::deserialize_args("env.render", args);
    std::fs::write(&file, "A=1\n").unwrap();
    let (host, key) = attempt(&of, &action.unwrap().unwrap()).await;
    let settled = async || match settle(&host, &key, &host.dir(&key)).await.outcome {
        StepOutcome::Failed(failure) => (failure.cause, failure.changed),
        other => panic!("{other:?}"),
    };
    assert_eq!(settled().await, (Cause::Interrupted, false));
    std::fs::write(&file, "A=3\n").unwrap();
    assert_eq!(settled().await, (Cause::Interrupted, true), "INV-6");
    // Asking has not overwritten what an undo needs.
    let copy = host.dir(&key).files().join("env-before");
    assert_eq!(std::fs::read_to_string(copy).unwrap(), "A=1\n");
}

/// As after a power loss, when the agent is up before the database.
#[tokio::test]
async fn a_host_that_cannot_be_asked_yet_is_asked_again() {
    let of = testing::Host::new();
    let file = of.path().join("app.env");
    let args = json!({"path": file, "set": {"A": "2"}});
    let action = Action::deserialize_args("env.render", args);
    let (host, key) = attempt(&of, &action.unwrap().unwrap()).await;
    let dir = host.dir(&key);
    // What is no file cannot be read.
    std::fs::create_dir(&file).unwrap();
    let mend = async {
        sleep(Duration::from_millis(500)).await;
        std::fs::remove_dir(&file).unwrap();
    };
    let (ended, ()) = tokio::join!(settle(&host, &key, &dir), mend);
    match ended.outcome {
        StepOutcome::Failed(failure) => {
            assert_eq!(
                (failure.cause, failure.changed),
                (Cause::Interrupted, false)
            );
        }
        other => panic!("{other:?}"),
    }
    // Not for ever: nobody waits longer than the step's own time.
    std::fs::create_dir(&file).unwrap();
    let mut job = dir.read_job().unwrap();
    job.timeout = Period(1500);
    dir.write_job(&job).unwrap();
    let ended = timeout(Duration::from_secs(20), settle(&host, &key, &dir)).await;
    assert!(matches!(
        ended.unwrap().outcome,
        StepOutcome::Unknown { .. }
    ));
}

/// Between its intent and its claim, an application fills the disk.
#[tokio::test]
async fn a_disk_that_is_full_before_the_claim_is_a_failure_that_changed_nothing() {
    let mut of = testing::Host::new();
    let small = of.path().join("small");
    let Some(disk) = lockstep_tests::disk::SmallDisk::mount(small.clone(), 1) else {
        return;
    };
    of.config.state_dir = small;
    let action = Action::deserialize_args("exec.run", json!({"name": "x", "argv": ["true"]}));
    let (host, key) = attempt(&of, &action.unwrap().unwrap()).await;
    let dir = host.dir(&key);
    disk.fill(0);
    let never = Claim::never(host.boot.clone())
        .unwrap()
        .take(&dir, Keep::Durably);
    assert!(never.is_err(), "{never:?}");
    // Its step process ends before it claims.
    let new = Met::New { unproven: vec![] };
    let StepOutcome::Failed(failure) = outcome(&host, &key, &dir, new).await.outcome else {
        panic!("nothing is unknown of what never began");
    };
    assert_eq!(
        (failure.cause, failure.changed),
        (Cause::Interrupted, false)
    );
    assert!(failure.message.contains("No space left"), "{failure:?}");
    // Another daemon's step process may still be on its way: nobody knows.
    let found = outcome(&host, &key, &dir, Met::Found).await.outcome;
    assert!(matches!(found, StepOutcome::Unknown { .. }), "{found:?}");
}

#[tokio::test]
async fn a_step_process_that_ends_before_it_begins_is_interrupted_and_never_begins() {
    let of = testing::Host::new();
    let action = Action::deserialize_args("check.port", serde_json::json!({"port": 1}));
    let (host, key) = attempt(&of, &action.unwrap().unwrap()).await;
    // What is started is this test's own program, which claims nothing.
    let dir = host.dir(&key);
    let new = Met::New { unproven: vec![] };
    let ended = outcome(&host, &key, &dir, new).await;
    let StepOutcome::Failed(failure) = ended.outcome else {
        panic!("{ended:?}");
    };
    assert_eq!(
        (failure.cause, failure.changed),
        (Cause::Interrupted, false)
    );
    let late = Claim::own(host.boot.clone())
        .unwrap()
        .take(&dir, Keep::Durably)
        .unwrap();
    assert_eq!(late, Claimed::Before, "INV-1");
}

#[tokio::test]
async fn what_an_attempt_without_proof_left_running_is_ended_before_the_next_one_acts() {
    let of = testing::Host::new();
    let action = Action::deserialize_args("check.port", json!({"port": 1}));
    let (host, first) = attempt(&of, &action.unwrap().unwrap()).await;
    let dir = host.dir(&first);
    let mut left = tokio::process::Command::new("setsid");
    let mut left = left.args(["sleep", "1000"]).spawn().unwrap();
    let pid = i32::try_from(left.id().unwrap()).unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let started = stat.split_whitespace().nth(21).unwrap().parse().unwrap();
    let claim = Claim {
        pid,
        started,
        boot: host.boot.clone(),
        acts: true,
    };
    claim.take(&dir, Keep::Durably).unwrap();
    while claim.alive(&host.boot).is_empty() {
        sleep(POLL_FIRST).await;
    }
    let undo = StepKey {
        direction: Direction::Undo,
        ..first.clone()
    };
    let dir = host.dir(&undo);
    dir.make(Keep::Durably).unwrap();
    let unproven = vec![first];
    outcome(&host, &undo, &dir, Met::New { unproven }).await;
    assert!(left.try_wait().unwrap().is_some(), "it still runs");
}

#[tokio::test]
async fn an_attempt_that_is_found_before_it_began_never_begins() {
    let of = testing::Host::new();
    let action = Action::deserialize_args("exec.run", json!({"name": "x", "argv": ["true"]}));
    let (host, key) = attempt(&of, &action.unwrap().unwrap()).await;
    let dir = host.dir(&key);
    // The second time as if the daemon had been killed before it recorded the first.
    for _ in 0..2 {
        let StepOutcome::Failed(failure) = outcome(&host, &key, &dir, Met::Found).await.outcome
        else {
            panic!("nothing is unknown of what never began");
        };
        assert_eq!(
            (failure.cause, failure.changed),
            (Cause::Interrupted, false)
        );
        assert!(!dir.output().exists(), "a step process was started");
        let late = Claim::own(host.boot.clone())
            .unwrap()
            .take(&dir, Keep::Durably)
            .unwrap();
        assert_eq!(late, Claimed::Before, "INV-1");
    }
    std::fs::write(dir.cancel(), "").unwrap();
    match outcome(&host, &key, &dir, Met::Found).await.outcome {
        StepOutcome::Failed(failure) => assert_eq!(failure.cause, Cause::Cancelled),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_attempt_that_is_found_while_its_step_process_acts_is_waited_for() {
    let of = testing::Host::new();
    let action = Action::deserialize_args("check.port", json!({"port": 1}));
    let (host, key) = attempt(&of, &action.unwrap().unwrap()).await;
    let dir = host.dir(&key);
    // It was a moment faster; this process plays it.
    Claim::own(host.boot.clone())
        .unwrap()
        .take(&dir, Keep::Durably)
        .unwrap();
    let ended = {
        let mut waits = std::pin::pin!(outcome(&host, &key, &dir, Met::Found));
        let soon = timeout(Duration::from_millis(300), &mut waits).await;
        assert!(soon.is_err(), "it is running: {soon:?}");
        dir.reserve_outcome().unwrap();
        let ended = failed(failure(Cause::CheckUnmet, "no"));
        dir.write_outcome(&ended, Keep::ThisBoot).unwrap();
        waits.await
    };
    assert_eq!(ended, failed(failure(Cause::CheckUnmet, "no")));
}

#[test]
fn who_waits_for_another_process_than_its_child_lets_others_run() {
    let root = tempfile::tempdir().unwrap();
    let dir = StepDir::at(root.path().to_owned());
    let boot = BootId::from_bytes([1; 8]);
    Claim::own(boot.clone())
        .unwrap()
        .take(&dir, Keep::Durably)
        .unwrap();
    let (answer, answers) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        let waited = runtime.block_on(async {
            // It has found the claim taken.
            let child = tokio::process::Command::new("true").spawn().unwrap();
            let mut child = Process::Child(child);
            timeout(Duration::from_secs(1), wait(&boot, &dir, &mut child)).await
        });
        answer.send(waited.is_err())
    });
    let waits = answers.recv_timeout(Duration::from_secs(20));
    assert_eq!(waits, Ok(true), "it waits, and gives way");
}

#[test]
fn an_attempt_without_an_outcome_is_judged_by_the_hosts_answer() {
    use Direction::{Do, Undo};
    let text = || "t".to_owned();
    let action = |name, args| Action::deserialize_args(name, args).unwrap().unwrap();
    let stop = action("service.stop", serde_json::json!({"service": "web"}));
    let restart = action("service.restart", serde_json::json!({"service": "web"}));
    let say = |ended: Ended| match ended.outcome {
        StepOutcome::Ok { changed, .. } => ("ok", changed),
        StepOutcome::Failed(failure) => {
            assert_eq!(failure.cause, Cause::Interrupted);
            ("again", failure.changed)
        }
        StepOutcome::Unknown { .. } => ("unknown", false),
    };
    let changed = |direction, probe| say(judge(direction, &stop, probe, true));
    assert_eq!(changed(Do, Ok(Probe::Present(text()))), ("again", true));
    assert_eq!(changed(Do, Ok(Probe::Absent(text()))), ("again", false));
    assert_eq!(changed(Do, Ok(Probe::Partial(text()))), ("again", true));
    assert_eq!(changed(Do, Ok(Probe::NoProof(text()))), ("unknown", false));
    assert_eq!(changed(Do, Ok(Probe::NotYet(text()))), ("unknown", false));
    let begun = judge(Do, &stop, Ok(Probe::Absent(text())), false);
    assert_eq!(say(begun), ("again", true), "INV-6: a rollback undoes it");
    let restarted = judge(Do, &restart, Ok(Probe::Present(text())), true);
    assert_eq!(
        say(restarted),
        ("ok", true),
        "INV-1: it is not restarted twice"
    );
    let error = || Err(failure(Cause::Host, "no answer"));
    assert_eq!(changed(Do, error()), ("unknown", false));
    assert_eq!(changed(Undo, Ok(Probe::Absent(text()))), ("again", true));
    assert_eq!(changed(Undo, Ok(Probe::Present(text()))), ("again", true));
    assert_eq!(changed(Undo, error()), ("unknown", false));
}
