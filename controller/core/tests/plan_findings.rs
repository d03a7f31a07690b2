//! What is wrong with a plan is said in full, in one pass, and in the same words every time.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lockstep_core::plan::{Code, Findings, Plan, Severity};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans/bad")
}

fn refused(name: &str) -> (String, Findings) {
    let text = std::fs::read_to_string(folder().join(name)).unwrap();
    let findings = Plan::parse(name, &text).expect_err("a plan with mistakes");
    (text, findings)
}

/// Holds every `bad/*.yaml` against the findings in the `.txt` beside it.
#[test]
fn findings_are_as_recorded() {
    let mut differing = Vec::new();
    let mut seen = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        seen += 1;
        let name = path.file_name().unwrap().to_str().unwrap();
        let (_, findings) = refused(name);
        let shown = format!("{findings}\n");
        let golden = path.with_extension("txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&golden, &shown).unwrap();
        } else if std::fs::read_to_string(&golden).unwrap_or_default() != shown {
            differing.push(format!("{name}:\n{shown}"));
        }
    }
    assert!(seen >= 9, "only {seen} plans found");
    assert!(
        differing.is_empty(),
        "look at the differences, then record them with UPDATE_GOLDEN=1:\n{}",
        differing.join("\n")
    );
}

#[test]
fn eight_mistakes_are_eight_findings_each_at_its_line() {
    let (text, findings) = refused("eight.yaml");
    let found: Vec<(usize, Code)> = findings.iter().map(|f| (f.line, f.code)).collect();
    let line = |start: &str| {
        1 + text
            .lines()
            .position(|l| l.trim().starts_with(start))
            .unwrap()
    };
    let expected: [_; 8] = [
        (line("deadlin:"), Code::UnknownKey),
        (line("on: [app, dbs]"), Code::UnknownGroup),
        (line("- check.disk"), Code::WrongValue),
        (line("- check.htp"), Code::UnknownAction),
        (line("- migration.apply"), Code::UnknownVariable),
        (line("- exec.run"), Code::BadCommand),
        (line("- exec.run") + 1, Code::DuplicateName),
        (line("bake:"), Code::NotInThisVersion),
    ];
    for one in &expected {
        assert!(found.contains(one), "{one:?} is missing in {found:?}");
    }
    assert_eq!(found.len(), expected.len(), "{findings}");
    for finding in &findings {
        assert_eq!(
            finding.source_line,
            text.lines().nth(finding.line - 1).unwrap()
        );
    }
}

#[test]
fn findings_come_in_the_order_of_the_file() {
    for name in ["eight.yaml", "shape.yaml", "order.yaml", "arguments.yaml"] {
        let (_, findings) = refused(name);
        let places: Vec<_> = findings.iter().map(|f| (f.line, f.column)).collect();
        assert!(places.is_sorted(), "{name}: {places:?}");
    }
}

/// The recorded plans together make every kind of finding that a file alone can make.
#[test]
fn every_kind_of_finding_is_recorded() {
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            let (_, findings) = refused(path.file_name().unwrap().to_str().unwrap());
            seen.extend(findings.iter().map(|finding| finding.code));
        }
    }
    // These need values of inputs, or a very large plan: see plan_compile.rs.
    seen.extend([Code::BadInputValue, Code::TooLarge]);
    let missing: Vec<_> = Code::ALL
        .iter()
        .filter(|code| !seen.contains(code))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn findings_have_a_form_for_programs() {
    let (_, findings) = refused("eight.yaml");
    let json = findings.to_json();
    assert_eq!(json["version"], 1);
    assert_eq!(json["errors"], findings.errors());
    let first = &json["findings"][0];
    assert_eq!(first["code"], "LS0004");
    assert_eq!(first["severity"], "error");
    assert_eq!(first["file"], "eight.yaml");
    assert_eq!((&first["line"], &first["column"]), (&4.into(), &1.into()));
    assert_eq!(first["hint"], "did you mean `deadline`?");
}

#[test]
fn control_characters_and_long_lines_do_not_reach_the_terminal() {
    let long = "x".repeat(5000);
    let text = format!("version: 1\nplan: \"\\e[31m{long}\" # \u{7f}\nnope: \u{85}\n");
    let findings = Plan::parse("x.yaml", &text).expect_err("not a plan");
    let shown = findings.to_string();
    assert!(shown.lines().all(|line| line.len() < 6000));
    for finding in &findings {
        assert!(!finding.source_line.contains(char::is_control), "{finding}");
    }
}

#[test]
fn a_carriage_return_by_itself_ends_a_line() {
    let findings = Plan::parse("p.yaml", "version: 1\r\rplan: p\r\nphase: x\n").unwrap_err();
    let found = findings.iter().find(|found| found.code == Code::UnknownKey);
    let found = found.expect("`phase` is no key");
    assert_eq!((found.line, found.source_line.as_str()), (4, "phase: x"));
}

#[test]
fn what_is_wrong_is_said_up_to_a_bound_and_quotes_no_more_than_is_shown() {
    // Each finding would quote the whole line.
    let text = format!("{{{}}}", "a: {},".repeat(20_000));
    let findings = Plan::parse("p.yaml", &text).unwrap_err();
    assert_eq!(findings.len(), 1000);
    assert!(findings.iter().all(|found| found.source_line.len() <= 1000));
    let shown = findings.to_string();
    assert!(
        shown.len() < 500_000 && shown.contains("perhaps more"),
        "{} bytes",
        shown.len()
    );
    let wrong = steps(&"      - chek.disk: {pth: /}\n".repeat(3000)).unwrap_err();
    assert_eq!(wrong.len(), 1000);
}

