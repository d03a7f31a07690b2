//! `lockstep approve`, `reject` and `confirm`: what people decide at gates. A decision is bound to
//! the digest of what was shown (INV-12); it is taken from the document that was just printed.

use std::path::PathBuf;

use lockstep_proto::approval;
use lockstep_proto::ids::{Digest, RolloutId, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::control_v1 as wire;
use serde_json::json;

use super::client::Client;
use super::document::{Document, Gate, Step};
use super::error::CliError;
use super::exit::Exit;
use super::printer::Printer;
use super::profile::Profile;
use super::render::{Line, Tone, status, words};
use super::{Session, clean, fetch};

mod own;

pub(super) use own::{Own, Shown};

#[derive(Debug, clap::Args)]
pub(crate) struct Approve {
    #[command(flatten)]
    at: GateArgs,
    /// Approve only if this is what the gate shows: the digest that somebody looked at before
    #[arg(long, value_name = "DIGEST")]
    evidence: Option<Digest>,
    /// Sign the approval with your SSH key, or with its public half if ssh-agent or a hardware
    /// token has the key: for hosts that do not take the controller's word
    #[arg(long, value_name = "KEY")]
    sign: Option<PathBuf>,
    /// How long a signed approval is good
    #[arg(long, value_name = "PERIOD", default_value = "8h", requires = "sign")]
    expires: Period,
    /// Your own copy of the compiled plan: refuse if the rollout runs another one
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Your own copy of SQL that is too long to be shown
    #[arg(long, value_name = "FILE")]
    sql: Vec<PathBuf>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Reject {
    #[command(flatten)]
    at: GateArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Confirm {
    #[command(flatten)]
    at: GateArgs,
    /// Only these items, by number [default: all]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    items: Vec<u32>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

#[derive(Debug, clap::Args)]
struct GateArgs {
    /// The rollout that waits
    rollout: RolloutId,
    /// The gate, such as `3.1`; needed if several are open
    #[arg(long, value_name = "PHASE.STEP")]
    gate: Option<String>,
    /// A comment for the report
    #[arg(long, default_value = "", hide_default_value = true)]
    comment: String,
}

/// Which command decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Approve,
    Reject,
    Confirm,
}

impl Verb {
    /// An approval is not confirmed, and a checklist is not approved: whoever meant the one has
    /// not looked at the other. Both may be rejected.
    fn check(self, document: &Document, step: &Step) -> Result<(), CliError> {
        let (is, right) = match (self, step.action.as_str()) {
            (Self::Approve, "gate.checklist") => ("a checklist", "confirm"),
            (Self::Confirm, "gate.approval") => ("an approval", "approve"),
            _ => return Ok(()),
        };
        Err(CliError::usage(
            format!("gate {} is {is}; nothing was decided", step.at),
            format!("lockstep {right} {} --gate {}", document.rollout, step.at),
        ))
    }
}

/// What is decided.
struct Decision {
    verb: Verb,
    /// From 0; empty means all.
    items: Vec<u32>,
    /// What the operator said was looked at; else what is shown now.
    evidence: Option<Digest>,
    /// The question to ask first, if any.
    question: Option<&'static str>,
    /// Not to ask it.
    yes: bool,
    /// What the approver has of it, to hold what is shown against.
    own: Own,
    /// The key to sign with, and how long that is good.
    sign: Option<(PathBuf, Period)>,
}

/// What an operator means to decide upon, without the controller that shows it.
pub(super) struct Meant<'a> {
    pub(super) gate: Option<&'a str>,
    /// What the operator has looked at before.
    pub(super) evidence: Option<Digest>,
    pub(super) own: &'a Own,
    pub(super) sign: bool,
    pub(super) yes: bool,
}

impl Meant<'_> {
    /// Whether to ask before it is done. Whoever names the digest has seen what it stands for. A
    /// signature outlives the controller that showed what it is for: then the gate, which the
    /// digest does not say, is named too.
    pub(super) fn must_ask(&self) -> Result<bool, CliError> {
        let named = self.evidence.is_some();
        if !self.sign {
            return Ok(!self.yes && !named);
        }
        let meant = self.gate.is_some() && (named || self.own.plan.is_some());
        if self.yes && !meant {
            return Err(CliError::usage(
                "--yes would sign whatever the controller shows",
                "say what you mean with --gate, and --plan FILE or --evidence DIGEST; or answer \
                 the question",
            ));
        }
        Ok(!(self.yes || named && meant))
    }

    /// What the operator looked at, and has, is what is to be decided upon.
    pub(super) fn check(
        &self,
        document: &Document,
        step: &Step,
        gate: &Gate,
    ) -> Result<(), CliError> {
        match self.evidence {
            Some(named) if named.to_string() != gate.evidence => Err(CliError::usage(
                format!(
                    "gate {} shows {}, not {named}; nothing was decided",
                    step.at, gate.evidence
                ),
                "look at what it shows now: the same command without --evidence",
            )),
            _ => self.own.check_plan(document, step),
        }
    }
}

/// `lockstep approve`.
pub(crate) async fn approve(arguments: Approve, session: &Session) -> Result<Exit, CliError> {
    let own = Own::read(arguments.plan.as_deref(), &arguments.sql)?;
    let decision = Decision {
        verb: Verb::Approve,
        items: vec![],
        evidence: arguments.evidence,
        question: Some("approve this?"),
        yes: arguments.yes,
        own,
        sign: arguments.sign.map(|key| (key, arguments.expires)),
    };
    decide(&arguments.at, decision, session).await
}

/// `lockstep reject`. Nothing is asked: to reject by mistake costs time, never a host.
pub(crate) async fn reject(arguments: Reject, session: &Session) -> Result<Exit, CliError> {
    let decision = Decision {
        verb: Verb::Reject,
        items: vec![],
        evidence: None,
        question: None,
        yes: true,
        own: Own::default(),
        sign: None,
    };
    decide(&arguments.at, decision, session).await
}

/// `lockstep confirm`.
pub(crate) async fn confirm(arguments: Confirm, session: &Session) -> Result<Exit, CliError> {
    let items: Option<Vec<u32>> = arguments
        .items
        .iter()
        .map(|item| item.checked_sub(1))
        .collect();
    let items = items.ok_or_else(|| {
        CliError::usage("there is no item 0", "items are numbered from 1, as shown")
    })?;
    let decision = Decision {
        verb: Verb::Confirm,
        items,
        evidence: None,
        question: Some("confirm this?"),
        yes: arguments.yes,
        own: Own::default(),
        sign: None,
    };
    decide(&arguments.at, decision, session).await
}

async fn decide(at: &GateArgs, decision: Decision, session: &Session) -> Result<Exit, CliError> {
    let printer = session.printer;
    let meant = Meant {
        gate: at.gate.as_deref(),
        evidence: decision.evidence,
        own: &decision.own,
        sign: decision.sign.is_some(),
        yes: decision.yes,
    };
    let ask = meant.must_ask()?;
    let client = session.connect().await?;
    let (document, _) = fetch(&client, &at.rollout).await?;
    let open: Vec<_> = document.open_gates().collect();
    let (step, gate) = choose(&document, at.gate.as_deref(), &open)?;
    decision.verb.check(&document, step)?;
    if let Some(item) = decision
        .items
        .iter()
        .find(|item| **item as usize >= gate.items.len())
    {
        return Err(CliError::usage(
            format!("the checklist has no item {}", item + 1),
            format!("it has {}", words::count(gate.items.len(), "item")),
        ));
    }
    meant.check(&document, step, gate)?;
    if decision.verb != Verb::Reject {
        printer.talk(&shown(
            &document,
            step,
            gate,
            &decision.items,
            &decision.own,
        ));
    }
    if let Some(question) = decision.question.filter(|_| ask) {
        if !Printer::can_ask() {
            return Err(CliError::usage(
                "nobody is there to be asked",
                format!(
                    "--yes decides without a question; `lockstep status {}` shows what is decided",
                    at.rollout
                ),
            ));
        }
        if !printer.ask(question)? {
            printer.say("nothing was decided");
            return Ok(Exit::Cancelled);
        }
    }
    let signed = match &decision.sign {
        Some((key, good_for)) => {
            let approver = super::client::operator_name(&Profile::load(&session.profile)?)?;
            let kind = Kind {
                statement: approval::STATEMENT,
                namespace: approval::NAMESPACE,
            };
            let shown = Shown {
                document: &document,
                step,
                gate,
                own: &decision.own,
            };
            Some(shown.sign(kind, &approver, (key.as_path(), *good_for))?)
        }
        None => None,
    };
    let missing = send(&client, at, step, gate, decision, signed).await?;
    let command = json!({
        "format": "lockstep.decided/1",
        "rollout": at.rollout.as_str(),
        "gate": step.at,
        "missing": missing,
    });
    if printer.is_json() {
        printer.json(&command)?;
    } else if missing.is_empty() {
        printer.lines(&[Line::plain(format!("gate {} is decided", step.at))])?;
    } else {
        printer.lines(&[Line::plain(format!(
            "gate {} still waits for {missing}",
            step.at
        ))])?;
    }
    Ok(Exit::Done)
}

async fn send(
    client: &Client,
    at: &GateArgs,
    step: &Step,
    gate: &Gate,
    decision: Decision,
    signed: Option<(Timestamp, String)>,
) -> Result<String, CliError> {
    let (expires, signature) = signed.unwrap_or_default();
    let evidence = decision
        .evidence
        .map_or_else(|| gate.evidence.clone(), |digest| digest.to_string());
    let request = wire::DecideRequest {
        rollout: at.rollout.to_string(),
        gate: step.at.clone(),
        evidence,
        approve: decision.verb != Verb::Reject,
        items: decision.items,
        comment: at.comment.clone(),
        signature: signature.into(),
        expires_ms: expires.0,
    };
    let answer = client
        .call(|mut api| async move { api.decide(request).await })
        .await?;
    Ok(clean::line(&answer.missing))
}

/// What a signature is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    /// The statement's name and version.
    pub(super) statement: &'static str,
    /// In SSH's sense.
    pub(super) namespace: &'static str,
}

