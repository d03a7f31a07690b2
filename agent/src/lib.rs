//! Lockstep's agent: one small binary on every host.
//!
//! ```text
//! controller <--- TLS 1.3, agent dials ---> link
//!                                            |  Inbound / Outbound: domain types only; within
//!                                            |  one process, or over a Unix socket (`bridge`)
//!                                           exec      consent, policy, journal, order of steps
//!                                            |  job file, claim, outcome file
//!                                       step process  one action, in a session or unit of its own
//!                                            |
//!                                           host
//! ```
//!
//! The link carries, exec decides and remembers, step processes act. Exec may be killed at any
//! instant: what is running goes on without it, and is found again.
//!
//! Promises kept here: INV-1 once (`step::claim`, `exec::attend`), INV-2 durable (`journal`), INV-4
//! fenced and the order of steps (`exec::machine`), INV-9 consent (`exec::policy`,
//! `exec::consent`), INV-10 secrets (resolved in step processes only). Start reading in
//! `exec::machine`.

mod actions;
mod audit;
mod bridge;
mod check;
mod config;
mod cores;
mod daemon;
mod enroll;
mod errors;
mod exec;
mod faults;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod identity;
mod journal;
mod link;
mod notify;
mod process;
mod secrets;
#[cfg(feature = "faults")]
pub mod simulation;
mod sql;
mod step;
#[cfg(test)]
mod testing;
mod tls;
mod watchdog;
mod web;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lockstep_proto::ids::StepKey;
use lockstep_proto::oneline::OneLine;
use lockstep_proto::shown;
use lockstep_proto::values::Timestamp;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::audit::Audit;
use crate::config::Config;
use crate::daemon::Half;
use crate::exec::{AnchorError, Anchored};
use crate::identity::{IdentityError, StateLock};
use crate::step::StepExit;

/// What the exit codes mean; also in the help text.
mod exit {
    /// Done; for `run`: ended because it was asked to.
    pub(crate) const DONE: u8 = 0;
    /// `check` has found something that keeps the agent from working, or that is not safe; `policy
    /// check` something that is not allowed.
    pub(crate) const PROBLEMS: u8 = 1;
    /// The command line or a file of the host's own cannot be used.
    pub(crate) const USAGE: u8 = 2;
    /// Another agent runs with the same state directory.
    pub(crate) const IN_USE: u8 = 3;
    /// The operating system failed, the journal first of all. Start it again.
    pub(crate) const INTERNAL: u8 = 4;
    /// `step`: the attempt was claimed before, and nothing was done.
    pub(crate) const CLAIMED: u8 = 10;
    /// `join`: the controller cannot be reached, or refuses.
    pub(crate) const REFUSED: u8 = 5;
    /// `journal verify`: a person must look at the state directory.
    pub(crate) const BROKEN: u8 = 10;
}

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  check, policy check: something is wrong, or not allowed
  2  the command line, the configuration or the policy cannot be used
  3  another agent runs with the same state directory
  4  the operating system failed; start it again
  5  join: the controller cannot be reached, or refuses
 10  journal verify, audit: the journal is broken; step: the attempt was claimed before, and nothing
     was done";

/// Lockstep's agent: does on this host what a plan says and the host's own policy allows.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connect to the controller and take its orders, until stopped.
    Run(File),
    /// Decide, remember and start steps, and leave the network to `link`: for root.
    Exec(File),
    /// Connect to the controller, and leave everything else to `exec`: for a user without rights.
    Link(File),
    /// Become a host: get this machine's certificate, with a token that an admin has made.
    Join(enroll::join::Join),
    /// Read configuration, policy and certificates, and say what is allowed and what is wrong.
    Check(File),
    /// Look at the journal while no agent runs.
    #[command(subcommand)]
    Journal(JournalCommand),
    /// Ask this host's policy, without a controller.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Let a host go on whose journal was put back to an earlier time, with a floor that people
    /// have signed. Needs the agent stopped.
    Anchor {
        #[command(flatten)]
        file: File,
        /// The statement, as `lockstep floor` writes it
        #[arg(long, value_name = "FILE")]
        floor: PathBuf,
        /// Its signatures, as `lockstep sign` writes them
        #[arg(long, value_name = "FILE")]
        sig: PathBuf,
    },
    /// Print the public half of this host's own key, for `[[evidence]]` in other hosts' policies.
    /// Makes the key if there is none.
    EvidenceKey(File),
    /// Hold the journal against what the controller was told of it.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Do one attempt. Started by `run`.
    #[command(hide = true)]
    Step {
        #[command(flatten)]
        file: File,
        key: StepKey,
    },
    /// Answer one question about the host. Started by `exec`.
    #[command(hide = true)]
    Look {
        #[command(flatten)]
        file: File,
        dir: PathBuf,
    },
    /// Become a service. Started by a step.
    #[command(hide = true)]
    Supervise,
}

