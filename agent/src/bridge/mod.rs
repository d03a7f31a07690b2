//! Link and exec in two processes: the seam between them, carried over a Unix socket.
//!
//! ```text
//! link process                                exec process
//!   Link --Inbound--> [bridge::link] ==socket==> [bridge::exec] --Inbound--> Exec
//!        <-Outbound--                 frames                    <-Outbound--
//! ```
//!
//! Neither side knows whether the other one is in its own process. Exec reads every message anew, and
//! believes the link no more than it believes a controller. The kernel says who is at the other end.

mod codec;
mod exec;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod link;

use std::io;

use lockstep_proto::plan::MAX_PLAN_BYTES;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWriteExt as _};
use tokio::net::unix::OwnedWriteHalf;
use tokio_stream::StreamExt as _;
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

pub(crate) use exec::Listening;
pub(crate) use link::relay;

/// The largest frame, in bytes: a compiled plan, and what is around it.
const MAX_FRAME: usize = MAX_PLAN_BYTES + (64 << 10);

/// Why a connection between the two ended.
#[derive(Debug, thiserror::Error)]
enum BridgeError {
    /// The socket.
    #[error("the socket of link and exec failed")]
    Io(#[from] io::Error),
    /// Something that breaks the contract.
    #[error("the other side says what cannot be understood")]
    Frame(#[from] prost::DecodeError),
    /// A message that is not what it should be.
    #[error("the other side says what cannot be understood")]
    Message(#[from] lockstep_proto::wire::InvalidMessage),
    /// The other side is gone.
    #[error("the other side has closed the socket")]
    Closed,
    /// The process is stopping.
    #[error("this side is stopping")]
    Stopping,
}

/// Reads frames; a read that is given up loses nothing.
struct Frames<R>(FramedRead<R, LengthDelimitedCodec>);

impl<R: AsyncRead + Unpin> Frames<R> {
    fn new(reader: R) -> Self {
        let codec = LengthDelimitedCodec::builder()
            .little_endian()
            .max_frame_length(MAX_FRAME)
            .new_codec();
        Self(FramedRead::new(reader, codec))
    }

    async fn next<M: Message + Default>(&mut self) -> Result<M, BridgeError> {
        let frame = self.0.next().await.ok_or(BridgeError::Closed)??;
        Ok(M::decode(frame)?)
    }
}

async fn send(writer: &mut OwnedWriteHalf, message: &impl Message) -> io::Result<()> {
    let size = message.encoded_len();
    let length = u32::try_from(size).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(size + 4);
    frame.extend_from_slice(&length.to_le_bytes());
    message.encode(&mut frame).map_err(io::Error::other)?;
    writer.write_all(&frame).await
}

#[cfg(test)]
mod tests;
