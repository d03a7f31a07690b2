//! `lockstep accept-loss`: a person's word that what an undo would lose may be lost.

use std::path::{Path, PathBuf};

use lockstep_proto::evidence;
use lockstep_proto::ids::{Digest, HostId, LossId, RolloutId, StepKey};
use lockstep_proto::wire::control_v1 as wire;

use super::Session;
use super::control::done;
use super::document::Document;
use super::error::CliError;
use super::exit::Exit;
use super::profile::Profile;

#[derive(Debug, clap::Args)]
pub(crate) struct AcceptLoss {
    /// The rollout
    rollout: RolloutId,
    /// The host
    host: HostId,
    /// The step whose undo refused: PHASE.STEP
    step: String,
    /// What would be lost, by the id that the refusal ends with
    loss: LossId,
    /// Why that may be lost, for the report
    #[arg(long)]
    reason: String,
    /// Sign it with your SSH key, or with its public half if ssh-agent or a hardware token has the
    /// key: for hosts that do not take the controller's word
    #[arg(long, value_name = "KEY")]
    sign: Option<PathBuf>,
}

/// `lockstep accept-loss`.
pub(crate) async fn run(arguments: AcceptLoss, session: &Session) -> Result<Exit, CliError> {
    let AcceptLoss {
        rollout,
        host,
        step,
        loss,
        reason,
        sign,
    } = arguments;
    let said = format!("what the undo of step {step} on {host} would lose ({loss}) is accepted");
    let client = session.connect().await?;
    let mut request = wire::AcceptLossRequest {
        rollout: rollout.to_string(),
        host: host.to_string(),
        step,
        loss: loss.to_string(),
        reason,
        ..wire::AcceptLossRequest::default()
    };
    if let Some(key) = sign {
        let (document, _) = super::fetch(&client, &rollout).await?;
        let by = super::client::operator_name(&Profile::load(&session.profile)?)?;
        let (of, signature) = signed(&document, &request, &loss, &by, &key)?;
        (request.signed_key, request.signature) = (of.to_string(), signature.into());
    }
    client
        .call(|mut api| async move { api.accept_loss(request).await })
        .await?;
    let hint = format!("the undo is tried again with: lockstep resume {rollout}");
    done(session, &rollout, "accept-loss", &said, Some(hint))
}

/// Signs the word for the newest undo that has refused because of this loss.
fn signed(
    document: &Document,
    request: &wire::AcceptLossRequest,
    loss: &LossId,
    by: &str,
    key: &Path,
) -> Result<(StepKey, String), CliError> {
    let nothing = || {
        CliError::usage(
            format!(
                "no undo of step {} on {} would lose {loss}",
                request.step, request.host
            ),
            format!("lockstep status {} says what is lost", request.rollout),
        )
    };
    let undos = document
        .steps()
        .filter(|(_, step)| step.at == request.step)
        .flat_map(|(_, step)| &step.attempts)
        .filter(|attempt| attempt.host == request.host && attempt.direction == "undo");
    let last = undos.max_by_key(|attempt| attempt.attempt);
    let last = last.filter(|undo| LossId::in_message(&undo.message).as_ref() == Some(loss));
    let number = last.ok_or_else(nothing)?.attempt;
    let of = format!(
        "{}.{}.undo.{number}@{}",
        request.rollout, request.step, request.host
    );
    let of: StepKey = of.parse().map_err(|_| nothing())?;
    let plan: Digest = document.digest.parse().map_err(|_| nothing())?;
    let statement = evidence::acceptance(plan, &of, loss, by);
    let signature = super::seal::ssh_sign(key, evidence::LOSS_NAMESPACE, &statement)?;
    Ok((of, signature))
}