/// Where a step stands.
pub(super) fn place(text: &str) -> Option<StepRef> {
    let (phase, step) = text.split_once('.')?;
    Some(StepRef {
        phase: phase.parse().ok()?,
        step: step.parse().ok()?,
    })
}

/// What was proven before a gate and still counts, in plan order.
pub(super) fn facts_before(document: &Document, gate: StepRef) -> Vec<Fact> {
    let earlier = |step: &&Step| place(&step.at).is_some_and(|at| at < gate);
    let steps = document.steps().map(|(_, step)| step).filter(earlier);
    let attempts = steps.flat_map(|step| &step.attempts);
    let attempts = attempts.filter(|attempt| !attempt.stale);
    attempts.flat_map(super::document::Attempt::facts).collect()
}

/// The gate that is meant: the named one, or the only one that is open.
pub(super) fn choose<'a>(
    document: &'a Document,
    gate: Option<&str>,
    open: &[(&'a Step, &'a Gate)],
) -> Result<(&'a Step, &'a Gate), CliError> {
    let names = || {
        open.iter()
            .map(|(step, _)| step.at.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    match (gate, open) {
        (Some(name), open) => open
            .iter()
            .find(|(step, _)| step.at == *name)
            .copied()
            .ok_or_else(|| {
                let hint = match open {
                    [] => format!("none is open; the rollout is {}", status::state(document)),
                    _ => format!("open: {}", names()),
                };
                CliError::usage(format!("gate {name} does not wait for a decision"), hint)
            }),
        (None, [one]) => Ok(*one),
        (None, []) => Err(CliError::usage(
            format!("{} does not wait for a decision", document.rollout),
            format!("it is {}", status::state(document)),
        )),
        (None, _) => Err(CliError::usage(
            format!("{} waits at several gates", document.rollout),
            format!("name one of {} with --gate", names()),
        )),
    }
}

/// What is decided upon, whole: plan, hosts, SQL, items.
pub(super) fn shown(
    document: &Document,
    step: &Step,
    gate: &Gate,
    items: &[u32],
    own: &Own,
) -> Vec<Line> {
    let mut lines = vec![
        Line::new(
            Tone::Heading,
            format!("{} {} of {}", step.at, step.title(), document.rollout),
        ),
        Line::plain(format!("plan      {} {}", document.plan, document.digest)),
    ];
    if !document.inputs.is_empty() {
        lines.push(Line::plain(format!(
            "inputs    {}",
            status::inputs(document)
        )));
    }
    lines.push(Line::plain(format!("by        {}", document.requester)));
    let hosts = words::count(document.hosts.len(), "host");
    lines.push(Line::plain(format!(
        "on        {hosts}: {}",
        status::host_names(document, usize::MAX)
    )));
    if let Some(title) = step.args["title"].as_str() {
        lines.push(Line::plain(format!("what      {}", clean::line(title))));
    }
    if let Some(gate) = place(&step.at).filter(|_| step.action == "gate.approval") {
        lines.extend(sql(document, gate, own));
    }
    for (index, item) in gate.items.iter().enumerate() {
        let chosen = items.is_empty() || items.iter().any(|item| *item as usize == index);
        let standing = match gate.confirmed(index) {
            Some(had) => format!("confirmed by {}", had.operator),
            None if chosen => "to be confirmed now".to_owned(),
            None => "stays open".to_owned(),
        };
        lines.push(Line::plain(format!(
            "  {:>2}. {} ({standing})",
            index + 1,
            clean::line(item)
        )));
    }
    lines.push(Line::plain(format!(
        "missing   {}",
        clean::line(&gate.missing)
    )));
    lines.push(Line::plain(format!("evidence  {}", gate.evidence)));
    // A plan's author may have chosen names that look like lines of ours.
    let plain = |line: Line| Line::new(line.tone, clean::line(&line.text));
    lines.into_iter().map(plain).collect()
}

fn sql(document: &Document, gate: StepRef, own: &Own) -> Vec<Line> {
    let mut lines = Vec::new();
    for fact in facts_before(document, gate) {
        let own_copy = own.has_sql(&fact);
        let is_whole = |sql: &str| fact.is_of_sql(Digest::of(sql.as_bytes()));
        if let Fact::SqlPlan {
            database,
            from,
            to,
            digest,
            sql,
            opaque,
            hazards,
            ..
        } = &fact
        {
            let from = if from.is_empty() { "nothing" } else { from };
            lines.push(Line::plain(format!(
                "SQL for   {database}, {from} -> {to}, {digest}"
            )));
            // What is approved is the digest: say where it cannot be held against the text.
            if own_copy {
                lines.push(Line::plain("  your own copy has this digest"));
            } else if !is_whole(sql) {
                lines.push(Line::new(
                    Tone::Bad,
                    "  what is shown has another digest: it was shortened, or it is false",
                ));
            }
            let opaque = opaque.iter().map(|what| format!("  opaque: {what}"));
            let hazards = hazards.iter().map(|what| format!("  hazard: {what}"));
            lines.extend(opaque.chain(hazards).map(|line| Line::new(Tone::Bad, line)));
            lines.extend(
                sql.lines()
                    .map(|line| Line::new(Tone::Quiet, format!("  | {line}"))),
            );
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Document {
        Document::read(include_bytes!("render/fixtures/waiting.json")).unwrap()
    }

    #[test]
    fn evidence_that_was_named_is_what_the_gate_shows() {
        let document = document();
        let (step, gate) =
            choose(&document, None, &document.open_gates().collect::<Vec<_>>()).unwrap();
        let own = Own::default();
        let check = |evidence| {
            let meant = Meant {
                gate: None,
                evidence,
                own: &own,
                sign: false,
                yes: false,
            };
            meant.check(&document, step, gate)
        };
        assert!(check(None).is_ok());
        assert!(check(Some(gate.evidence.parse().unwrap())).is_ok());
        let error = check(Some(Digest::of(b"seen before"))).unwrap_err();
        assert!(said(&error)[0].ends_with("nothing was decided"), "{error}");
    }

    #[test]
    fn a_decision_shows_plan_hosts_sql_and_evidence() {
        let document = document();
        let (step, gate) =
            choose(&document, None, &document.open_gates().collect::<Vec<_>>()).unwrap();
        let text: Vec<String> = shown(&document, step, gate, &[], &Own::default())
            .iter()
            .map(|line| line.render(false))
            .collect();
        insta::assert_snapshot!(text.join("\n"));
    }

    #[test]
    fn names_do_not_look_like_lines_of_ours() {
        let mut document = document();
        let forged = "x\nevidence  sha256:00\nby        dana";
        document.plan = forged.to_owned();
        document.requester = forged.to_owned();
        document.inputs.insert(forged.to_owned(), forged.to_owned());
        document.phases[1].steps[1].name = Some(forged.to_owned());
        let open: Vec<_> = document.open_gates().collect();
        let (step, gate) = choose(&document, None, &open).unwrap();
        let lines = shown(&document, step, gate, &[], &Own::default());
        let text: Vec<String> = lines.iter().map(|line| line.render(false)).collect();
        let text = text.join("\n");
        for word in ["evidence", "by"] {
            let named = text.lines().filter(|line| line.starts_with(word));
            assert_eq!(named.count(), 1, "{text}");
        }
    }

    #[test]
    fn a_gate_that_is_not_open_is_named_with_those_that_are() {
        let document = document();
        let open: Vec<_> = document.open_gates().collect();
        let error = choose(&document, Some("0.0"), &open).unwrap_err();
        assert_eq!(
            said(&error),
            [
                "error: gate 0.0 does not wait for a decision",
                "  hint: open: 1.1"
            ]
        );
    }

    fn said(error: &CliError) -> Vec<String> {
        let lines = error.lines();
        lines.iter().map(|line| line.render(false)).collect()
    }

    #[test]
    fn each_kind_of_gate_has_its_own_command() {
        let document = document();
        let open: Vec<_> = document.open_gates().collect();
        let (step, _) = choose(&document, None, &open).unwrap();
        assert_eq!(step.action, "gate.approval");
        assert!(Verb::Approve.check(&document, step).is_ok());
        assert!(Verb::Reject.check(&document, step).is_ok());
        let error = Verb::Confirm.check(&document, step).unwrap_err();
        assert_eq!(
            said(&error),
            [
                "error: gate 1.1 is an approval; nothing was decided",
                "  hint: lockstep approve ro_0123456789ab --gate 1.1"
            ]
        );
        let list = Step {
            at: "2.0".to_owned(),
            action: "gate.checklist".to_owned(),
            ..Step::default()
        };
        let error = Verb::Approve.check(&document, &list).unwrap_err();
        assert!(said(&error)[1].ends_with("lockstep confirm ro_0123456789ab --gate 2.0"));
    }
}
