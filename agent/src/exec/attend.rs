//! Attends one attempt from its start to its outcome, whoever else dies meanwhile (INV-1).
//!
//! ```text
//! start -> outcome file                                   what it says
//!       -> process gone, no outcome -> end what is left -> settle by the action's class
//!       -> never claimed -> claim it here, so that it never will be -> failed, unchanged
//! found at the daemon's start, and not claimed                      -> the same
//! ```

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::{BootId, Direction, StepKey};
use lockstep_proto::report::{Cause, Failure, StepOutcome};
use lockstep_proto::values::{Period, Timestamp};
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::runner::Runner;
use super::seam::LogPiece;
use super::tail::Tail;
use crate::actions::Probe;
use crate::config::Config;
use crate::faults::planted;
use crate::process::head;
use crate::sql::remove_left_over;
use crate::step::{Claim, Claimed, Ended, Job, Keep, StepDir, failure};

/// How long a host that cannot be asked is asked again, and how often: after a power loss the agent
/// is up before the database. The step's own timeout ends it sooner, for nobody waits longer.
const ASK_AGAIN: Duration = Duration::from_mins(2);
const ASK_EVERY: Duration = Duration::from_secs(2);

/// How often the outcome of another daemon's child, or systemd's, is looked for: often at first, for
/// many steps take no time, and then at leisure. Only while something runs.
const POLL_FIRST: Duration = Duration::from_millis(5);
const POLL_LATER: Duration = Duration::from_millis(50);
const SOON: Duration = Duration::from_millis(500);

/// The longest pause of the same of the daemon's own child: each is twice the one before, for its end
/// is told. Its outcome is there before that, while it waits for its directory to be on the disk.
const POLL_CHILD: Duration = Duration::from_millis(500);

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
    /// How many looks there were, for their names.
    pub(crate) looks: Cell<u64>,
}

/// How an attempt is met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Met {
    /// Its intent has just been written. Of attempts at the same step it is not known whether
    /// something still runs: that is ended first.
    New { unproven: Vec<StepKey> },
    /// The daemon finds it at its start. It is never started any more: meanwhile the controller may
    /// have given it up, and people may have decided otherwise.
    Found,
    /// The daemon finds it at its start: it only observed, and it began in a boot that is over. Of
    /// its files a power loss may have left anything ([`Keep::ThisBoot`]).
    Over,
}

