//! The operators' service: `lockstep.control.v1`.

pub(crate) mod access;
pub(crate) mod convert;
mod follow;
mod glass;
mod outbox;
pub(crate) mod shared;
mod trust;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use lockstep_core::{Answer, Call, Coordinator, MAX_TEXT, TrustCall};
use lockstep_proto::ids::{Digest, HostId, InvalidId, OperatorName, PlanDigest, RolloutId};
use lockstep_proto::seal;
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::control_v1::control_service_server::ControlService;
use lockstep_proto::wire::{control_v1 as wire, signatures as signatures_of};
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Code, Request, Response, Status};

use crate::blobs::Blobs;
use crate::driver::{Handle, wall_clock};
use crate::hub::Hub;
use crate::identity::Peer;
use crate::logs::Logs;
use crate::rates::{Rate, Used};

/// Items of one decision: no checklist is longer.
const MAX_ITEMS: usize = 1000;

/// The plan file's text, in bytes.
const MAX_SOURCE: usize = 2 << 20;

/// Rollouts in one list.
const MAX_LIST: usize = 1000;

/// Submissions of one operator: with each, a plan is written to the disk and synced.
const SUBMISSIONS: Rate = Rate {
    burst: 300,
    per_second: 2,
};

/// Messages of one stream that wait for a slow operator; the rest waits where it is read from.
const STREAM_QUEUE: usize = 64;

/// The operators' service.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    /// The driver.
    pub(crate) driver: Handle,
    /// Compiled plans.
    pub(crate) blobs: Arc<Blobs>,
    /// Output of steps.
    pub(crate) logs: Logs,
    /// Live events.
    pub(crate) hub: Hub,
    /// Streams that are open.
    pub(crate) tasks: TaskTracker,
    /// Ends every stream.
    pub(crate) draining: CancellationToken,
    /// When the controller started.
    pub(crate) started: SystemTime,
    /// The agents' revocation list; none if the controller signs none.
    pub(crate) list: Option<PathBuf>,
    /// Held while a plan is submitted.
    pub(crate) submissions: Submissions,
}

/// What operators have submitted. Held from when a plan is stored until it is known whether a record
/// names it: one that was refused goes again, and may not be another one's meanwhile.
#[derive(Debug, Clone)]
pub(crate) struct Submissions(Arc<Mutex<Used<OperatorName>>>);

impl Default for Submissions {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Used::new(SUBMISSIONS))))
    }
}

