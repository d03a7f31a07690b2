//! `lockstep apply` and `lockstep plan`: submit a plan, and watch what comes of it.

use lockstep_proto::ids::RolloutId;
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::wire::control_v1 as wire;
use serde_json::json;
use tonic::Code;

use super::Session;
use super::client::{Client, ClientError};
use super::document::Step;
use super::error::CliError;
use super::exit::Exit;
use super::plan::{self, PlanArgs, Submission};
use super::printer::Printer;
use super::render;
use super::watch::{self, Followed, Outage, Voice};

#[derive(Debug, clap::Args)]
pub(crate) struct Apply {
    #[command(flatten)]
    plan: PlanArgs,
    /// Submit, and do not wait for the end
    #[arg(long)]
    detach: bool,
    /// Do not ask before submitting
    #[arg(short, long)]
    yes: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DryRun {
    #[command(flatten)]
    plan: PlanArgs,
}

/// `lockstep apply`.
pub(crate) async fn apply(arguments: Apply, session: &Session) -> Result<Exit, CliError> {
    let printer = session.printer;
    let submission = plan::compiled(&arguments.plan, &session.profile, printer)?;
    let sealed = &submission.sealed;
    printer.talk(&render::plan::summary(sealed));
    printer.say("");
    if !arguments.yes && Printer::can_ask() && !printer.ask("start this rollout?")? {
        printer.say("nothing was submitted");
        return Ok(Exit::Cancelled);
    }
    let client = session.connect().await?;
    let rollout = submit(&client, &submission, false).await?;
    if printer.is_json() {
        let document = json!({
            "format": "lockstep.submitted/1",
            "rollout": rollout.as_str(),
            "plan": sealed.plan().plan,
            "plan_digest": sealed.digest().to_string(),
        });
        printer.json_line(&document)?;
    } else {
        printer.say(format!("rollout {rollout}"));
    }
    if arguments.detach {
        if !printer.is_json() {
            printer.text(rollout.as_str())?;
            printer.say(format!("  follow it with: lockstep watch {rollout}"));
        }
        return Ok(Exit::Done);
    }
    watch::watch(&client, &rollout, printer).await
}

/// `lockstep plan`.
pub(crate) async fn dry_run(arguments: DryRun, session: &Session) -> Result<Exit, CliError> {
    let printer = session.printer;
    let submission = plan::compiled(&arguments.plan, &session.profile, printer)?;
    let client = session.connect().await?;
    let rollout = submit(&client, &submission, true).await?;
    if let Followed::Interrupted = watch::follow(&client, &rollout, printer, Voice::Quiet).await? {
        printer.say(format!(
            "interrupted; a dry run changes nothing, and {rollout} ends by itself"
        ));
        return Ok(Exit::Detached);
    }
    let (document, bytes) = watch::fetch_patiently(&client, &rollout).await?;
    if printer.is_json() {
        super::print_document(&bytes, printer)?;
    } else {
        printer.lines(&render::plan::dry_run(&document))?;
    }
    let failed = |step: &Step| render::status::failures(&step.attempts).next().is_some();
    let good = document.state == "succeeded" && !document.steps().any(|(_, step)| failed(step));
    Ok(if good { Exit::Done } else { Exit::Failed })
}

/// Submits a plan. If the controller goes away in the middle, the same plan is submitted again:
/// its serial licenses one rollout, so a second one cannot come of it.
async fn submit(
    client: &Client,
    submission: &Submission,
    dry_run: bool,
) -> Result<RolloutId, CliError> {
    let Submission {
        sealed,
        source,
        signatures,
    } = submission;
    let compiled_plan = bytes::Bytes::copy_from_slice(sealed.bytes());
    let request = wire::SubmitRequest {
        compiled_plan,
        source: source.clone(),
        dry_run,
        signatures: signatures.iter().map(|it| it.clone().into()).collect(),
    };
    let mut outage: Option<Outage> = None;
    loop {
        let again = request.clone();
        let answer = client
            .call(|mut api| async move { api.submit(again).await })
            .await;
        match answer {
            Ok(answer) => return accepted(&answer, sealed),
            Err(error) if error.is_passing() => {
                let outage = outage.get_or_insert_with(Outage::begin);
                if outage.is_too_long() {
                    return Err(error.into());
                }
                tokio::time::sleep(outage.next_wait()).await;
            }
            Err(ClientError::Refused {
                code: Code::AlreadyExists,
                ..
            }) if outage.is_some() => {
                return taken(client, sealed).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The rollout that came of an attempt whose answer was lost.
async fn taken(client: &Client, sealed: &SealedPlan) -> Result<RolloutId, CliError> {
    let request = wire::ListRolloutsRequest {
        limit: 0,
        open: false,
    };
    let answer = client
        .call(|mut api| async move { api.list_rollouts(request).await })
        .await?;
    let digest = sealed.digest().to_string();
    let found = answer
        .rollouts
        .into_iter()
        .find(|rollout| rollout.plan_digest == digest && !rollout.dry_run);
    let rollout = found.and_then(|rollout| rollout.rollout.parse().ok());
    rollout.ok_or_else(|| failed("it has taken the plan, but does not list its rollout"))
}

fn accepted(answer: &wire::SubmitResponse, sealed: &SealedPlan) -> Result<RolloutId, CliError> {
    let rollout: RolloutId = answer
        .rollout
        .parse()
        .map_err(|_| failed("it answered with something that is no rollout"))?;
    let digest = sealed.digest().to_string();
    if answer.plan_digest == digest {
        return Ok(rollout);
    }
    // What runs must be what was submitted (INV-12); a controller that says otherwise is broken.
    Err(failed(&format!(
        "it took {digest} for another plan; look at {rollout} before anything else"
    )))
}

fn failed(message: &str) -> CliError {
    ClientError::Failed {
        message: message.to_owned(),
    }
    .into()
}