impl Host {
    pub(crate) fn dir(&self, key: &StepKey) -> StepDir {
        StepDir::of(&self.config.state_dir, key)
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
    let mut process = match met {
        Met::New { unproven } => {
            if let Err(why) = end_unproven(host, &unproven).await {
                return cannot_start(host, key, dir, Process::None, why).await;
            }
            match host.runner.start(key, dir).await {
                Ok(Some(child)) => Process::Child(child),
                Ok(None) => Process::Elsewhere,
                Err(error) => {
                    let why = failure(Cause::Host, error.to_string());
                    let process = if host.runner.finds_all() {
                        // It may have been started all the same.
                        Process::Elsewhere
                    } else {
                        Process::None
                    };
                    return cannot_start(host, key, dir, process, why).await;
                }
            }
        }
        // No process of it is alive, and none is started any more: the journal has its intent.
        Met::Over => return or_cancelled(dir, left_by(dir)),
        Met::Found if dir.claim().exists() => Process::Elsewhere,
        // Claiming decides: a process that was started before and is still on its way finds the
        // claim taken, or is found by it.
        Met::Found => {
            let why = "the agent was stopped before the step began";
            let why = failure(Cause::Interrupted, why);
            return cannot_start(host, key, dir, Process::Elsewhere, why).await;
        }
    };
    match wait(&host.boot, dir, &mut process).await {
        Waited::Outcome(ended) => ended,
        Waited::Gone => settle(host, key, dir).await,
        Waited::NeverClaimed => {
            let never = failure(Cause::Interrupted, "the step process ended before it began");
            cannot_start(host, key, dir, process, never).await
        }
    }
}

/// What an attempt that only observed has left of a boot that is over. An outcome that can be read
/// is whole; one that is torn, or not there, proves nothing, and there is no effect to be proven.
fn left_by(dir: &StepDir) -> Ended {
    match dir.read_outcome() {
        Ok(Some(ended)) if !planted!(ForgetOutcome) => ended,
        _ => failed(failure(Cause::Interrupted, NO_OUTCOME)),
    }
}

/// What is known of the step process, beside its claim.
#[derive(Debug)]
enum Process {
    /// There is none, or it has ended.
    None,
    /// It is this daemon's own.
    Child(Child),
    /// It may be there, and another daemon's child, or systemd's.
    Elsewhere,
}

/// Ends what earlier attempts at a step may have left running, so that two never act at once.
async fn end_unproven(host: &Host, earlier: &[StepKey]) -> Result<(), Failure> {
    for key in earlier {
        if !host.runner.end_all(key, &host.dir(key), &host.boot).await {
            return Err(Failure {
                hint: Some(format!(
                    "nothing was done; look at the processes of {key} on the host"
                )),
                ..failure(
                    Cause::Host,
                    format!(
                        "processes of {} attempt {} are still there and cannot be ended",
                        key.direction, key.attempt
                    ),
                )
            });
        }
    }
    Ok(())
}

enum Waited {
    Outcome(Ended),
    /// The process that claimed it is gone, and has left no outcome.
    Gone,
    /// No process has claimed it to act.
    NeverClaimed,
}

/// Waits for the outcome file, or for the end of the process that should write it.
async fn wait(boot: &BootId, dir: &StepDir, process: &mut Process) -> Waited {
    let start = Instant::now();
    let mut of_child = POLL_FIRST;
    loop {
        let pause = match process {
            Process::Child(_) => {
                let pause = of_child;
                of_child = (pause * 2).min(POLL_CHILD);
                pause
            }
            _ if start.elapsed() < SOON => POLL_FIRST,
            _ => POLL_LATER,
        };
        let ends = async {
            match process {
                Process::Child(child) => drop(child.wait().await),
                Process::None | Process::Elsewhere => std::future::pending().await,
            }
        };
        if timeout(pause, ends).await.is_ok() {
            // Another process may have the claim, and is waited for at leisure.
            *process = Process::None;
        }
        // The order matters: a process that is gone may have written the outcome just before.
        let claim = Claim::read(dir);
        let claimed = claim.is_some() || dir.claim().exists();
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
        let child = matches!(process, Process::Child(_));
        match claimed {
            // A claim is whole from the first, but for those of releases that wrote it in place:
            // the process that does so may be frozen, and then it must not be taken for gone.
            true if !late || child => {}
            true => return Waited::Gone,
            false if late || matches!(process, Process::None) => return Waited::NeverClaimed,
            false => {}
        }
    }
}

/// Claims an attempt that nobody has claimed, so that it can never be carried out. Another one is
/// safe: what was interrupted the controller orders again by itself, a few times.
async fn cannot_start(
    host: &Host,
    key: &StepKey,
    dir: &StepDir,
    process: Process,
    why: Failure,
) -> Ended {
    let claimed = Claim::never(host.boot.clone()).and_then(|claim| claim.take(dir, Keep::Durably));
    match claimed {
        Ok(Claimed::Now) => never_begun(dir, why),
        Ok(Claimed::Before) => claimed_before(host, key, dir, why).await,
        // The disk is full, most likely. What no process is left for never begins either.
        Err(error) if is_over(host, key, dir, process).await => {
            if dir.claim().exists() {
                return claimed_before(host, key, dir, why).await;
            }
            let message = format!("{} ({error})", why.message);
            never_begun(dir, Failure { message, ..why })
        }
        Err(error) => unknown(format!(
            "the step process could not be started ({}), and that it never will be cannot be \
             recorded: {error}",
            why.message
        )),
    }
}

async fn claimed_before(host: &Host, key: &StepKey, dir: &StepDir, why: Failure) -> Ended {
    match wait(&host.boot, dir, &mut Process::Elsewhere).await {
        Waited::Outcome(ended) => ended,
        Waited::Gone => settle(host, key, dir).await,
        // The daemon claimed it before it was stopped.
        Waited::NeverClaimed => never_begun(dir, why),
    }
}

/// Ends the step process; says whether it is proven that there is none.
async fn is_over(host: &Host, key: &StepKey, dir: &StepDir, process: Process) -> bool {
    match process {
        Process::Child(mut child) => {
            if child.kill().await.is_err() {
                return false;
            }
        }
        Process::Elsewhere if !host.runner.finds_all() => return false,
        Process::None | Process::Elsewhere => {}
    }
    host.runner.end_all(key, dir, &host.boot).await
}

fn never_begun(dir: &StepDir, why: Failure) -> Ended {
    let said = std::fs::read_to_string(dir.output()).unwrap_or_default();
    let hint = "nothing was done; run `lockstep-agent check` on the host, then order it again";
    let never = failed(Failure {
        hint: why.hint.or_else(|| Some(hint.into())),
        last_lines: last_lines(&said),
        ..why
    });
    or_cancelled(dir, never)
}

/// What a process said last, for people.
pub(super) fn last_lines(said: &str) -> Vec<String> {
    let lines = said.lines().rev().take(20).map(cut_line);
    let mut last: Vec<String> = lines.collect();
    last.reverse();
    last
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
            let probe = match ask(host, &job).await {
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

/// Asks whether the effect is there, until there is an answer or no time left. The session goes on
/// meanwhile, and the daemon may be stopped: its next start asks anew.
async fn ask(host: &Host, job: &Job) -> Result<Probe, Failure> {
    let until = Instant::now() + ASK_AGAIN.min(job.timeout.to_std());
    loop {
        match host.settles(job).await {
            Err(failure) if Instant::now() < until => {
                let why = failure.message;
                tracing::warn!(step = %job.key, why, "cannot be settled yet; asking again");
                sleep(ASK_EVERY).await;
            }
            probe => return probe,
        }
    }
}

/// Whether the host is as it was before the attempt: an effect that is not there may be on its
/// way, or half of it may be there. Who cannot say has an undo look at it.
async fn is_untouched(host: &Host, job: &Job) -> bool {
    host.is_as_before(job).await.unwrap_or_else(|failure| {
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
mod tests;
