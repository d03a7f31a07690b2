//! `lockstep logs`: what steps wrote, as far as it was kept.

use std::str::FromStr;

use lockstep_proto::ids::{HostId, RolloutId, StepKey};
use lockstep_proto::wire::control_v1 as wire;
use serde_json::json;

use super::document::Document;
use super::error::CliError;
use super::exit::Exit;
use super::render::{Line, Tone, status};
use super::{Session, clean};

#[derive(Debug, clap::Args)]
pub(crate) struct Logs {
    /// The rollout
    rollout: RolloutId,
    /// Only this host
    #[arg(long)]
    host: Option<HostId>,
    /// Only this step, such as `3.1`
    #[arg(long, value_name = "PHASE.STEP")]
    step: Option<Place>,
    /// Go on with what comes until the rollout ends
    #[arg(short, long)]
    follow: bool,
}

/// `PHASE.STEP`, as every screen shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place(String);

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<u16>().ok();
        let place = text
            .split_once('.')
            .and_then(|(phase, step)| Some((number(phase)?, number(step)?)));
        match place {
            Some((phase, step)) => Ok(Self(format!("{phase}.{step}"))),
            None => Err("expected PHASE.STEP, both from 0, such as 3.1".to_owned()),
        }
    }
}

/// `lockstep logs`.
pub(crate) async fn logs(arguments: Logs, session: &Session) -> Result<Exit, CliError> {
    let client = session.connect().await?;
    if arguments.host.is_some() || arguments.step.is_some() {
        let (document, _) = super::fetch(&client, &arguments.rollout).await?;
        check(&arguments, &document)?;
    }
    let request = wire::LogsRequest {
        rollout: arguments.rollout.to_string(),
        host: arguments.host.map(String::from).unwrap_or_default(),
        step: arguments.step.map(|Place(step)| step).unwrap_or_default(),
        follow: arguments.follow,
    };
    let printer = session.printer;
    let mut stream = client
        .call(|mut api| async move { api.logs(request).await })
        .await?;
    let mut last = String::new();
    loop {
        let piece = tokio::select! {
            biased;
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Detached),
            piece = stream.message() => piece.map_err(|status| client.explain(status))?,
        };
        let Some(piece) = piece else {
            if last.is_empty() {
                printer.say("no output was kept");
            }
            return Ok(Exit::Done);
        };
        let again = std::mem::replace(&mut last, piece.key.clone()) == piece.key;
        if printer.is_json() {
            let line = json!({"format": "lockstep.log/1", "key": piece.key, "text": piece.text});
            printer.json_line(&line)?;
            continue;
        }
        if !again {
            printer.lines(&[Line::new(Tone::Heading, heading(&piece.key))])?;
        }
        let text = clean::lines(&piece.text);
        let lines: Vec<Line> = text.lines().map(Line::plain).collect();
        printer.lines(&lines)?;
    }
}

/// Nobody waits for the output of a host or step that the rollout does not have.
fn check(arguments: &Logs, document: &Document) -> Result<(), CliError> {
    let of = |what: &str, name: &str| format!("{} has no {what} {name}", document.rollout);
    if let Some(host) = &arguments.host
        && !document
            .hosts
            .iter()
            .any(|known| known.host == host.as_str())
    {
        let hosts = status::host_names(document, 12);
        return Err(CliError::usage(
            of("host", host.as_str()),
            format!("its hosts: {hosts}"),
        ));
    }
    if let Some(Place(step)) = &arguments.step
        && !document.steps().any(|(_, known)| known.at == *step)
    {
        let hint = "steps are PHASE.STEP, both from 0, as `lockstep watch` shows them";
        return Err(CliError::usage(of("step", step), hint));
    }
    Ok(())
}

/// `== app-1 3.1 do, attempt 1`.
fn heading(key: &str) -> String {
    match key.parse::<StepKey>() {
        Ok(StepKey {
            host,
            at,
            direction,
            attempt,
            ..
        }) => {
            format!("== {host} {at} {direction}, attempt {attempt}")
        }
        Err(_) => format!("== {}", clean::line(key)),
    }
}
