//! `lockstep logs`: what steps wrote, as far as it was kept.

use lockstep_proto::ids::{HostId, RolloutId, StepKey};
use lockstep_proto::wire::control_v1 as wire;
use serde_json::json;

use super::error::CliError;
use super::exit::Exit;
use super::render::{Line, Tone};
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
    step: Option<String>,
    /// Go on with what comes until the rollout ends
    #[arg(short, long)]
    follow: bool,
}

/// `lockstep logs`.
pub(crate) async fn logs(arguments: Logs, session: &Session) -> Result<Exit, CliError> {
    let client = session.connect().await?;
    let request = wire::LogsRequest {
        rollout: arguments.rollout.to_string(),
        host: arguments.host.map(String::from).unwrap_or_default(),
        step: arguments.step.unwrap_or_default(),
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
            return Ok(Exit::Done);
        };
        if printer.is_json() {
            let line = json!({"format": "lockstep.log/1", "key": piece.key, "text": piece.text});
            printer.json_line(&line)?;
            continue;
        }
        if piece.key != last {
            printer.lines(&[Line::new(Tone::Heading, heading(&piece.key))])?;
            last.clone_from(&piece.key);
        }
        let text = clean::lines(&piece.text);
        let lines: Vec<Line> = text.lines().map(Line::plain).collect();
        printer.lines(&lines)?;
    }
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
