//! What link and exec say to each other: values of the domain, no transport. They run in one
//! process, or in two with the `bridge` between them.

use lockstep_proto::ids::{Epoch, HostId, PlanDigest, RolloutId, StepKey};
use lockstep_proto::order::Order;
use lockstep_proto::report::Report;
use lockstep_proto::wire::{Hello, InvalidMessage, Welcome, agent_v1 as wire};
use lockstep_proto::witness::Head;
use tokio::sync::{mpsc, oneshot};

use super::Refusal;

/// From link to exec. Exec never waits for the link, so that the link may wait here.
#[derive(Debug)]
pub(crate) enum Inbound {
    /// The link is about to introduce the agent.
    Dial(oneshot::Sender<Hello>),
    /// A controller has answered. What exec says goes to `outbox` until it is dropped.
    Connected {
        welcome: Welcome,
        outbox: mpsc::Sender<Outbound>,
    },
    /// The stream has ended.
    Disconnected,
    /// Reports up to this one are durable at the controller.
    Acknowledged(u64),
    /// The controller's journal, as it says.
    Witness(Head),
    /// The controller asks for consent.
    Offer(Offer),
    /// The controller orders a step.
    Order(Box<Order>),
    /// A rollout has ended; or it waits, and comes back.
    Release {
        rollout: RolloutId,
        epoch: Epoch,
        comes_back: bool,
    },
    /// What runs of a rollout is to be stopped.
    Cancel(RolloutId, Epoch),
    /// The host's state is asked for.
    Survey(RolloutId, Epoch),
    /// A compiled plan that was asked for, or why it cannot be had.
    Plan(PlanDigest, Result<Vec<u8>, String>),
    /// The link has refused what answered there.
    Refused(Refusal),
}

impl Inbound {
    /// Reads what a controller says to exec, on this host; its `Welcome` and `Drain` are the link's
    /// business, and not understood here.
    pub(crate) fn read(down: wire::Down, host: &HostId) -> Result<Self, InvalidMessage> {
        use wire::down::Message;
        // A newer controller that says something else relies on its being understood.
        let message = down.message.ok_or(InvalidMessage::Missing("message"))?;
        Ok(match message {
            Message::Acknowledged(number) => Self::Acknowledged(number),
            Message::Offer(offer) => {
                let round = offer.round;
                let (rollout, plan, epoch, dry_run, signatures) = offer.into_parts()?;
                Self::Offer(Offer {
                    rollout,
                    plan,
                    epoch,
                    dry_run,
                    signatures,
                    round,
                })
            }
            Message::Order(order) => Self::Order(Box::new(order.into_order(host.clone())?)),
            Message::Release(release) => {
                let (rollout, epoch, comes_back) = release.into_parts()?;
                Self::Release {
                    rollout,
                    epoch,
                    comes_back,
                }
            }
            Message::Cancel(cancel) => {
                let (rollout, epoch) = cancel.into_parts()?;
                Self::Cancel(rollout, epoch)
            }
            Message::Survey(survey) => {
                let (rollout, epoch) = survey.into_parts()?;
                Self::Survey(rollout, epoch)
            }
            Message::Welcome(_) => return Err(InvalidMessage::Field("a second welcome")),
            Message::Drain(_) => return Err(InvalidMessage::Field("drain")),
        })
    }
}

/// Asks for consent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) rollout: RolloutId,
    pub(crate) plan: PlanDigest,
    pub(crate) epoch: Epoch,
    pub(crate) dry_run: bool,
    /// Armoured, as they came.
    pub(crate) signatures: Vec<String>,
    /// Which time the rollout takes its lock.
    pub(crate) round: u32,
}

/// From exec to link.
#[derive(Debug)]
pub(crate) enum Outbound {
    /// A report for the controller.
    Report(Box<Report>),
    /// A compiled plan is needed.
    Fetch(PlanDigest),
    /// This controller is not to be obeyed: end the stream.
    Refuse(String),
}

/// Output of a running step, on its way to the controller. Lossy.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LogPiece {
    pub(crate) key: StepKey,
    /// Where the data begins in the step's whole output, in bytes.
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
    /// How far the step is, from 0 to 1000, and what it is at.
    pub(crate) progress: Option<(u32, String)>,
}

impl From<LogPiece> for wire::LogChunk {
    fn from(piece: LogPiece) -> Self {
        let LogPiece {
            key,
            offset,
            data,
            progress,
        } = piece;
        let (permille, text) = progress.unzip();
        Self {
            key: key.to_string(),
            offset,
            data: data.into(),
            progress_permille: permille,
            progress_text: text.unwrap_or_default(),
        }
    }
}

impl TryFrom<wire::LogChunk> for LogPiece {
    type Error = InvalidMessage;
    fn try_from(chunk: wire::LogChunk) -> Result<Self, InvalidMessage> {
        let wire::LogChunk {
            key,
            offset,
            data,
            progress_permille,
            progress_text,
        } = chunk;
        Ok(Self {
            key: key.parse()?,
            offset,
            data: data.into(),
            progress: progress_permille.map(|permille| (permille, progress_text)),
        })
    }
}
