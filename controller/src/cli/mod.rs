//! The command line: what operators say, and what they are told.
//!
//! ```text
//! arguments -> Command -> one file per command -> client (gRPC) -> controller
//!                               `-> render (pure: events and documents to text) -> printer
//! ```
//!
//! Data goes to stdout, talk to stderr. What came over the wire is cleaned where it comes in
//! ([`clean`]), so nothing that a host wrote reaches a terminal as it is. Start with [`run`].

mod apply;
mod audit;
mod clean;
mod client;
mod control;
mod decide;
mod document;
mod error;
mod event;
mod exit;
mod floor;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod glass;
mod journal;
mod live;
mod logs;
mod loss;
mod passphrase;
mod pki;
mod plan;
mod printer;
mod profile;
mod render;
mod report;
mod seal;
mod serve;
mod status;
mod trust;
mod watch;

use clap::{CommandFactory as _, Parser, Subcommand};
use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1 as wire;

use client::Client;
use document::Document;
use error::CliError;
use exit::Exit;
use printer::{Color, Output, Printer};
use profile::{Profile, ProfileArgs};

/// Moves a fleet of hosts through a deployment in step.
#[derive(Debug, Parser)]
#[command(
    name = "lockstep",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
struct Arguments {
    #[command(flatten)]
    profile: ProfileArgs,
    /// What to print on stdout
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        help_heading = "Output"
    )]
    output: Output,
    /// When to use colour
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        help_heading = "Output"
    )]
    color: Color,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a plan, and watch it
    Apply(apply::Apply),
    /// Say what a plan would do on each host, and change nothing
    Plan(apply::DryRun),
    /// Say what is wrong with a plan file; needs no controller
    Validate(plan::Validate),
    /// Compile a plan into a file that people sign and `apply` submits; needs no controller
    Compile(seal::Compile),
    /// Sign a compiled plan, or a floor, with an SSH key
    Sign(seal::Sign),
    /// Say who has signed a compiled plan, or a floor
    Verify(seal::Verify),
    /// Write a floor: from which serials on a host may go on whose journal was put back
    Floor(floor::FloorArgs),
    /// Print the JSON Schema of plan files
    Schema,
    /// List the actions that steps may use
    Actions(plan::Actions),
    /// Show rollouts that go on, or one in detail
    Status(status::Status),
    /// Watch a rollout until it ends
    Watch(RolloutArg),
    /// Approve what a gate shows
    Approve(decide::Approve),
    /// Reject what a gate shows
    Reject(decide::Reject),
    /// Confirm items of a checklist
    Confirm(decide::Confirm),
    /// In an emergency: let a gate be met without what it waits for; takes two people
    BreakGlass(glass::BreakGlass),
    /// Send nothing new; what runs, runs on
    Pause(RolloutArg),
    /// Go on after a pause or a halt
    Resume(control::Resume),
    /// Say what a step did whose outcome is unknown
    Resolve(control::Resolve),
    /// Accept what an undo would lose, exactly as its refusal shows it
    AcceptLoss(loss::AcceptLoss),
    /// End a rollout where it stands
    Cancel(control::Reasoned),
    /// Undo a rollout
    Rollback(control::Reasoned),
    /// Accept a halted rollout as it is, and free its hosts
    Close(control::Close),
    /// Sign the report of an ended rollout
    Signoff(control::SignOff),
    /// List the hosts that the controller knows
    Hosts,
    /// Forget a host that is gone for good, so that no plan waits for it
    Forget(control::Forget),
    /// Make, list and take back the tokens with which hosts join
    #[command(subcommand)]
    Token(trust::Token),
    /// Let a host, an operator or a certificate do nothing any more
    Suspend(trust::Suspend),
    /// Lift a suspension
    Unsuspend(trust::Unsuspend),
    /// List who is suspended
    Suspended(trust::Suspended),
    /// List rollouts, newest first
    History(status::History),
    /// Print the output of a rollout's steps
    Logs(logs::Logs),
    /// Write a rollout's report
    Report(report::Report),
    /// Make issuers and certificates
    #[command(subcommand)]
    Pki(pki::Pki),
    /// Issue operators' certificates
    #[command(subcommand)]
    Operator(pki::Operator),
    /// Run the controller
    Serve(serve::Serve),
    /// Verify, export or import the journal of a controller that does not run
    #[command(subcommand)]
    Journal(journal::Journal),
    /// Hold a controller's journal against what agents were told of it
    #[command(subcommand)]
    Audit(audit::Audit),
    /// Print a completion script for a shell
    Completions {
        /// Which
        shell: clap_complete::Shell,
    },
}

/// One rollout.
#[derive(Debug, clap::Args)]
struct RolloutArg {
    /// Its id, as `lockstep status` lists it
    rollout: RolloutId,
}

/// Runs the command line of this process.
pub(crate) fn main() -> Exit {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are data, mistakes are talk; clap knows which.
            let said = error.print();
            let asked = !error.use_stderr() && said.is_ok();
            return if asked { Exit::Done } else { Exit::Usage };
        }
    };
    let printer = Printer::new(arguments.output, arguments.color);
    run(arguments, printer).unwrap_or_else(|error| {
        if printer.is_json() && !error.lines().is_empty() {
            printer.say(clean::json(&error.to_json().to_string()));
        } else {
            printer.talk(&error.lines());
        }
        error.exit()
    })
}

