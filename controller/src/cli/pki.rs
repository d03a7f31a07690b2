//! `lockstep pki`: issuers and certificates, on the machine that keeps the issuers.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::error::CliError;
use super::exit::Exit;
use super::printer::Printer;
use super::render::{Line, words};
use crate::pki::{self, Issued};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Pki {
    /// Make the issuers of controllers, agents and operators
    Init {
        #[command(flatten)]
        issuers: Issuers,
        /// The trust domain of every certificate, such as `example.com`
        #[arg(long)]
        domain: String,
    },
    /// Issue a controller's certificate
    Controller {
        /// The controller's name
        name: String,
        /// A DNS name or IP address by which it is dialled; repeat it for more
        #[arg(long = "address", value_name = "ADDRESS", required = true)]
        addresses: Vec<String>,
        #[command(flatten)]
        files: Files,
    },
    /// Issue an agent's certificate
    Agent {
        /// The host's name
        host: String,
        #[command(flatten)]
        files: Files,
    },
    /// Issue an operator's certificate
    Operator {
        /// The operator's name
        name: String,
        /// A group that the operator may decide for; repeat it for more
        #[arg(long = "group", value_name = "GROUP")]
        groups: Vec<String>,
        #[command(flatten)]
        files: Files,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Issuers {
    /// Where the issuers are kept
    #[arg(long, value_name = "DIR", default_value = "pki")]
    dir: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    #[command(flatten)]
    issuers: Issuers,
    /// Where certificate and key are written, with the issuers that their owner trusts
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

/// `lockstep pki`.
pub(crate) fn run(command: &Pki, printer: Printer) -> Result<Exit, CliError> {
    match command {
        Pki::Init { issuers, domain } => {
            pki::init(&issuers.dir, domain)?;
            let dir = issuers.dir.display();
            if printer.is_json() {
                let dir = dir.to_string();
                printer
                    .json(&json!({"format": "lockstep.issuers/1", "dir": dir, "domain": domain}))?;
            } else {
                printer.lines(&[Line::plain(format!("issuers for {domain} in {dir}"))])?;
                printer.say(
                    "  keep the ca-*.key files off the controller; it needs only the certificates",
                );
            }
            Ok(Exit::Done)
        }
        Pki::Controller {
            name,
            addresses,
            files,
        } => say(
            &pki::issue_controller(&files.issuers.dir, name, addresses, &files.out)?,
            printer,
        ),
        Pki::Agent { host, files } => say(
            &pki::issue_agent(&files.issuers.dir, host, &files.out)?,
            printer,
        ),
        Pki::Operator {
            name,
            groups,
            files,
        } => say(
            &pki::issue_operator(&files.issuers.dir, name, groups, &files.out)?,
            printer,
        ),
    }
}

fn say(issued: &Issued, printer: Printer) -> Result<Exit, CliError> {
    let not_after = issued
        .not_after
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let not_after = u64::try_from(not_after.as_millis()).unwrap_or(u64::MAX);
    if printer.is_json() {
        printer.json(&json!({
            "format": "lockstep.issued/1",
            "certificate": issued.certificate,
            "key": issued.key,
            "trusts": issued.trusts,
            "not_after": not_after,
        }))?;
    } else {
        let mut lines = vec![
            Line::plain(format!("certificate {}", issued.certificate.display())),
            Line::plain(format!("key         {}", issued.key.display())),
        ];
        for issuer in &issued.trusts {
            lines.push(Line::plain(format!("trusts      {}", issuer.display())));
        }
        let until = words::moment(not_after);
        lines.push(Line::plain(format!("valid until {until}")));
        printer.lines(&lines)?;
        debug_assert!(
            issued.not_after > SystemTime::now(),
            "a fresh certificate is valid"
        );
    }
    Ok(Exit::Done)
}
