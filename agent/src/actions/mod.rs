//! What the host can do: one file per family, one [`Act`] implementation per action.
//!
//! ```text
//! look:          before() -> exec journals the intent with it -> starts the step process
//! step process:  claim -> apply(before) or undo(before) -> outcome file
//! look, after a crash without an outcome:  probe()
//! ```
//!
//! `probe`, `before` and `state` only look, under a time limit (`exec::look`).

use lockstep_proto::action::Action;
use lockstep_proto::order::{Binding, Fact};
use lockstep_proto::report::Failure;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::step::Context;

mod check;
mod env;
mod exec;
mod files;
mod loss;
mod migration;
mod net;
mod places;
mod postgres;
mod release;
pub(crate) mod service;

pub(crate) use env::salt;

/// What a host answers when asked whether an action's effect is there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Probe {
    /// It is there: applying would change nothing.
    Present(String),
    /// It is not there: applying would do this.
    Absent(String),
    /// A part of it is there.
    Partial(String),
    /// Only in a dry run: there is nothing to do now; an earlier step of the plan may change that.
    NotYet(String),
    /// It would fail on the host as it is now. Only in a dry run, and of what only looks.
    Unmet(Failure),
    /// The host cannot say.
    NoProof(String),
}

/// How an action ended well.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Done {
    /// Whether anything was changed; if not, a rollback has nothing to undo.
    pub(crate) changed: bool,
    /// One line for people.
    pub(crate) summary: String,
    /// What it proved.
    pub(crate) facts: Vec<Fact>,
}

/// An action on this host. Futures need not be `Send`: the agent has one thread.
#[allow(async_fn_in_trait, reason = "called within this crate, on one thread")]
pub(crate) trait Act {
    /// Asks the host whether the effect is there. It counts as proof only once the processes and
    /// database sessions of the old attempt are gone. Fails only if asking failed.
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure>;

    /// What a later undo must know, read before anything is changed; journalled with the intent.
    async fn before(&self, _cx: &Context) -> Result<Value, Failure> {
        Ok(Value::Null)
    }

    /// Whether what `before` told still holds, after an attempt that was killed. What it cannot
    /// tell apart must count as another state.
    async fn is_as_before(&self, cx: &Context, before: &Value) -> Result<bool, Failure> {
        Ok(self.before(cx).await? == *before)
    }

    /// Makes the effect. It must be safe on a host where the effect is there already.
    async fn apply(&self, cx: &Context, before: &Value) -> Result<Done, Failure>;

    /// Returns to the before-state, from any state that an attempt may have left. It must be safe
    /// to run again.
    async fn undo(&self, _cx: &Context, _before: &Value) -> Result<Done, Failure> {
        Ok(Done {
            summary: "nothing to undo".into(),
            ..Done::default()
        })
    }

    /// One line for people: what the step does on this host.
    fn describe(&self) -> String;

    /// The parts of the host's state that the action touches ([`Fact::State`]), for the comparison
    /// of before and after a rollback (INV-6). Databases are compared by the fence instead, while
    /// nothing can write.
    async fn state(&self, _cx: &Context) -> Result<Vec<Fact>, Failure> {
        Ok(vec![])
    }
}

/// The newest fact among an order's bindings that `pick` wants.
pub(crate) fn bound<'a, T>(
    bindings: &'a [Binding],
    pick: impl Fn(&'a Fact) -> Option<T>,
) -> Option<T> {
    bindings
        .iter()
        .rev()
        .find_map(|binding| pick(&binding.fact))
}

