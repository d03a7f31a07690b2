//! A rollout's events for one watcher: what was, then what comes.

use std::time::Duration;

use lockstep_core::Coordinator;
use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1::{EventKind, RolloutEvent};
use tokio::sync::{broadcast, mpsc};
use tonic::Status;

use super::{Control, convert, not_found};

/// When nothing else comes, this says that controller and connection are alive.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);

/// Events that are read from the coordinator at once: they are copied while it waits.
const PAGE: usize = 512;

/// Sends events after a number, then live ones, until the rollout has ended.
pub(super) async fn watch(
    control: Control,
    rollout: RolloutId,
    after: u64,
    sender: mpsc::Sender<Result<RolloutEvent, Status>>,
) -> Result<(), Status> {
    // First, so that nothing falls between what was and what comes.
    let mut live = control.hub.subscribe(&rollout);
    let mut last = after;
    loop {
        let ended = replay(&control, &rollout, &mut last, &sender).await?;
        if ended {
            return Ok(());
        }
        loop {
            let next = tokio::time::timeout(HEARTBEAT_EVERY, live.recv()).await;
            let event = match next {
                Err(_) => heartbeat(),
                // Number 0 is progress: it is kept nowhere and never comes twice.
                Ok(Ok(event)) if event.number == 0 => (*event).clone(),
                Ok(Ok(event)) if event.number > last => {
                    last = event.number;
                    (*event).clone()
                }
                Ok(Ok(_)) => continue,
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => break,
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    live = control.hub.subscribe(&rollout);
                    break;
                }
            };
            let ended = event.kind() == EventKind::Ended;
            if sender.send(Ok(event)).await.is_err() || ended {
                return Ok(());
            }
        }
    }
}

/// Sends what is there. Returns whether the rollout has ended, or nobody watches any more.
async fn replay(
    control: &Control,
    rollout: &RolloutId,
    last: &mut u64,
    sender: &mpsc::Sender<Result<RolloutEvent, Status>>,
) -> Result<bool, Status> {
    loop {
        let (asked, after) = (rollout.clone(), *last);
        let read = move |coordinator: &Coordinator| {
            let events = coordinator.events(&asked, after)?;
            let page: Vec<_> = events.iter().take(PAGE).map(convert::event).collect();
            let ended = coordinator.summary(&asked)?.ended;
            Some((page, events.len() > PAGE, ended))
        };
        let found = control.driver.read(read).await?;
        let (page, more, ended) = found.ok_or_else(|| not_found(rollout))?;
        for event in page {
            *last = event.number;
            if sender.send(Ok(event)).await.is_err() {
                return Ok(true);
            }
        }
        if !more {
            return Ok(ended);
        }
    }
}

fn heartbeat() -> RolloutEvent {
    RolloutEvent {
        kind: EventKind::Heartbeat.into(),
        ..RolloutEvent::default()
    }
}
