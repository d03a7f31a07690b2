//! Consent: before anything happens anywhere, the host holds every step that is meant for it
//! against its own configuration and policy (INV-9).

use std::collections::BTreeMap;

use lockstep_proto::action::Action;
use lockstep_proto::action::service::Driver;
use lockstep_proto::ids::StepRef;
use lockstep_proto::plan::{CompiledPlan, Placed, Target, Undo};
use lockstep_proto::report::Refusal;
use lockstep_proto::values::{Period, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::policy::Policy;
use crate::config::Config;

/// How far the host's clock may differ from the clock that a plan's expiry was written with.
pub(super) use lockstep_proto::plan::CLOCK_TOLERANCE;

/// A step as the host consented to it: with its own variables put in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeldStep {
    /// Its place in the plan.
    pub(crate) at: StepRef,
    /// What is done.
    pub(crate) action: Action,
    /// The longest time for one attempt.
    pub(crate) timeout: Period,
    /// What a rollback does with it.
    pub(crate) undo: Undo,
    /// The line in the plan file.
    pub(crate) line: u32,
    /// Who does it.
    #[serde(default, skip_serializing_if = "Duty::is_some_hosts")]
    pub(crate) duty: Duty,
}

/// Which of the hosts that a step is meant for do it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Duty {
    /// Some: one is elected. Steps that a release before this one held say so, too.
    #[default]
    SomeHosts,
    /// All: nothing that comes after it begins here before it is done here.
    AllHosts,
    /// Those that were rolled back, whatever they have done.
    AfterRollback,
}

impl Duty {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
    fn is_some_hosts(&self) -> bool {
        *self == Self::SomeHosts
    }
}

/// The steps that are meant for this host, or everything that speaks against them.
pub(crate) fn review(
    plan: &CompiledPlan,
    config: &Config,
    policy: &Policy,
    wall: Timestamp,
) -> Result<Vec<HeldStep>, Vec<Refusal>> {
    let whole = |reason: String| Refusal { at: None, reason };
    let mut refusals: Vec<Refusal> = Vec::new();
    if let Err(reason) = check_time(plan, wall) {
        refusals.push(whole(reason));
    }
    let mut steps = Vec::new();
    let mut meant = 0;
    for placed in plan.steps_for(&config.labels) {
        meant += 1;
        match review_step(plan, &placed, config, policy) {
            Ok(step) => steps.push(step),
            Err(reasons) => refusals.extend(reasons.into_iter().map(|reason| Refusal {
                at: Some(placed.at),
                reason,
            })),
        }
    }
    if meant == 0 {
        refusals.push(whole(format!(
            "no step of the plan is meant for this host's labels ({}); labels are in its agent.toml",
            show_labels(&config.labels)
        )));
    }
    let actions: Vec<&Action> = steps.iter().map(|step| &step.action).collect();
    let never = policy.never(&actions, wall, plan.expires);
    refusals.extend(never.into_iter().map(|(place, reason)| Refusal {
        at: Some(steps[place].at),
        reason,
    }));
    if refusals.is_empty() {
        Ok(steps)
    } else {
        Err(refusals)
    }
}

/// Refuses a plan before its time and after its expiry.
pub(crate) fn check_time(plan: &CompiledPlan, wall: Timestamp) -> Result<(), String> {
    if wall.plus(CLOCK_TOLERANCE) < plan.not_before {
        let early = plan.not_before.since(wall);
        return Err(format!(
            "the plan is not valid before {} s from now by this host's clock; if the plan is \
             right, set the clock of this host",
            early.0 / 1000
        ));
    }
    if wall > plan.expires.plus(CLOCK_TOLERANCE) {
        let late = wall.since(plan.expires);
        return Err(format!(
            "the plan expired {} s ago by this host's clock; compile it again, or set the clock \
             of this host if that is wrong",
            late.0 / 1000
        ));
    }
    Ok(())
}

/// The steps that are meant for a host with these labels and variables.
pub(super) fn steps_of(
    plan: &CompiledPlan,
    labels: &BTreeMap<String, String>,
    vars: &BTreeMap<String, String>,
) -> Result<Vec<HeldStep>, String> {
    let steps = plan.steps_for(labels);
    steps.map(|placed| held_step(plan, &placed, vars)).collect()
}

fn review_step(
    plan: &CompiledPlan,
    placed: &Placed<'_>,
    config: &Config,
    policy: &Policy,
) -> Result<HeldStep, Vec<String>> {
    let step = held_step(plan, placed, &config.vars).map_err(|reason| vec![reason])?;
    let mut reasons = missing_names(&step.action, config);
    reasons.extend(policy.check(&step.action).err());
    if reasons.is_empty() {
        Ok(step)
    } else {
        Err(reasons)
    }
}

