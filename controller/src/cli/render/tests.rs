//! What people read, as golden texts over documents and events.

use super::progress::Progress;
use super::{Line, html, markdown, plan, report, status};
use crate::cli::document::Document;
use crate::cli::event::{Event, EventKind};

/// 2026-11-24 14:00:00Z.
const START: u64 = 1_795_528_800_000;

fn waiting() -> Document {
    Document::read(include_bytes!("fixtures/waiting.json")).unwrap()
}

fn succeeded() -> Document {
    Document::read(include_bytes!("fixtures/succeeded.json")).unwrap()
}

fn rolled_back() -> Document {
    Document::read(include_bytes!("fixtures/rolled_back.json")).unwrap()
}

fn dry_run() -> Document {
    Document::read(include_bytes!("fixtures/dry_run.json")).unwrap()
}

fn text(lines: &[Line]) -> String {
    lines
        .iter()
        .map(|line| line.render(false))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn a_waiting_rollout_says_for_whom_and_how_to_answer() {
    insta::assert_snapshot!(text(&status::detail(&waiting(), START + 95_000)));
}

#[test]
fn who_is_waited_for_and_what_to_do_next_is_said() {
    let mut document = waiting();
    document.absent = vec![document.hosts[0].host.clone()];
    document.paused = Some(crate::cli::document::Paused {
        at: START,
        message: "paused by olga".to_owned(),
    });
    document.state = "paused".to_owned();
    let said = text(&status::detail(&document, START));
    assert!(said.contains("paused by olga at 2026-11-24"), "{said}");
    assert!(said.contains("(not connected)"), "{said}");
    assert!(said.contains("next       lockstep resume ro_"), "{said}");
    document.state = "halted".to_owned();
    let said = text(&status::detail(&document, START));
    assert!(said.contains(" --accept --reason TEXT"), "{said}");

    let rollout = lockstep_proto::wire::control_v1::Rollout {
        state: "running".to_owned(),
        dry_run: true,
        waits_for: "1 of dba".to_owned(),
        ..Default::default()
    };
    let said = text(&status::rollouts(&[rollout], START));
    assert!(said.contains("running (dry run)"), "{said}");
    assert!(said.contains("waits for 1 of dba"), "{said}");

    let host = lockstep_proto::wire::control_v1::Host {
        host: "app-1".to_owned(),
        last_seen_ms: START,
        awaited_since_ms: START + 102_000,
        ..Default::default()
    };
    let said = text(&status::hosts(&[host], START + 117_000));
    assert!(said.contains("controller's start 15s ago"), "{said}");
}

#[test]
fn a_wait_names_the_hosts_that_are_not_connected() {
    let mut progress = Progress::new("ro_0123456789ab", false);
    for event in Story::begin().events {
        progress.take(&event);
    }
    let mut heartbeat = Event {
        kind: EventKind::Heartbeat,
        detail: vec!["app-2".to_owned()],
        ..Event::default()
    };
    progress.take(&heartbeat);
    let said = progress.waiting(START + 15_000);
    assert_eq!(said, "… 15s waiting for hosts; not connected: app-2");
    heartbeat.detail.clear();
    progress.take(&heartbeat);
    assert_eq!(progress.waiting(START + 15_000), "… 15s waiting for hosts");
}

#[test]
fn a_rolled_back_rollout_in_detail() {
    insta::assert_snapshot!(text(&status::detail(&rolled_back(), START + 2_000_000)));
}

#[test]
fn the_end_of_a_rollout_in_short() {
    let both = [status::ending(&succeeded()), status::ending(&rolled_back())].concat();
    insta::assert_snapshot!(text(&both));
}

#[test]
fn a_dry_run_says_what_would_happen_and_that_nothing_did() {
    insta::assert_snapshot!(text(&plan::dry_run(&dry_run())));
}

#[test]
fn a_report_of_success_as_markdown() {
    insta::assert_snapshot!(markdown::markdown(&report::report(&succeeded())));
}

#[test]
fn a_report_of_a_rollback_as_markdown() {
    insta::assert_snapshot!(markdown::markdown(&report::report(&rolled_back())));
}

#[test]
fn a_report_as_a_page() {
    insta::assert_snapshot!(html::html(&report::report(&rolled_back())));
}

#[test]
fn colour_only_repeats_what_words_say() {
    let lines = status::detail(&rolled_back(), START);
    let colored: Vec<String> = lines.iter().map(|line| line.render(true)).collect();
    assert!(colored.iter().any(|line| line.contains("\u{1b}[31m")));
    let mut plain = colored.join("\n");
    for code in [
        "\u{1b}[1m",
        "\u{1b}[2m",
        "\u{1b}[31m",
        "\u{1b}[32m",
        "\u{1b}[33m",
        "\u{1b}[0m",
    ] {
        plain = plain.replace(code, "");
    }
    assert_eq!(plain, text(&lines));
}

/// Events of a rollout, told in the order of a story.
struct Story {
    events: Vec<Event>,
    state: &'static str,
}

impl Story {
    fn begin() -> Self {
        let mut story = Self {
            events: vec![],
            state: "running",
        };
        let hosts = ["app-1", "app-2", "db-1"].map(ToOwned::to_owned).into();
        let event = story.at(
            0,
            EventKind::Submitted,
            "plan `employee-system` submitted by dora",
        );
        event.detail = hosts;
        story
    }

    fn at(&mut self, seconds: u64, kind: EventKind, message: &str) -> &mut Event {
        self.events.push(Event {
            number: self.events.len() as u64 + 1,
            at_ms: START + seconds * 1000,
            kind,
            state: self.state.to_owned(),
            message: message.to_owned(),
            ..Event::default()
        });
        self.events.last_mut().expect("it was just added")
    }

    fn step(
        &mut self,
        seconds: u64,
        kind: EventKind,
        host: &str,
        step: &str,
        message: &str,
    ) -> &mut Event {
        let (at, action) = step.split_once(' ').expect("place and action");
        let event = self.at(seconds, kind, message);
        event.host = host.to_owned();
        event.step = at.to_owned();
        event.action = action.to_owned();
        event.direction = "do".to_owned();
        event.attempt = 1;
        event
    }

    fn phase(&mut self, seconds: u64, name: &str) {
        self.at(seconds, EventKind::PhaseOpened, &format!("phase `{name}`"))
            .phase = name.to_owned();
    }
}

fn a_rollout_that_is_undone() -> Vec<Event> {
    let mut story = Story::begin();
    for host in ["app-1", "app-2", "db-1"] {
        story
            .at(0, EventKind::Consent, &format!("{host} consents"))
            .host = host.to_owned();
    }
    story.phase(1, "approve");
    let gate = story.step(
        1,
        EventKind::GateOpened,
        "",
        "0.0 gate.approval",
        "approval: waiting for 1 of dba",
    );
    gate.detail = vec![
        "plan sha256:aaaa".into(),
        "hosts app-1, app-2, db-1".into(),
        "evidence sha256:eeee".into(),
    ];
    story.step(
        36,
        EventKind::GateDecided,
        "",
        "0.0 gate.approval",
        "abel approves: read it",
    );
    story.step(
        36,
        EventKind::GateClosed,
        "",
        "0.0 gate.approval",
        "approved by abel",
    );
    story.phase(36, "backup");
    story.step(
        36,
        EventKind::StepOrdered,
        "db-1",
        "1.0 postgres.backup",
        "",
    );
    story.step(
        36,
        EventKind::StepStarted,
        "db-1",
        "1.0 postgres.backup",
        "",
    );
    story
        .step(
            98,
            EventKind::StepOk,
            "db-1",
            "1.0 postgres.backup",
            "12.4 MiB",
        )
        .took_ms = 62_500;
    story.phase(98, "start");
    story.step(98, EventKind::StepStarted, "app-1", "2.0 check.http", "");
    story.step(98, EventKind::StepStarted, "app-2", "2.0 check.http", "");
    story
        .step(99, EventKind::StepOk, "app-1", "2.0 check.http", "200")
        .took_ms = 210;
    let failed = story.step(
        158,
        EventKind::StepFailed,
        "app-2",
        "2.0 check.http",
        "check unmet: expected 200, got 503",
    );
    failed.took_ms = 60_000;
    failed.detail = vec![
        "HTTP/1.1 503 Service Unavailable".into(),
        "hint: look at the log of app-2".into(),
    ];
    story
        .at(
            158,
            EventKind::Quarantined,
            "app-2 stays behind: check.http failed",
        )
        .host = "app-2".into();
    story.state = "rolling_back";
    story.at(
        158,
        EventKind::RollbackStarted,
        "rolling back: check.http failed on app-2",
    );
    story
        .step(159, EventKind::StepStarted, "app-1", "1.1 service.stop", "")
        .direction = "undo".into();
    let undone = story.step(
        161,
        EventKind::StepOk,
        "app-1",
        "1.1 service.stop",
        "started again",
    );
    (undone.direction, undone.took_ms) = ("undo".into(), 2_100);
    story.state = "rolled_back";
    story.at(
        162,
        EventKind::Ended,
        "rolled_back: check.http failed on app-2",
    );
    story.events
}

#[test]
fn a_rollout_line_by_line() {
    let mut progress = Progress::new("ro_0123456789ab", false);
    let mut lines = Vec::new();
    for event in a_rollout_that_is_undone() {
        let now = event.at_ms;
        lines.extend(progress.remind(now));
        lines.extend(progress.take(&event));
    }
    insta::assert_snapshot!(text(&lines));
}

#[test]
fn what_is_waited_for_is_said_at_any_time() {
    let mut progress = Progress::new("ro_0123456789ab", true);
    let mut said = Vec::new();
    for event in a_rollout_that_is_undone() {
        progress.take(&event);
        let waiting = progress.waiting(event.at_ms + 35_000);
        if said.last() != Some(&waiting) {
            said.push(waiting);
        }
    }
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn a_step_that_says_how_far_it_is_has_a_bar_until_it_ends() {
    let mut story = Story::begin();
    story.step(1, EventKind::StepStarted, "db-1", "1.0 postgres.backup", "");
    let progress_event = story.step(
        9,
        EventKind::StepProgress,
        "db-1",
        "1.0 postgres.backup",
        "5 of 12 MiB",
    );
    (progress_event.number, progress_event.progress) = (0, Some(416));
    story.step(20, EventKind::StepOk, "db-1", "1.0 postgres.backup", "");
    let mut progress = Progress::new("ro_0123456789ab", true);
    let seen: Vec<_> = story
        .events
        .iter()
        .map(|event| {
            progress.take(event);
            progress
                .bars(6)
                .into_iter()
                .map(|bar| (bar.label, bar.permille, bar.message))
                .collect::<Vec<_>>()
        })
        .collect();
    let bar = (
        "db-1 postgres.backup".to_owned(),
        416,
        "5 of 12 MiB".to_owned(),
    );
    assert_eq!(seen, [vec![], vec![], vec![bar], vec![]]);
}

#[test]
fn a_resumed_rollout_has_not_ended() {
    let mut story = Story::begin();
    story.state = "halted";
    story.at(5, EventKind::Ended, "halted: no word from app-1");
    story.state = "running";
    story.at(9, EventKind::Resumed, "resumed by dora");
    let mut progress = Progress::new("ro_0123456789ab", false);
    for event in &story.events {
        progress.take(event);
    }
    assert_eq!(progress.state(), "running");
    assert!(progress.remind(START + 60_000).is_some());
}

#[test]
fn a_plan_does_nothing_to_the_screen_of_whoever_signs_it() {
    let name = "p\u{1b}[2J\ndigest    sha256:00\u{202e}";
    let text = serde_json::json!({
        "format": 1, "plan": name, "serial": 1, "not_before": 0, "expires": 9, "deadline": "1h",
        "fleet": {},
        "phases": [{"name": name, "stages": [{"target": "controller", "steps": [
            {"action": {"gate.wait": {"for": "1m"}}, "timeout": "2m", "line": 1},
        ]}]}],
        "slo": {},
    });
    let compiled = serde_json::from_value(text).unwrap();
    let sealed = lockstep_proto::seal::seal(compiled).unwrap();
    let lines = plan::summary(&sealed);
    for line in &lines {
        assert!(!line.text.contains(char::is_control), "{line:?}");
    }
    let named: Vec<&Line> = lines
        .iter()
        .filter(|line| line.text.starts_with("digest"))
        .collect();
    assert_eq!(named.len(), 1, "{lines:?}");
    // Lines that were made elsewhere get no further either.
    assert!(
        !Line::plain("a\u{1b}[2J\u{9b}")
            .render(true)
            .contains(['\u{1b}', '\u{9b}'])
    );
}
