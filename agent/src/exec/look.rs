//! Looks: what a host is asked without being changed.
//!
//! ```text
//! exec -- look.json --> a unit of its own, as a step has one -- answer.json --> exec
//! ```
//!
//! Asking needs what acting needs: users, files and databases of applications, the network. Exec has
//! none of that, so where steps run in units of systemd, looks do; elsewhere exec asks by itself.

use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::ids::Direction;
use lockstep_proto::json;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::ahead::{self, Earlier};
use super::attend::{Host, last_lines};
use super::unit::Unit;
use crate::actions::{self, Probe};
use crate::config::Config;
use crate::identity::replace_file;
use crate::sql::GONE;
use crate::step::{Context, Job, StepDir, StepLog, failure};

/// How long a host may take to answer about one action.
const WITHIN: Duration = Duration::from_secs(30);

/// The same where an attempt is settled: what it left behind is ended first, and sessions of a
/// database have their time for that.
const SETTLE_WITHIN: Duration = Duration::from_secs(WITHIN.as_secs() + GONE.as_secs());

/// What a process needs beside its question's own limit, to start and to write the answer.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How many processes look for dry runs and surveys at a time, and how many more looks wait for that.
/// A dry run asks each step of a plan at once, and a host allows everybody's: without a bound, a
/// controller that repeats itself would have thousands of processes begin as root.
const AT_A_TIME: usize = 4;
const WAITING: usize = 512;

/// How often the answer is looked for, at first and later.
const POLL_FIRST: Duration = Duration::from_millis(4);
const POLL_LATER: Duration = Duration::from_millis(64);

/// What is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Look {
    /// What an undo must know: a value.
    Before(Job),
    /// Whether the host is as the job's before-state tells: a truth value.
    IsAsBefore(Job),
    /// Whether the effect of an attempt that was killed is there: a [`Probe`].
    Settle(Job),
    /// What these actions touch, each part once: facts.
    State(Vec<Job>),
    /// What the step would do: one line.
    DryRun {
        job: Job,
        /// The steps before it that change something.
        earlier: Vec<Earlier>,
        /// The policy limits how often it may be done, so that it is not tried out.
        limited: bool,
    },
}

impl Look {
    /// How long the answer may take.
    fn limit(&self) -> Duration {
        match self {
            Self::Settle(_) => SETTLE_WITHIN,
            Self::State(jobs) => WITHIN * u32::try_from(jobs.len().max(1)).unwrap_or(u32::MAX),
            Self::Before(_) | Self::IsAsBefore(_) | Self::DryRun { .. } => WITHIN,
        }
    }

    /// Asks the host, within the limit.
    async fn answer(&self, config: &Arc<Config>) -> Result<Value, Failure> {
        let limit = self.limit();
        let answer = timeout(limit, self.ask(config)).await;
        answer.unwrap_or_else(|_| Err(no_answer(limit)))
    }

    async fn ask(&self, config: &Arc<Config>) -> Result<Value, Failure> {
        let of = |job| context(config, job, self.limit());
        match self {
            Self::Before(job) => actions::before(&job.action, &of(job)).await,
            Self::IsAsBefore(job) => {
                let same = actions::is_as_before(&job.action, &of(job), &job.before).await?;
                Ok(same.into())
            }
            Self::Settle(job) => Ok(plain(&actions::probe(&job.action, &of(job)).await?)),
            Self::State(jobs) => {
                let mut state: Vec<Fact> = vec![];
                for job in jobs {
                    for part in state_of(config, job).await? {
                        if !state.iter().any(|known| name(known) == name(&part)) {
                            state.push(part);
                        }
                    }
                }
                Ok(plain(&state))
            }
            Self::DryRun {
                job,
                earlier,
                limited,
            } => {
                let cx = of(job);
                // No step brings a secret, and each is looked up only when it is needed.
                let secrets = cx.check_secrets(&job.action.args()).await;
                secrets.map_err(ahead::would_fail)?;
                let probe = if *limited {
                    let why = "the policy limits how often and when it may be done";
                    Ok(Probe::NoProof(why.to_owned()))
                } else {
                    actions::probe(&job.action, &cx).await
                };
                let done = ahead::settle(&job.action, earlier, probe)?;
                Ok(done.summary.into())
            }
        }
    }
}

async fn state_of(config: &Arc<Config>, job: &Job) -> Result<Vec<Fact>, Failure> {
    let cx = context(config, job, WITHIN);
    let state = timeout(WITHIN, actions::state(&job.action, &cx)).await;
    state
        .unwrap_or_else(|_| Err(no_answer(WITHIN)))
        .map_err(|failure| Failure {
            message: format!("{}: {}", job.action.name(), failure.message),
            ..failure
        })
}

