//! Attends one attempt from its start to its outcome, whoever else dies meanwhile (INV-1).
//!
//! ```text
//! start -> outcome file                                   what it says
//!       -> process gone, no outcome -> end what is left -> settle by the action's class
//!       -> never claimed -> claim it here, so that it never will be -> failed, unchanged
//! found at the daemon's start, and not claimed                      -> the same
//! ```

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::{BootId, Direction, StepKey};
use lockstep_proto::report::{Cause, Failure, StepOutcome};
use lockstep_proto::values::{Period, Timestamp};
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::runner::Runner;
use super::seam::LogPiece;
use super::tail::Tail;
use crate::actions::{self, Probe};
use crate::config::Config;
use crate::faults::planted;
use crate::process::head;
use crate::sql::remove_left_over;
use crate::step::{Claim, Claimed, Context, Ended, Job, StepDir, StepLog, failure};

/// How long asking the host may take: `before`, `probe`, `state` of one action.
pub(crate) const LOOK: Duration = Duration::from_secs(30);

/// How often the outcome is looked for: often at first, for many steps take no time, and then at
/// leisure. Only while something runs.
const POLL_FIRST: Duration = Duration::from_millis(5);
const POLL_LATER: Duration = Duration::from_millis(50);
const SOON: Duration = Duration::from_millis(500);

/// How long a step process may take to claim its attempt. One that is later finds the claim taken.
const CLAIM_WITHIN: Duration = Duration::from_secs(30);

/// The parts of the host that attending needs.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) config: Arc<Config>,
    pub(crate) boot: BootId,
    pub(crate) runner: Runner,
    /// Where output goes; dropped while nobody takes it.
    pub(crate) logs: mpsc::Sender<LogPiece>,
}

/// How an attempt is met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Met {
    /// Its intent has just been written.
    New,
    /// The daemon finds it at its start. It is never started any more: meanwhile the controller may
    /// have given it up, and people may have decided otherwise.
    Found,
}

impl Host {
    pub(crate) fn dir(&self, key: &StepKey) -> StepDir {
        StepDir::of(&self.config.state_dir, key)
    }

    /// What asking the host sees.
    pub(crate) fn context(&self, job: &Job, dir: std::path::PathBuf, limit: Duration) -> Context {
        Context {
            key: job.key.clone(),
            config: self.config.clone(),
            bindings: job.bindings.clone().into(),
            dir,
            log: StepLog::nowhere(),
            deadline: Instant::now() + limit,
            stop: CancellationToken::new(),
            log_offsets: Arc::new(job.log_offsets.clone()),
            dry_run: job.key.direction == Direction::Probe,
        }
    }

    /// Asks the host, with a time limit.
    pub(crate) async fn look<T>(
        &self,
        job: &Job,
        ask: impl AsyncFnOnce(&Context) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let dir = self.dir(&job.key).files();
        let dir = if dir.is_dir() {
            dir
        } else {
            self.config.run_dir.clone()
        };
        let context = self.context(job, dir, LOOK);
        timeout(LOOK, ask(&context)).await.unwrap_or_else(|_| {
            Err(failure(
                Cause::TimedOut,
                format!("the host did not answer within {} s", LOOK.as_secs()),
            ))
        })
    }
}

/// Attends an attempt until its outcome is known.
pub(crate) async fn attend(host: Rc<Host>, key: StepKey, met: Met) -> Ended {
    let dir = host.dir(&key);
    let mut tail = Tail::new(key.clone(), dir.log(), host.logs.clone());
    let begun = Instant::now();
    let mut ended = tokio::select! {
        biased;
        ended = outcome(&host, &key, &dir, met) => ended,
        never = tail.follow() => match never {},
    };
    tail.catch_up();
    remove_left_over(&host.config.run_dir, |of| *of == key);
    if ended.took == Period(0) {
        let millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        ended.took = Period(millis);
    }
    ended
}

