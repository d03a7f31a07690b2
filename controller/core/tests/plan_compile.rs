//! A plan and its inputs make one compiled plan: complete, and always the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lockstep_core::compile::compile;
use lockstep_core::plan::{Code, Findings, Plan, Severity};
use lockstep_proto::action::{Action, Site};
use lockstep_proto::plan::{Batch, CompiledPlan, Strategy, Target, Undo};
use lockstep_proto::seal::{SealedPlan, open};
use lockstep_proto::values::{Period, Timestamp};

const NOW: Timestamp = Timestamp(1_700_000_000_000);

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn s0() -> Plan {
    let text = std::fs::read_to_string(here("tests/plans/s0.yaml")).unwrap();
    Plan::parse("s0.yaml", &text).unwrap_or_else(|findings| panic!("{findings}"))
}

fn inputs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let pairs = pairs
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    pairs.collect()
}

fn sealed(plan: &Plan, given: &[(&str, &str)]) -> Result<SealedPlan, Findings> {
    compile(plan, &inputs(given), 7, NOW)
}

/// A plan around some phases, with the groups `app` and `db`.
fn plan(rest: &str) -> Result<Plan, Findings> {
    let head =
        "version: 1\nplan: p\nfleet: {app: {labels: {role: app}}, db: {labels: {role: db}}}\n";
    Plan::parse("p.yaml", &format!("{head}{rest}"))
}

fn compiled(rest: &str) -> CompiledPlan {
    let plan = plan(rest).unwrap_or_else(|findings| panic!("{findings}"));
    sealed(&plan, &[]).unwrap().plan().clone()
}

fn names(plan: &CompiledPlan) -> Vec<&str> {
    plan.phases
        .iter()
        .map(|phase| phase.name.as_str())
        .collect()
}

#[test]
fn the_employee_plan_compiles_without_a_word() {
    let plan = s0();
    assert!(plan.warnings().is_empty(), "{}", plan.warnings());
    let sealed = sealed(&plan, &[("release", "v1.0.0")]).unwrap();
    assert_eq!(
        open(sealed.bytes()).unwrap(),
        sealed,
        "its bytes are canonical"
    );
    let plan = sealed.plan();
    assert_eq!(
        names(plan),
        [
            "window",
            "readiness",
            "preflight",
            "build",
            "approve",
            "stop",
            "backup",
            "environment",
            "migrate",
            "start",
            "open",
            "validate",
        ]
    );
    assert_eq!(plan.deadline, Period::seconds(7200));
    assert_eq!(plan.not_before, NOW);
    assert_eq!(plan.expires, NOW.plus(Period::seconds(86_400)));
    assert_eq!(
        plan.inputs["driver"], "systemd",
        "defaults are inputs like any other"
    );
    assert_eq!(plan.notices.len(), 3);
    let text = std::str::from_utf8(sealed.bytes()).unwrap();
    assert!(!text.contains("${release}") && !text.contains("${driver}"));
    assert!(text.contains("${host.address}"), "agents put that in");
}