fn context(config: &Arc<Config>, job: &Job, limit: Duration) -> Context {
    let own = StepDir::of(&config.state_dir, &job.key).files();
    Context {
        key: job.key.clone(),
        config: config.clone(),
        secrets: Arc::default(),
        bindings: job.bindings.clone().into(),
        dir: if own.is_dir() {
            own
        } else {
            config.run_dir.clone()
        },
        log: StepLog::nowhere(),
        deadline: Instant::now() + limit,
        stop: CancellationToken::new(),
        log_offsets: Arc::new(job.log_offsets.clone()),
        dry_run: job.key.direction == Direction::Probe,
    }
}

/// When a look begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Without waiting for others. What an attempt asks is one at a time, and what a consent asks
    /// is bounded by those who ask: neither stands behind dry runs.
    AtOnce,
    /// When there is a place in the [`Room`].
    Waits,
}

/// Where looks of dry runs and surveys wait.
struct Room {
    /// For all, those that wait too.
    all: Semaphore,
    /// For those that look.
    inside: Semaphore,
}

static DRY_RUNS: Room = Room::new();

impl Room {
    const fn new() -> Self {
        Self {
            all: Semaphore::const_new(AT_A_TIME + WAITING),
            inside: Semaphore::const_new(AT_A_TIME),
        }
    }

    /// Waits for a place, which is free again when the value is dropped.
    async fn enter(&self) -> Result<[SemaphorePermit<'_>; 2], Failure> {
        let crowded = |_| Failure {
            hint: Some("try it again once the other dry runs are over".into()),
            ..failure(
                Cause::Host,
                format!(
                    "{} questions of dry runs and surveys wait already",
                    AT_A_TIME + WAITING
                ),
            )
        };
        let waits = self.all.try_acquire().map_err(crowded)?;
        let looks = self.inside.acquire().await;
        Ok([waits, looks.expect("it is never closed")])
    }
}

/// Takes every place, until it is dropped.
#[cfg(test)]
pub(super) fn crowd() -> SemaphorePermit<'static> {
    let all = u32::try_from(AT_A_TIME + WAITING).expect("a small number");
    DRY_RUNS.all.try_acquire_many(all).expect("nobody is there")
}

/// The failure of a host that is silent.
fn no_answer(within: Duration) -> Failure {
    let seconds = within.as_secs();
    failure(
        Cause::TimedOut,
        format!("the host did not answer within {seconds} s"),
    )
}

fn name(fact: &Fact) -> &str {
    match fact {
        Fact::State { name, .. } | Fact::Note { name, .. } => name,
        _ => "",
    }
}

fn plain(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("answers are plain data")
}

impl Host {
    /// What an undo of the job must know.
    pub(super) async fn before(&self, job: &Job) -> Result<Value, Failure> {
        // What changes nothing has nothing to know, and needs no look.
        if !job.action.changes() {
            return Ok(Value::Null);
        }
        self.look(Look::Before(job.clone()), Turn::AtOnce).await
    }

    /// Whether the host is as the job's before-state tells.
    pub(super) async fn is_as_before(&self, job: &Job) -> Result<bool, Failure> {
        self.look(Look::IsAsBefore(job.clone()), Turn::AtOnce).await
    }

    /// Whether the effect of an attempt that left no outcome is there.
    pub(super) async fn settles(&self, job: &Job) -> Result<Probe, Failure> {
        self.look(Look::Settle(job.clone()), Turn::AtOnce).await
    }

    /// What the jobs touch, each part once.
    pub(super) async fn state(&self, jobs: Vec<Job>, turn: Turn) -> Result<Vec<Fact>, Failure> {
        if jobs.is_empty() {
            return Ok(vec![]);
        }
        self.look(Look::State(jobs), turn).await
    }

    /// What a step would do, after those before it: one line.
    pub(super) async fn dry_run(
        &self,
        job: &Job,
        earlier: Vec<Earlier>,
        limited: bool,
    ) -> Result<String, Failure> {
        let job = job.clone();
        let look = Look::DryRun {
            job,
            earlier,
            limited,
        };
        self.look(look, Turn::Waits).await
    }

    /// Asks, where steps run.
    async fn look<T: DeserializeOwned>(&self, look: Look, turn: Turn) -> Result<T, Failure> {
        let answer = if self.runner.has_units() {
            let _place = match turn {
                Turn::Waits => Some(DRY_RUNS.enter().await?),
                Turn::AtOnce => None,
            };
            let number = self.looks.get() + 1;
            self.looks.set(number);
            let name = format!("{}-{number}", std::process::id());
            self.look_apart(&look, &name).await
        } else {
            look.answer(&self.config).await
        };
        serde_json::from_value(answer?).map_err(|error| {
            failure(
                Cause::Host,
                format!("the answer is not to be read: {error}"),
            )
        })
    }