async fn outcome(host: &Host, key: &StepKey, dir: &StepDir, met: Met) -> Ended {
    let child = match met {
        Met::New => match host.runner.start(key, dir).await {
            Ok(child) => child,
            Err(error) => {
                let why = failure(Cause::Host, error.to_string());
                return cannot_start(host, key, dir, why).await;
            }
        },
        Met::Found if dir.claim().exists() => None,
        // Claiming decides: a process that was started before and is still on its way finds the
        // claim taken, or is found by it.
        Met::Found => {
            let why = "the agent was stopped before the step began";
            return cannot_start(host, key, dir, failure(Cause::Interrupted, why)).await;
        }
    };
    match wait(&host.boot, dir, child).await {
        Waited::Outcome(ended) => ended,
        Waited::Gone => settle(host, key, dir).await,
        Waited::NeverClaimed => {
            let never = failure(Cause::Interrupted, "the step process ended before it began");
            cannot_start(host, key, dir, never).await
        }
    }
}

enum Waited {
    Outcome(Ended),
    /// The process that claimed it is gone, and has left no outcome.
    Gone,
    /// No process has claimed it to act.
    NeverClaimed,
}

/// Waits for the outcome file, or for the end of the process that should write it.
async fn wait(boot: &BootId, dir: &StepDir, mut child: Option<Child>) -> Waited {
    let start = Instant::now();
    let mut exited = false;
    loop {
        let pause = if start.elapsed() < SOON {
            POLL_FIRST
        } else {
            POLL_LATER
        };
        let ends = async {
            match &mut child {
                Some(process) => drop(process.wait().await),
                None => std::future::pending().await,
            }
        };
        if timeout(pause, ends).await.is_ok() {
            // Another process may have the claim, and is waited for at leisure.
            child = None;
            exited = true;
        }
        // The order matters: a process that is gone may have written the outcome just before.
        let claim = Claim::read(dir);
        if claim.as_ref().is_some_and(|claim| !claim.acts) {
            return Waited::NeverClaimed;
        }
        let alive = claim.as_ref().is_some_and(|claim| claim.is_alive(boot));
        match dir.read_outcome() {
            Ok(Some(ended)) if !planted!(ForgetOutcome) => return Waited::Outcome(ended),
            Ok(_) => {}
            Err(error) => {
                tracing::error!(%error, "an outcome cannot be read");
                if !alive {
                    return Waited::Gone;
                }
            }
        }
        if alive {
            continue;
        }
        if claim.is_some() {
            return Waited::Gone;
        }
        let late = start.elapsed() > CLAIM_WITHIN;
        match dir.claim().exists() {
            // It is being written, perhaps by another process than the one that has exited.
            true if !late => {}
            true => return Waited::Gone,
            false if late || exited => return Waited::NeverClaimed,
            false => {}
        }
    }
}

/// Claims an attempt that nobody has claimed, so that it can never be carried out. Another one is
/// safe: what was interrupted the controller orders again by itself, a few times.
async fn cannot_start(host: &Host, key: &StepKey, dir: &StepDir, why: Failure) -> Ended {
    let claimed = Claim::never(host.boot.clone()).and_then(|claim| claim.take(dir));
    match claimed {
        Ok(Claimed::Now) => never_begun(dir, why),
        Ok(Claimed::Before) => match wait(&host.boot, dir, None).await {
            Waited::Outcome(ended) => ended,
            Waited::Gone => settle(host, key, dir).await,
            // The daemon claimed it before it was stopped.
            Waited::NeverClaimed => never_begun(dir, why),
        },
        Err(error) => unknown(format!(
            "the step process could not be started ({}), and that it never will be cannot be \
             recorded: {error}",
            why.message
        )),
    }
}

fn never_begun(dir: &StepDir, why: Failure) -> Ended {
    let said = std::fs::read_to_string(dir.output()).unwrap_or_default();
    let lines = said.lines().rev().take(20).map(cut_line);
    let mut last_lines: Vec<String> = lines.collect();
    last_lines.reverse();
    let never = failed(Failure {
        hint: Some(
            "nothing was done; run `lockstep-agent check` on the host, then order it again".into(),
        ),
        last_lines,
        ..why
    });
    or_cancelled(dir, never)
}

