//! `lockstep pki` and `lockstep operator`: issuers and certificates, on the machine that keeps the issuers.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use lockstep_proto::values::Period;
use serde_json::json;

use super::error::CliError;
use super::exit::Exit;
use super::passphrase::Source;
use super::printer::Printer;
use super::render::{Line, words};
use crate::pki::roles::{Role, Roles};
use crate::pki::{self, Issued, Person};

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
    /// Issue an operator's certificate; the same as `lockstep operator add`
    Operator {
        /// What the operator may do; repeat it for more. Without it, everything but `admin`
        #[arg(long = "role", value_name = "ROLE", value_enum)]
        roles: Vec<Role>,
        #[command(flatten)]
        person: PersonArgs,
    },
}

/// `lockstep operator`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Operator {
    /// Issue an operator's certificate, on the machine that keeps the issuers
    Add {
        /// What the operator may do; repeat it for more
        #[arg(long = "role", value_name = "ROLE", value_enum, required = true)]
        roles: Vec<Role>,
        #[command(flatten)]
        person: PersonArgs,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct PersonArgs {
    /// The operator's name
    name: String,
    /// A group that the operator may decide for; repeat it for more
    #[arg(long = "group", value_name = "GROUP")]
    groups: Vec<String>,
    /// How long the certificate is valid
    #[arg(long, value_name = "PERIOD", default_value_t = Period::seconds(pki::OPERATOR_LIFE.as_secs()))]
    life: Period,
    /// Encrypt the key with a passphrase: it is asked for on the terminal, or read from
    /// --passphrase-fd
    #[arg(long)]
    passphrase: bool,
    #[command(flatten)]
    files: Files,
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
pub(crate) fn run(
    command: &Pki,
    descriptor: Option<u32>,
    printer: Printer,
) -> Result<Exit, CliError> {
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
        Pki::Operator { roles, person } => {
            let roles = match &roles[..] {
                [] => Roles::BEFORE_ROLES,
                roles => Roles::of(roles),
            };
            issue_operator(person, roles, descriptor, printer)
        }
    }
}

/// `lockstep operator add`.
pub(crate) fn operator(
    command: &Operator,
    descriptor: Option<u32>,
    printer: Printer,
) -> Result<Exit, CliError> {
    let Operator::Add { roles, person } = command;
    issue_operator(person, Roles::of(roles), descriptor, printer)
}

fn issue_operator(
    person: &PersonArgs,
    roles: Roles,
    descriptor: Option<u32>,
    printer: Printer,
) -> Result<Exit, CliError> {
    let PersonArgs {
        name,
        groups,
        life,
        passphrase,
        files,
    } = person;
    // Asked for first: whoever has none gets nothing.
    let passphrase = (*passphrase || descriptor.is_some()).then(|| {
        let source = Source::of(descriptor);
        source.ask_for_new(&format!("{name}'s key"))
    });
    let passphrase = passphrase.transpose().map_err(CliError::Passphrase)?;
    let person = Person {
        name,
        roles,
        groups,
        life: life.to_std(),
        passphrase: passphrase.as_ref(),
    };
    let issued = pki::issue_operator(&files.issuers.dir, &person, &files.out)?;
    say(&issued, printer)
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
