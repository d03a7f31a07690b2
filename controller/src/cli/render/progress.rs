//! A rollout while it runs: one line per host and step, phases as headings, and one line that
//! says what is waited for.

use std::collections::BTreeMap;

use lockstep_core::rollout::LOUD;

use super::{Line, Tone, words};
use crate::cli::event::{Event, EventKind};
use crate::cli::exit::is_end;

/// How often a line says that nothing is new, where no line can be redrawn.
const REMIND_MS: u64 = 15_000;

/// The widest column for hosts; longer names push their line.
const WIDEST_HOST: usize = 24;

/// What a watcher knows from the events so far.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    rollout: String,
    /// Whether steps that run are shown in a live area: then their start is no line of its own.
    live: bool,
    host_width: usize,
    running: BTreeMap<Place, Running>,
    gates: BTreeMap<String, OpenGate>,
    paused_since: Option<u64>,
    /// Hosts that are waited for and are not connected, as the last heartbeat said.
    absent: Vec<String>,
    state: String,
    /// When the last event came, and when anything was said last.
    latest: u64,
    spoke: u64,
}

/// An attempt that runs: host, step, direction.
type Place = (String, String, String);

#[derive(Debug)]
struct Running {
    since: u64,
    action: String,
    progress: Option<(u32, String)>,
}

#[derive(Debug)]
struct OpenGate {
    since: u64,
    action: String,
    message: String,
}

/// A step that says how far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bar {
    pub(crate) label: String,
    /// From 0 to 1000.
    pub(crate) permille: u32,
    pub(crate) message: String,
}

impl Progress {
    /// `live`: whether there is a terminal whose last lines are redrawn.
    pub(crate) fn new(rollout: &str, live: bool) -> Self {
        Self {
            rollout: rollout.to_owned(),
            live,
            host_width: 6,
            ..Self::default()
        }
    }

    /// The state after the last event.
    pub(crate) fn state(&self) -> &str {
        &self.state
    }

    /// Takes an event, and says what is new.
    pub(crate) fn take(&mut self, event: &Event) -> Vec<Line> {
        if event.number > 0 {
            self.state.clone_from(&event.state);
        }
        self.latest = self.latest.max(event.at_ms);
        self.remember(event);
        let lines = self.say(event);
        if !lines.is_empty() {
            self.spoke = event.at_ms;
        }
        lines
    }

    /// A line to say that the rollout still waits, if none was said for some time.
    pub(crate) fn remind(&mut self, now_ms: u64) -> Option<Line> {
        if now_ms.saturating_sub(self.spoke) < REMIND_MS || is_end(&self.state) {
            return None;
        }
        self.spoke = now_ms;
        Some(Line::new(Tone::Waiting, self.waiting(now_ms)))
    }

    /// What is waited for, and for how long.
    pub(crate) fn waiting(&self, now_ms: u64) -> String {
        let for_ms = |since: u64| words::since(now_ms.saturating_sub(since));
        if let Some((at, gate)) = self.gates.iter().next() {
            let answer = self
                .answer(at, &gate.action)
                .map(|answer| format!(": {answer}"));
            return format!(
                "… {} {}{}",
                for_ms(gate.since),
                gate.message,
                answer.unwrap_or_default()
            );
        }
        if let Some(since) = self.paused_since {
            return format!(
                "… {} paused: lockstep resume {}",
                for_ms(since),
                self.rollout
            );
        }
        let longest = self.running.iter().min_by_key(|(_, running)| running.since);
        match longest {
            Some(((host, _, direction), running)) => {
                let more = match self.running.len() {
                    1 => String::new(),
                    all => format!(", and {} more", all - 1),
                };
                let action = marked(&running.action, direction, 0);
                format!(
                    "… {} {action} on {host}{more}{}",
                    for_ms(running.since),
                    self.without()
                )
            }
            None => format!(
                "… {} {}{}",
                for_ms(self.latest),
                self.between(),
                self.without()
            ),
        }
    }

    /// `; not connected: app-2`.
    fn without(&self) -> String {
        if self.absent.is_empty() {
            return String::new();
        }
        format!("; not connected: {}", some_of(&self.absent, 6))
    }

    /// How people answer at a gate; none if it waits for time.
    fn answer(&self, at: &str, action: &str) -> Option<String> {
        let verb = match action {
            "gate.approval" => "approve",
            "gate.checklist" => "confirm",
            _ => return None,
        };
        let which = if self.gates.len() > 1 {
            format!(" --gate {at}")
        } else {
            String::new()
        };
        Some(format!("lockstep {verb} {}{which}", self.rollout))
    }

