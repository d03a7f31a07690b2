//! Output of steps and their progress: bounded, never in the way of reports.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lockstep_core::Coordinator;
use lockstep_proto::ids::{HostId, PlanDigest, StepKey};
use lockstep_proto::wire::CHUNK;
use lockstep_proto::wire::agent_v1::LogChunk;
use lockstep_proto::wire::control_v1::{EventKind, RolloutEvent};
use tonic::{Status, Streaming};

use super::Agents;
use crate::identity::Peer;
use crate::logs::{Writer, harmless};

/// Attempts that one stream may write at a time. A host runs one step at a time; the others are
/// those that have just ended.
const OPEN_ATTEMPTS: usize = 8;

/// Progress of one attempt is published at most this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// The longest progress text, in characters.
const MAX_PROGRESS_TEXT: usize = 200;

/// Streams of output that one host may have open: its own, and those that it has lost and this side
/// has not missed yet. Each has up to [`OPEN_ATTEMPTS`] files open.
const STREAMS: usize = 8;

/// The streams of output that are open.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outputs(Arc<Mutex<HashMap<HostId, usize>>>);

/// One of them, for as long as the value lives.
#[derive(Debug)]
pub(super) struct Output {
    all: Outputs,
    host: HostId,
}

impl Outputs {
    /// A place for one more stream of a host.
    pub(super) fn take(&self, host: &HostId) -> Result<Output, Status> {
        let mut open = self.open();
        let mine = open.entry(host.clone()).or_default();
        if *mine == STREAMS {
            let why = format!("{host} has {STREAMS} streams of output open");
            return Err(Status::resource_exhausted(why));
        }
        *mine += 1;
        Ok(Output {
            all: self.clone(),
            host: host.clone(),
        })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<HostId, usize>> {
        // Nothing that holds the lock leaves the map half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut open = self.all.open();
        if let Some(mine) = open.get_mut(&self.host) {
            *mine -= 1;
            if *mine == 0 {
                open.remove(&self.host);
            }
        }
    }
}

/// One attempt that is being written.
struct Attempt {
    writer: Writer,
    /// The end of what the agent has sent, stored or not.
    end: u64,
    published: Option<Instant>,
    used: Instant,
    /// What its events say of it, so that they look like the others.
    phase: String,
    action: &'static str,
}

/// Takes an agent's output until it ends. Returns how many bytes were kept.
pub(super) async fn receive(
    agents: &Agents,
    peer: &Peer,
    mut chunks: Streaming<LogChunk>,
) -> Result<u64, Status> {
    let host = peer.agent()?;
    let mut attempts: HashMap<StepKey, Attempt> = HashMap::new();
    let mut kept = 0;
    let ends = tokio::time::sleep(peer.remaining());
    tokio::pin!(ends);
    let result = loop {
        let chunk = tokio::select! {
            biased;
            () = peer.when_cut().cancelled() => break Err(peer.cut_status()),
            () = &mut ends => {
                break Err(Status::unauthenticated("the agent's certificate has ended"));
            }
            chunk = chunks.message() => chunk,
        };
        let chunk = match chunk {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break Ok(()),
            Err(status) => break Err(status),
        };
        if let Err(status) = take(agents, host, &mut attempts, &mut kept, chunk).await {
            break Err(status);
        }
    };
    for (_, attempt) in attempts {
        kept += finish(attempt);
    }
    result.map(|()| kept)
}

async fn take(
    agents: &Agents,
    host: &HostId,
    attempts: &mut HashMap<StepKey, Attempt>,
    kept: &mut u64,
    chunk: LogChunk,
) -> Result<(), Status> {
    let LogChunk {
        key,
        offset,
        data,
        progress_permille,
        progress_text,
    } = chunk;
    let key: StepKey = key
        .parse()
        .map_err(|error| Status::invalid_argument(format!("{error}")))?;
    if key.host != *host {
        let why = format!("the certificate is {host}'s, but the output {}'s", key.host);
        return Err(Status::permission_denied(why));
    }
    if data.len() > CHUNK || offset > u64::MAX / 2 {
        return Err(Status::invalid_argument("a piece of output is too large"));
    }
    if !attempts.contains_key(&key) {
        if attempts.len() == OPEN_ATTEMPTS {
            let oldest = attempts.iter().min_by_key(|(_, attempt)| attempt.used);
            let oldest = oldest.map(|(key, _)| key.clone());
            if let Some(attempt) = oldest.and_then(|oldest| attempts.remove(&oldest)) {
                *kept += finish(attempt);
            }
        }
        let attempt = open(agents, &key).await?;
        attempts.insert(key.clone(), attempt);
    }
    let attempt = attempts.get_mut(&key).expect("inserted above");
    attempt.used = Instant::now();
    attempt.end = attempt.end.max(offset + data.len() as u64);
    // At most 64 KiB into the page cache: nothing that others would have to wait for.
    let appended = attempt.writer.append(offset, &data);
    appended.map_err(|error| Status::resource_exhausted(format!("no output is kept: {error}")))?;

    let due = attempt
        .published
        .is_none_or(|last| last.elapsed() >= PROGRESS_EVERY);
    let says_something = progress_permille.is_some() || !progress_text.is_empty();
    if due && says_something {
        attempt.published = Some(Instant::now());
        let text: String = progress_text.chars().take(MAX_PROGRESS_TEXT).collect();
        let event = || RolloutEvent {
            kind: EventKind::StepProgress.into(),
            phase: attempt.phase.clone(),
            step: key.at.to_string(),
            action: attempt.action.to_owned(),
            host: key.host.to_string(),
            direction: key.direction.to_string(),
            attempt: key.attempt.into(),
            message: harmless(&text),
            progress_permille: progress_permille.map(|progress| progress.min(1000)),
            ..RolloutEvent::default()
        };
        agents
            .hub
            .publish(&key.rollout, std::iter::once_with(event));
    }
    Ok(())
}

/// Opens an attempt's file; only for attempts that were ordered.
async fn open(agents: &Agents, key: &StepKey) -> Result<Attempt, Status> {
    let unknown = || Status::not_found(format!("there is no step {}", key.at));
    let digest = plan_of(agents, key).await?;
    let (blobs, logs, attempt) = (Arc::clone(&agents.blobs), agents.logs.clone(), key.clone());
    let open = move || (blobs.plan(digest), logs.writer(&attempt));
    let opened = tokio::task::spawn_blocking(open).await;
    let (plan, writer) = opened.map_err(|_| Status::internal("reading the plan has failed"))?;
    let plan = plan.map_err(|error| Status::data_loss(error.to_string()))?;
    let plan = plan.ok_or_else(unknown)?;
    let placed = plan.plan().step(key.at).ok_or_else(unknown)?;
    let writer = writer
        .map_err(|error| Status::resource_exhausted(format!("no output is kept: {error}")))?;
    Ok(Attempt {
        writer,
        end: 0,
        published: None,
        used: Instant::now(),
        phase: placed.phase.name.clone(),
        action: placed.step.action.info().name,
    })
}

async fn plan_of(agents: &Agents, key: &StepKey) -> Result<PlanDigest, Status> {
    let asked = key.clone();
    let read = move |coordinator: &Coordinator| {
        let summary = coordinator.summary(&asked.rollout)?;
        coordinator.was_ordered(&asked).then_some(summary.digest)
    };
    let digest = agents.driver.read(read).await?;
    digest.ok_or_else(|| Status::not_found(format!("{key} was never ordered")))
}

fn finish(mut attempt: Attempt) -> u64 {
    if let Err(error) = attempt.writer.finish(attempt.end) {
        tracing::debug!(%error, "the end of an output is not kept");
    }
    attempt.writer.kept()
}