#[derive(Debug, Subcommand)]
enum JournalCommand {
    /// Say whether the journal is whole, and which record is the first that is not. Changes
    /// nothing.
    Verify(File),
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Say for each step of a compiled plan that is meant for this host what the policy says of it,
    /// and what to add to the policy. Exits with 0 only if all of it is allowed.
    Check {
        #[command(flatten)]
        file: File,
        /// The compiled plan.
        #[arg(value_name = "PLAN")]
        plan: PathBuf,
        /// When the rollout is to run, such as 2026-11-24T14:00Z. Default: now.
        #[arg(long, value_name = "TIME", value_parser = exec::parse_utc)]
        rollout_time: Option<Timestamp>,
    },
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Say whether the journal is what was written, and what its controller was told of it.
    ///
    /// Whoever can change a journal can also chain it anew, so that it is whole by itself. The
    /// controller keeps heads of it in its own journal: `lockstep audit heads` prints them.
    Verify {
        #[command(flatten)]
        file: File,
        /// Heads that a controller has written down, one in JSON on each line; may be repeated.
        #[arg(long, value_name = "HEADS")]
        witness: Vec<PathBuf>,
    },
    /// Print the heads of the controller's journal that this one has, for `lockstep audit verify`.
    Heads(File),
    /// Print every record as JSON lines, with its number and hash.
    Export(File),
}

#[derive(Debug, clap::Args)]
struct File {
    /// The host's configuration.
    #[arg(long, value_name = "FILE", default_value = "/etc/lockstep/agent.toml")]
    config: PathBuf,
}

/// The whole program.
pub fn main() -> ExitCode {
    // Before anything uses TLS: with no default, rustls would have to guess.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let command = Arguments::parse().command;
    // A service that a step starts is on its own from here on.
    if !matches!(command, Command::Supervise)
        && let Err(error) = cores::off()
    {
        say(&format!("core dumps cannot be turned off: {error}"));
        return exit::INTERNAL.into();
    }
    let code = match command {
        Command::Run(file) => daemon(&file, Half::Both),
        Command::Exec(file) => daemon(&file, Half::Exec),
        Command::Link(file) => daemon(&file, Half::Link),
        Command::Join(join) => enroll::join::run(&join),
        Command::Check(file) => check::check(&file.config),
        Command::Journal(JournalCommand::Verify(file)) => with_config(&file, verify),
        Command::Policy(PolicyCommand::Check {
            file,
            plan,
            rollout_time,
        }) => with_config(&file, |config| check::policy(&config, &plan, rollout_time)),
        Command::Anchor { file, floor, sig } => {
            with_config(&file, |config| anchor(&config, &floor, &sig))
        }
        Command::EvidenceKey(file) => with_config(&file, |config| evidence_key(&config)),
        Command::Audit(AuditCommand::Verify { file, witness }) => with_config(&file, |config| {
            audit::run(&config, &Audit::Verify(&witness))
        }),
        Command::Audit(AuditCommand::Heads(file)) => {
            with_config(&file, |config| audit::run(&config, &Audit::Heads))
        }
        Command::Audit(AuditCommand::Export(file)) => {
            with_config(&file, |config| audit::run(&config, &Audit::Export))
        }
        Command::Step { file, key } => with_config(&file, |config| step(config, &key)),
        Command::Look { file, dir } => with_config(&file, |config| look(config, &dir)),
        Command::Supervise => {
            let Err(why) = actions::service::supervise();
            say(&why);
            exit::INTERNAL
        }
    };
    code.into()
}

fn daemon(file: &File, half: Half) -> u8 {
    with_config(file, |config| daemon::run(config, &file.config, half))
}

fn with_config(file: &File, then: impl FnOnce(Config) -> u8) -> u8 {
    log();
    match Config::load(&file.config) {
        Ok(config) => then(config),
        Err(error) => {
            say(&errors::chain(&error));
            exit::USAGE
        }
    }
}

