//! Services: stop, start, restart, ask; by systemd, by the agent itself, or by commands.
//!
//! A driver says what a service does and changes it; what counts as stopped and started is
//! decided here, alike for all of them.

use std::time::Duration;

use lockstep_proto::action::Address;
use lockstep_proto::action::service::{Driver, Expected, Start, Status, Stop};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Period;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::net::{self, Answer, PAUSE};
use super::{Act, Done, Probe};
use crate::step::{Context, changed, failure};

mod command;
mod process;
mod restart;
mod switch;
mod systemd;

pub(crate) use process::supervise;
pub(crate) use switch::Switch;

/// What a service is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Phase {
    /// It runs.
    Running,
    /// It is on its way up or down, or waits to be started again after a crash.
    Changing,
    /// It does not run.
    Stopped,
    /// It does not run, and did not end well.
    Failed,
}

impl Phase {
    fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Changing)
    }

    /// Whether it must be started to run: also one that is on its way, which may be the way down,
    /// or waits after a crash. Drivers start it after that.
    fn needs_start(self) -> bool {
        self != Self::Running
    }
}

/// What a driver says about a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// What it is doing.
    phase: Phase,
    /// The same in the driver's words, with nothing that differs from run to run.
    words: String,
    /// Identifies this run: another start has another one. `None` where the driver cannot know.
    run: Option<String>,
    /// Why it failed, if the driver knows.
    #[serde(default)]
    trouble: Option<String>,
}