fn cut_line(line: &str) -> String {
    head(line, 400).to_owned()
}

/// The outcome of an attempt whose process ended without one.
async fn settle(host: &Host, key: &StepKey, dir: &StepDir) -> Ended {
    if !host.runner.end_all(key, dir, &host.boot).await {
        return unknown(
            "the step process ended without an outcome, and processes that it started cannot be \
             ended: as long as they live nothing is proven"
                .into(),
        );
    }
    if let Ok(Some(ended)) = dir.read_outcome()
        && !planted!(ForgetOutcome)
    {
        return ended;
    }
    let job = match dir.read_job() {
        Ok(job) => job,
        Err(error) => return unknown(format!("the job file cannot be read: {error}")),
    };
    let class = job.action.info().class;
    let ended = match class {
        Class::Observing => failed(failure(Cause::Interrupted, NO_OUTCOME)),
        Class::Blind => unknown(format!(
            "{NO_OUTCOME}, and whether {} had its effect cannot be found out",
            job.action.name()
        )),
        _ if planted!(SettleWithoutProbe) => failed(failure(Cause::Interrupted, NO_OUTCOME)),
        Class::Convergent | Class::Receipted => {
            let probe = host.look(&job, async |cx| actions::probe(&job.action, cx).await);
            let probe = match probe.await {
                Ok(Probe::Unmet(failure)) => Ok(Probe::Absent(failure.message)),
                probe => probe,
            };
            let untouched = matches!(probe, Ok(Probe::Absent(_))) && is_untouched(host, &job).await;
            judge(key.direction, &job.action, probe, untouched)
        }
    };
    or_cancelled(dir, ended)
}

/// What failed after people had asked for it to be stopped was stopped.
fn or_cancelled(dir: &StepDir, ended: Ended) -> Ended {
    match ended.outcome {
        StepOutcome::Failed(was) if dir.cancel().exists() => failed(Failure {
            cause: Cause::Cancelled,
            message: format!("stopped, as people asked for ({})", was.message),
            ..was
        }),
        _ => ended,
    }
}

/// Whether the host is as it was before the attempt: an effect that is not there may be on its
/// way, or half of it may be there. Who cannot say has an undo look at it.
async fn is_untouched(host: &Host, job: &Job) -> bool {
    let same = host
        .look(job, async |cx| {
            actions::is_as_before(&job.action, cx, &job.before).await
        })
        .await;
    same.unwrap_or_else(|failure| {
        tracing::warn!(step = %job.key, why = failure.message, "cannot be compared with before");
        false
    })
}

const NO_OUTCOME: &str = "the step process ended without an outcome";

/// What the host's answer says about an attempt that left no outcome. Where it proves what is
/// there, the controller may order another attempt: it finds the effect or makes it, and says
/// once more what it proved. `untouched` says of what is not done that nothing of it was begun.
fn judge(
    direction: Direction,
    action: &Action,
    probe: Result<Probe, Failure>,
    untouched: bool,
) -> Ended {
    let again = |text: &str, changed| {
        failed(Failure {
            hint: Some("the host was asked what is there; another attempt is safe".into()),
            changed,
            ..failure(Cause::Interrupted, format!("{NO_OUTCOME}; {text}"))
        })
    };
    match (direction, probe) {
        // A service that was restarted is not restarted again.
        (Direction::Do, Ok(Probe::Present(text)))
            if matches!(action, Action::ServiceRestart(_)) =>
        {
            Ended {
                outcome: StepOutcome::Ok {
                    changed: true,
                    summary: format!("{text} ({NO_OUTCOME}; the host was asked)"),
                },
                facts: vec![],
                took: Period(0),
            }
        }
        // An undo is safe to run again: from whatever is there.
        (
            Direction::Undo,
            Ok(Probe::Absent(text) | Probe::Present(text) | Probe::Partial(text)),
        ) => again(&text, true),
        (_, Ok(Probe::Present(text))) => again(&format!("done: {text}"), true),
        (_, Ok(Probe::Absent(text))) => again(&format!("not done: {text}"), !untouched),
        (_, Ok(Probe::Partial(text))) => again(&format!("done in part: {text}"), true),
        (_, Ok(Probe::Unmet(failure))) => again(&format!("not done: {}", failure.message), true),
        (_, Ok(Probe::NoProof(text) | Probe::NotYet(text))) => {
            unknown(format!("{NO_OUTCOME}, and the host cannot say: {text}"))
        }
        (_, Err(failure)) => unknown(format!(
            "{NO_OUTCOME}, and asking the host failed: {}",
            failure.message
        )),
    }
}

