//! Output of steps for one operator: what is kept, then what comes.

use std::collections::BTreeMap;

use lockstep_proto::ids::{HostId, RolloutId, StepKey, StepRef};
use lockstep_proto::wire::control_v1 as wire;
use tokio::sync::{broadcast, mpsc};
use tonic::Status;

use super::{Control, rollout_id};
use crate::logs::{Logs, Reader};

/// What an operator wants to see.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) rollout: RolloutId,
    host: Option<HostId>,
    step: Option<StepRef>,
    follow: bool,
}

impl Wanted {
    pub(super) fn read(request: wire::LogsRequest) -> Result<Self, Status> {
        let wire::LogsRequest {
            rollout,
            host,
            step,
            follow,
        } = request;
        let invalid = |what: &str| Status::invalid_argument(format!("{what} is not valid"));
        let host = match host.as_str() {
            "" => None,
            host => Some(host.parse().map_err(|_| invalid("host"))?),
        };
        let step = match step.split_once('.') {
            None if step.is_empty() => None,
            None => return Err(invalid("step")),
            Some((phase, step)) => Some(StepRef {
                phase: phase.parse().map_err(|_| invalid("step"))?,
                step: step.parse().map_err(|_| invalid("step"))?,
            }),
        };
        Ok(Self {
            rollout: rollout_id(&rollout)?,
            host,
            step,
            follow,
        })
    }

    fn wants(&self, key: &StepKey) -> bool {
        self.host.as_ref().is_none_or(|host| *host == key.host)
            && self.step.is_none_or(|step| step == key.at)
    }
}

type Sender = mpsc::Sender<Result<wire::LogLine, Status>>;

/// Sends output until there is no more, or, if it follows, until the rollout has ended.
pub(super) async fn follow(control: Control, wanted: Wanted, sender: Sender) -> Result<(), Status> {
    // First, so that nothing falls between what is kept and what comes.
    let mut growing = control.logs.follow(&wanted.rollout);
    let mut events = control.hub.subscribe(&wanted.rollout);
    let mut output = Output {
        logs: control.logs.clone(),
        readers: BTreeMap::new(),
        sender,
    };
    loop {
        let ended = control.summary(&wanted.rollout).await?.ended;
        output.send_all(&wanted).await?;
        if ended || !wanted.follow {
            return output.send_rest().await;
        }
        loop {
            tokio::select! {
                key = growing.recv() => match key {
                    Ok(key) if wanted.wants(&key) => output.send_new(&key).await?,
                    Ok(_) => {}
                    Err(broadcast::error::RecvError::Lagged(_)) => break,
                    Err(broadcast::error::RecvError::Closed) => {
                        growing = control.logs.follow(&wanted.rollout);
                        break;
                    }
                },
                event = events.recv() => match event {
                    Ok(piece) if !piece.has_end() => {}
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => break,
                    Err(broadcast::error::RecvError::Closed) => {
                        events = control.hub.subscribe(&wanted.rollout);
                        break;
                    }
                },
            }
        }
    }
}

/// The files that are read, and where they go.
struct Output {
    logs: Logs,
    readers: BTreeMap<StepKey, Reader>,
    sender: Sender,
}

impl Output {
    async fn send_all(&mut self, wanted: &Wanted) -> Result<(), Status> {
        let (logs, rollout) = (self.logs.clone(), wanted.rollout.clone());
        let (host, step) = (wanted.host.clone(), wanted.step);
        let keys = tokio::task::spawn_blocking(move || logs.keys(&rollout, host.as_ref(), step));
        for key in flatten(keys.await)? {
            self.send_new(&key).await?;
            if !wanted.follow {
                // Nothing more of it will be asked for.
                self.send_rest().await?;
            }
        }
        Ok(())
    }

    async fn send_new(&mut self, key: &StepKey) -> Result<(), Status> {
        let known = self.readers.remove(key);
        let mut reader = known.unwrap_or_else(|| self.logs.reader(key));
        loop {
            let read = tokio::task::spawn_blocking(move || {
                let lines = reader.lines();
                lines.map(|lines| (lines, reader))
            });
            let (lines, back) = flatten(read.await)?;
            reader = back;
            if lines.is_empty() {
                self.readers.insert(key.clone(), reader);
                return Ok(());
            }
            self.send(key, lines).await?;
        }
    }

    async fn send_rest(&mut self) -> Result<(), Status> {
        for (key, mut reader) in std::mem::take(&mut self.readers) {
            let rest = reader.rest();
            if !rest.is_empty() {
                self.send(&key, rest).await?;
            }
        }
        Ok(())
    }

    async fn send(&self, key: &StepKey, text: String) -> Result<(), Status> {
        let key = key.to_string();
        let sent = self.sender.send(Ok(wire::LogLine { key, text })).await;
        sent.map_err(|_| Status::cancelled("nobody reads any more"))
    }
}

fn flatten<T>(result: Result<std::io::Result<T>, tokio::task::JoinError>) -> Result<T, Status> {
    let result = result.map_err(|_| Status::internal("reading output has failed"))?;
    result.map_err(|error| unreadable(&error))
}

fn unreadable(error: &std::io::Error) -> Status {
    Status::data_loss(format!("the output cannot be read: {error}"))
}