fn held_step(
    plan: &CompiledPlan,
    placed: &Placed<'_>,
    vars: &BTreeMap<String, String>,
) -> Result<HeldStep, String> {
    let duty = match placed.target {
        _ if placed.at.phase == plan.after_rollback_index() => Duty::AfterRollback,
        Target::Groups(_) => Duty::AllHosts,
        Target::OneOf(_) | Target::Controller => Duty::SomeHosts,
    };
    Ok(HeldStep {
        at: placed.at,
        action: put_in_variables(&placed.step.action, vars)?,
        timeout: placed.step.timeout,
        undo: placed.step.undo,
        line: placed.step.line,
        duty,
    })
}

/// Puts the host's variables in for `${host.NAME}`.
pub(super) fn put_in_variables(
    action: &Action,
    vars: &BTreeMap<String, String>,
) -> Result<Action, String> {
    let mut value = serde_json::to_value(action).expect("an action is plain data");
    replace_in(&mut value, vars)?;
    serde_json::from_value(value)
        .map_err(|error| format!("with this host's variables it is not valid: {error}"))
}

fn replace_in(value: &mut Value, vars: &BTreeMap<String, String>) -> Result<(), String> {
    match value {
        Value::String(text) if text.contains(OPENING) => *text = replace_text(text, vars)?,
        Value::Array(items) => items
            .iter_mut()
            .try_for_each(|item| replace_in(item, vars))?,
        Value::Object(fields) => fields
            .values_mut()
            .try_for_each(|item| replace_in(item, vars))?,
        _ => {}
    }
    Ok(())
}

const OPENING: &str = "${host.";

fn replace_text(text: &str, vars: &BTreeMap<String, String>) -> Result<String, String> {
    let mut result = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(OPENING) {
        let (name, tail) = after
            .split_once('}')
            .ok_or_else(|| format!("`{text}` has a `{OPENING}` without its `}}`"))?;
        let value = vars.get(name).ok_or_else(|| {
            format!(
                "this host has no variable `{name}`; add it to `[vars]` of its agent.toml{}",
                known(vars.keys())
            )
        })?;
        result.push_str(before);
        result.push_str(value);
        rest = tail;
    }
    result.push_str(rest);
    Ok(result)
}

/// Names that the action uses and the host's configuration does not know.
pub(super) fn missing_names(action: &Action, config: &Config) -> Vec<String> {
    let args = action.args();
    let named = |argument: &str| args.get(argument).and_then(Value::as_str);
    let mut reasons = Vec::new();
    if let Some(app) = named("app").filter(|name| !config.apps.contains_key(*name)) {
        reasons.push(missing("application", "apps", app, config.apps.keys()));
    }
    if let Some(database) = named("database").filter(|name| !config.postgres.contains_key(*name)) {
        let keys = config.postgres.keys();
        reasons.push(missing("database", "postgres", database, keys));
    }
    let own_driver = matches!(driver(action), Some(Driver::Process | Driver::Command));
    if let Some(service) =
        named("service").filter(|name| own_driver && !config.services.contains_key(*name))
    {
        let keys = config.services.keys();
        reasons.push(missing("service", "services", service, keys));
    }
    reasons
}

fn driver(action: &Action) -> Option<Driver> {
    match action {
        Action::ServiceStop(args) => Some(args.driver),
        Action::ServiceStart(args) => Some(args.driver),
        Action::ServiceRestart(args) => Some(args.driver),
        Action::ServiceStatus(args) => Some(args.driver),
        _ => None,
    }
}

fn missing<'a>(
    what: &str,
    table: &str,
    name: &str,
    names: impl Iterator<Item = &'a String>,
) -> String {
    format!(
        "this host has no {what} `{name}`; add `[{table}.{name}]` to its agent.toml{}",
        known(names)
    )
}

fn known<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.map(String::as_str).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(" (it has {})", names.join(", "))
    }
}