pub(crate) fn failed(failure: Failure) -> Ended {
    Ended {
        outcome: StepOutcome::Failed(failure),
        facts: vec![],
        took: Period(0),
    }
}

fn unknown(why: String) -> Ended {
    Ended {
        outcome: StepOutcome::Unknown { why },
        facts: vec![],
        took: Period(0),
    }
}

/// The host's own clock.
pub(crate) fn wall_clock() -> Timestamp {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return Timestamp(world.wall_clock());
    }
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Timestamp(since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }))
}

#[cfg(test)]
mod tests {
    use lockstep_proto::ids::{RolloutId, StepRef};
    use serde_json::json;

    use super::*;
    use crate::config::StepRunner;
    use crate::testing;

    /// An attempt at an action, with its job written.
    async fn attempt(of: &testing::Host, action: &Action) -> (Host, StepKey) {
        let host = Host {
            config: Arc::new(of.config.clone()),
            boot: BootId::from_bytes([1; 8]),
            runner: Runner::new(StepRunner::Session, "/agent.toml".as_ref()).unwrap(),
            logs: mpsc::channel(1).0,
        };
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
        host.dir(&key).make().unwrap();
        let before = host.look(&job, async |cx| actions::before(action, cx).await);
        job.before = before.await.unwrap();
        host.dir(&key).write_job(&job).unwrap();
        (host, key)
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

    #[tokio::test]
    async fn a_step_process_that_ends_before_it_begins_is_interrupted_and_never_begins() {
        let of = testing::Host::new();
        let action = Action::deserialize_args("check.port", serde_json::json!({"port": 1}));
        let (host, key) = attempt(&of, &action.unwrap().unwrap()).await;
        // What is started is this test's own program, which claims nothing.
        let dir = host.dir(&key);
        let ended = outcome(&host, &key, &dir, Met::New).await;
        let StepOutcome::Failed(failure) = ended.outcome else {
            panic!("{ended:?}");
        };
        assert_eq!(
            (failure.cause, failure.changed),
            (Cause::Interrupted, false)
        );
        let late = Claim::own(host.boot.clone()).unwrap().take(&dir).unwrap();
        assert_eq!(late, Claimed::Before, "INV-1");
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
            let late = Claim::own(host.boot.clone()).unwrap().take(&dir).unwrap();
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
        Claim::own(host.boot.clone()).unwrap().take(&dir).unwrap();
        let ended = {
            let mut waits = std::pin::pin!(outcome(&host, &key, &dir, Met::Found));
            let soon = timeout(Duration::from_millis(300), &mut waits).await;
            assert!(soon.is_err(), "it is running: {soon:?}");
            dir.reserve_outcome().unwrap();
            dir.write_outcome(&failed(failure(Cause::CheckUnmet, "no")))
                .unwrap();
            waits.await
        };
        assert_eq!(ended, failed(failure(Cause::CheckUnmet, "no")));
    }

    #[test]
    fn who_waits_for_another_process_than_its_child_lets_others_run() {
        let root = tempfile::tempdir().unwrap();
        let dir = StepDir::at(root.path().to_owned());
        let boot = BootId::from_bytes([1; 8]);
        Claim::own(boot.clone()).unwrap().take(&dir).unwrap();
        let (answer, answers) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().build().unwrap();
            let waited = runtime.block_on(async {
                // It has found the claim taken.
                let child = tokio::process::Command::new("true").spawn().unwrap();
                timeout(Duration::from_secs(1), wait(&boot, &dir, Some(child))).await
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
}
