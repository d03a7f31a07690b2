//! A rollout's events for one watcher: what was, then what comes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lockstep_core::{Coordinator, event};
use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1::{EventKind, RolloutEvent};
use serde_json::Value;
use tokio::sync::{broadcast, mpsc};
use tonic::Status;

use super::{Control, convert};

/// When nothing else comes, this says that controller and connection are alive.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);

/// Events that are read from the coordinator at once: they are copied while it waits.
const PAGE: usize = 512;

/// Hosts that a heartbeat names.
const ABSENT: usize = 20;

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
    let mut waiting = Waiting::default();
    loop {
        let ended = replay(&control, &rollout, &mut last, &sender).await?;
        if ended {
            return Ok(());
        }
        loop {
            let next = tokio::time::timeout(HEARTBEAT_EVERY, live.recv()).await;
            let event = match next {
                Err(_) => waiting.heartbeat(&control, &rollout, last).await?,
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
            let page = events.iter().take(PAGE);
            let page: Vec<_> = page.map(|event| convert::event(event)).collect();
            let ended = coordinator.summary(&asked)?.ended;
            Some((page, events.len() > PAGE, ended))
        };
        let found = control.driver.read(read).await?;
        let Some((page, more, ended)) = found else {
            return Err(control.not_found(rollout).await?);
        };
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