fn run(arguments: Arguments, printer: Printer) -> Result<Exit, CliError> {
    match arguments.command {
        Command::Validate(validate) => plan::validate(&validate, printer),
        Command::Compile(compile) => seal::compile(&compile, &arguments.profile, printer),
        Command::Sign(sign) => seal::sign(&sign, printer),
        Command::Verify(verify) => seal::verify(&verify, printer),
        Command::Floor(floor) => floor::floor(floor, &arguments.profile, printer),
        Command::Schema => plan::schema(printer),
        Command::Actions(actions) => plan::actions(&actions, printer),
        Command::Pki(command) => pki::run(&command, arguments.profile.passphrase_fd, printer),
        Command::Operator(command) => {
            pki::operator(&command, arguments.profile.passphrase_fd, printer)
        }
        Command::Completions { shell } => completions(shell, printer),
        Command::Journal(command) => journal::run(&command, printer),
        Command::Audit(command) => audit::run(&command, printer),
        Command::Serve(serve) => Ok(serve::serve(serve)),
        command => {
            let session = Session {
                profile: arguments.profile,
                printer,
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let exit = runtime.block_on(Box::pin(run_client(command, &session)));
            // A question that nobody answered must not keep the process.
            runtime.shutdown_background();
            exit
        }
    }
}

async fn run_client(command: Command, session: &Session) -> Result<Exit, CliError> {
    match command {
        Command::Apply(apply) => apply::apply(apply, session).await,
        Command::Plan(dry_run) => apply::dry_run(dry_run, session).await,
        Command::Status(status) => status::status(status, session).await,
        Command::History(history) => status::history(history, session).await,
        Command::Hosts => status::hosts(session).await,
        Command::Forget(forget) => control::forget(forget, session).await,
        Command::Token(command) => trust::token(command, session).await,
        Command::Suspend(suspend) => trust::suspend(suspend, session).await,
        Command::Unsuspend(unsuspend) => trust::unsuspend(unsuspend, session).await,
        Command::Suspended(suspended) => trust::suspended(suspended, session).await,
        Command::Watch(RolloutArg { rollout }) => {
            let client = session.connect().await?;
            watch::watch(&client, &rollout, session.printer).await
        }
        Command::Approve(approve) => decide::approve(approve, session).await,
        Command::Reject(reject) => decide::reject(reject, session).await,
        Command::Confirm(confirm) => decide::confirm(confirm, session).await,
        Command::BreakGlass(arguments) => glass::break_glass(arguments, session).await,
        Command::Pause(RolloutArg { rollout }) => control::pause(rollout, session).await,
        Command::Resume(resume) => control::resume(resume, session).await,
        Command::Cancel(cancel) => control::cancel(cancel, session).await,
        Command::Rollback(rollback) => control::roll_back(rollback, session).await,
        Command::Resolve(resolve) => control::resolve(resolve, session).await,
        Command::AcceptLoss(accept) => loss::run(accept, session).await,
        Command::Close(close) => control::close(close, session).await,
        Command::Signoff(signoff) => control::sign_off(signoff, session).await,
        Command::Logs(logs) => logs::logs(logs, session).await,
        Command::Report(report) => report::report(report, session).await,
        Command::Validate(_)
        | Command::Compile(_)
        | Command::Sign(_)
        | Command::Verify(_)
        | Command::Floor(_)
        | Command::Schema
        | Command::Actions(_)
        | Command::Pki(_)
        | Command::Operator(_)
        | Command::Completions { .. }
        | Command::Journal(_)
        | Command::Audit(_)
        | Command::Serve(_) => unreachable!("these need no controller, and were run before"),
    }
}

/// What a command that talks to a controller needs.
struct Session {
    profile: ProfileArgs,
    printer: Printer,
}

impl Session {
    async fn connect(&self) -> Result<Client, CliError> {
        let profile = Profile::load(&self.profile)?;
        Ok(Client::connect(&profile).await?)
    }
}

/// One rollout as it stands, and its document's bytes as they came.
async fn fetch(client: &Client, rollout: &RolloutId) -> Result<(Document, bytes::Bytes), CliError> {
    let request = wire::GetRolloutRequest {
        rollout: rollout.to_string(),
    };
    let answer = client
        .call(|mut api| async move { api.get_rollout(request).await })
        .await?;
    let document = Document::read_of(&answer.document_json, rollout)?;
    Ok((document, answer.document_json))
}

/// The same for programs: as it came, for JSON text hides what terminals obey.
fn print_document(bytes: &[u8], printer: Printer) -> Result<(), CliError> {
    let value: serde_json::Value =
        serde_json::from_slice(bytes).map_err(document::InvalidDocument::Unreadable)?;
    Ok(printer.json(&value)?)
}

fn completions(shell: clap_complete::Shell, printer: Printer) -> Result<Exit, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "lockstep", &mut script);
    printer.text(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_is_not_an_id_is_refused_before_anybody_is_dialled() {
        for bad in ["x", "ro_12", "ro_01020304050G", "--yes"] {
            assert!(
                Arguments::try_parse_from(["lockstep", "watch", bad]).is_err(),
                "{bad}"
            );
        }
    }
}