    fn between(&self) -> &'static str {
        match self.state.as_str() {
            "rolling_back" => "rolling back; waiting for hosts",
            _ => "waiting for hosts",
        }
    }

    /// Steps that say how far they are, at most `most` of them.
    pub(crate) fn bars(&self, most: usize) -> Vec<Bar> {
        let said = self
            .running
            .iter()
            .filter_map(|((host, _, direction), running)| {
                let (permille, message) = running.progress.clone()?;
                let label = format!("{host} {}", marked(&running.action, direction, 0));
                Some(Bar {
                    label,
                    permille,
                    message,
                })
            });
        said.take(most).collect()
    }

    fn remember(&mut self, event: &Event) {
        if event.kind == EventKind::Heartbeat {
            self.absent.clone_from(&event.detail);
        } else if matches!(event.kind, EventKind::Consent | EventKind::StepStarted) {
            self.absent.retain(|host| *host != event.host);
        }
        let place = (
            event.host.clone(),
            event.step.clone(),
            event.direction.clone(),
        );
        match event.kind {
            EventKind::Submitted => {
                let longest = event.detail.iter().map(|host| host.chars().count()).max();
                self.host_width = longest.unwrap_or(0).clamp(self.host_width, WIDEST_HOST);
            }
            EventKind::StepStarted => {
                let action = event.action.clone();
                self.running.insert(
                    place,
                    Running {
                        since: event.at_ms,
                        action,
                        progress: None,
                    },
                );
            }
            EventKind::StepProgress => {
                let running = self.running.entry(place).or_insert_with(|| Running {
                    since: event.at_ms,
                    action: event.action.clone(),
                    progress: None,
                });
                if let Some(permille) = event.progress {
                    running.progress = Some((permille, event.message.clone()));
                }
            }
            EventKind::StepOk | EventKind::StepFailed => {
                self.running.remove(&place);
            }
            EventKind::GateOpened => {
                let gate = OpenGate {
                    since: event.at_ms,
                    action: event.action.clone(),
                    message: event.message.clone(),
                };
                self.gates.insert(event.step.clone(), gate);
            }
            EventKind::GateClosed => {
                self.gates.remove(&event.step);
            }
            // A heartbeat may say what is still missing.
            EventKind::Heartbeat if !event.step.is_empty() && !event.message.is_empty() => {
                if let Some(gate) = self.gates.get_mut(&event.step) {
                    gate.message.clone_from(&event.message);
                }
            }
            EventKind::Paused => self.paused_since = Some(event.at_ms),
            // A gate that was open stays open.
            EventKind::Resumed => self.paused_since = None,
            EventKind::RollbackStarted => {
                self.paused_since = None;
                self.gates.clear();
            }
            EventKind::Ended => {
                self.running.clear();
                self.gates.clear();
                self.paused_since = None;
            }
            _ => {}
        }
    }

    fn say(&self, event: &Event) -> Vec<Line> {
        match event.kind {
            EventKind::Unspecified
            | EventKind::StepOrdered
            | EventKind::StepProgress
            | EventKind::Heartbeat
            | EventKind::PhaseClosed => vec![],
            EventKind::Submitted => {
                let mut lines = vec![self.about(event, Tone::Plain, "rollout", &event.message)];
                if !event.detail.is_empty() {
                    let hosts = format!("hosts: {}", some_of(&event.detail, 12));
                    lines.push(Line::plain(format!("{:>10}{hosts}", "")));
                }
                lines
            }
            EventKind::PhaseOpened => {
                vec![
                    Line::plain(""),
                    Line::new(Tone::Heading, format!("phase {}", event.phase)),
                ]
            }
            EventKind::StepStarted if self.live => vec![],
            EventKind::StepStarted => vec![self.step(event, Tone::Quiet, "started")],
            EventKind::StepOk => {
                let mut lines = vec![self.step(event, Tone::Plain, &outcome(event, "ok"))];
                lines.extend(below(&event.detail));
                lines
            }
            EventKind::StepFailed => {
                let mut lines = vec![self.step(event, Tone::Bad, &outcome(event, "FAILED"))];
                lines.extend(below(&event.detail));
                lines
            }
            EventKind::GateOpened => {
                let mut lines = vec![self.step(event, Tone::Waiting, &event.message)];
                lines.extend(below(&event.detail));
                if let Some(answer) = self.answer(&event.step, &event.action) {
                    lines.push(Line::plain(format!("{:>10}{answer}", "")));
                }
                lines
            }
            EventKind::GlassBroken => {
                vec![self.step(event, Tone::Bad, &event.message)]
            }
            EventKind::GateClosed if event.message.starts_with(LOUD) => {
                vec![self.step(event, Tone::Bad, &event.message)]
            }
            EventKind::GateDecided | EventKind::GateClosed => {
                vec![self.step(event, Tone::Plain, &event.message)]
            }
            EventKind::Consent if !event.message.ends_with(" consents") => {
                vec![self.about(event, Tone::Bad, &event.host, &event.message)]
            }
            EventKind::Quarantined => {
                vec![self.about(event, Tone::Bad, &event.host, &event.message)]
            }
            EventKind::RollbackStarted => {
                let line = Line::new(Tone::Heading, event.message.clone());
                vec![Line::plain(""), line]
            }
            EventKind::Ended => {
                let good = matches!(event.state.as_str(), "succeeded");
                let tone = if good { Tone::Good } else { Tone::Bad };
                let mut lines = vec![Line::plain(""), Line::new(tone, event.message.clone())];
                lines.extend(below(&event.detail));
                lines
            }
            EventKind::Paused => vec![self.about(event, Tone::Waiting, "rollout", &event.message)],
            EventKind::Consent | EventKind::Resumed | EventKind::Host | EventKind::Note => {
                let what = if event.host.is_empty() {
                    "rollout"
                } else {
                    &event.host
                };
                let mut lines = vec![self.about(event, Tone::Quiet, what, &event.message)];
                lines.extend(below(&event.detail));
                lines
            }
        }
    }

    /// `  14:00:05  app-1  3.0 service.stop  started`.
    fn step(&self, event: &Event, tone: Tone, what: &str) -> Line {
        let host = if event.host.is_empty() {
            "gate"
        } else {
            &event.host
        };
        let action = marked(&event.action, &event.direction, event.attempt);
        let place = format!("{} {action}", event.step);
        Line::new(
            tone,
            format!(
                "{}  {host:width$}  {place:28}  {what}",
                words::clock(event.at_ms),
                width = self.host_width
            ),
        )
    }

    fn about(&self, event: &Event, tone: Tone, what: &str, message: &str) -> Line {
        let width = self.host_width;
        // Most messages about a host begin with its name.
        let rest = message.strip_prefix(what).map_or(message, str::trim_start);
        Line::new(
            tone,
            format!("{}  {what:width$}  {rest}", words::clock(event.at_ms)),
        )
    }
}