#[test]
fn inputs_reach_enums() {
    let sealed = sealed(&s0(), &[("release", "v1.0.0"), ("driver", "process")]).unwrap();
    let text = std::str::from_utf8(sealed.bytes()).unwrap().to_owned();
    assert!(text.contains(r#""driver":"process""#));
}

#[test]
fn the_same_plan_is_the_same_bytes() {
    let first = sealed(&s0(), &[("release", "v1.0.0")]).unwrap();
    let second = sealed(&s0(), &[("release", "v1.0.0")]).unwrap();
    assert_eq!(first.bytes(), second.bytes());
    assert_eq!(first.digest(), second.digest());
    let other = sealed(&s0(), &[("release", "v1.0.1")]).unwrap();
    assert_ne!(first.digest(), other.digest());
}

/// Readers that are a bit off would read another number, and refuse the plan's own encoding.
#[test]
fn a_plan_with_any_number_is_opened_again() {
    for number in [
        "5e49",
        "0.1",
        "123456789.12345678",
        "1.7976931348623157e308",
        "4.9e-324",
    ] {
        let rest = format!(
            "phases:\n  - name: a\n    on: [app, db]\n    steps:\n      - check.http: \
             {{url: 'http://a/', expect: {{json: {{'$.x': {number}}}}}}}\n"
        );
        let plan = plan(&rest).unwrap_or_else(|findings| panic!("{findings}"));
        let sealed = sealed(&plan, &[]).unwrap();
        assert_eq!(open(sealed.bytes()).expect(number), sealed);
    }
}

#[test]
fn a_fence_is_raised_first_and_lowered_when_its_last_phase_begins() {
    let sealed = sealed(&s0(), &[("release", "v1.0.0")]).unwrap();
    let plan = sealed.plan();
    let phase = |name: &str| plan.phases.iter().find(|phase| phase.name == name).unwrap();
    let backup = &phase("backup").stages;
    assert!(matches!(
        backup[0].steps[0].action,
        Action::PostgresFence(_)
    ));
    assert_eq!(backup[0].target, Target::Groups(vec!["db".into()]));
    assert_eq!(backup[0].steps.len(), 1, "a stage of its own");
    assert!(matches!(
        backup[1].steps[0].action,
        Action::PostgresBackup(_)
    ));
    let open = &phase("open").stages;
    assert!(matches!(
        open[0].steps[0].action,
        Action::PostgresUnfence(_)
    ));
    assert_eq!(open[0].target, Target::Groups(vec!["db".into()]));
    assert_eq!(open[1].target, Target::Groups(vec!["app".into()]));
    let fences = plan.steps().filter(|placed| {
        matches!(
            placed.step.action,
            Action::PostgresFence(_) | Action::PostgresUnfence(_)
        )
    });
    assert_eq!(fences.count(), 2);
}

/// Fences hold checksums of every row against each other: a minute is too short for most.
#[test]
fn a_fence_has_time_for_the_whole_database() {
    let timeouts = |key: &str| -> Vec<Period> {
        let plan = compiled(&format!(
            "
phases:
  - name: a
    on: db
    fence: {{database: p, roles: [web], until: b{key}}}
    steps: [{{postgres.fence: {{database: q, roles: [web]}}}}]
  - name: b
    on: db
    steps: [{{postgres.unfence: {{database: q, roles: [web]}}}}]
"
        ));
        plan.steps().map(|placed| placed.step.timeout).collect()
    };
    let (hour, own) = (Period::seconds(3600), Period::seconds(5400));
    assert_eq!(timeouts(""), [hour; 4]);
    assert_eq!(timeouts(", timeout: 90m"), [own, hour, own, hour]);
}

#[test]
fn stages_are_runs_of_steps_with_the_same_hosts() {
    let plan = compiled(
        "
phases:
  - name: a
    on: [db, app, db]
    steps:
      - check.port: {port: 1}
      - check.port: {port: 2, on: [app, db]}
      - gate.wait: {for: 1m}
      - check.port: {port: 3}
      - check.port: {port: 4}
        on: {one_of: app}
      - check.port: {port: 5, on: {one_of: [app]}}
",
    );
    let both = Target::Groups(vec!["app".into(), "db".into()]);
    let shape: Vec<_> = plan.phases[0]
        .stages
        .iter()
        .map(|stage| (stage.target.clone(), stage.steps.len()))
        .collect();
    assert_eq!(
        shape,
        [
            (both.clone(), 2),
            (Target::Controller, 1),
            (both, 1),
            (Target::OneOf(vec!["app".into()]), 2),
        ]
    );
    let lines: Vec<u32> = plan.steps().map(|placed| placed.step.line).collect();
    assert_eq!(lines, [9, 10, 11, 12, 13, 15]);
}

#[test]
fn strategies_timeouts_and_undo_are_carried_over() {
    let plan = compiled(
        "
phases:
  - name: a
    on: app
    strategy: {rolling: {batch: 25%, max_failures: 1, pause: 5s}}
    deadline: 10m
    planned: {at: 2m, takes: 3m, owner: DevOps}
    steps:
      - service.stop: {service: web, within: 20s}
      - service.start: {service: web}
        timeout: 3m
        undo: keep
  - name: b
    on: app
    strategy: {canary: {first: 1, soak: 5m}}
    steps:
      - check.http: {url: 'http://x/', within: 60s, timeout: 5s, then: [{url: 'http://x/'}]}
  - name: c
    on: app
    strategy: all
    steps: [{check.port: {port: 80}}]
after_rollback:
  on: app
  steps: [{check.port: {port: 80}}]
",
    );
    let stage = |phase: usize| &plan.phases[phase].stages[0];
    let rolling = Strategy::Rolling {
        batch: Batch::Percent(25),
        max_failures: 1,
        pause: Period::seconds(5),
    };
    assert_eq!(stage(0).strategy, rolling);
    assert_eq!(stage(0).steps[0].timeout, Period::seconds(50));
    assert_eq!(stage(0).steps[1].timeout, Period::seconds(180));
    assert_eq!(stage(0).steps[1].undo, Undo::Keep);
    assert_eq!(plan.phases[0].deadline, Some(Period::seconds(600)));
    let canary = Strategy::Canary {
        first: Batch::Hosts(1),
        soak: Period::seconds(300),
    };
    assert_eq!(stage(1).strategy, canary);
    assert_eq!(stage(1).steps[0].timeout, Period::seconds(60 + 60 + 2 * 5));
    assert_eq!(stage(2).strategy, Strategy::All);
    assert_eq!(plan.max_failures, None);
    let after = plan.after_rollback.as_ref().unwrap();
    assert_eq!(after.stages[0].steps.len(), 1);
    assert_eq!(plan.deadline, Period::seconds(7200), "the default");
}

#[test]
fn values_of_inputs_are_held_against_their_declarations() {
    let codes = |given: &[(&str, &str)]| -> Vec<(usize, String)> {
        let findings = sealed(&s0(), given).expect_err("not compiled");
        assert!(
            findings
                .iter()
                .all(|finding| finding.code == Code::BadInputValue)
        );
        findings
            .iter()
            .map(|f| (f.line, f.message.clone()))
            .collect()
    };
    let missing = codes(&[]);
    assert_eq!(missing.len(), 1);
    assert!(
        missing[0].1.contains("`release` has no value"),
        "{missing:?}"
    );
    for bad in [
        "1.0.0",
        "v1.0.0\n",
        "v1.0.0 --force",
        "xv1.0.0",
        "",
        "${host.x}",
    ] {
        let refused = codes(&[("release", bad)]);
        assert_eq!(refused.len(), 1, "{bad:?}: {refused:?}");
    }
    assert_eq!(codes(&[("release", "v1.0.0"), ("driver", "pm2")]).len(), 1);
    assert_eq!(
        codes(&[("release", "v1.0.0"), ("drivr", "process")]).len(),
        1
    );
}

/// What depends on a value that is not known yet is left until it is.
#[test]
fn an_unknown_value_is_checked_when_it_is_given() {
    let plan = plan(
        "
inputs: {wait: {}, size: {}, batch: {}, path: {}, method: {}, on: {}}
deadline: \"${wait}\"
phases:
  - name: a
    on: \"${on}\"
    strategy: {rolling: {batch: \"${batch}\"}}
    steps:
      - check.disk: {path: \"${path}\", free: \"${size}\"}
      - check.http: {url: \"${path}\", method: \"${method}\"}
",
    )
    .unwrap_or_else(|findings| panic!("{findings}"));
    assert!(plan.warnings().is_empty());
    let good = [
        ("wait", "1h"),
        ("size", "1GiB"),
        ("batch", "2"),
        ("path", "http://x/"),
        ("method", "POST"),
        ("on", "app"),
    ];
    let findings = sealed(&plan, &good).expect_err("a URL is no path of a disk");
    let errors = findings.iter().filter(|f| f.severity == Severity::Error);
    assert_eq!(errors.count(), 1, "{findings}");
    let bad = [
        ("wait", "soon"),
        ("size", "much"),
        ("batch", "0"),
        ("path", "x"),
        ("method", "SEND"),
        ("on", "ap"),
    ];
    let findings = sealed(&plan, &bad).expect_err("nothing fits");
    let mut lines: Vec<usize> = findings.iter().map(|finding| finding.line).collect();
    lines.dedup();
    assert_eq!(lines, [6, 9, 10, 12, 13], "{findings}");
}

#[test]
fn dollars_of_ones_own_are_escaped() {
    let plan = compiled(
        "
inputs: {a: {default: x}}
phases:
  - name: a
    on: app
    steps:
      - check.command: {argv: [echo, \"$$5 $5 $\", \"$${a} ${a}\", '^\\d+$']}
",
    );
    let Action::CheckCommand(command) = &plan.phases[0].stages[0].steps[0].action else {
        panic!("another action");
    };
    assert_eq!(command.argv, ["echo", "$5 $5 $", "${a} x", r"^\d+$"]);
}

/// Texts stay as they are written, whatever YAML would make of them.
#[test]
fn a_text_is_not_turned_into_something_else() {
    let plan = compiled(
        "
phases:
  - name: a
    on: app
    steps:
      - env.render: {path: /x, mode: 0600, set: {A: 010, B: no, C: 1.10, D: true, x-e: f}}
      - check.http: {url: 'http://x/', json: {a: 1, b: '1', c: 1.5, d: true, e: null, f: no, x-g: -2}}
",
    );
    let steps = &plan.phases[0].stages[0].steps;
    let args = steps[0].action.args();
    assert_eq!(args["mode"], "0600");
    assert_eq!(
        args["set"],
        serde_json::json!({"A": "010", "B": "no", "C": "1.10", "D": "true", "x-e": "f"})
    );
    assert_eq!(
        steps[1].action.args()["json"],
        serde_json::json!({"a": 1, "b": "1", "c": 1.5, "d": true, "e": null, "f": "no", "x-g": -2})
    );
}

#[test]
fn a_plan_that_no_agent_could_hold_is_refused() {
    let steps = "      - check.port: {port: 1}\n".repeat(20_000);
    let plan = plan(&format!(
        "phases:\n  - name: a\n    on: app\n    steps:\n{steps}"
    ))
    .unwrap();
    let Err(findings) = sealed(&plan, &[]) else {
        panic!("a plan of more than 1 MiB");
    };
    let codes: Vec<Code> = findings.iter().map(|finding| finding.code).collect();
    assert_eq!(codes, [Code::TooLarge]);
}

/// Every plan that the repository ships can be run as it is.
#[test]
fn the_examples_of_the_repository_are_plans() {
    let examples = here("../../deploy/examples");
    let mut seen = 0;
    let mut folders = vec![examples];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let is_plan = text.lines().any(|line| line.starts_with("plan:"));
            if path.extension().is_none_or(|extension| extension != "yaml") || !is_plan {
                continue;
            }
            seen += 1;
            let name = path.display().to_string();
            let plan = Plan::parse(&name, &text).unwrap_or_else(|f| panic!("{f}"));
            assert!(plan.warnings().is_empty(), "{}", plan.warnings());
            let given = sealed(&plan, &[("release", "v1.0.0")]).unwrap_or_else(|f| panic!("{f}"));
            for placed in given.plan().steps() {
                let on_controller = placed.step.action.info().site == Site::Controller;
                assert_eq!(
                    on_controller,
                    *placed.target == Target::Controller,
                    "{name}"
                );
            }
        }
    }
    assert!(seen >= 1, "no example found");
}
