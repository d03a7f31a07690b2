//! `lockstep pause`, `resume`, `resolve`, `cancel`, `rollback`, `close` and `signoff`: one call each.

use std::path::{Path, PathBuf};

use lockstep_proto::evidence;
use lockstep_proto::ids::{Digest, HostId, RolloutId, StepKey};
use lockstep_proto::wire::control_v1 as wire;
use serde_json::json;

use super::document::Document;
use super::error::CliError;
use super::exit::Exit;
use super::profile::Profile;
use super::render::{self, Line};
use super::{Session, clean};

/// A rollout, and why.
#[derive(Debug, clap::Args)]
pub(crate) struct Reasoned {
    /// The rollout
    rollout: RolloutId,
    /// Why, for the report
    #[arg(long)]
    reason: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Resume {
    /// The rollout, paused or halted
    rollout: RolloutId,
    /// Try again on the hosts that failed, and only there
    #[arg(long)]
    failed: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Close {
    /// The halted rollout
    rollout: RolloutId,
    /// The hosts stay as they are
    #[arg(long, required = true)]
    accept: bool,
    /// Why that is acceptable, for the report
    #[arg(long)]
    reason: String,
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("word").required(true))]
pub(crate) struct Resolve {
    /// The rollout
    rollout: RolloutId,
    /// The host
    host: HostId,
    /// The step, as every screen shows it: PHASE.STEP
    step: String,
    /// It was done there
    #[arg(long, group = "word")]
    done: bool,
    /// It was not done: it may be tried again
    #[arg(long, group = "word")]
    not_done: bool,
    /// How that is known, for the report
    #[arg(long)]
    reason: String,
    /// Sign it with your SSH key, or with its public half if ssh-agent or a hardware token has the
    /// key: for hosts that do not take the controller's word
    #[arg(long, value_name = "KEY")]
    sign: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Forget {
    /// The host's name
    host: HostId,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SignOff {
    /// The ended rollout
    rollout: RolloutId,
    /// One of the plan's `signoff`, and a group of yours
    #[arg(long)]
    role: String,
    /// A comment for the report
    #[arg(long, default_value = "", hide_default_value = true)]
    comment: String,
}

/// `lockstep pause`.
pub(crate) async fn pause(rollout: RolloutId, session: &Session) -> Result<Exit, CliError> {
    let request = wire::PauseRequest {
        rollout: rollout.to_string(),
    };
    let client = session.connect().await?;
    client
        .call(|mut api| async move { api.pause(request).await })
        .await?;
    let said = format!("{rollout} sends nothing new; what runs, runs on");
    done(
        session,
        &rollout,
        "pause",
        &said,
        Some(format!("go on with: lockstep resume {rollout}")),
    )
}

/// `lockstep resume`.
pub(crate) async fn resume(arguments: Resume, session: &Session) -> Result<Exit, CliError> {
    let Resume { rollout, failed } = arguments;
    let request = wire::ResumeRequest {
        rollout: rollout.to_string(),
        failed,
    };
    let client = session.connect().await?;
    let answer = client
        .call(|mut api| async move { api.resume(request).await })
        .await?;
    let hosts: Vec<String> = answer.hosts.iter().map(|host| clean::line(host)).collect();
    if session.printer.is_json() {
        session.printer.json(&json!({
            "format": "lockstep.done/1",
            "rollout": rollout.as_str(),
            "command": "resume",
            "hosts": hosts,
        }))?;
        return Ok(Exit::Done);
    }
    let said = std::iter::once(format!("{rollout} goes on")).chain(hosts);
    let said: Vec<Line> = said.map(Line::plain).collect();
    session.printer.lines(&said)?;
    session.printer.say(format!("  {}", watch_hint(&rollout)));
    Ok(Exit::Done)
}

/// `lockstep resolve`.
pub(crate) async fn resolve(arguments: Resolve, session: &Session) -> Result<Exit, CliError> {
    let Resolve {
        rollout,
        host,
        step,
        done: was_done,
        not_done: _,
        reason,
        sign,
    } = arguments;
    let word = if was_done { "done" } else { "not done" };
    let said = format!("step {step} on {host} counts as {word}, by your word");
    let client = session.connect().await?;
    let mut request = wire::ResolveRequest {
        rollout: rollout.to_string(),
        host: host.to_string(),
        step,
        done: was_done,
        reason,
        ..wire::ResolveRequest::default()
    };
    if let Some(key) = sign {
        let (document, _) = super::fetch(&client, &rollout).await?;
        let by = super::client::operator_name(&Profile::load(&session.profile)?)?;
        let (of, signature) = sign_word(&document, &request, &by, &key)?;
        (request.signed_key, request.signature) = (of.to_string(), signature.into());
    }
    client
        .call(|mut api| async move { api.resolve(request).await })
        .await?;
    let hint = format!("a paused or halted rollout goes on with: lockstep resume {rollout}");
    done(session, &rollout, "resolve", &said, Some(hint))
}

/// Signs a person's word on the attempt of which nobody knows what it did: an undo's before a
/// do's, the last one.
fn sign_word(
    document: &Document,
    request: &wire::ResolveRequest,
    by: &str,
    key: &Path,
) -> Result<(StepKey, String), CliError> {
    let nothing = || {
        CliError::usage(
            format!(
                "no attempt at step {} on {} is open",
                request.step, request.host
            ),
            format!("lockstep status {} says what is", request.rollout),
        )
    };
    let open = document
        .steps()
        .filter(|(_, step)| step.at == request.step)
        .flat_map(|(_, step)| &step.attempts)
        .filter(|attempt| attempt.host == request.host)
        .filter(|attempt| matches!(attempt.outcome.as_str(), "unknown" | "unreachable"));
    let last = open.max_by_key(|attempt| (attempt.direction == "undo", attempt.attempt));
    let last = last.ok_or_else(nothing)?;
    let of = format!(
        "{}.{}.{}.{}@{}",
        request.rollout, request.step, last.direction, last.attempt, request.host
    );
    let of: StepKey = of.parse().map_err(|_| nothing())?;
    let plan: Digest = document.digest.parse().map_err(|_| nothing())?;
    let statement = evidence::resolution(plan, &of, request.done, by);
    let signature = super::seal::ssh_sign(key, evidence::RESOLVE_NAMESPACE, &statement)?;
    Ok((of, signature))
}

/// `lockstep cancel`.
pub(crate) async fn cancel(arguments: Reasoned, session: &Session) -> Result<Exit, CliError> {
    let Reasoned { rollout, reason } = arguments;
    let request = wire::CancelRequest {
        rollout: rollout.to_string(),
        reason,
    };
    let client = session.connect().await?;
    client
        .call(|mut api| async move { api.cancel(request).await })
        .await?;
    let (document, _) = super::fetch(&client, &rollout).await?;
    if session.printer.is_json() {
        return done(session, &rollout, "cancel", "", None);
    }
    let said = format!("{rollout} has ended where it stood; nothing was undone");
    let mut lines = vec![Line::plain(said)];
    lines.extend(render::status::left(&document));
    session.printer.lines(&lines)?;
    session.printer.say(format!("  {}", document.reason));
    Ok(Exit::Done)
}

/// `lockstep rollback`.
pub(crate) async fn roll_back(arguments: Reasoned, session: &Session) -> Result<Exit, CliError> {
    let Reasoned { rollout, reason } = arguments;
    let request = wire::RollBackRequest {
        rollout: rollout.to_string(),
        reason,
    };
    let client = session.connect().await?;
    client
        .call(|mut api| async move { api.roll_back(request).await })
        .await?;
    done(
        session,
        &rollout,
        "rollback",
        &format!("{rollout} is rolling back"),
        Some(watch_hint(&rollout)),
    )
}

/// `lockstep close`.
pub(crate) async fn close(arguments: Close, session: &Session) -> Result<Exit, CliError> {
    let Close {
        rollout,
        accept: _,
        reason,
    } = arguments;
    let request = wire::CloseRequest {
        rollout: rollout.to_string(),
        reason,
    };
    let client = session.connect().await?;
    client
        .call(|mut api| async move { api.close(request).await })
        .await?;
    let said = format!("{rollout} is accepted as it is; its hosts are free");
    let (document, _) = super::fetch(&client, &rollout).await?;
    // What stays as it is, such as a database behind a fence, stands in the reason.
    let reason = document.closed.map(|closed| closed.reason);
    done(session, &rollout, "close", &said, reason)
}

/// `lockstep signoff`.
pub(crate) async fn sign_off(arguments: SignOff, session: &Session) -> Result<Exit, CliError> {
    let SignOff {
        rollout,
        role,
        comment,
    } = arguments;
    let request = wire::SignOffRequest {
        rollout: rollout.to_string(),
        role: role.clone(),
        comment,
    };
    let client = session.connect().await?;
    client
        .call(|mut api| async move { api.sign_off(request).await })
        .await?;
    done(
        session,
        &rollout,
        "signoff",
        &format!("{rollout} is signed as {role}"),
        None,
    )
}

/// `lockstep forget`.
pub(crate) async fn forget(arguments: Forget, session: &Session) -> Result<Exit, CliError> {
    let Forget { host } = arguments;
    let request = wire::ForgetHostRequest {
        host: host.to_string(),
    };
    let client = session.connect().await?;
    client
        .call(|mut api| async move { api.forget_host(request).await })
        .await?;
    if session.printer.is_json() {
        session.printer.json(&json!({
            "format": "lockstep.done/1",
            "command": "forget",
            "host": host,
        }))?;
    } else {
        let said = format!("{host} is forgotten");
        session.printer.lines(&[Line::plain(&said)])?;
    }
    Ok(Exit::Done)
}

fn watch_hint(rollout: &RolloutId) -> String {
    format!("follow it with: lockstep watch {rollout}")
}

pub(super) fn done(
    session: &Session,
    rollout: &RolloutId,
    command: &str,
    said: &str,
    next: Option<String>,
) -> Result<Exit, CliError> {
    if session.printer.is_json() {
        session.printer.json(&json!({
            "format": "lockstep.done/1",
            "rollout": rollout.as_str(),
            "command": command,
        }))?;
    } else {
        session.printer.lines(&[Line::plain(said)])?;
        if let Some(next) = next {
            session.printer.say(format!("  {next}"));
        }
    }
    Ok(Exit::Done)
}