/// `ok in 3.2s: stopped`.
fn outcome(event: &Event, word: &str) -> String {
    let mut text = word.to_owned();
    if event.took_ms > 0 {
        text.push_str(" in ");
        text.push_str(&words::took(event.took_ms));
    }
    if !event.message.is_empty() {
        text.push_str(": ");
        text.push_str(&event.message);
    }
    text
}

/// `service.stop`, `service.stop (undo)`, `service.stop (attempt 2)`.
fn marked(action: &str, direction: &str, attempt: u32) -> String {
    let direction = match direction {
        "do" | "" => None,
        other => Some(other.to_owned()),
    };
    let attempt = (attempt > 1).then(|| format!("attempt {attempt}"));
    let marks: Vec<String> = direction.into_iter().chain(attempt).collect();
    if marks.is_empty() {
        action.to_owned()
    } else {
        format!("{action} ({})", marks.join(", "))
    }
}

/// More lines of an event, set apart from the one that they explain; hints stand out.
fn below(detail: &[String]) -> Vec<Line> {
    let one = |text: &String| match text.strip_prefix("hint: ") {
        Some(hint) => Line::plain(format!("{:>10}hint: {hint}", "")),
        None => Line::new(
            Tone::Quiet,
            format!("{:>10}| {text}", "").trim_end().to_owned(),
        ),
    };
    detail.iter().map(one).collect()
}

/// The first `most` of a list, and how many more there are.
pub(super) fn some_of(list: &[String], most: usize) -> String {
    match list.len().checked_sub(most) {
        None | Some(0) => list.join(", "),
        Some(more) => format!("{} and {more} more", list[..most].join(", ")),
    }
}
