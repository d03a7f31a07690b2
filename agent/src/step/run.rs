//! One attempt, from its claim to its outcome.

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::action::migration::UndoBy;
use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::{Direction, StepKey};
use lockstep_proto::report::{Cause, Failure, StepOutcome};
use lockstep_proto::values::Period;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{Claim, Claimed, Context, Ended, Job, Keep, StepDir, StepLog, failure};
use crate::actions::{self, Done, Probe};
use crate::config::Config;
use crate::faults::planted;
use crate::identity::boot_id;

/// Beyond the deadline: programs end at the deadline by themselves, first politely, and their
/// own account of it is better than ours.
const LAST_WORDS: Duration = Duration::from_secs(15);

/// How long a database's server that was stopped may take to be started again, in all.
const SERVER_STARTED: Duration = Duration::from_mins(5);

/// How often the cancel file is looked for. A signal is faster; the file outlives a race with the
/// process's start.
const CANCEL_POLL: Duration = Duration::from_millis(200);

/// How long an outcome is tried to be written: somebody may free space meanwhile.
const WRITE_TRIES: u32 = 600;

/// How a step process ended, other than by an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StepExit {
    /// The outcome is on the disk.
    Done,
    /// Another process had claimed the attempt: nothing was done.
    ClaimedBefore,
}

/// Does the attempt, unless anybody ever claimed it.
pub(crate) async fn run(config: Config, key: &StepKey) -> io::Result<StepExit> {
    lead_session()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let terminated = async move {
        let _ = terminate.recv().await;
    };
    perform(config, key, terminated).await
}

/// The attempt, in a session of its own; `terminated` resolves when it is to stop.
pub(crate) async fn perform(
    config: Config,
    key: &StepKey,
    terminated: impl Future<Output = ()>,
) -> io::Result<StepExit> {
    let begun = Instant::now();
    let dir = StepDir::of(&config.state_dir, key);
    let job = dir.read_job()?;
    if job.key != *key {
        return Err(io::Error::other(format!("the job is that of {}", job.key)));
    }
    let boot = boot_id(&config.run_dir).map_err(io::Error::other)?;
    let keep = Keep::of(&job.action);
    let log = StepLog::to_file(dir.log());
    // Before the claim: without room for its outcome the attempt must not begin. Of two processes
    // that race, the second finds the first one's file and leaves it as it is.
    dir.reserve_outcome()?;
    let claimed = Claim::own(boot)?.take(&dir, keep)?;
    if claimed == Claimed::Before && !planted!(ExecuteClaimed) {
        return Ok(StepExit::ClaimedBefore);
    }
    if dir.cancel().exists() {
        let stopped = failure(
            Cause::Cancelled,
            "stopped before it began, as people asked for",
        );
        write(&dir, &ended(Err(stopped), Period(0)), keep).await?;
        return Ok(StepExit::Done);
    }
    let context = Context {
        key: key.clone(),
        config: Arc::new(config),
        secrets: Arc::default(),
        bindings: job.bindings.clone().into(),
        dir: dir.files(),
        log,
        deadline: begun + job.timeout.to_std(),
        stop: CancellationToken::new(),
        log_offsets: Arc::new(job.log_offsets.clone()),
        dry_run: false,
    };
    let cancelled = async {
        let asked = async {
            while !dir.cancel().exists() {
                sleep(CANCEL_POLL).await;
            }
        };
        tokio::select! {
            biased;
            () = terminated => {}
            () = asked => {}
        }
        context.stop.cancel();
        match &job.action {
            // It first removes what it created: nobody else does.
            Action::CheckHttp(_) => sleep(LAST_WORDS).await,
            // It first starts the server that it has stopped.
            Action::MigrationApply(act)
                if act.undo_by == UndoBy::Recover && job.key.direction == Direction::Undo =>
            {
                sleep(SERVER_STARTED).await;
            }
            _ => {}
        }
    };
    let changes = job.action.info().class != Class::Observing;
    let limit = context.deadline + LAST_WORDS;
    let result = tokio::select! {
        biased;
        () = cancelled => Err(Failure {
            changed: changes,
            last_lines: context.log.last_lines(),
            ..failure(Cause::Cancelled, why_stopped(&dir))
        }),
        result = timeout_at(limit, guarded(&job, &context)) => result.unwrap_or_else(|_| {
            Err(Failure {
                changed: changes,
                hint: Some("raise the step's `timeout` if it needs longer".into()),
                last_lines: context.log.last_lines(),
                ..failure(Cause::TimedOut, format!("took longer than {}", job.timeout))
            })
        }),
    };
    let result = result.map_err(|was| match was.cause {
        Cause::Cancelled if was.message != why_stopped(&dir) => Failure {
            message: format!("{}; {}", why_stopped(&dir), was.message),
            ..was
        },
        _ => was,
    });
    let millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let ended = ended(result, Period(millis));
    write(&dir, &ended, keep).await?;
    Ok(StepExit::Done)
}

