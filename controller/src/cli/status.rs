//! `lockstep status`, `history` and `hosts`.

use std::time::{SystemTime, UNIX_EPOCH};

use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1 as wire;
use serde_json::{Value, json};

use super::client::Client;
use super::error::CliError;
use super::exit::Exit;
use super::render;
use super::render::Line;
use super::{Session, clean, fetch, print_document};

/// How many rollouts are looked through for those that go on.
const RECENT: u32 = 200;

#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    /// One rollout in detail
    rollout: Option<RolloutId>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct History {
    /// At most so many
    #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

/// `lockstep status`.
pub(crate) async fn status(arguments: Status, session: &Session) -> Result<Exit, CliError> {
    let printer = session.printer;
    let client = session.connect().await?;
    let Some(rollout) = arguments.rollout else {
        // A halted rollout keeps its lock: it stands here until somebody has decided.
        let rollouts = list(&client, RECENT, true).await?;
        if rollouts.is_empty() && !printer.is_json() {
            printer.lines(&[Line::plain(
                "no rollout goes on; `lockstep history` lists earlier ones",
            )])?;
            return Ok(Exit::Done);
        }
        return print_list(&rollouts, session);
    };
    let (document, bytes) = fetch(&client, &rollout).await?;
    if printer.is_json() {
        print_document(&bytes, printer)?;
    } else {
        printer.lines(&render::status::detail(&document, now_ms()))?;
    }
    Ok(Exit::Done)
}

/// `lockstep history`.
pub(crate) async fn history(arguments: History, session: &Session) -> Result<Exit, CliError> {
    let client = session.connect().await?;
    let rollouts = list(&client, arguments.limit, false).await?;
    print_list(&rollouts, session)
}

/// `lockstep hosts`.
pub(crate) async fn hosts(session: &Session) -> Result<Exit, CliError> {
    let client = session.connect().await?;
    let request = wire::ListHostsRequest {};
    let answer = client
        .call(|mut api| async move { api.list_hosts(request).await })
        .await?;
    if session.printer.is_json() {
        let hosts: Vec<Value> = answer.hosts.iter().map(host_json).collect();
        session
            .printer
            .json(&json!({"format": "lockstep.hosts/1", "hosts": hosts}))?;
    } else {
        session
            .printer
            .lines(&render::status::hosts(&answer.hosts, now_ms()))?;
    }
    Ok(Exit::Done)
}

async fn list(client: &Client, limit: u32, open: bool) -> Result<Vec<wire::Rollout>, CliError> {
    let request = wire::ListRolloutsRequest { limit, open };
    let answer = client
        .call(|mut api| async move { api.list_rollouts(request).await })
        .await?;
    Ok(answer.rollouts)
}

fn print_list(rollouts: &[wire::Rollout], session: &Session) -> Result<Exit, CliError> {
    if session.printer.is_json() {
        let rollouts: Vec<Value> = rollouts.iter().map(rollout_json).collect();
        session
            .printer
            .json(&json!({"format": "lockstep.rollouts/1", "rollouts": rollouts}))?;
    } else {
        session
            .printer
            .lines(&render::status::rollouts(rollouts, now_ms()))?;
    }
    Ok(Exit::Done)
}

fn rollout_json(rollout: &wire::Rollout) -> Value {
    let ended = (rollout.ended_ms > 0).then_some(rollout.ended_ms);
    json!({
        "rollout": rollout.rollout,
        "plan": rollout.plan,
        "plan_digest": rollout.plan_digest,
        "state": rollout.state,
        "dry_run": rollout.dry_run,
        "waits_for": rollout.waits_for,
        "reason": rollout.reason,
        "requester": rollout.requester,
        "submitted": rollout.submitted_ms,
        "ended": ended,
    })
}

fn host_json(host: &wire::Host) -> Value {
    let locked_by = (!host.locked_by.is_empty()).then_some(&host.locked_by);
    json!({
        "host": host.host,
        "connected": host.connected,
        "last_seen": host.last_seen_ms,
        "awaited_since": (host.awaited_since_ms > 0).then_some(host.awaited_since_ms),
        "labels": clean::value(json!(host.labels)),
        "agent_version": host.agent_version,
        "locked_by": locked_by,
    })
}

/// The time on this machine, for what is still going on.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
