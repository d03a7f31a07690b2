//! `lockstep compile`, `sign` and `verify`: a plan, or a floor, on its way to those who seal it.
//!
//! ```text
//! plan.yaml --compile--> plan.json --sign, k times--> plan.json.sig --apply--> controller
//! ```

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lockstep_proto::floor::{self, Floor};
use lockstep_proto::seal::{self, MAX_SIGNATURES, SealedPlan};
use lockstep_proto::sshsig::{self, NamedKey, PublicKey};
use lockstep_proto::trust::Keyring;
use serde_json::json;

use super::clean;
use super::error::CliError;
use super::exit::Exit;
use super::plan::{self, PlanArgs};
use super::printer::Printer;
use super::profile::ProfileArgs;
use super::render::{self, Line};

#[derive(Debug, clap::Args)]
pub(crate) struct Compile {
    #[command(flatten)]
    plan: PlanArgs,
    /// Where the compiled plan goes
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Sign {
    /// What `compile` or `floor` wrote
    file: PathBuf,
    /// Your SSH key, or its public half if ssh-agent or a hardware token has the key
    #[arg(short, long, value_name = "FILE")]
    key: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Verify {
    /// What `compile` or `floor` wrote
    file: PathBuf,
    /// Public keys that count, one a line, each with its owner's name
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// How many of their owners must have signed
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    threshold: usize,
}

/// Something that people sign.
enum Signable {
    Plan(Box<SealedPlan>),
    Floor(Floor),
}

impl Signable {
    fn read(path: &Path) -> Result<Self, CliError> {
        let bytes = read(path)?;
        if plan::is_compiled(&bytes) {
            return Ok(Self::Plan(Box::new(plan::open(path, &bytes)?)));
        }
        let floor = Floor::read(&bytes).map_err(|error| {
            CliError::usage(
                format!(
                    "{} is neither a compiled plan nor a floor: {error}",
                    path.display()
                ),
                "make one with `lockstep compile PLAN -o FILE` or `lockstep floor`",
            )
        })?;
        Ok(Self::Floor(floor))
    }

    fn namespace(&self) -> &'static str {
        match self {
            Self::Plan(_) => seal::NAMESPACE,
            Self::Floor(_) => floor::NAMESPACE,
        }
    }

    fn message(&self) -> Vec<u8> {
        match self {
            Self::Plan(plan) => seal::message(plan.digest()).into_bytes(),
            Self::Floor(floor) => floor.encode(),
        }
    }

    /// What is signed, for whoever signs.
    fn lines(&self) -> Vec<Line> {
        match self {
            Self::Plan(plan) => render::plan::summary(plan),
            Self::Floor(floor) => {
                let Floor {
                    statement: _,
                    fleet,
                    host,
                    instance,
                    serials,
                    expires,
                } = floor;
                let mut lines = vec![
                    Line::plain(format!("host      {host} of {fleet}, {instance}")),
                    Line::plain(format!("expires   {}", render::words::moment(expires.0))),
                ];
                let serial = |(plan, serial): (&String, &u64)| match plan.as_str() {
                    floor::OTHERS => format!("others    from serial {serial} on"),
                    plan => format!("plan      {plan} from serial {serial} on"),
                };
                lines.extend(serials.iter().map(serial).map(Line::plain));
                let plain = |line: Line| Line::new(line.tone, clean::line(&line.text));
                lines.into_iter().map(plain).collect()
            }
        }
    }
}

/// `lockstep compile`.
pub(crate) fn compile(
    arguments: &Compile,
    profile: &ProfileArgs,
    printer: Printer,
) -> Result<Exit, CliError> {
    let submission = plan::compiled(&arguments.plan, profile, printer)?;
    let sealed = submission.sealed;
    write(&arguments.out, sealed.bytes())?;
    printer.talk(&render::plan::summary(&sealed));
    if printer.is_json() {
        printer.json(&json!({
            "format": "lockstep.compiled/1",
            "file": arguments.out,
            "plan": sealed.plan().plan,
            "plan_digest": sealed.digest().to_string(),
            "fleet": sealed.plan().fleet_name,
            "serial": sealed.plan().serial,
        }))?;
    } else {
        printer.text(&format!("{}\n", sealed.digest()))?;
    }
    if sealed.plan().fleet_name.is_empty() {
        printer.say("it names no fleet: hosts that ask for a seal refuse it (--fleet NAME)");
    }
    Ok(Exit::Done)
}

/// `lockstep sign`.
pub(crate) fn sign(arguments: &Sign, printer: Printer) -> Result<Exit, CliError> {
    let Sign { file, key } = arguments;
    let signable = Signable::read(file)?;
    let (namespace, message) = (signable.namespace(), signable.message());
    let path = beside(file);
    let mut text = signatures_text(file)?;
    let known = read_signatures(&path, &text)?;
    let known: Result<Vec<PublicKey>, _> = known
        .iter()
        .map(|signature| sshsig::verify(signature.as_bytes(), namespace, &message))
        .collect();
    let known = known.map_err(|error| {
        CliError::usage(
            format!(
                "a signature in {} is not one of {}: {error}",
                path.display(),
                file.display()
            ),
            format!("move {} away, and sign again", path.display()),
        )
    })?;
    printer.talk(&signable.lines());
    let signature = ssh_sign(key, namespace, &message)?;
    let signer = sshsig::verify(signature.as_bytes(), namespace, &message).map_err(|error| {
        CliError::usage(
            format!(
                "what ssh-keygen made with {} cannot be used: {error}",
                key.display()
            ),
            "use a key made with `ssh-keygen -t ed25519` or `-t ed25519-sk`",
        )
    })?;
    if known.contains(&signer) {
        return Err(CliError::usage(
            format!("{} is signed with this key already", file.display()),
            "another person signs with another key",
        ));
    }
    if known.len() == MAX_SIGNATURES {
        return Err(CliError::usage(
            format!("{} has {MAX_SIGNATURES} signatures already", file.display()),
            "no plan needs more",
        ));
    }
    text.push_str(&signature);
    write(&path, text.as_bytes())?;
    let fingerprint = signer.fingerprint();
    if printer.is_json() {
        printer.json(&json!({
            "format": "lockstep.signed/1",
            "file": path,
            "key": fingerprint,
            "signatures": known.len() + 1,
        }))?;
    } else {
        printer.lines(&[Line::plain(format!(
            "{} has {} by {fingerprint}",
            path.display(),
            render::words::count(known.len() + 1, "signature")
        ))])?;
    }
    Ok(Exit::Done)
}

/// `lockstep verify`.
pub(crate) fn verify(arguments: &Verify, printer: Printer) -> Result<Exit, CliError> {
    let signable = Signable::read(&arguments.file)?;
    let (namespace, message) = (signable.namespace(), signable.message());
    let path = beside(&arguments.file);
    let text = signatures_text(&arguments.file)?;
    let signatures = read_signatures(&path, &text)?;
    let keys = arguments.keys.as_deref().map(read_keys).transpose()?;
    let owner = |key: &PublicKey| {
        let keys = keys.as_deref().unwrap_or_default();
        let named = keys.iter().find(|named| named.key == *key)?;
        Some(named.name.clone())
    };
    let mut good = 0_usize;
    let mut lines = signable.lines();
    let mut list = Vec::new();
    for signature in &signatures {
        let (line, entry) = match sshsig::verify(signature.as_bytes(), namespace, &message) {
            Ok(key) => {
                good += 1;
                let name = owner(&key);
                let said = match (&name, &keys) {
                    (Some(name), _) => name.clone(),
                    (None, Some(_)) => "not one of the keys".to_owned(),
                    (None, None) => String::new(),
                };
                let fingerprint = key.fingerprint();
                let line = format!("signed    {fingerprint} {said}");
                (line, json!({"key": fingerprint, "name": name}))
            }
            Err(error) => {
                let error = error.to_string();
                (format!("not valid {error}"), json!({"error": error}))
            }
        };
        lines.push(Line::plain(line.trim_end().to_owned()));
        list.push(entry);
    }
    let verdict = match keys {
        Some(keys) => {
            let unusable = |error: lockstep_proto::trust::InvalidKeyring| {
                CliError::usage(error.to_string(), "look at --keys and --threshold")
            };
            let keyring = Keyring::new(arguments.threshold, keys).map_err(unusable)?;
            keyring
                .check(namespace, &message, &signatures)
                .map(drop)
                .map_err(|error| error.to_string())
        }
        None if good >= arguments.threshold => Ok(()),
        None => Err(format!("{good} of {} signatures", arguments.threshold)),
    };
    if printer.is_json() {
        printer.json(&json!({
            "format": "lockstep.verified/1",
            "sealed": verdict.is_ok(),
            "why": verdict.as_ref().err(),
            "signatures": list,
        }))?;
    } else {
        printer.lines(&lines)?;
    }
    Ok(match verdict {
        Ok(()) => Exit::Done,
        Err(why) => {
            printer.say(format!("not sealed: {why}"));
            Exit::Failed
        }
    })
}

/// The signatures beside a compiled plan; none if there is no such file.
pub(crate) fn signatures_of(file: &Path) -> Result<Vec<String>, CliError> {
    let text = signatures_text(file)?;
    let signatures = read_signatures(&beside(file), &text)?;
    Ok(signatures.into_iter().map(ToOwned::to_owned).collect())
}

/// An SSH signature by the user's own `ssh-keygen`, as git does it: it finds keys in files, in
/// ssh-agent and on hardware tokens, and asks for what it needs on the terminal.
pub(crate) fn ssh_sign(key: &Path, namespace: &str, message: &[u8]) -> Result<String, CliError> {
    let failed = |what: String| {
        CliError::usage(
            what,
            format!(
                "try it by hand: ssh-keygen -Y sign -n test -f {}",
                key.display()
            ),
        )
    };
    let started = Command::new("ssh-keygen")
        .args(["-q", "-Y", "sign", "-n", namespace, "-f"])
        .arg(key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = started.map_err(|error| failed(format!("cannot start ssh-keygen: {error}")))?;
    let written = child.stdin.take().expect("it is piped").write_all(message);
    let output = child.wait_with_output()?;
    // One that ended early says why itself, and does not read.
    if !output.status.success() || written.is_err() {
        return Err(failed(format!(
            "ssh-keygen did not sign with {}",
            key.display()
        )));
    }
    String::from_utf8(output.stdout).map_err(|_| failed("ssh-keygen wrote no text".to_owned()))
}

/// Where the signatures of a file are: `plan.json.sig` for `plan.json`.
fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sig");
    name.into()
}

fn signatures_text(file: &Path) -> Result<String, CliError> {
    let path = beside(file);
    if !path.exists() {
        return Ok(String::new());
    }
    let bytes = read(&path)?;
    String::from_utf8(bytes).map_err(|_| not_signatures(&path))
}

fn read_signatures<'a>(path: &Path, text: &'a str) -> Result<Vec<&'a str>, CliError> {
    sshsig::split(text).map_err(|_| not_signatures(path))
}

fn not_signatures(path: &Path) -> CliError {
    CliError::usage(
        format!(
            "{} does not hold SSH signatures, and only them",
            path.display()
        ),
        format!("at most {MAX_SIGNATURES}, as `lockstep sign` writes them"),
    )
}

fn read_keys(path: &Path) -> Result<Vec<NamedKey>, CliError> {
    let text = String::from_utf8_lossy(&read(path)?).into_owned();
    let lines = text.lines().zip(1..);
    let lines = lines.filter(|(line, _)| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|(line, number)| {
            line.parse().map_err(|error| {
                CliError::usage(
                    format!("{}:{number}: {error}", path.display()),
                    "write one public key a line, as in the file `.pub` beside a key",
                )
            })
        })
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    fs::read(path).map_err(|source| CliError::File {
        path: path.to_owned(),
        verb: "read",
        source,
    })
}

/// Writes a file as a whole or not at all.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let attempt = || {
        fs::write(&fresh, bytes)?;
        fs::rename(&fresh, path)
    };
    attempt().map_err(|source| CliError::File {
        path: path.to_owned(),
        verb: "written",
        source,
    })
}