fn anchor(config: &Config, floor: &Path, sig: &Path) -> u8 {
    let unreadable = |path: &Path, error| {
        say(&format!("cannot read {}: {error}", path.display()));
        exit::USAGE
    };
    let statement = match std::fs::read(floor) {
        Ok(statement) => statement,
        Err(error) => return unreadable(floor, error),
    };
    let signatures = match std::fs::read_to_string(sig) {
        Ok(signatures) => signatures,
        Err(error) => return unreadable(sig, error),
    };
    match exec::anchor(config, &statement, &signatures) {
        Ok(Anchored { signers, instance }) => {
            let signers: Vec<String> = signers.into_iter().collect();
            let signers = signers.join(", ");
            say(&format!(
                "anchored as {instance}, signed by {signers}; start the agent"
            ));
            exit::DONE
        }
        Err(error) => {
            say(&errors::chain(&error));
            match error {
                AnchorError::Identity(IdentityError::InUse(_)) => exit::IN_USE,
                AnchorError::Identity(_) | AnchorError::Journal(_) | AnchorError::Append(_) => {
                    exit::INTERNAL
                }
                _ => exit::USAGE,
            }
        }
    }
}

fn evidence_key(config: &Config) -> u8 {
    let key = identity::private_dir(&config.state_dir)
        .map_err(std::io::Error::other)
        .and_then(|()| exec::own_key(&config.state_dir));
    match key {
        Ok(key) => {
            let line = format!("{} {}\n", key.public(), config.host);
            let _ = std::io::stdout().write_all(line.as_bytes());
            exit::DONE
        }
        Err(error) => {
            say(&errors::chain(&error));
            exit::INTERNAL
        }
    }
}

fn step(config: Config, key: &StepKey) -> u8 {
    let result = runtime().and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, step::run(config, key))
    });
    match result {
        Ok(StepExit::Done) => exit::DONE,
        Ok(StepExit::ClaimedBefore) => {
            say(&format!("{key} was claimed before; nothing was done"));
            exit::CLAIMED
        }
        Err(error) => {
            say(&format!("{key}: {}", errors::chain(&error)));
            exit::INTERNAL
        }
    }
}

fn look(config: Config, dir: &Path) -> u8 {
    let result = runtime().and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, exec::look(config, dir))
    });
    match result {
        Ok(()) => exit::DONE,
        Err(error) => {
            say(&errors::chain(&error));
            exit::INTERNAL
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as the other commands")]
fn verify(config: Config) -> u8 {
    let state = &config.state_dir;
    // Taking the lock would make a directory and a file where there never was an agent.
    if !state.join("journal").exists() && !state.join("head").exists() {
        say(&format!("there is no journal in {}", state.display()));
        return exit::USAGE;
    }
    let _lock = match StateLock::take(state) {
        Ok(lock) => lock,
        Err(error) => {
            say(&errors::chain(&error));
            return match error {
                IdentityError::InUse(_) => exit::IN_USE,
                IdentityError::Io { .. } => exit::INTERNAL,
            };
        }
    };
    match journal::verify(state) {
        Ok(verified) => {
            // Whoever closes the pipe has read enough.
            let _ = std::io::stdout().write_all(verified.text().as_bytes());
            let Some(broken) = verified.broken else {
                return exit::DONE;
            };
            say(&format!("the journal is broken: {}", broken.why));
            say(
                "hint: nothing was changed; keep a copy of the state directory, then see \
                 docs/recovery.md",
            );
            exit::BROKEN
        }
        Err(error) => {
            say(&errors::chain(&error));
            exit::INTERNAL
        }
    }
}

/// One thread: an agent waits nearly all the time.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// Events go to standard error: journald takes them from there, with its own clock.
fn log() {
    let asked = std::env::var("LOCKSTEP_LOG").ok();
    let filter = asked.and_then(|asked| asked.parse::<Targets>().ok());
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| OneLine::new(std::io::stderr(), false))
        .with_ansi(false);
    let log = tracing_subscriber::registry().with(filter);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.with(lines.without_time()).init();
    } else {
        log.with(lines).init();
    }
}

/// One line for people. Nobody may be reading.
fn say(line: &str) {
    // Others wrote parts of it.
    let line = shown::lines(line);
    let _ = writeln!(std::io::stderr(), "lockstep-agent: {line}");
}
