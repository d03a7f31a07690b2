//! `lockstep token`, `suspend`, `unsuspend` and `suspended`: who may be.

use std::fs;
use std::path::PathBuf;

use lockstep_core::trust::Subject;
use lockstep_proto::ids::HostId;
use lockstep_proto::values::Period;
use lockstep_proto::wire::control_v1 as wire;
use serde_json::json;

use super::error::CliError;
use super::exit::Exit;
use super::profile::Profile;
use super::render::{Line, words};
use super::{Session, clean};
use crate::enroll::issuer;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Token {
    /// Make a token, with which a host joins once
    Create {
        /// The host's name
        host: HostId,
        /// How long it lives, ten minutes at most
        #[arg(long, value_name = "PERIOD", default_value = "10m")]
        life: Period,
    },
    /// List the tokens that have not ended
    List,
    /// Take a token back that was not used
    Revoke {
        /// Its name, as `lockstep token list` shows it
        token: String,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Suspend {
    /// `host:NAME`, `operator:NAME` or `serial:HEX`
    subject: Subject,
    /// Why: whoever is refused reads it
    #[arg(long)]
    reason: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Unsuspend {
    /// As `lockstep suspended` shows it
    subject: Subject,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Suspended {
    /// Write the agents' revocation list, in PEM, to this file
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
}

/// `lockstep token`.
pub(crate) async fn token(command: Token, session: &Session) -> Result<Exit, CliError> {
    match command {
        Token::Create { host, life } => create(host, life, session).await,
        Token::List => list(session).await,
        Token::Revoke { token } => {
            let client = session.connect().await?;
            let request = wire::RevokeTokenRequest {
                token: token.clone(),
            };
            client
                .call(|mut api| async move { api.revoke_token(request).await })
                .await?;
            done(session, "token revoke", &token, "lets nobody in any more")
        }
    }
}

async fn create(host: HostId, life: Period, session: &Session) -> Result<Exit, CliError> {
    let client = session.connect().await?;
    let request = wire::CreateTokenRequest {
        host: host.to_string(),
        life_ms: life.0,
    };
    let made = client
        .call(|mut api| async move { api.create_token(request).await })
        .await?;
    let Profile { controller, ca, .. } = Profile::load(&session.profile)?;
    // The profile's issuer is the one that this very answer came from.
    let pin = issuer::pin(&ca).unwrap_or_else(|| "sha256:...".to_owned());
    let (secret, token) = (clean::line(&made.secret), clean::line(&made.token));
    if session.printer.is_json() {
        session.printer.json(&json!({
            "format": "lockstep.token/1",
            "secret": secret,
            "token": token,
            "host": host,
            "until": made.until_ms,
            "ca_pin": pin,
        }))?;
        return Ok(Exit::Done);
    }
    session.printer.lines(&[Line::plain(&secret)])?;
    let until = words::moment(made.until_ms);
    for line in [
        format!("  {token} lets {host} in once, until {until}; it is shown this once. On {host}:"),
        format!("  lockstep-agent join --controller {controller} --ca-pin {pin} --token-file -"),
        "  and paste the token, or put it into a file and name that".to_owned(),
    ] {
        session.printer.say(line);
    }
    Ok(Exit::Done)
}

async fn list(session: &Session) -> Result<Exit, CliError> {
    let client = session.connect().await?;
    let request = wire::ListTokensRequest {};
    let answer = client
        .call(|mut api| async move { api.list_tokens(request).await })
        .await?;
    let tokens = answer.tokens.iter();
    if session.printer.is_json() {
        let tokens = tokens.map(|token| {
            json!({
                "token": token.token, "host": token.host, "operator": token.operator,
                "until": token.until_ms, "state": token.state,
            })
        });
        let tokens: Vec<_> = tokens.collect();
        session
            .printer
            .json(&json!({"format": "lockstep.tokens/1", "tokens": tokens}))?;
        return Ok(Exit::Done);
    }
    let lines = tokens.map(|token| {
        let until = words::moment(token.until_ms);
        let text = format!(
            "{}  {:<8} {}  until {until}, by {}",
            token.token, token.state, token.host, token.operator
        );
        Line::plain(clean::line(&text))
    });
    let mut lines: Vec<Line> = lines.collect();
    if lines.is_empty() {
        lines.push(Line::plain("there are no tokens"));
    }
    session.printer.lines(&lines)?;
    Ok(Exit::Done)
}

/// `lockstep suspend`.
pub(crate) async fn suspend(arguments: Suspend, session: &Session) -> Result<Exit, CliError> {
    let Suspend { subject, reason } = arguments;
    let request = wire::SuspendRequest {
        subject: subject.to_string(),
        reason,
    };
    let client = session.connect().await?;
    client
        .call(|mut api| async move { api.suspend(request).await })
        .await?;
    done(session, "suspend", &subject.to_string(), "is suspended")
}

/// `lockstep unsuspend`.
pub(crate) async fn unsuspend(arguments: Unsuspend, session: &Session) -> Result<Exit, CliError> {
    let Unsuspend { subject } = arguments;
    let request = wire::UnsuspendRequest {
        subject: subject.to_string(),
    };
    let client = session.connect().await?;
    client
        .call(|mut api| async move { api.unsuspend(request).await })
        .await?;
    done(
        session,
        "unsuspend",
        &subject.to_string(),
        "is suspended no more",
    )
}

/// `lockstep suspended`.
pub(crate) async fn suspended(arguments: Suspended, session: &Session) -> Result<Exit, CliError> {
    let client = session.connect().await?;
    let request = wire::ListSuspendedRequest {};
    let answer = client
        .call(|mut api| async move { api.list_suspended(request).await })
        .await?;
    if let Some(path) = arguments.crl {
        if answer.agent_crl.is_empty() {
            let what = "this controller signs no revocation list";
            let hint = "it holds the agents' issuer only with `[enroll]` in its configuration";
            return Err(CliError::usage(what, hint));
        }
        let written = fs::write(&path, &answer.agent_crl);
        written.map_err(|source| CliError::File {
            verb: "written",
            path,
            source,
        })?;
    }
    let suspended = answer.suspended.iter();
    if session.printer.is_json() {
        let suspended = suspended.map(|one| {
            json!({
                "subject": one.subject, "reason": one.reason, "operator": one.operator,
                "since": one.since_ms,
            })
        });
        let suspended: Vec<_> = suspended.collect();
        let document = json!({"format": "lockstep.suspended/1", "suspended": suspended});
        session.printer.json(&document)?;
        return Ok(Exit::Done);
    }
    let lines = suspended.map(|one| {
        let since = words::moment(one.since_ms);
        let by = match one.operator.as_str() {
            "" => "the controller",
            operator => operator,
        };
        let text = format!("{}  since {since}, by {by}: {}", one.subject, one.reason);
        Line::plain(clean::line(&text))
    });
    let mut lines: Vec<Line> = lines.collect();
    if lines.is_empty() {
        lines.push(Line::plain("nobody is suspended"));
    }
    session.printer.lines(&lines)?;
    Ok(Exit::Done)
}

fn done(session: &Session, command: &str, subject: &str, said: &str) -> Result<Exit, CliError> {
    if session.printer.is_json() {
        session.printer.json(&json!({
            "format": "lockstep.done/1",
            "command": command,
            "subject": subject,
        }))?;
    } else {
        let said = clean::line(&format!("{subject} {said}"));
        session.printer.lines(&[Line::plain(said)])?;
    }
    Ok(Exit::Done)
}
