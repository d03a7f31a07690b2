//! What this host's policy says of a compiled plan, step by step, without a controller.

use std::fmt::Write as _;

use lockstep_proto::action::Action;
use lockstep_proto::ids::BootId;
use lockstep_proto::plan::CompiledPlan;
use lockstep_proto::shown;
use lockstep_proto::values::{Period, Timestamp};

use super::consent::{check_time, missing_names, put_in_variables};
use super::policy::{Begun, Moment, Policy, Refused, utc};
use crate::config::Config;

/// What would become of a plan on this host.
#[derive(Debug)]
pub(crate) struct Explained {
    /// For people, a paragraph for each step.
    pub(crate) text: String,
    /// Whether all of it is allowed.
    pub(crate) allowed: bool,
}

/// Holds each step that is meant for this host against its policy, as at a moment, as if nothing had
/// been done within the hour before.
pub(crate) fn explain(
    plan: &CompiledPlan,
    config: &Config,
    policy: &Policy,
    at: Timestamp,
) -> Explained {
    let mut problems: Vec<String> = check_time(plan, at).err().into_iter().collect();
    let placed: Vec<_> = plan.steps_for(&config.labels).collect();
    let mut says: Vec<(bool, String)> = vec![];
    let mut allowed: Vec<(usize, Action)> = vec![];
    for (index, placed) in placed.iter().enumerate() {
        let said = put_in_variables(&placed.step.action, &config.vars)
            .map_err(|why| vec![why])
            .and_then(|action| judge(&action, config, policy, at).map(|words| (action, words)));
        match said {
            Ok((action, words)) => {
                allowed.push((index, action));
                says.push((true, words));
            }
            Err(why) => says.push((false, why.join("\n"))),
        }
    }
    let actions: Vec<&Action> = allowed.iter().map(|(_, action)| action).collect();
    for (place, why) in policy.never(&actions, at, plan.expires) {
        says[allowed[place].0] = (false, why);
    }
    if placed.is_empty() {
        problems.push("no step of the plan is meant for this host's labels".to_owned());
    }
    let count = says.iter().filter(|(allowed, _)| *allowed).count();
    let mut text = format!("plan {} at {}\n", shown::line(&plan.plan), utc(at));
    for (placed, (allowed, words)) in placed.iter().zip(&says) {
        let verdict = if *allowed { "" } else { "NOT ALLOWED: " };
        let words = format!("{verdict}{words}").replace('\n', "\n      ");
        let (step, action) = (placed.at, placed.step.action.name());
        let _ = writeln!(
            text,
            "{step:<5} {action} (line {})\n      {words}",
            placed.step.line
        );
    }
    let _ = writeln!(text, "{count} of {} steps are allowed", placed.len());
    for problem in &problems {
        let _ = writeln!(text, "{problem}");
    }
    Explained {
        text: shown::lines(&text),
        allowed: problems.is_empty() && count == placed.len(),
    }
}

/// What the policy says of one action, or everything that speaks against it.
fn judge(
    action: &Action,
    config: &Config,
    policy: &Policy,
    at: Timestamp,
) -> Result<String, Vec<String>> {
    let mut why = missing_names(action, config);
    let now = Moment {
        wall: at,
        uptime: Period(0),
        boot: BootId::from_bytes([0; 8]),
    };
    match policy.admit(action, &Begun::default(), &now) {
        Ok(_) => {}
        Err(Refused::Never(reason) | Refused::Later(reason)) => why.push(reason),
    }
    if why.is_empty() {
        Ok(policy.explain(action))
    } else {
        Err(why)
    }
}

#[cfg(test)]
mod tests {
    use super::super::consent::tests::plan_of;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_plan_does_nothing_to_the_screen_and_adds_no_lines_of_its_own() {
        let run = json!({"name": "x\u{9b}2J", "argv": ["/bin/x", "\u{202e}\u{1b}[2J"]});
        let mut plan = plan_of(&[("exec.run", run)]);
        plan.plan = "p\n1 of 1 steps are allowed\u{1b}[8m".into();
        let mut host = crate::testing::Host::new();
        host.config.labels = [("role".to_owned(), "app".to_owned())].into();
        let policy = Policy::default();
        let said = explain(&plan, &host.config, &policy, Timestamp(0)).text;
        let odd = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
        assert!(!said.contains(odd), "{said:?}");
        assert!(
            !said.lines().any(|line| line.starts_with("1 of 1")),
            "{said}"
        );
    }

    #[test]
    fn each_step_is_explained_and_only_all_of_them_are_enough() {
        let stop = ("service.stop", json!({"service": "web"}));
        let run = (
            "exec.run",
            json!({"name": "x", "argv": ["/bin/x", "${host.port}"]}),
        );
        let disk = ("check.disk", json!({"path": "/", "free": "1B"}));
        let plan = plan_of(&[stop.clone(), run, disk.clone()]);
        let mut host = crate::testing::Host::new();
        host.config.labels = [("role".to_owned(), "app".to_owned())].into();
        host.config.vars = [("port".to_owned(), "8001".to_owned())].into();
        let file = host.path().join("policy.toml");
        let text = "\n[[allow]]\naction = 'service.stop'\nper_hour = 1\nwindows = [{ utc = '00:30-01:00' }]\n";
        std::fs::write(&file, text).unwrap();
        let policy = Policy::load(&file).unwrap();
        let at = |minute: u64| Timestamp(minute * 60_000);
        let says = |plan: &CompiledPlan, minute| explain(plan, &host.config, &policy, at(minute));

        let open = says(&plan, 30);
        assert!(!open.allowed);
        for words in [
            "allowed by line 3, 1 in an hour, 00:30-01:00 UTC",
            "NOT ALLOWED: ",
            r#"argv = [["/bin/x", "8001"]]"#,
            "allowed: it only looks",
            "2 of 3 steps are allowed",
        ] {
            assert!(open.text.contains(words), "{words}\n{}", open.text);
        }
        let all = plan_of(&[stop.clone(), disk]);
        assert!(says(&all, 30).allowed, "{}", says(&all, 30).text);
        let shut = says(&all, 25);
        assert!(
            !shut.allowed && shut.text.contains("00:30 UTC, in 5 min"),
            "{}",
            shut.text
        );
        let often = says(&plan_of(&[stop.clone(), stop]), 30);
        assert!(
            !often.allowed && often.text.contains("2nd"),
            "{}",
            often.text
        );
        host.config.labels.clear();
        let none = explain(&all, &host.config, &policy, at(30));
        assert!(
            !none.allowed && none.text.contains("labels"),
            "{}",
            none.text
        );
    }
}