/// A host that is shut down ends its processes with the same signal.
fn why_stopped(dir: &StepDir) -> &'static str {
    if dir.cancel().exists() {
        "stopped, as people asked for"
    } else {
        "stopped by a signal, as when the host is shut down"
    }
}

/// Makes a session for all that the attempt starts, by which it is found again and ended. Under
/// systemd there is one already.
fn lead_session() -> io::Result<()> {
    let own = rustix::process::getpid();
    match rustix::process::setsid() {
        Err(_) if rustix::process::getsid(None)? == own => Ok(()),
        made => Ok(made.map(|_| ())?),
    }
}

fn ended(result: Result<Done, Failure>, took: Period) -> Ended {
    match result {
        Ok(Done {
            changed,
            summary,
            facts,
        }) => Ended {
            outcome: StepOutcome::Ok { changed, summary },
            facts,
            took,
        },
        Err(failure) => Ended {
            outcome: StepOutcome::Failed(failure),
            facts: vec![],
            took,
        },
    }
}

/// The action; a panic in it is a failure with an outcome, not a process that vanished.
async fn guarded(job: &Job, context: &Context) -> Result<Done, Failure> {
    let mut work = std::pin::pin!(act(job, context));
    let caught = std::future::poll_fn(|task| {
        match std::panic::catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(task))) {
            Ok(poll) => poll.map(Some),
            Err(_) => std::task::Poll::Ready(None),
        }
    })
    .await;
    caught.unwrap_or_else(|| {
        Err(Failure {
            changed: true,
            hint: Some(format!(
                "this is a defect of the agent; {} on the host says where",
                context.dir.with_file_name("output").display()
            )),
            last_lines: context.log.last_lines(),
            ..failure(Cause::Step, "the agent's own code failed")
        })
    })
}

async fn act(job: &Job, context: &Context) -> Result<Done, Failure> {
    match job.key.direction {
        Direction::Do => actions::apply(&job.action, context, &job.before).await,
        Direction::Undo => actions::undo(&job.action, context, &job.before).await,
        Direction::Probe => actions::probe(&job.action, context).await.and_then(would),
    }
}

/// A probe's answer as a dry run shows it; an error if the step would fail.
pub(crate) fn would(probe: Probe) -> Result<Done, Failure> {
    let summary = match probe {
        Probe::Present(text) => format!("nothing to do: {text}"),
        Probe::Absent(text) => format!("would act: {text}"),
        Probe::Partial(text) => format!("would finish: {text}"),
        Probe::NotYet(text) => format!("depends on an earlier step: {text}"),
        Probe::NoProof(text) => format!("the host cannot say: {text}"),
        Probe::Unmet(failure) => return Err(failure),
    };
    Ok(Done {
        changed: false,
        summary,
        facts: vec![],
    })
}

async fn write(dir: &StepDir, ended: &Ended, keep: Keep) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match dir.write_outcome(ended, keep) {
            Ok(()) => return Ok(()),
            // Without the step's directory nobody waits for it.
            Err(error) if tries == WRITE_TRIES || error.kind() == io::ErrorKind::NotFound => {
                return Err(error);
            }
            Err(error) => {
                tracing::error!(%error, "the outcome cannot be written; trying again");
                tries += 1;
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
