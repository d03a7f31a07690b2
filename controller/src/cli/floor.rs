//! `lockstep floor`: what people sign to let a host go on whose journal was put back.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use lockstep_proto::floor::{Floor, OTHERS, STATEMENT};
use lockstep_proto::ids::{HostId, InstanceId};
use lockstep_proto::values::{Period, Timestamp};
use serde_json::json;

use super::error::CliError;
use super::exit::Exit;
use super::printer::Printer;
use super::profile::ProfileArgs;
use super::render::Line;
use super::seal::write;

#[derive(Debug, clap::Args)]
pub(crate) struct FloorArgs {
    /// The host
    #[arg(long)]
    host: HostId,
    /// The installation of its agent, as the agent names it where it says that it is quarantined
    #[arg(long)]
    instance: InstanceId,
    /// The fleet that the host is of [default: the profile's]
    #[arg(long, value_name = "NAME")]
    fleet: Option<String>,
    /// The lowest serial of a plan that may come next. Plans that are not named must have been
    /// compiled after this floor was made
    #[arg(long = "serial", value_name = "PLAN=SERIAL", value_parser = parse_serial)]
    serials: Vec<(String, u64)>,
    /// How long the host takes the statement
    #[arg(long, value_name = "PERIOD", default_value = "1d")]
    expires: Period,
    /// Where the statement goes
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

/// `lockstep floor`.
pub(crate) fn floor(
    arguments: FloorArgs,
    profile: &ProfileArgs,
    printer: Printer,
) -> Result<Exit, CliError> {
    let FloorArgs {
        host,
        instance,
        fleet,
        serials,
        expires,
        out,
    } = arguments;
    let fleet = super::plan::fleet_name(fleet.as_ref(), profile)?;
    if fleet.is_empty() {
        return Err(CliError::usage(
            "nothing says which fleet the host is of",
            "--fleet NAME, as `[seal]` in the host's policy says it",
        ));
    }
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut serials: BTreeMap<String, u64> = serials.into_iter().collect();
    // Serials are the time of compilation, in nanoseconds.
    let now = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    serials.entry(OTHERS.to_owned()).or_insert(now);
    let floor = Floor {
        statement: STATEMENT.to_owned(),
        fleet,
        host,
        instance,
        serials,
        expires: Timestamp(now / 1_000_000).plus(expires),
    };
    write(&out, &floor.encode())?;
    if printer.is_json() {
        printer.json(&json!({"format": "lockstep.floor-written/1", "file": out}))?;
    } else {
        let file = out.display();
        printer.lines(&[Line::plain(format!("{file} is to be signed"))])?;
        printer.say(format!("  lockstep sign {file} --key KEY"));
    }
    Ok(Exit::Done)
}

fn parse_serial(text: &str) -> Result<(String, u64), String> {
    let (plan, serial) = text.split_once('=').ok_or("expected PLAN=SERIAL")?;
    let serial = serial.parse().map_err(|_| "a serial is a number")?;
    Ok((plan.to_owned(), serial))
}