/// Runs `$body` with `$act` bound to the arguments of `$action`, whichever action it is. Gates and
/// notices never reach a host: consent refuses plans that say so.
macro_rules! with_act {
    ($action:expr, $act:ident => $body:expr) => {
        match $action {
            Action::ServiceStop($act) => $body,
            Action::ServiceStart($act) => $body,
            Action::ServiceRestart($act) => $body,
            Action::ServiceStatus($act) => $body,
            Action::ReleaseFetch($act) => $body,
            Action::ReleaseBuild($act) => $body,
            Action::ReleaseActivate($act) => $body,
            Action::ReleasePrevious($act) => $body,
            Action::EnvDiff($act) => $body,
            Action::EnvRender($act) => $body,
            Action::PostgresBackup($act) => $body,
            Action::PostgresVerifyBackup($act) => $body,
            Action::PostgresRehearse($act) => $body,
            Action::PostgresRestore($act) => $body,
            Action::PostgresCounts($act) => $body,
            Action::PostgresIntegrity($act) => $body,
            Action::PostgresCompare($act) => $body,
            Action::PostgresAssert($act) => $body,
            Action::PostgresAnalyze($act) => $body,
            Action::PostgresRestorePoint($act) => $body,
            Action::PostgresExternalBackup($act) => $body,
            Action::PostgresFence($act) => $body,
            Action::PostgresUnfence($act) => $body,
            Action::MigrationCurrent($act) => $body,
            Action::MigrationPlan($act) => $body,
            Action::MigrationApply($act) => $body,
            Action::MigrationVerify($act) => $body,
            Action::MigrationDowngrade($act) => $body,
            Action::CheckHttp($act) => $body,
            Action::CheckTcp($act) => $body,
            Action::CheckPort($act) => $body,
            Action::CheckProcess($act) => $body,
            Action::CheckDisk($act) => $body,
            Action::CheckTls($act) => $body,
            Action::CheckSql($act) => $body,
            Action::CheckLog($act) => $body,
            Action::CheckCommand($act) => $body,
            Action::ExecRun($act) => $body,
            Action::GateApproval(_)
            | Action::GateChecklist(_)
            | Action::GateWindow(_)
            | Action::GateWait(_)
            | Action::NotifyWebhook(_)
            | Action::NotifySlack(_)
            | Action::NotifyEmail(_) => unreachable!("consent refuses controller actions on hosts"),
        }
    };
}

/// [`Act::probe`] of any action.
pub(crate) async fn probe(action: &Action, cx: &Context) -> Result<Probe, Failure> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return world.probe(&cx.key, action).map(crate::simulation::shown);
    }
    with_act!(action, act => act.probe(cx).await)
}

/// [`Act::before`] of any action.
pub(crate) async fn before(action: &Action, cx: &Context) -> Result<Value, Failure> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return world.before(&cx.key, action);
    }
    with_act!(action, act => act.before(cx).await)
}

/// [`Act::is_as_before`] of any action.
pub(crate) async fn is_as_before(
    action: &Action,
    cx: &Context,
    before: &Value,
) -> Result<bool, Failure> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return Ok(world.before(&cx.key, action)? == *before);
    }
    with_act!(action, act => act.is_as_before(cx, before).await)
}

/// [`Act::apply`] of any action.
pub(crate) async fn apply(action: &Action, cx: &Context, before: &Value) -> Result<Done, Failure> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return world
            .apply(&cx.key, action)
            .await
            .map(crate::simulation::done);
    }
    with_act!(action, act => act.apply(cx, before).await)
}

/// [`Act::undo`] of any action.
pub(crate) async fn undo(action: &Action, cx: &Context, before: &Value) -> Result<Done, Failure> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        let undone = world.undo(&cx.key, action, before).await;
        return undone.map(crate::simulation::done);
    }
    with_act!(action, act => act.undo(cx, before).await)
}

/// [`Act::describe`] of any action.
pub(crate) fn describe(action: &Action) -> String {
    with_act!(action, act => act.describe())
}

/// [`Act::state`] of any action.
pub(crate) async fn state(action: &Action, cx: &Context) -> Result<Vec<Fact>, Failure> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return Ok(world.state(&cx.key, action));
    }
    with_act!(action, act => act.state(cx).await)
}
