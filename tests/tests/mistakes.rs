//! A plan with eight mistakes gets eight findings, each at its place, in one pass.

use std::process::Command;

use lockstep_tests::binaries::Binaries;
use lockstep_tests::repository;

/// The line of each mistake, what its finding must say, and the word that it points at.
const MISTAKES: [(usize, &str); 8] = [
    (7, "2 hours"),
    (10, "apps"),
    (12, "service.stopp"),
    (13, "10GB"),
    (17, "relase"),
    (18, "staus"),
    (19, "servce"),
    (20, "build"),
];

#[test]
fn a_plan_with_eight_mistakes_has_eight_findings_each_at_its_line() {
    let plan = repository().join("tests/fixtures/plans/eight-mistakes.yaml");
    let validate = Command::new(Binaries::find().unwrap().lockstep)
        .arg("validate")
        .arg(&plan)
        .env("NO_COLOR", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&validate.stderr).into_owned();
    assert_eq!(validate.status.code(), Some(2), "{said}");
    let text = std::fs::read_to_string(&plan).unwrap();
    let places: Vec<(usize, usize)> = said
        .lines()
        .filter_map(|line| line.split_once("eight-mistakes.yaml:"))
        .filter_map(|(_, place)| {
            let mut numbers = place.split([':', ' ', ']', ')']).map(str::parse::<usize>);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        })
        .collect();
    let lines: Vec<usize> = places.iter().map(|(line, _)| *line).collect();
    assert_eq!(lines, MISTAKES.map(|(line, _)| line), "{said}");
    for ((line, column), (_, word)) in places.iter().zip(MISTAKES) {
        let shown = text.lines().nth(line - 1).unwrap();
        assert!(
            said.contains(shown.trim()),
            "line {line} is not shown:\n{said}"
        );
        assert!(said.contains(word), "{word} is not named:\n{said}");
        let at = &shown[column - 1..];
        assert!(
            at.contains(word),
            "line {line} column {column} is behind `{word}`:\n{said}"
        );
    }
    for meant in [
        "service.stop",
        "app",
        "release",
        "status",
        "service",
        "deadline",
    ] {
        assert!(said.contains(meant), "no help towards `{meant}`:\n{said}");
    }
}

#[test]
fn the_example_s_plans_are_without_a_finding() {
    for plan in [
        lockstep_tests::example::plan(),
        lockstep_tests::example::install_plan(),
    ] {
        let validate = Command::new(Binaries::find().unwrap().lockstep)
            .arg("validate")
            .arg(&plan)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&validate.stderr);
        assert_eq!(validate.status.code(), Some(0), "{said}");
        assert!(!said.contains("warning"), "{said}");
    }
}
