//! Restarts, with a receipt that tells a new run from the old one.

use lockstep_proto::action::service::Restart;
use lockstep_proto::order::Fact;
use lockstep_proto::report::Failure;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    Phase, Service, State, all_answer, describe_up, from_value, state_fact, to_value, until,
};
use crate::actions::files::{self, OrFailed as _};
use crate::actions::net::Answer;
use crate::actions::{Act, Done, Probe};
use crate::step::Context;

/// The receipt of a restart: which run it ended, written before it is ended.
const RECEIPT: &str = "restarted-run";

/// The same of the restart that undoes it.
const UNDO_RECEIPT: &str = "restarted-back-run";

/// The runs that this attempt has ended or was about to, and those of earlier attempts that were
/// killed meanwhile. One that failed by itself has an outcome: then another restart is asked for.
fn ended_runs(cx: &Context, receipt: &str) -> Vec<String> {
    let dirs = files::attempts_without_outcome(cx).into_iter();
    dirs.filter_map(|dir| std::fs::read_to_string(dir.join(receipt)).ok())
        .collect()
}

/// Forgets the receipts of the other direction: an attempt after this one is to restart it again.
fn forget(cx: &Context, receipt: &str) -> Result<(), Failure> {
    for dir in files::attempts(cx) {
        files::remove(&dir.join(receipt)).or_failed(|| "remove a restart's receipt")?;
    }
    Ok(())
}

/// Ends this run and begins another one, unless an attempt that was killed has begun one: that
/// one is only waited for. Nothing is restarted twice.
async fn restart_once(
    cx: &Context,
    service: &Service<'_>,
    receipt: &str,
    until: Instant,
) -> Result<(), Failure> {
    let State { phase, run, .. } = service.state(cx).await?;
    let ended = ended_runs(cx, receipt);
    let anew = run.as_ref().is_some_and(|run| !ended.contains(run));
    if ended.is_empty() || !anew || !phase.is_up() {
        let run = run.unwrap_or_default();
        files::write(&cx.dir.join(receipt), run.as_bytes(), 0o600, None)
            .or_failed(|| "note which run is ended")?;
        service.restart(cx, until).await?;
    }
    Ok(())
}

impl Act for Restart {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        let State {
            phase, words, run, ..
        } = service.state(cx).await?;
        let name = &self.service;
        let ended = ended_runs(cx, RECEIPT);
        if ended.is_empty() {
            return Ok(Probe::Absent(format!("restarts {name}, which is {words}")));
        }
        Ok(match (phase, run) {
            (_, None) if phase.is_up() => Probe::NoProof(format!(
                "{name} is {words}, but its driver does not tell its runs apart"
            )),
            (Phase::Running, Some(run)) if ended.contains(&run) => {
                Probe::Absent(format!("restarts {name}, whose old run goes on"))
            }
            (Phase::Running, _) => match all_answer(&self.listens, &Answer::Accepts).await {
                Ok(()) => Probe::Present(format!("{name} is {words} in a new run")),
                Err(other) => {
                    Probe::Partial(format!("{name} is {words} in a new run, but {other}"))
                }
            },
            _ => Probe::Partial(format!("{name} is {words}")),
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        Ok(to_value(&service.state(cx).await?))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        let until = until(cx, self.within);
        forget(cx, UNDO_RECEIPT)?;
        restart_once(cx, &service, RECEIPT, until).await?;
        service
            .await_running(cx, &self.service, &self.listens, until)
            .await?;
        Ok(Done {
            changed: true,
            summary: format!("{} runs anew", self.service),
            facts: vec![],
        })
    }

    /// Comes last in a rollback: what the service reads is as before, and a new run finds it.
    async fn undo(&self, cx: &Context, before: &Value) -> Result<Done, Failure> {
        let before: State = from_value(before)?;
        let service = Service::open(cx, &self.service, self.driver).await?;
        let until = until(cx, self.within);
        forget(cx, RECEIPT)?;
        let summary = if before.phase.is_up() {
            restart_once(cx, &service, UNDO_RECEIPT, until).await?;
            service
                .await_running(cx, &self.service, &self.listens, until)
                .await?;
            format!("{} runs anew, with what was there before", self.service)
        } else {
            service.stop(cx, until).await?;
            format!("{} is stopped again", self.service)
        };
        Ok(Done {
            changed: true,
            summary,
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        describe_up("restart", &self.service, &self.listens)
    }

    async fn state(&self, cx: &Context) -> Result<Vec<Fact>, Failure> {
        let service = Service::open(cx, &self.service, self.driver).await?;
        Ok(state_fact(&self.service, service.state(cx).await?))
    }
}