type Stream<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl ControlService for Control {
    // What is sent stands beside the answer: everybody who watches gets the same bytes.
    type WatchStream = shared::Nothing<wire::RolloutEvent>;
    type LogsStream = Stream<wire::LogLine>;

    async fn submit(
        &self,
        request: Request<wire::SubmitRequest>,
    ) -> Result<Response<wire::SubmitResponse>, Status> {
        let peer = peer(&request)?;
        let wire::SubmitRequest {
            compiled_plan,
            source,
            dry_run,
            signatures,
        } = request.into_inner();
        let signatures = signatures_of(signatures);
        let signatures = signatures.map_err(|error| Status::invalid_argument(error.to_string()))?;
        if source.len() > MAX_SOURCE {
            let why = format!("the plan file has more than {MAX_SOURCE} bytes");
            return Err(Status::invalid_argument(why));
        }
        let plan = seal::open(&compiled_plan).map_err(|error| {
            let cause = std::error::Error::source(&error);
            let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
            Status::invalid_argument(format!("{error}{cause}"))
        })?;
        let plan = Arc::new(plan);
        let (name, _) = peer.operator()?;
        let mut submissions = self.submissions.0.lock().await;
        if !submissions.take(wall_clock(), name.clone(), 1) {
            tracing::warn!(operator = name, "plans are submitted too often");
            let why = format!("{name} submits too many plans; wait a minute");
            return Err(Status::resource_exhausted(why));
        }
        let (blobs, stored) = (Arc::clone(&self.blobs), Arc::clone(&plan));
        // The plan is on the disk before any record names it.
        let stored = tokio::task::spawn_blocking(move || blobs.store_plan(&stored, &source)).await;
        let stored = stored.map_err(|_| Status::internal("storing the plan has failed"))?;
        let is_new = stored.map_err(|error| {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a plan cannot be stored"
            );
            let cause = std::error::Error::source(&error);
            let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
            Status::unavailable(format!(
                "the plan cannot be stored on the controller's disk: {error}{cause}"
            ))
        })?;
        let rollout = self.unused_id().await?;
        let digest = plan.digest();
        let call = Call::Submit {
            rollout: rollout.clone(),
            plan,
            dry_run,
            signatures,
        };
        if let Err(refused) = self.call(&peer, call).await {
            // A controller that stops has not refused it: then a record may name it.
            if is_new && refused.code() != Code::Unavailable {
                self.remove(digest).await;
            }
            return Err(refused);
        }
        drop(submissions);
        Ok(Response::new(wire::SubmitResponse {
            rollout: rollout.into(),
            plan_digest: digest.to_string(),
        }))
    }

    async fn watch(
        &self,
        request: Request<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let peer = peer(&request)?;
        let wire::WatchRequest { rollout, after } = request.into_inner();
        let rollout = rollout_id(&rollout)?;
        self.summary(&rollout).await?;
        let (sender, encoded) = mpsc::channel(watch::QUEUE);
        let watch = watch::watch(self.clone(), rollout, after, sender.clone());
        self.spawn_stream(&peer, sender, watch);
        Ok(shared::answer(encoded))
    }

    async fn get_rollout(
        &self,
        request: Request<wire::GetRolloutRequest>,
    ) -> Result<Response<wire::Rollout>, Status> {
        let rollout = rollout_id(&request.get_ref().rollout)?;
        let asked = rollout.clone();
        let read = move |coordinator: &Coordinator| {
            let mut document = coordinator.document(&asked)?;
            // Sessions are not part of a rollout; who looks at one wants to know whom it lacks.
            document["absent"] = coordinator
                .absent(&asked)
                .into_iter()
                .map(HostId::as_str)
                .collect();
            let left = coordinator.left(&asked);
            document["left"] = serde_json::to_value(left).expect("plain fields");
            Some((coordinator.summary(&asked)?, document))
        };
        let found = self.driver.read(read).await?;
        let Some((summary, mut document)) = found else {
            return Err(self.not_found(&rollout).await?);
        };
        let blobs = Arc::clone(&self.blobs);
        let digest = summary.digest;
        let source = tokio::task::spawn_blocking(move || blobs.source(digest)).await;
        if let (Ok(Ok(source)), Some(fields)) = (source, document.as_object_mut())
            && !source.is_empty()
        {
            // Kept beside the plan, so the coordinator does not have it.
            fields.insert("source".to_owned(), source.into());
        }
        let json = serde_json::to_vec(&document).expect("a JSON value has a text");
        let mut rollout = convert::rollout(summary);
        rollout.document_json = json.into();
        Ok(Response::new(rollout))
    }

    async fn list_rollouts(
        &self,
        request: Request<wire::ListRolloutsRequest>,
    ) -> Result<Response<wire::ListRolloutsResponse>, Status> {
        let limit = match request.get_ref().limit {
            0 => 50,
            limit => (limit as usize).min(MAX_LIST),
        };
        let only_open = request.get_ref().open;
        let read = move |coordinator: &Coordinator| {
            let ids: Vec<&RolloutId> = coordinator.rollouts().collect();
            let newest = ids.into_iter().rev();
            newest
                .filter_map(|id| coordinator.summary(id))
                .filter(|summary| summary.open || !only_open)
                .take(limit)
                .collect::<Vec<_>>()
        };
        let summaries = self.driver.read(read).await?;
        let rollouts = summaries.into_iter().map(convert::rollout).collect();
        Ok(Response::new(wire::ListRolloutsResponse { rollouts }))
    }

    async fn decide(
        &self,
        request: Request<wire::DecideRequest>,
    ) -> Result<Response<wire::DecideResponse>, Status> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let gate = request.place();
        let gate = gate.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let wire::DecideRequest {
            rollout,
            gate: _,
            evidence,
            approve,
            items,
            comment,
            signature,
            expires_ms,
        } = request;
        let signature = convert::one_signature(signature)?;
        let signed = signature.map(|signature| (Timestamp(expires_ms), signature));
        let evidence: Digest = evidence
            .parse()
            .map_err(|error| Status::invalid_argument(format!("evidence: {error}")))?;
        if items.len() > MAX_ITEMS {
            let why = format!("a decision has at most {MAX_ITEMS} items");
            return Err(Status::invalid_argument(why));
        }
        let call = Call::Decide {
            rollout: rollout_id(&rollout)?,
            gate,
            evidence,
            approve,
            items,
            comment: text("comment", comment)?,
            signed,
        };
        let missing = match self.call(&peer, call).await? {
            Answer::Missing(missing) => missing,
            _ => String::new(),
        };
        Ok(Response::new(wire::DecideResponse { missing }))
    }

    async fn break_glass(
        &self,
        request: Request<wire::BreakGlassRequest>,
    ) -> Result<Response<wire::BreakGlassResponse>, Status> {
        let peer = peer(&request)?;
        let call = glass::call(request.into_inner())?;
        let missing = match self.call(&peer, call).await? {
            Answer::Missing(missing) => missing,
            _ => String::new(),
        };
        Ok(Response::new(wire::BreakGlassResponse { missing }))
    }

    async fn pause(
        &self,
        request: Request<wire::PauseRequest>,
    ) -> Result<Response<wire::PauseResponse>, Status> {
        let peer = peer(&request)?;
        let rollout = rollout_id(&request.get_ref().rollout)?;
        self.call(&peer, Call::Pause { rollout }).await?;
        Ok(Response::new(wire::PauseResponse {}))
    }

    async fn resume(
        &self,
        request: Request<wire::ResumeRequest>,
    ) -> Result<Response<wire::ResumeResponse>, Status> {
        let peer = peer(&request)?;
        let rollout = rollout_id(&request.get_ref().rollout)?;
        let call = if request.get_ref().failed {
            Call::ResumeFailed { rollout }
        } else {
            Call::Resume { rollout }
        };
        let hosts = match self.call(&peer, call).await? {
            Answer::Again(hosts) => hosts,
            _ => vec![],
        };
        Ok(Response::new(wire::ResumeResponse { hosts }))
    }

    async fn resolve(
        &self,
        request: Request<wire::ResolveRequest>,
    ) -> Result<Response<wire::ResolveResponse>, Status> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let invalid = |error: String| Status::invalid_argument(error);
        let at = request
            .place()
            .map_err(|error| invalid(error.to_string()))?;
        let signed = convert::signed_word(request.signature, &request.signed_key)?;
        let host = request.host.parse();
        let call = Call::Resolve {
            rollout: rollout_id(&request.rollout)?,
            host: host.map_err(|error| invalid(format!("`host`: {error}")))?,
            at,
            done: request.done,
            reason: text("reason", request.reason)?,
            signed,
        };
        self.call(&peer, call).await?;
        Ok(Response::new(wire::ResolveResponse {}))
    }

    async fn accept_loss(
        &self,
        request: Request<wire::AcceptLossRequest>,
    ) -> Result<Response<wire::AcceptLossResponse>, Status> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let invalid = |error: String| Status::invalid_argument(error);
        let at = request
            .place()
            .map_err(|error| invalid(error.to_string()))?;
        let host = request.host.parse();
        let loss = request.loss.parse();
        let call = Call::AcceptLoss {
            rollout: rollout_id(&request.rollout)?,
            host: host.map_err(|error| invalid(format!("`host`: {error}")))?,
            at,
            loss: loss.map_err(|error| invalid(format!("`loss`: {error}")))?,
            reason: text("reason", request.reason)?,
            signed: convert::signed_word(request.signature, &request.signed_key)?,
        };
        self.call(&peer, call).await?;
        Ok(Response::new(wire::AcceptLossResponse {}))
    }

    async fn cancel(
        &self,
        request: Request<wire::CancelRequest>,
    ) -> Result<Response<wire::CancelResponse>, Status> {
        let peer = peer(&request)?;
        let wire::CancelRequest { rollout, reason } = request.into_inner();
        let call = Call::Cancel {
            rollout: rollout_id(&rollout)?,
            reason: text("reason", reason)?,
        };
        self.call(&peer, call).await?;
        Ok(Response::new(wire::CancelResponse {}))
    }

    async fn roll_back(
        &self,
        request: Request<wire::RollBackRequest>,
    ) -> Result<Response<wire::RollBackResponse>, Status> {
        let peer = peer(&request)?;
        let wire::RollBackRequest { rollout, reason } = request.into_inner();
        let call = Call::RollBack {
            rollout: rollout_id(&rollout)?,
            reason: text("reason", reason)?,
        };
        self.call(&peer, call).await?;
        Ok(Response::new(wire::RollBackResponse {}))
    }

    async fn close(
        &self,
        request: Request<wire::CloseRequest>,
    ) -> Result<Response<wire::CloseResponse>, Status> {
        let peer = peer(&request)?;
        let wire::CloseRequest { rollout, reason } = request.into_inner();
        let call = Call::Close {
            rollout: rollout_id(&rollout)?,
            reason: text("reason", reason)?,
        };
        self.call(&peer, call).await?;
        Ok(Response::new(wire::CloseResponse {}))
    }

    async fn sign_off(
        &self,
        request: Request<wire::SignOffRequest>,
    ) -> Result<Response<wire::SignOffResponse>, Status> {
        let peer = peer(&request)?;
        let wire::SignOffRequest {
            rollout,
            role,
            comment,
        } = request.into_inner();
        let call = Call::SignOff {
            rollout: rollout_id(&rollout)?,
            role: text("role", role)?,
            comment: text("comment", comment)?,
        };
        self.call(&peer, call).await?;
        Ok(Response::new(wire::SignOffResponse {}))
    }

    async fn forget_host(
        &self,
        request: Request<wire::ForgetHostRequest>,
    ) -> Result<Response<wire::ForgetHostResponse>, Status> {
        let peer = peer(&request)?;
        let wire::ForgetHostRequest { host } = request.into_inner();
        let host = host
            .parse()
            .map_err(|error: InvalidId| Status::invalid_argument(error.to_string()))?;
        self.call(&peer, Call::Forget { host }).await?;
        Ok(Response::new(wire::ForgetHostResponse {}))
    }

    async fn list_hosts(
        &self,
        _: Request<wire::ListHostsRequest>,
    ) -> Result<Response<wire::ListHostsResponse>, Status> {
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let started = u64::try_from(started.as_millis()).unwrap_or(u64::MAX);
        let read = move |coordinator: &Coordinator| {
            let hosts = coordinator.hosts().map(|(host, info)| {
                let awaited = !info.connected && info.last_seen.0 < started;
                wire::Host {
                    host: host.to_string(),
                    connected: info.connected,
                    last_seen_ms: info.last_seen.0,
                    labels: info.labels.clone().into_iter().collect(),
                    agent_version: info.agent_version.clone(),
                    locked_by: coordinator
                        .locked_by(host)
                        .map(ToString::to_string)
                        .unwrap_or_default(),
                    awaited_since_ms: if awaited { started } else { 0 },
                }
            });
            hosts.collect::<Vec<_>>()
        };
        let mut hosts = self.driver.read(read).await?;
        hosts.sort_by(|one, other| one.host.cmp(&other.host));
        Ok(Response::new(wire::ListHostsResponse { hosts }))
    }

    async fn create_token(
        &self,
        request: Request<wire::CreateTokenRequest>,
    ) -> Result<Response<wire::CreateTokenResponse>, Status> {
        self.make_token(request).await
    }

    async fn list_tokens(
        &self,
        _: Request<wire::ListTokensRequest>,
    ) -> Result<Response<wire::ListTokensResponse>, Status> {
        self.tokens().await
    }

    async fn revoke_token(
        &self,
        request: Request<wire::RevokeTokenRequest>,
    ) -> Result<Response<wire::RevokeTokenResponse>, Status> {
        let peer = peer(&request)?;
        let token = text("token", request.into_inner().token)?;
        let call = Call::Trust(TrustCall::RevokeToken { token });
        self.call(&peer, call).await?;
        Ok(Response::new(wire::RevokeTokenResponse {}))
    }

    async fn suspend(
        &self,
        request: Request<wire::SuspendRequest>,
    ) -> Result<Response<wire::SuspendResponse>, Status> {
        let peer = peer(&request)?;
        let wire::SuspendRequest { subject, reason } = request.into_inner();
        let call = Call::Trust(TrustCall::Suspend {
            subject: trust::subject(&subject)?,
            reason: text("reason", reason)?,
        });
        self.call(&peer, call).await?;
        Ok(Response::new(wire::SuspendResponse {}))
    }

    async fn unsuspend(
        &self,
        request: Request<wire::UnsuspendRequest>,
    ) -> Result<Response<wire::UnsuspendResponse>, Status> {
        let peer = peer(&request)?;
        let subject = trust::subject(&request.get_ref().subject)?;
        let call = Call::Trust(TrustCall::Unsuspend { subject });
        self.call(&peer, call).await?;
        Ok(Response::new(wire::UnsuspendResponse {}))
    }

    async fn list_suspended(
        &self,
        _: Request<wire::ListSuspendedRequest>,
    ) -> Result<Response<wire::ListSuspendedResponse>, Status> {
        self.suspended().await
    }

    async fn logs(
        &self,
        request: Request<wire::LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let peer = peer(&request)?;
        let wanted = follow::Wanted::read(request.into_inner())?;
        self.summary(&wanted.rollout).await?;
        let (sender, receiver) = mpsc::channel(STREAM_QUEUE);
        let follow = follow::follow(self.clone(), wanted, sender.clone());
        self.spawn_stream(&peer, sender, follow);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl Control {
    /// Removes a plan that was refused.
    async fn remove(&self, digest: PlanDigest) {
        let blobs = Arc::clone(&self.blobs);
        let removed = tokio::task::spawn_blocking(move || blobs.remove_plan(digest)).await;
        if let Ok(Err(error)) = removed {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a refused plan stays on the disk");
        }
    }

    async fn call(&self, peer: &Peer, call: Call) -> Result<Answer, Status> {
        let (name, groups) = peer.operator()?;
        let answer = self
            .driver
            .call(name.clone(), groups.to_vec(), call)
            .await?;
        answer.map_err(|refused| {
            // As a text it is quoted: people's words are in it.
            let why = refused.to_string();
            tracing::info!(operator = name, why, "a call was refused");
            convert::refused(&refused)
        })
    }

    async fn summary(&self, rollout: &RolloutId) -> Result<lockstep_core::Summary, Status> {
        let asked = rollout.clone();
        let read = move |coordinator: &Coordinator| coordinator.summary(&asked);
        match self.driver.read(read).await? {
            Some(summary) => Ok(summary),
            None => Err(self.not_found(rollout).await?),
        }
    }

    /// What is said of a rollout that is not here: it may be in an archive.
    async fn not_found(&self, rollout: &RolloutId) -> Result<Status, Status> {
        let asked = rollout.clone();
        let read = move |coordinator: &Coordinator| coordinator.archived(&asked).cloned();
        let archived = self.driver.read(read).await?;
        let why = archived.map_or_else(
            || format!("there is no rollout {rollout}"),
            |archived| archived.to_string(),
        );
        Ok(Status::not_found(why))
    }

    /// A random id that no rollout has.
    async fn unused_id(&self) -> Result<RolloutId, Status> {
        loop {
            let id = RolloutId::from_random(rand::random());
            let asked = id.clone();
            let read = move |coordinator: &Coordinator| {
                coordinator.summary(&asked).is_some() || coordinator.archived(&asked).is_some()
            };
            if !self.driver.read(read).await? {
                return Ok(id);
            }
        }
    }

    /// Runs a stream until it ends by itself, the operator's certificate ends, or the controller
    /// drains.
    fn spawn_stream<T: Send + 'static>(
        &self,
        peer: &Peer,
        sender: mpsc::Sender<Result<T, Status>>,
        stream: impl Future<Output = Result<(), Status>> + Send + 'static,
    ) {
        let draining = self.draining.clone();
        let (valid_for, peer) = (peer.remaining(), peer.clone());
        self.tasks.spawn(async move {
            let end = tokio::select! {
                end = stream => end,
                () = peer.when_cut().cancelled() => Err(peer.cut_status()),
                () = draining.cancelled() => Err(crate::driver::Stopping.into()),
                () = tokio::time::sleep(valid_for) => {
                    Err(Status::unauthenticated("the operator's certificate has ended"))
                }
                () = sender.closed() => Ok(()),
            };
            if let Err(status) = end {
                // An operator who does not read finds out by the end of the stream.
                let _ = sender.try_send(Err(status));
            }
        });
    }
}

fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    let peer = request.extensions().get::<Peer>();
    peer.cloned()
        .ok_or_else(|| Status::unauthenticated("no certificate"))
}

fn rollout_id(text: &str) -> Result<RolloutId, Status> {
    text.parse()
        .map_err(|error: InvalidId| Status::invalid_argument(error.to_string()))
}

/// A text that fits into a record of the journal.
fn text(field: &str, text: String) -> Result<String, Status> {
    let size = serde_json::to_string(&text).map_or(usize::MAX, |json| json.len());
    if size > MAX_TEXT {
        let why = format!("{field} has more than {MAX_TEXT} bytes");
        return Err(Status::invalid_argument(why));
    }
    Ok(text)
}
