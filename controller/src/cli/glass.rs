//! `lockstep break-glass`: one of two people lets a gate be met without what it waits for. It is shown
//! what it stands for, and shown to everybody afterwards.

use std::path::PathBuf;

use lockstep_core::rollout::LOUD;
use lockstep_proto::approval;
use lockstep_proto::ids::{Digest, RolloutId};
use lockstep_proto::values::Period;
use lockstep_proto::wire::control_v1 as wire;
use serde_json::json;

use super::decide::{self, Kind, Meant, Own, Shown};
use super::error::CliError;
use super::exit::Exit;
use super::printer::Printer;
use super::profile::Profile;
use super::render::{Line, Tone};
use super::{Session, clean, fetch};

#[derive(Debug, clap::Args)]
pub(crate) struct BreakGlass {
    /// The rollout that waits
    rollout: RolloutId,
    /// The gate, such as `3.1`; needed if several are open
    #[arg(long, value_name = "PHASE.STEP")]
    gate: Option<String>,
    /// Why that has to be: it stands in the report, in messages and in the audit
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// How long your word holds while a second person is awaited; an hour at most
    #[arg(long = "for", value_name = "PERIOD", default_value = "15m")]
    holds: Period,
    /// Break it only if this is what the gate shows: the digest that somebody looked at before
    #[arg(long, value_name = "DIGEST")]
    evidence: Option<Digest>,
    /// Sign your word with your SSH key, for hosts that do not take the controller's; only at
    /// approvals: hosts ask for no signature at other gates
    #[arg(long, value_name = "KEY")]
    sign: Option<PathBuf>,
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

/// `lockstep break-glass`.
pub(crate) async fn break_glass(
    arguments: BreakGlass,
    session: &Session,
) -> Result<Exit, CliError> {
    let BreakGlass {
        rollout,
        gate,
        reason,
        holds,
        evidence,
        sign,
        plan,
        sql,
        yes,
    } = arguments;
    let printer = session.printer;
    let own = Own::read(plan.as_deref(), &sql)?;
    let meant = Meant {
        gate: gate.as_deref(),
        evidence,
        own: &own,
        sign: sign.is_some(),
        yes,
    };
    let ask = meant.must_ask()?;
    let client = session.connect().await?;
    let (document, _) = fetch(&client, &rollout).await?;
    let open: Vec<_> = document.waiting_gates().collect();
    let (step, gate) = decide::choose(&document, meant.gate, &open)?;
    meant.check(&document, step, gate)?;
    printer.talk(&decide::shown(&document, step, gate, &[], &own));
    let missing = clean::line(&gate.missing);
    printer.talk(&[Line::new(
        Tone::Bad,
        format!("{LOUD}: the gate would be met without {missing}"),
    )]);
    if ask {
        if !Printer::can_ask() {
            return Err(CliError::usage(
                "nobody is there to be asked",
                "--yes breaks the glass without a question",
            ));
        }
        if !printer.ask("break the glass?")? {
            printer.say("nothing was done");
            return Ok(Exit::Cancelled);
        }
    }
    let signed = match &sign {
        Some(key) => {
            let person = super::client::operator_name(&Profile::load(&session.profile)?)?;
            let kind = Kind {
                statement: approval::GLASS_STATEMENT,
                namespace: approval::GLASS_NAMESPACE,
            };
            let shown = Shown {
                document: &document,
                step,
                gate,
                own: &own,
            };
            Some(shown.sign(kind, &person, (key.as_path(), holds))?)
        }
        None => None,
    };
    let (expires, signature) = signed.unwrap_or_default();
    let request = wire::BreakGlassRequest {
        rollout: rollout.to_string(),
        gate: step.at.clone(),
        evidence: gate.evidence.clone(),
        reason,
        holds_ms: holds.0,
        signature: signature.into(),
        expires_ms: expires.0,
    };
    let answer = client
        .call(|mut api| async move { api.break_glass(request).await })
        .await?;
    let missing = clean::line(&answer.missing);
    if printer.is_json() {
        printer.json(&json!({
            "format": "lockstep.glass-broken/1",
            "rollout": rollout.as_str(),
            "gate": step.at,
            "missing": missing,
        }))?;
    } else if missing.is_empty() {
        printer.lines(&[Line::plain(format!(
            "the glass of gate {} is broken",
            step.at
        ))])?;
    } else {
        printer.lines(&[Line::plain(format!(
            "a second person has to say so too, within {holds}; gate {} still waits for {missing}",
            step.at
        ))])?;
    }
    Ok(Exit::Done)
}
