//! A rollout's events for one watcher: what was, then what comes.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use lockstep_core::{Coordinator, event};
use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1::{EventKind, RolloutEvent};
use serde_json::Value;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, mpsc};
use tonic::Status;

use super::outbox::Outbox;
use super::{Control, convert};
use crate::hub::Piece;

/// When nothing else comes, this says that controller and connection are alive.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);

/// Events that are read from the coordinator at once: what is encoded for one watcher before it is
/// sent.
const PAGE: usize = 512;

/// Hosts that a heartbeat names.
const ABSENT: usize = 20;

/// Parcels that wait for a slow watcher, each a frame of HTTP/2; what else comes waits in the hub,
/// where all watchers share it.
pub(super) const QUEUE: usize = 4;

/// Sends events after a number, then live ones, until the rollout has ended.
pub(super) async fn watch(
    control: Control,
    rollout: RolloutId,
    after: u64,
    sender: mpsc::Sender<Result<Bytes, Status>>,
) -> Result<(), Status> {
    let mut watcher = Watcher {
        // First, so that nothing falls between what was and what comes.
        live: control.hub.subscribe(&rollout),
        outbox: Outbox::new(after, sender),
        waiting: Waiting::default(),
        control,
        rollout,
    };
    while !(watcher.replay().await? || watcher.follow().await?) {}
    watcher.outbox.send().await
}

struct Watcher {
    control: Control,
    rollout: RolloutId,
    live: broadcast::Receiver<Arc<Piece>>,
    outbox: Outbox,
    waiting: Waiting,
}

impl Watcher {
    /// Sends what is there. Returns whether the rollout has ended.
    async fn replay(&mut self) -> Result<bool, Status> {
        loop {
            let (asked, after) = (self.rollout.clone(), self.outbox.last());
            let read = move |coordinator: &Coordinator| {
                let events = coordinator.events(&asked, after)?;
                let page: Vec<_> = events.iter().take(PAGE).cloned().collect();
                let ended = coordinator.summary(&asked)?.ended;
                Some((page, events.len() > PAGE, ended))
            };
            let found = self.control.driver.read(read).await?;
            let Some((page, more, ended)) = found else {
                return Err(self.control.not_found(&self.rollout).await?);
            };
            // Here and not in the driver, which has others to serve.
            for piece in Piece::pack(page.iter().map(|event| convert::event(event))) {
                self.outbox.put(&piece).await?;
            }
            if !more {
                self.outbox.send().await?;
                return Ok(ended);
            }
        }
    }

    /// Passes on what comes. Returns whether the rollout has ended; otherwise events have to be read
    /// again.
    async fn follow(&mut self) -> Result<bool, Status> {
        loop {
            let next = tokio::time::timeout(HEARTBEAT_EVERY, self.live.recv()).await;
            match next {
                Err(_) => self.heartbeat().await?,
                Ok(Ok(piece)) => {
                    if self.take(&piece).await? {
                        return Ok(true);
                    }
                    self.outbox.rest().await;
                    match self.take_more().await? {
                        More::Ended => return Ok(true),
                        More::Missed => return Ok(false),
                        More::Nothing => {}
                    }
                }
                Ok(Err(RecvError::Lagged(_))) => return Ok(false),
                Ok(Err(RecvError::Closed)) => {
                    self.live = self.control.hub.subscribe(&self.rollout);
                    return Ok(false);
                }
            }
            self.outbox.send().await?;
        }
    }

    /// Takes a piece. Returns whether the rollout has ended with it.
    async fn take(&mut self, piece: &Piece) -> Result<bool, Status> {
        Ok(self.outbox.put(piece).await? && piece.has_end())
    }

    /// Takes what else has come already.
    async fn take_more(&mut self) -> Result<More, Status> {
        loop {
            match self.live.try_recv() {
                Ok(piece) if self.take(&piece).await? => return Ok(More::Ended),
                Ok(_) => {}
                Err(TryRecvError::Lagged(_)) => return Ok(More::Missed),
                // Who waits for the next piece hears of a channel that is closed.
                Err(TryRecvError::Empty | TryRecvError::Closed) => return Ok(More::Nothing),
            }
        }
    }

    async fn heartbeat(&mut self) -> Result<(), Status> {
        let last = self.outbox.last();
        let event = self.waiting.heartbeat(&self.control, &self.rollout, last);
        for piece in Piece::pack([event.await?]) {
            self.outbox.put(&piece).await?;
        }
        Ok(())
    }
}

/// What has come beside a piece.
enum More {
    /// Nothing else.
    Nothing,
    /// The rollout's end.
    Ended,
    /// More than there was room for.
    Missed,
}

/// What a heartbeat says: what is missing at the first gate that waits for people, and which
/// hosts are waited for that are not connected.
#[derive(Default)]
struct Waiting {
    /// The newest event that was there when it was read.
    as_of: Option<u64>,
    event: RolloutEvent,
}

impl Waiting {
    /// Every change at a gate is an event, so nothing is read again while no event comes: a
    /// document is large, and everything else waits while it is made. Hosts come and go without
    /// an event.
    async fn heartbeat(
        &mut self,
        control: &Control,
        rollout: &RolloutId,
        last: u64,
    ) -> Result<RolloutEvent, Status> {
        let (asked, anew) = (rollout.clone(), self.as_of != Some(last));
        let read = move |coordinator: &Coordinator| {
            let gate = || {
                let gate = first_gate(coordinator.events(&asked, 0)?)?;
                with_missing(gate, &coordinator.document(&asked)?)
            };
            let absent = coordinator.absent(&asked).into_iter();
            let absent: Vec<String> = absent.take(ABSENT).map(ToString::to_string).collect();
            (anew.then(gate), absent)
        };
        let (gate, absent) = control.driver.read(read).await?;
        if let Some(gate) = gate {
            self.event = gate.unwrap_or_default();
            self.event.set_kind(EventKind::Heartbeat);
            self.as_of = Some(last);
        }
        self.event.detail = absent;
        Ok(self.event.clone())
    }
}

/// The first open gate that people decide at; what others wait for does not change.
fn first_gate(events: &[Arc<lockstep_core::RolloutEvent>]) -> Option<RolloutEvent> {
    let mut open = BTreeMap::new();
    for event in events {
        match event.kind {
            event::EventKind::GateOpened => {
                open.insert(event.step, event);
            }
            event::EventKind::GateClosed => {
                open.remove(&event.step);
            }
            // On the way back, nobody waits at a gate of the way there.
            event::EventKind::RollbackStarted => open.clear(),
            _ => {}
        }
    }
    let mut decided = open
        .into_values()
        .filter(|event| matches!(event.action, "gate.approval" | "gate.checklist"));
    let event = convert::event(decided.next()?);
    Some(RolloutEvent {
        phase: event.phase,
        step: event.step,
        action: event.action,
        ..RolloutEvent::default()
    })
}

/// Says in a gate's event what is still missing there; none if nothing is.
fn with_missing(gate: RolloutEvent, document: &Value) -> Option<RolloutEvent> {
    let phases = document["phases"].as_array()?;
    let mut steps = phases.iter().filter_map(|phase| phase["steps"].as_array());
    let step = steps.find_map(|steps| steps.iter().find(|step| step["at"] == gate.step))?;
    let missing = step["gate"]["missing"].as_str()?;
    if missing.is_empty() {
        return None;
    }
    let message = match step["args"]["title"].as_str() {
        Some(title) => format!("{title}: waiting for {missing}"),
        None => format!("waiting for {missing}"),
    };
    Some(RolloutEvent { message, ..gate })
}
