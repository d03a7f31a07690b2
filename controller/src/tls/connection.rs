//! A connection whose peer is known, or is known to be nobody; and when it is cut.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::gate::{OfPeer, Place};
use crate::identity::Peer;
use crate::suspensions::{Entered, Suspensions};

/// Between telling the streams of a suspended peer why they end, and cutting the connection.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long one without a certificate is connected: joining takes one call.
const STRANGER_FOR: Duration = Duration::from_secs(15);

/// A connection whose peer is known.
pub(crate) struct Connection<S = TlsStream<TcpStream>> {
    stream: S,
    peer: Peer,
    /// Resolves when the connection is to be cut; none on a simulated network.
    end: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    _held: Option<Held>,
}

/// What a connection holds for as long as it is up.
#[expect(
    dead_code,
    reason = "each is given back when the connection is dropped"
)]
pub(super) enum Held {
    /// Its place among those that are cut when somebody is suspended, and among its peer's own.
    Known(Entered, OfPeer),
    /// Its place among those that have no certificate.
    Stranger(Place),
}

impl Connection {
    /// A connection of one whose certificate was verified. When the peer is suspended, its streams
    /// have a moment to say so; then it is cut.
    pub(super) fn known(
        stream: TlsStream<TcpStream>,
        peer: Peer,
        permit: OfPeer,
        suspensions: &Arc<Suspensions>,
    ) -> Self {
        let entered = suspensions.enter(&peer);
        let (cut, ends) = (peer.when_cut().clone(), peer.remaining());
        let end = async move {
            tokio::select! {
                () = cut.cancelled_owned() => {}
                () = tokio::time::sleep(ends) => {}
            }
            tokio::time::sleep(LAST_WORDS).await;
        };
        Self {
            stream,
            peer,
            end: Some(Box::pin(end)),
            _held: Some(Held::Known(entered, permit)),
        }
    }

    /// A connection of one who has shown no certificate: it ends soon.
    pub(super) fn stranger(
        stream: TlsStream<TcpStream>,
        address: SocketAddr,
        place: Place,
    ) -> Self {
        Self {
            stream,
            peer: Peer::nobody(address),
            end: Some(Box::pin(tokio::time::sleep(STRANGER_FOR))),
            _held: Some(Held::Stranger(place)),
        }
    }
}

impl<S> Connection<S> {
    /// A connection of a peer that is known to be who it is.
    #[cfg(feature = "faults")]
    pub(crate) fn simulated(stream: S, peer: Peer) -> Self {
        Self {
            stream,
            peer,
            end: None,
            _held: None,
        }
    }
}

impl<S> fmt::Debug for Connection<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.peer).finish()
    }
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // To HTTP/2 it looks as if the peer had gone.
        if let Some(end) = &mut self.end
            && end.as_mut().poll(cx).is_ready()
        {
            self.end = None;
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