/// A service and its driver.
enum Service<'a> {
    Systemd(systemd::Unit),
    Process(process::Process<'a>),
    Command(command::Commands<'a>),
}

impl<'a> Service<'a> {
    async fn open(cx: &'a Context, name: &'a str, driver: Driver) -> Result<Self, Failure> {
        let unfit = name.is_empty() || name.starts_with(['-', '.']) || name.contains(['/', '\0']);
        if unfit {
            return Err(failure(
                Cause::Refused,
                format!("`{name}` cannot name a service"),
            ));
        }
        Ok(match driver {
            Driver::Systemd => Self::Systemd(systemd::Unit::open(cx, name).await?),
            Driver::Process => Self::Process(process::Process::open(cx, name)?),
            Driver::Command => Self::Command(command::Commands::open(cx, name)?),
        })
    }

    async fn state(&self, cx: &Context) -> Result<State, Failure> {
        match self {
            Self::Systemd(unit) => unit.state().await,
            Self::Process(process) => process.state(),
            Self::Command(commands) => commands.state(cx).await,
        }
    }

    /// Returns when the driver holds it started; it may crash yet.
    async fn start(&self, cx: &Context, until: Instant) -> Result<(), Failure> {
        match self {
            Self::Systemd(unit) => unit.start(until).await,
            Self::Process(process) => process.start(cx).await,
            Self::Command(commands) => commands.start(cx, until).await,
        }
    }

    async fn stop(&self, cx: &Context, until: Instant) -> Result<(), Failure> {
        match self {
            Self::Systemd(unit) => unit.stop(until).await,
            Self::Process(process) => process.stop(until).await,
            Self::Command(commands) => commands.stop(cx, until).await,
        }
    }

    async fn restart(&self, cx: &Context, until: Instant) -> Result<(), Failure> {
        if let Self::Systemd(unit) = self {
            return unit.restart(until).await;
        }
        // One that resists must leave time for its successor.
        let left = until.saturating_duration_since(Instant::now());
        self.stop(cx, Instant::now() + left / 2).await?;
        self.start(cx, until).await.map_err(changed)
    }

    /// Forgets that it failed, where the driver remembers such a thing.
    async fn forget_failure(&self) -> Result<(), Failure> {
        match self {
            Self::Systemd(unit) => unit.reset_failed().await,
            Self::Process(_) | Self::Command(_) => Ok(()),
        }
    }

    /// What it wrote last.
    async fn last_lines(&self, cx: &Context) -> Vec<String> {
        match self {
            Self::Systemd(unit) => unit.last_lines(cx).await,
            Self::Process(process) => process.last_lines(),
            Self::Command(_) => cx.log.last_lines(),
        }
    }

    /// Waits until it runs and every address accepts; fails at once if it crashes meanwhile. Who
    /// calls has started it: a failure says that something was changed.
    async fn await_running(
        &self,
        cx: &Context,
        name: &str,
        listens: &[Address],
        until: Instant,
    ) -> Result<(), Failure> {
        let mut waiting: Vec<&Address> = listens.iter().collect();
        let mut settling: Option<(Instant, Option<String>)> = None;
        loop {
            let state = self.state(cx).await.map_err(changed)?;
            let still = match state.phase {
                Phase::Stopped | Phase::Failed => return Err(self.crashed(cx, name, &state).await),
                Phase::Changing if state.trouble.is_some() => {
                    return Err(self.crashed(cx, name, &state).await);
                }
                Phase::Changing => format!("is {}", state.words),
                Phase::Running => {
                    let mut answer = None;
                    while let Some(address) = waiting.first() {
                        match net::ask(address).await {
                            Answer::Accepts => waiting.remove(0),
                            other => {
                                answer =
                                    Some(format!("is {}, but {} {other}", state.words, address.0));
                                break;
                            }
                        };
                    }
                    match (answer, &settling) {
                        (Some(answer), _) => answer,
                        (None, Some((since, run))) if *run == state.run => {
                            if since.elapsed() >= SETTLED {
                                return Ok(());
                            }
                            "has only just started".to_owned()
                        }
                        (None, Some(_)) => {
                            return Err(self.crashed(cx, name, &state).await);
                        }
                        (None, None) => {
                            settling = Some((Instant::now(), state.run.clone()));
                            "has only just started".to_owned()
                        }
                    }
                }
            };
            if Instant::now() + PAUSE >= until {
                return Err(Failure {
                    last_lines: self.last_lines(cx).await,
                    hint: Some("raise `within` if it needs longer to start".into()),
                    changed: true,
                    ..failure(
                        Cause::TimedOut,
                        format!("service {name} {still} when its time is over"),
                    )
                });
            }
            sleep(PAUSE).await;
        }
    }

    async fn crashed(&self, cx: &Context, name: &str, state: &State) -> Failure {
        let State { words, trouble, .. } = state;
        let why = trouble
            .as_ref()
            .map(|trouble| format!(" ({trouble})"))
            .unwrap_or_default();
        let message = format!("service {name} did not stay up: it is {words}{why}");
        Failure {
            last_lines: self.last_lines(cx).await,
            hint: Some("its last lines say why; correct it, then try again".into()),
            changed: true,
            ..failure(Cause::Step, message)
        }
    }
}

/// A service that has been up this long is taken for one that stays up: one that cannot read its
/// configuration ends sooner.
const SETTLED: Duration = Duration::from_millis(700);

/// How long a start may take that undoes a stop, where the plan says nothing about starting.
const UNDO_START: Period = Period::seconds(60);

fn until(cx: &Context, within: Period) -> Instant {
    let end = Instant::now().checked_add(within.to_std());
    end.map_or(cx.deadline, |end| end.min(cx.deadline))
}

fn to_value(state: &State) -> Value {
    serde_json::to_value(state).expect("a state has a JSON form")
}

fn from_value(before: &Value) -> Result<State, Failure> {
    serde_json::from_value(before.clone()).map_err(|error| {
        failure(
            Cause::Step,
            format!("the before-state cannot be read: {error}"),
        )
    })
}

fn state_fact(service: &str, state: State) -> Vec<Fact> {
    let name = format!("service {service}");
    vec![Fact::State {
        name,
        digest: Digest::of(state.words.as_bytes()),
        text: state.words,
    }]
}

/// Proves that every address refuses.
async fn prove_refusal(addresses: &[Address], until: Instant) -> Result<Vec<Fact>, Failure> {
    let mut facts = vec![];
    for address in addresses {
        let answer = net::ask_until(address, &Answer::Refuses, until).await;
        if answer != Answer::Refuses {
            let holder = super::check::holder_of(address);
            let by = holder
                .map(|holder| format!(" (held by {holder})"))
                .unwrap_or_default();
            return Err(Failure {
                hint: Some("something else may listen there: end it, then try again".into()),
                changed: true,
                ..failure(
                    Cause::CheckUnmet,
                    format!(
                        "the service is stopped, but {} still {answer}{by}",
                        address.0
                    ),
                )
            });
        }
        facts.push(Fact::Refused {
            address: address.0.clone(),
        });
    }
    Ok(facts)
}

/// Whether all addresses give this answer, and if not, which one does what instead.
async fn all_answer(addresses: &[Address], wanted: &Answer) -> Result<(), String> {
    for address in addresses {
        let answer = net::ask(address).await;
        if answer != *wanted {
            return Err(format!("{} {answer}", address.0));
        }
    }
    Ok(())
}

impl Act for Stop {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        let state = service.state(cx).await?;
        let (name, words) = (&self.service, state.words);
        Ok(match state.phase {
            Phase::Running => Probe::Absent(format!("stops {name}, which is {words}")),
            Phase::Changing if cx.dry_run => {
                Probe::Absent(format!("stops {name}, which is {words}"))
            }
            // It may be on its way down, and goes on by itself.
            Phase::Changing => Probe::Partial(format!("{name} is {words}")),
            Phase::Stopped | Phase::Failed => {
                match all_answer(&self.refuses, &Answer::Refuses).await {
                    Ok(()) => Probe::Present(format!("{name} is {words}")),
                    Err(other) => Probe::Partial(format!("{name} is {words}, but {other}")),
                }
            }
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        Ok(to_value(&service.state(cx).await?))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        let until = until(cx, self.within);
        let changed = service.state(cx).await?.phase.is_up();
        if changed {
            service.stop(cx, until).await?;
            let state = service.state(cx).await.map_err(self::changed)?;
            if state.phase.is_up() {
                return Err(Failure {
                    hint: Some(
                        "something started it again: a socket, a timer, or another unit".into(),
                    ),
                    changed: true,
                    ..failure(
                        Cause::Step,
                        format!(
                            "service {} is {} after it was stopped",
                            self.service, state.words
                        ),
                    )
                });
            }
        }
        let facts = prove_refusal(&self.refuses, until)
            .await
            .map_err(|failure| Failure { changed, ..failure })?;
        let summary = match (changed, facts.len()) {
            (false, _) => format!("{} was stopped already", self.service),
            (true, 0) => format!("{} is stopped", self.service),
            (true, count) => format!(
                "{} is stopped; {count} of {count} addresses refuse",
                self.service
            ),
        };
        Ok(Done {
            changed,
            summary,
            facts,
        })
    }

    async fn undo(&self, cx: &Context, before: &Value) -> Result<Done, Failure> {
        let before = from_value(before)?;
        if !before.phase.is_up() {
            let summary = format!("{} was {} before", self.service, before.words);
            return Ok(Done {
                summary,
                ..Done::default()
            });
        }
        let service = Service::open(cx, &self.service, self.driver).await?;
        let until = until(cx, self.within.max(UNDO_START));
        let changed = service.state(cx).await?.phase.needs_start();
        if changed {
            service.start(cx, until).await?;
        }
        // One that was crashing before is only set going again.
        if before.phase == Phase::Running {
            service
                .await_running(cx, &self.service, &self.refuses, until)
                .await
                .map_err(|failure| Failure { changed, ..failure })?;
        }
        let summary = format!("{} runs again", self.service);
        Ok(Done {
            changed,
            summary,
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        let refuses: Vec<_> = self
            .refuses
            .iter()
            .map(|address| address.0.as_str())
            .collect();
        match refuses.as_slice() {
            [] => format!("stop service {}", self.service),
            some => format!(
                "stop service {}, until {} refuses",
                self.service,
                some.join(", ")
            ),
        }
    }

    async fn state(&self, cx: &Context) -> Result<Vec<Fact>, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        Ok(state_fact(&self.service, service.state(cx).await?))
    }
}

impl Act for Start {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        let State { phase, words, .. } = service.state(cx).await?;
        let name = &self.service;
        Ok(match phase {
            Phase::Stopped | Phase::Failed => {
                Probe::Absent(format!("starts {name}, which is {words}"))
            }
            _ if cx.dry_run => Probe::NotYet(format!(
                "{name} is {words} now; started if a step before stops it"
            )),
            Phase::Changing => Probe::Partial(format!("{name} is {words}")),
            Phase::Running => match all_answer(&self.listens, &Answer::Accepts).await {
                Ok(()) => Probe::Present(format!("{name} is {words}")),
                Err(other) => Probe::Partial(format!("{name} is {words}, but {other}")),
            },
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        Ok(to_value(&service.state(cx).await?))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        let until = until(cx, self.within);
        let began = Instant::now();
        let changed = service.state(cx).await?.phase.needs_start();
        if changed {
            service.start(cx, until).await?;
        }
        service
            .await_running(cx, &self.service, &self.listens, until)
            .await
            .map_err(|failure| Failure { changed, ..failure })?;
        let took = began.elapsed().as_secs_f64();
        let summary = if changed {
            format!("{} runs, {took:.1} s after it was started", self.service)
        } else {
            format!("{} ran already", self.service)
        };
        Ok(Done {
            changed,
            summary,
            facts: vec![],
        })
    }

    async fn undo(&self, cx: &Context, before: &Value) -> Result<Done, Failure> {
        let before = from_value(before)?;
        if before.phase.is_up() {
            let summary = format!("{} was {} before", self.service, before.words);
            return Ok(Done {
                summary,
                ..Done::default()
            });
        }
        let service = Service::open(cx, &self.service, self.driver).await?;
        let changed = service.state(cx).await?.phase.is_up();
        if changed {
            service.stop(cx, until(cx, self.within)).await?;
        }
        // A start that failed leaves its mark on the unit, which was not there before.
        if before.phase == Phase::Stopped {
            let unmark = async {
                if service.state(cx).await?.phase == Phase::Failed {
                    service.forget_failure().await?;
                }
                Ok(())
            };
            unmark
                .await
                .map_err(|failure| Failure { changed, ..failure })?;
        }
        Ok(Done {
            changed,
            summary: format!("{} is stopped again", self.service),
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        describe_up("start", &self.service, &self.listens)
    }

    async fn state(&self, cx: &Context) -> Result<Vec<Fact>, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        Ok(state_fact(&self.service, service.state(cx).await?))
    }
}

fn describe_up(verb: &str, service: &str, listens: &[Address]) -> String {
    let listens: Vec<_> = listens.iter().map(|address| address.0.as_str()).collect();
    match listens.as_slice() {
        [] => format!("{verb} service {service}"),
        some => format!(
            "{verb} service {service}, until {} accepts",
            some.join(", ")
        ),
    }
}

fn is_met(expected: Expected, phase: Phase) -> bool {
    match expected {
        Expected::Any => true,
        Expected::Running => phase == Phase::Running,
        Expected::Stopped => !phase.is_up(),
    }
}

impl Act for Status {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        match self.apply(cx, &Value::Null).await {
            Ok(done) => Ok(Probe::Present(done.summary)),
            Err(unmet) if unmet.cause == Cause::CheckUnmet => Ok(Probe::Unmet(unmet)),
            Err(failure) => Err(failure),
        }
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        let state = service.state(cx).await?;
        let summary = format!("{} is {}", self.service, state.words);
        if is_met(self.expect, state.phase) {
            return Ok(Done {
                summary,
                ..Done::default()
            });
        }
        let expected = if self.expect == Expected::Stopped {
            "stopped"
        } else {
            "running"
        };
        let last_lines = service.last_lines(cx).await;
        let message = format!("service {summary}, not {expected}");
        Err(Failure {
            last_lines,
            ..failure(Cause::CheckUnmet, message)
        })
    }

    fn describe(&self) -> String {
        format!("ask how service {} is", self.service)
    }
}