    async fn look_apart(&self, look: &Look, name: &str) -> Result<Value, Failure> {
        let limit = look.limit() + LAST_WORDS;
        let host = |error: io::Error| {
            let why = format!("the host cannot be looked at: {error}");
            failure(Cause::Host, why)
        };
        let dir = LookDir::make(&self.config.run_dir, name, look).map_err(host)?;
        let writable = vec![
            self.config.run_dir.clone(),
            StepDir::parent(&self.config.state_dir),
        ];
        let unit = Unit::of_look(name, &self.config.host);
        let started = self.runner.start_look(&unit, &dir, writable, limit).await;
        started.map_err(host)?;
        let begun = Instant::now();
        let mut pause = POLL_FIRST;
        loop {
            sleep(pause).await;
            pause = (pause * 2).min(POLL_LATER);
            // The order matters: it may have answered and ended just before.
            let over = pause == POLL_LATER && !unit.exists().await;
            if let Some(answer) = dir.read_answer().map_err(host)? {
                return answer;
            }
            if over {
                return Err(dir.silent());
            }
            if begun.elapsed() > limit {
                unit.stop().await;
                return Err(no_answer(limit));
            }
        }
    }
}

/// The directory of a look that has a process of its own. It is in the run directory: nothing of a
/// look outlives a boot.
#[derive(Debug)]
pub(super) struct LookDir(PathBuf);

/// What a host answers, as the process of a look writes it.
type Answer = Result<Value, Failure>;

impl LookDir {
    /// Where the directories of all looks are.
    fn parent(run_dir: &Path) -> PathBuf {
        run_dir.join("looks")
    }

    /// Makes one, with what is asked in it.
    fn make(run_dir: &Path, name: &str, look: &Look) -> io::Result<Self> {
        let dir = Self::parent(run_dir).join(name);
        crate::identity::private_dir(&dir).map_err(io::Error::other)?;
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(dir.join("look.json"))?;
        serde_json::to_writer(file, look)?;
        Ok(Self(dir))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// What the process itself said, such as a panic.
    pub(super) fn output(&self) -> PathBuf {
        self.0.join("output")
    }

    /// The failure of a look that ended without an answer.
    fn silent(&self) -> Failure {
        let said = std::fs::read_to_string(self.output()).unwrap_or_default();
        Failure {
            hint: Some("run `lockstep-agent check` on the host, then try it again".into()),
            last_lines: last_lines(&said),
            ..failure(
                Cause::Host,
                "the process that looks at the host ended without an answer",
            )
        }
    }

    /// The answer; `None` if there is none yet.
    fn read_answer(&self) -> io::Result<Option<Answer>> {
        match std::fs::read(self.0.join("answer.json")) {
            Ok(text) => Ok(Some(json::read(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for LookDir {
    fn drop(&mut self) {
        // A daemon's start removes what is left over.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Nobody awaits the looks of an earlier daemon.
pub(super) fn remove_left_over(run_dir: &Path) {
    let _ = std::fs::remove_dir_all(LookDir::parent(run_dir));
}

/// The process of a look: asks, and leaves the answer, whole or not at all.
pub(crate) async fn run(config: Config, dir: &Path) -> io::Result<()> {
    let look: Look = json::read(&std::fs::read(dir.join("look.json"))?)?;
    let answer: Answer = look.answer(&Arc::new(config)).await;
    replace_file(&dir.join("answer.json"), &serde_json::to_vec(&answer)?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn a_flood_of_dry_runs_looks_a_few_at_a_time_and_the_rest_is_refused() {
        static ROOM: Room = Room::new();
        static INSIDE: AtomicUsize = AtomicUsize::new(0);
        async fn look() -> Result<usize, Failure> {
            let _place = ROOM.enter().await?;
            let inside = INSIDE.fetch_add(1, Ordering::Relaxed) + 1;
            tokio::task::yield_now().await;
            INSIDE.fetch_sub(1, Ordering::Relaxed);
            Ok(inside)
        }
        let flood: JoinSet<_> = (0..2000).map(|_| look()).collect();
        let looked = flood.join_all().await;
        let most = looked.iter().flatten().max();
        assert_eq!(most, Some(&AT_A_TIME));
        let refused = looked.iter().filter(|looked| looked.is_err()).count();
        assert_eq!(refused, 2000 - AT_A_TIME - WAITING);
        assert!(look().await.is_ok(), "there is room again");
    }
}