#[test]
fn a_json_path_that_takes_long_to_be_read_is_refused() {
    let with = |path: &str| {
        codes(&format!(
            "check.http: {{url: 'http://a/', expect: {{json: {{'{path}': 1}}}}}}"
        ))
    };
    assert_eq!(with(&format!("${}", "[?@".repeat(30))), [Code::BadJsonPath]);
    assert_eq!(with("$.items[?@.a > 1 && @.b].c"), []);
}

#[test]
fn warnings_do_not_keep_a_plan_from_being_one() {
    let text = "
version: 1
plan: p
inputs: {unused: {}}
fleet: {app: {labels: {role: app}}}
phases: [{name: a, on: app, steps: [{release.activate: {app: p, release: v1}}]}]
";
    let plan = Plan::parse("p.yaml", text).unwrap();
    let codes: Vec<Code> = plan.warnings().iter().map(|f| f.code).collect();
    assert_eq!(codes, [Code::UnusedInput, Code::NeverFetched]);
    assert!(
        plan.warnings()
            .iter()
            .all(|f| f.severity == Severity::Warning)
    );
    assert!(!plan.warnings().has_errors());
}

/// A plan of these steps, on one group of hosts.
fn steps(steps: &str) -> Result<Plan, Findings> {
    let head = "version: 1\nplan: p\nfleet: {app: {labels: {role: app}}}\n";
    let phase = format!("phases:\n  - name: a\n    on: app\n    steps:\n{steps}");
    Plan::parse("p.yaml", &format!("{head}{phase}"))
}

/// The findings of one step, by kind.
fn codes(step: &str) -> Vec<Code> {
    match steps(&format!("      - {step}\n")) {
        Ok(plan) => plan.warnings().iter().map(|f| f.code).collect(),
        Err(findings) => findings.iter().map(|f| f.code).collect(),
    }
}

#[test]
fn a_statement_of_which_nothing_is_asked_is_no_check() {
    let check = |rest: &str| codes(&format!("check.sql: {{database: p, sql: select 1{rest}}}"));
    assert_eq!(check(""), [Code::NothingAsked]);
    for asked in ["equals: 1", "at_least: 0", "at_most: 5"] {
        assert_eq!(check(&format!(", {asked}")), [], "{asked}");
    }
}

#[test]
fn a_check_of_an_assertion_asks_for_a_value_or_for_no_row() {
    let assert = |check: &str| {
        codes(&format!(
            "postgres.assert: {{database: p, checks: [{{sql: select 1{check}}}]}}"
        ))
    };
    assert_eq!(assert(""), [Code::NothingAsked]);
    assert_eq!(assert(", empty: false"), [Code::NothingAsked]);
    assert_eq!(assert(", empty: true, at_most: 3"), [Code::WrongValue]);
    assert_eq!(assert(", equals: [1]"), [Code::WrongValue]);
    for asked in ["equals: 1", "at_least: 0", "at_most: 5", "empty: true"] {
        assert_eq!(assert(&format!(", {asked}")), [], "{asked}");
    }
}

#[test]
fn barman_s_backups_are_full() {
    let backup = |rest: &str| {
        codes(&format!(
            "postgres.external_backup: {{database: p, system: barman{rest}}}"
        ))
    };
    assert_eq!(backup(", kind: incremental"), [Code::WrongValue]);
    assert_eq!(backup(", kind: full"), []);
    assert_eq!(backup(""), []);
}

/// `within` asks again until the answer is right: what creates something would create it again.
#[test]
fn only_requests_that_change_nothing_are_repeated() {
    let check = |rest: &str| codes(&format!("check.http: {{url: 'http://x/', {rest}}}"));
    for method in ["POST", "PUT", "PATCH", "DELETE"] {
        let repeated = check(&format!("method: {method}, within: 5s"));
        assert_eq!(repeated, [Code::RepeatedEffect], "{method}");
        assert_eq!(check(&format!("method: {method}")), [], "{method}");
    }
    assert_eq!(check("within: 5s"), []);
    assert_eq!(check("method: HEAD, within: 5s"), []);
    let then = "within: 5s, then: [{url: 'http://x/', method: POST}]";
    assert_eq!(check(then), []);
}

/// Whatever holds a command, and wherever its shell or its password stands.
#[test]
fn commands_have_no_shell_behind_wrappers_and_no_passwords() {
    let holders = [
        "exec.run: {name: a, argv: ARGV}",
        "check.command: {argv: ARGV}",
        "release.build: {app: p, release: v1, run: [{argv: ARGV}]}",
    ];
    for holder in holders {
        let check = |argv: &str| {
            let mut codes = codes(&holder.replace("ARGV", argv));
            codes.retain(|code| *code != Code::NeverFetched);
            codes
        };
        assert_eq!(check("[timeout, 5s, sh, -c, make]"), [Code::BadCommand]);
        assert_eq!(check("[psql, 'postgres://a:b@db/x']"), [Code::BadUrl]);
        assert_eq!(check("[timeout, 5s, make, 'postgres://a@db/x']"), []);
    }
}