fn show_labels(labels: &BTreeMap<String, String>) -> String {
    if labels.is_empty() {
        return "it has none".to_owned();
    }
    let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.join(", ")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::Postgres;
    use lockstep_proto::plan::{FORMAT, Phase, Selector, Slo, Stage, Step, Strategy, Target};
    use serde_json::json;

    fn step(name: &str, args: Value, line: u32) -> Step {
        Step {
            name: None,
            action: Action::deserialize_args(name, args).unwrap().unwrap(),
            timeout: Period::seconds(60),
            undo: Undo::Auto,
            line,
        }
    }

    fn plan(groups: &[&str], steps: Vec<Step>) -> CompiledPlan {
        let selector = |role: &str| Selector {
            labels: [("role".to_owned(), role.to_owned())].into(),
        };
        CompiledPlan {
            format: FORMAT,
            plan: "p".into(),
            serial: 1,
            fleet_name: String::new(),
            not_before: Timestamp(1_000_000),
            expires: Timestamp(2_000_000),
            deadline: Period::seconds(60),
            inputs: BTreeMap::new(),
            fleet: [
                ("app".to_owned(), selector("app")),
                ("db".to_owned(), selector("db")),
            ]
            .into(),
            phases: vec![Phase {
                name: "one".into(),
                stages: vec![Stage {
                    target: Target::Groups(groups.iter().map(|&g| g.to_owned()).collect()),
                    strategy: Strategy::All,
                    steps,
                }],
                deadline: None,
                planned: None,
            }],
            after_rollback: None,
            max_failures: None,
            notices: vec![],
            slo: Slo::default(),
            signoff: vec![],
        }
    }

    /// A plan of one phase for the group `app`.
    pub(crate) fn plan_of(actions: &[(&str, Value)]) -> CompiledPlan {
        let steps = actions.iter().zip(1..);
        let steps = steps.map(|((name, args), line)| step(name, args.clone(), line));
        plan(&["app"], steps.collect())
    }

    fn config() -> Config {
        let mut config = crate::testing::Host::new().config;
        config.labels = [("role".to_owned(), "app".to_owned())].into();
        config.vars = [("port".to_owned(), "8001".to_owned())].into();
        config
    }

    fn refusals(plan: &CompiledPlan, config: &Config, wall: u64) -> Vec<Refusal> {
        review(plan, config, &Policy::default(), Timestamp(wall)).unwrap_err()
    }

    const NOW: u64 = 1_500_000;

    #[test]
    fn variables_of_the_host_are_put_in() {
        let port = step("check.tcp", json!({"address": "localhost:${host.port}"}), 7);
        let steps = review(
            &plan(&["app"], vec![port]),
            &config(),
            &Policy::default(),
            Timestamp(NOW),
        )
        .unwrap();
        assert_eq!(steps[0].action.args()["address"], "localhost:8001");
    }

    #[test]
    fn an_unknown_variable_is_said_of_its_step() {
        let bad = step(
            "check.disk",
            json!({"path": "/${host.nope}", "free": "1B"}),
            42,
        );
        let good = step("check.port", json!({"port": 1}), 41);
        let found = refusals(&plan(&["app"], vec![good, bad]), &config(), NOW);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].at, Some(StepRef { phase: 0, step: 1 }));
        for word in ["`nope`", "port"] {
            assert!(found[0].reason.contains(word), "{}", found[0].reason);
        }
    }

    #[test]
    fn only_steps_for_the_hosts_own_labels_are_its_business() {
        let stop = step("service.stop", json!({"service": "web"}), 1);
        let found = refusals(&plan(&["db"], vec![stop]), &config(), NOW);
        assert_eq!(found.len(), 1);
        assert!(found[0].at.is_none() && found[0].reason.contains("role=app"));
    }

    #[test]
    fn every_step_that_is_not_allowed_is_named_at_once() {
        let stop = |line| step("service.stop", json!({"service": "web"}), line);
        let found = refusals(&plan(&["app"], vec![stop(1), stop(2)]), &config(), NOW);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn names_must_be_in_the_configuration() {
        let counts = step("postgres.counts", json!({"database": "sales"}), 3);
        let status = step(
            "service.status",
            json!({"service": "web", "driver": "process"}),
            4,
        );
        let mut config = config();
        let found = refusals(&plan(&["app"], vec![counts.clone(), status]), &config, NOW);
        assert!(
            found[0].reason.contains("[postgres.sales]"),
            "{}",
            found[0].reason
        );
        assert!(
            found[1].reason.contains("[services.web]"),
            "{}",
            found[1].reason
        );
        let database: Postgres = toml::from_str("host = '/run'\nuser = 'x'").unwrap();
        config.postgres.insert("sales".into(), database);
        let counts = plan(&["app"], vec![counts]);
        assert!(review(&counts, &config, &Policy::default(), Timestamp(NOW)).is_ok());
    }

    #[test]
    fn a_plan_is_taken_in_its_time_only() {
        let port = step("check.port", json!({"port": 1}), 1);
        let plan = plan(&["app"], vec![port]);
        let ok = |wall| review(&plan, &config(), &Policy::default(), Timestamp(wall)).is_ok();
        assert!(ok(NOW) && ok(1_000_000 - 300_000) && ok(2_000_000 + 300_000));
        assert!(!ok(1_000_000 - 300_001) && !ok(2_000_000 + 300_001));
    }
}
