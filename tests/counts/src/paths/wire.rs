//! What goes over the wire, and comes from it.

use std::hint::black_box;

use lockstep_core::RolloutEvent;
use lockstep_core::event::EventKind;
use lockstep_proto::ids::StepRef;
use lockstep_proto::wire::agent_v1::{Down, Up, down, up};
use prost::Message as _;
use prost::bytes::Bytes;

use super::number;
use super::values::{NOW, host, order, report};

/// The most orders that are encoded.
const MOST: usize = 20_000;

/// Orders as they go to agents.
pub(super) fn encode_orders(times: u32) {
    // Each is given away as it is encoded.
    let mut orders = vec![order(); MOST].into_iter();
    let mut buffer = Vec::with_capacity(4 << 10);
    for order in orders.by_ref().take(number(times)) {
        let message = Down {
            message: Some(down::Message::Order(black_box(order).into())),
            head: None,
        };
        buffer.clear();
        message.encode(&mut buffer).expect("memory has room");
        black_box(&buffer);
    }
    // What would be dropped here is what was not encoded.
    std::mem::forget(orders);
}

/// Reports as they come from agents, until they are events for the coordinator.
pub(super) fn decode_reports(times: u32) {
    let host = host(1);
    let message = up::Message::Report(report(1).into());
    let message = Up {
        message: Some(message),
    };
    let bytes = Bytes::from(message.encode_to_vec());
    for _ in 0..times {
        let message = Up::decode(black_box(bytes.clone())).expect("it was just encoded");
        let Some(up::Message::Report(report)) = message.message else {
            unreachable!("it is a report")
        };
        let report = lockstep::fuzzing::report(&host, report);
        black_box(report.expect("it keeps the contract"));
    }
}

/// Events as they go to whoever watches.
pub(super) fn encode_events(times: u32) {
    let event = RolloutEvent {
        number: 20_117,
        at: NOW,
        kind: EventKind::StepOk,
        state: "running",
        phase: "start".into(),
        step: Some(StepRef { phase: 6, step: 1 }),
        action: "service.start",
        host: Some(host(1)),
        direction: "do",
        attempt: 1,
        message: "employee-backend is active and listens on port 8000".into(),
        detail: vec![],
        took_ms: 2_341,
    };
    let mut buffer = Vec::with_capacity(4 << 10);
    for _ in 0..times {
        let message = lockstep::fuzzing::wire_event(black_box(&event));
        buffer.clear();
        message.encode(&mut buffer).expect("memory has room");
        black_box(&buffer);
    }
}
