//! The wire: what is understood of a message is the same after it was said again.

use lockstep_proto::ids::HostId;
use lockstep_proto::order::Order;
use lockstep_proto::report::Report;
use lockstep_proto::seal::check_size;
use lockstep_proto::wire::{Hello, Welcome, agent_v1 as agent, control_v1 as control};
use lockstep_proto::witness::Head;
use prost::Message;

/// Domain types and what they are on the wire.
fn survives<W, D>(message: W, read: impl Fn(W) -> Option<D>)
where
    W: Message + Default + From<D>,
    D: Clone + PartialEq + std::fmt::Debug,
{
    let Some(value) = read(message) else {
        return;
    };
    let bytes = W::from(value.clone()).encode_to_vec();
    let message = W::decode(bytes.as_slice()).expect("it was just written");
    // A map is in no order there.
    assert_eq!(message.encoded_len(), bytes.len());
    let again = read(message).expect("it was understood before");
    assert_eq!(again, value);
}

pub(crate) fn host() -> HostId {
    "app-1".parse().expect("a host's name")
}

pub(crate) fn order(bytes: &[u8]) {
    use agent::down::Message as Down;
    let Ok(agent::Down { message, head }) = agent::Down::decode(bytes) else {
        return;
    };
    if let Some(head) = head {
        survives(head, |head| Head::try_from(head).ok());
    }
    match message {
        Some(Down::Order(order)) => {
            survives(order, |order| -> Option<Order> {
                order.into_order(host()).ok()
            });
        }
        Some(Down::Welcome(welcome)) => {
            survives(welcome, |welcome| Welcome::try_from(welcome).ok());
        }
        Some(Down::Offer(offer)) => {
            if let Ok((.., signatures)) = offer.into_parts() {
                check_size(&signatures).expect("they are within their bounds");
            }
        }
        Some(Down::Release(release)) => drop(release.into_parts()),
        Some(Down::Cancel(cancel)) => drop(cancel.into_parts()),
        Some(Down::Survey(survey)) => drop(survey.into_parts()),
        Some(Down::Acknowledged(_) | Down::Drain(_)) | None => {}
    }
}

pub(crate) fn report(bytes: &[u8]) {
    use agent::up::Message as Up;
    let Ok(agent::Up { message }) = agent::Up::decode(bytes) else {
        return;
    };
    match message {
        Some(Up::Hello(hello)) => survives(hello, |hello| Hello::try_from(hello).ok()),
        Some(Up::Report(report)) => {
            survives(report.clone(), |report| Report::try_from(report).ok());
            survives(report, |report| lockstep::fuzzing::report(&host(), report));
        }
        None => {}
    }
}

/// An even first byte: from the link to exec; an odd one: from exec to the link.
pub(crate) fn bridge(bytes: &[u8]) {
    match bytes.split_first() {
        Some((first, frames)) if first % 2 == 0 => lockstep_agent::fuzzing::bridge_to_exec(frames),
        Some((_, frames)) => lockstep_agent::fuzzing::bridge_to_link(frames),
        None => {}
    }
}

/// The first byte says what it is: `{` a document, `E` events, else any text.
pub(crate) fn shown(bytes: &[u8]) {
    match bytes {
        [b'{', ..] => lockstep::fuzzing::documents(bytes),
        [b'E', events @ ..] => {
            let mut events = events;
            lockstep::fuzzing::events(std::iter::from_fn(|| {
                let more = !events.is_empty();
                more.then(|| control::RolloutEvent::decode_length_delimited(&mut events).ok())?
            }));
        }
        _ => {}
    }
    lockstep::fuzzing::text(bytes);
}
