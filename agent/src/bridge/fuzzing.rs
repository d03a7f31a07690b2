//! For fuzzers: what must hold of what the two processes of an agent say to each other.

use lockstep_proto::ids::HostId;
use lockstep_proto::wire::host_v1 as wire;
use prost::Message;

use super::codec::{self, Heard, Said};
use super::{BridgeError, Frames, MAX_FRAME};

/// Frames from the link, as exec reads them.
pub fn bridge_to_exec(bytes: &[u8]) {
    let host: HostId = "app-1".parse().expect("a host's name");
    each(bytes, |frame: wire::ToExec| {
        let Ok(heard) = codec::heard(frame, &host) else {
            return false;
        };
        let words = format!("{heard:?}");
        let Heard::Inbound(inbound) = heard else {
            return true;
        };
        let again = codec::to_exec(inbound).expect("it is said as it is");
        let again = wire::ToExec::decode(again.encode_to_vec().as_slice());
        let again = codec::heard(again.expect("it was just written"), &host);
        assert_eq!(
            words,
            format!("{:?}", again.expect("it was understood before"))
        );
        true
    });
}

/// Frames from exec, as the link reads them.
pub fn bridge_to_link(bytes: &[u8]) {
    each(bytes, |frame: wire::ToLink| {
        let Ok(said) = codec::said(frame) else {
            return false;
        };
        let words = format!("{said:?}");
        let again = match said {
            Said::Hello(hello) => codec::hello(hello),
            Said::Log(piece) => codec::log(piece),
            Said::Outbound(session, outbound) => codec::to_link(session, outbound),
        };
        let again = wire::ToLink::decode(again.encode_to_vec().as_slice());
        let again = codec::said(again.expect("it was just written"));
        assert_eq!(
            words,
            format!("{:?}", again.expect("it was understood before"))
        );
        true
    });
}

/// Reads frames until one breaks the contract; then the connection would end.
fn each<M: Message + Default>(bytes: &[u8], mut take: impl FnMut(M) -> bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime without timers and sockets");
    runtime.block_on(async {
        let mut frames = Frames::new(bytes);
        loop {
            match frames.next::<M>().await {
                Ok(message) => {
                    assert!(message.encoded_len() <= MAX_FRAME);
                    if !take(message) {
                        return;
                    }
                }
                Err(BridgeError::Io(_) | BridgeError::Frame(_) | BridgeError::Closed) => return,
                Err(error) => unreachable!("{error}"),
            }
        }
    });
}
