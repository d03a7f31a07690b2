//! The seam's messages as they go over the socket, and back.

use lockstep_proto::ids::{Digest, HostId};
use lockstep_proto::order::Order;
use lockstep_proto::wire::agent_v1 as agent;
use lockstep_proto::wire::host_v1::{self as wire, to_exec, to_link};
use lockstep_proto::wire::{Hello, InvalidMessage, Welcome};

use crate::exec::{Inbound, LogPiece, Offer, Outbound, Refusal};

/// What exec hears from the link.
#[derive(Debug)]
pub(super) enum Heard {
    /// It asks for a `Hello`.
    Dial,
    /// A controller has answered, in a session with this number.
    Connected(u64, Welcome),
    /// Anything else, as it is.
    Inbound(Inbound),
}

/// What the link says; none of what is not said as it is.
pub(super) fn to_exec(inbound: Inbound) -> Option<wire::ToExec> {
    use agent::down::Message as Down;
    let down = match inbound {
        Inbound::Dial(_) | Inbound::Connected { .. } => return None,
        Inbound::Disconnected => {
            return Some(exec_message(to_exec::Message::Disconnected(
                wire::Disconnected {},
            )));
        }
        Inbound::Plan(digest, answer) => {
            let answer = match answer {
                Ok(content) => wire::plan::Answer::Content(content.into()),
                Err(why) => wire::plan::Answer::Refused(why),
            };
            let plan = wire::Plan {
                digest: digest.0.to_vec().into(),
                answer: Some(answer),
            };
            return Some(exec_message(to_exec::Message::Plan(plan)));
        }
        Inbound::Refused(why) => {
            let why = match why {
                Refusal::Certificate => wire::Refusal::Certificate,
                Refusal::Contract => wire::Refusal::Contract,
                // Only exec can tell.
                _ => return None,
            };
            return Some(exec_message(to_exec::Message::Refused(why.into())));
        }
        Inbound::Witness(head) => agent::Down {
            message: None,
            head: Some(head.into()),
        },
        Inbound::Acknowledged(number) => down(Down::Acknowledged(number)),
        Inbound::Offer(offer) => {
            let Offer {
                rollout,
                plan,
                epoch,
                dry_run,
                signatures,
                round,
            } = offer;
            down(Down::Offer(agent::Offer {
                rollout: rollout.into(),
                plan_digest: plan.0.to_vec().into(),
                epoch: Some(epoch.into()),
                dry_run,
                signatures: signatures.into_iter().map(Into::into).collect(),
                round,
            }))
        }
        Inbound::Order(order) => down(Down::Order(Order::clone(&order).into())),
        Inbound::Release {
            rollout,
            epoch,
            comes_back,
        } => down(Down::Release(agent::Release {
            rollout: rollout.into(),
            epoch: Some(epoch.into()),
            comes_back,
        })),
        Inbound::Cancel(rollout, epoch) => down(Down::Cancel(agent::Cancel {
            rollout: rollout.into(),
            epoch: Some(epoch.into()),
        })),
        Inbound::Survey(rollout, epoch) => down(Down::Survey(agent::Survey {
            rollout: rollout.into(),
            epoch: Some(epoch.into()),
        })),
    };
    Some(exec_message(to_exec::Message::Down(down)))
}

pub(super) fn dial() -> wire::ToExec {
    exec_message(to_exec::Message::Dial(wire::Dial {}))
}

pub(super) fn exec_message(message: to_exec::Message) -> wire::ToExec {
    wire::ToExec {
        message: Some(message),
    }
}

fn down(message: agent::down::Message) -> agent::Down {
    agent::Down {
        message: Some(message),
        head: None,
    }
}

/// Reads what the link says.
pub(super) fn heard(message: wire::ToExec, host: &HostId) -> Result<Heard, InvalidMessage> {
    use to_exec::Message;
    let message = message.message.ok_or(InvalidMessage::Missing("message"))?;
    Ok(match message {
        Message::Dial(wire::Dial {}) => Heard::Dial,
        Message::Connected(wire::Connected { session, welcome }) => {
            let welcome = welcome.ok_or(InvalidMessage::Missing("welcome"))?;
            Heard::Connected(session, welcome.try_into()?)
        }
        Message::Disconnected(wire::Disconnected {}) => Heard::Inbound(Inbound::Disconnected),
        Message::Plan(wire::Plan { digest, answer }) => {
            let digest = read_digest(&digest)?;
            let answer = match answer.ok_or(InvalidMessage::Missing("answer"))? {
                wire::plan::Answer::Content(content) => Ok(content.into()),
                wire::plan::Answer::Refused(why) => Err(why),
            };
            Heard::Inbound(Inbound::Plan(digest, answer))
        }
        Message::Refused(why) => Heard::Inbound(Inbound::Refused(match why.try_into() {
            Ok(wire::Refusal::Certificate) => Refusal::Certificate,
            Ok(wire::Refusal::Contract) => Refusal::Contract,
            _ => return Err(InvalidMessage::Field("refused")),
        })),
        Message::Down(agent::Down {
            message: None,
            head: Some(head),
        }) => Heard::Inbound(Inbound::Witness(head.try_into()?)),
        Message::Down(down) => Heard::Inbound(Inbound::read(down, host)?),
    })
}

/// What exec says in a session.
pub(super) fn to_link(session: u64, outbound: Outbound) -> wire::ToLink {
    let message = match outbound {
        Outbound::Report(report) => to_link::Message::Report((*report).into()),
        Outbound::Fetch(digest) => to_link::Message::Fetch(digest.0.to_vec().into()),
        Outbound::Refuse(why) => to_link::Message::Refuse(why),
    };
    wire::ToLink {
        session,
        message: Some(message),
    }
}

/// What exec says in no session.
pub(super) fn hello(hello: Hello) -> wire::ToLink {
    wire::ToLink {
        session: 0,
        message: Some(to_link::Message::Hello(hello.into())),
    }
}

/// A piece of output.
pub(super) fn log(piece: LogPiece) -> wire::ToLink {
    wire::ToLink {
        session: 0,
        message: Some(to_link::Message::Log(piece.into())),
    }
}

/// What the link hears from exec.
#[derive(Debug)]
pub(super) enum Said {
    Hello(Hello),
    Log(LogPiece),
    /// In this session.
    Outbound(u64, Outbound),
}

/// Reads what exec says.
pub(super) fn said(message: wire::ToLink) -> Result<Said, InvalidMessage> {
    use to_link::Message;
    let wire::ToLink { session, message } = message;
    let outbound = match message.ok_or(InvalidMessage::Missing("message"))? {
        Message::Hello(hello) => return Ok(Said::Hello(hello.try_into()?)),
        Message::Log(chunk) => return Ok(Said::Log(chunk.try_into()?)),
        Message::Report(report) => Outbound::Report(Box::new(report.try_into()?)),
        Message::Fetch(digest) => Outbound::Fetch(read_digest(&digest)?),
        Message::Refuse(why) => Outbound::Refuse(why),
    };
    Ok(Said::Outbound(session, outbound))
}

fn read_digest(bytes: &[u8]) -> Result<Digest, InvalidMessage> {
    let bytes = bytes.try_into();
    bytes
        .map(Digest)
        .map_err(|_| InvalidMessage::Field("digest"))
}
