//! Bytes that are nothing, for each state that a connection can be in.

use bytes::Bytes;
use lockstep_proto::wire::agent_v1::{self as wire, up};
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _};

/// The beginning of a connection that speaks HTTP/2.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn noise(random: &mut StdRng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(1..=most)];
    random.fill_bytes(&mut bytes);
    bytes
}

/// What comes before TLS.
pub(super) fn before_tls(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = noise(random, 512);
    let head: &[u8] = match random.random_range(0..6) {
        0 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        1 => PREFACE,
        // A record of a handshake that is as long as can be said, and a ClientHello in it.
        2 => &[22, 3, 1, 255, 255, 1],
        3 => &[22, 3, 1, 0, 5, 1, 255, 255, 255, 0],
        4 => &[21, 3, 3, 0, 2, 2, 40],
        _ => &[],
    };
    bytes.splice(0..0, head.iter().copied());
    bytes
}

/// A frame of HTTP/2 that breaks a rule.
pub(super) fn http2(random: &mut StdRng) -> Vec<u8> {
    let stream = random.random_range(0..40_u32);
    let frame = |kind: u8, flags: u8, stream: u32, body: &[u8]| {
        let length = u32::try_from(body.len()).unwrap_or(0).to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(body);
        frame
    };
    match random.random_range(0..14) {
        // Headers that no table has, on streams that were or are not open.
        0 => frame(1, 4, stream | 1, &noise(random, 64)),
        1 => frame(1, 5, stream & !1, &[0x82]),
        2 => frame(0, 0, 0, &noise(random, 32)),
        3 => frame(0, 8, stream | 1, &[255, 1]),
        4 => frame(4, 0, 0, &noise(random, 5)),
        5 => frame(4, 1, 0, &[0; 6]),
        6 => frame(8, 0, stream, &[0; 4]),
        7 => frame(9, 4, stream | 1, &noise(random, 32)),
        8 => frame(5, 4, stream | 1, &noise(random, 32)),
        9 => frame(6, 0, stream, &noise(random, 9)),
        10 => frame(3, 0, stream | 1, &[0; 4]),
        11 => frame(2, 0, stream | 1, &(stream | 1).to_be_bytes()),
        // Longer than it says, or than any may be.
        12 => [255, 255, 255, 0, 0, 0, 0, 0, 1].to_vec(),
        _ => noise(random, 200),
    }
}

/// A message as gRPC frames it.
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let mut bytes = vec![0];
    bytes.extend(length.to_be_bytes());
    bytes.extend(message);
    bytes
}

/// The body of a call that is no message.
pub(super) fn grpc(random: &mut StdRng) -> Bytes {
    let bytes = match random.random_range(0..7) {
        0 => noise(random, 300),
        // Compressed, in a way that nobody agreed upon.
        1 => [&[1, 0, 0, 0, 4][..], &noise(random, 4)].concat(),
        // Longer than what follows, and than any may be.
        2 => [&[0, 0, 0, 1, 0][..], &noise(random, 16)].concat(),
        3 => [&[0, 255, 255, 255, 255][..], &noise(random, 16)].concat(),
        4 => framed(&nested(random)),
        5 => vec![],
        _ => framed(&noise(random, 200)),
    };
    bytes.into()
}

/// Protobuf that begins well: fields of fields of fields, whose lengths lie.
fn nested(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = noise(random, 16);
    for _ in 0..random.random_range(1..100) {
        let length = u8::try_from(bytes.len().min(120)).unwrap_or(0);
        let lie = u8::from(random.random_bool(0.1));
        bytes.splice(0..0, [random.random_range(1..10) << 3 | 2, length + lie]);
    }
    bytes
}

/// What an agent may not say, instead of or after its `Hello`.
pub(super) fn up(random: &mut StdRng) -> Vec<u8> {
    let report = |number: u64, body: &[u8]| {
        let report = wire::Report {
            number,
            body_json: body.to_vec().into(),
            head: None,
        };
        let message = Some(up::Message::Report(report));
        framed(&wire::Up { message }.encode_to_vec())
    };
    match random.random_range(0..6) {
        0 => report(random.random(), b"{"),
        1 => report(1 << 41, "[".repeat(10_000).as_bytes()),
        2 => report(1 << 41, &noise(random, 300)),
        3 => framed(&[]),
        _ => grpc(random).to_vec(),
    }
}

/// What exec's socket may get: lengths of four bytes, the lowest first, and no messages.
pub(super) fn bridge(random: &mut StdRng) -> Vec<u8> {
    let body = noise(random, 100);
    let length = u32::try_from(body.len()).unwrap_or(0);
    let length = match random.random_range(0..4) {
        0 => u32::MAX,
        1 => length + 1000,
        2 => 0,
        _ => length,
    };
    [&length.to_le_bytes()[..], &body].concat()
}
