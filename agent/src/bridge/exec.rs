//! Exec's end of the socket.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use lockstep_proto::ids::HostId;
use lockstep_proto::wire::host_v1 as wire;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::codec::{self, Heard};
use super::{BridgeError, Frames, send};
use crate::errors::chain;
use crate::exec::{Inbound, LogPiece, Outbound};

/// Messages that wait for the socket. The link is on the same host and only hands them on.
const OUT: usize = 16;

/// The socket on which exec waits for its link.
#[derive(Debug)]
pub(crate) struct Listening {
    listener: UnixListener,
    /// Whose link is taken; another user's is not.
    user: u32,
    host: HostId,
}

impl Listening {
    /// Listens; a socket that an earlier exec left is replaced. The caller holds the state lock.
    pub(crate) fn bind(path: &Path, user: u32, host: HostId) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        // Everybody may knock: the kernel says who it is.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        Ok(Self {
            listener,
            user,
            host,
        })
    }

    /// Carries messages until `stop`. A new connection takes the place of the one before: a link
    /// that was restarted does not wait for its predecessor's end.
    pub(crate) async fn serve(
        self,
        exec: mpsc::Sender<Inbound>,
        mut logs: mpsc::Receiver<LogPiece>,
        stop: CancellationToken,
    ) {
        let mut next = None;
        loop {
            let stream = if let Some(stream) = next.take() {
                stream
            } else {
                tokio::select! {
                    () = stop.cancelled() => return,
                    stream = self.accept() => stream,
                }
            };
            tracing::info!("the link is there");
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                replaced = self.accept() => {
                    next = Some(replaced);
                    Ok(())
                }
                ended = converse(stream, &self.host, &exec, &mut logs) => ended,
            };
            if let Err(error) = ended {
                tracing::warn!(why = chain(&error), "the link is gone");
            }
            if exec.send(Inbound::Disconnected).await.is_err() {
                return;
            }
        }
    }

    /// The next connection of the link's user.
    async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == self.user => return stream,
                    peer => tracing::error!(
                        uid = peer.ok().map(|peer| peer.uid()),
                        expected = self.user,
                        "somebody who is not the link has connected, and is not heard"
                    ),
                },
                Err(error) => {
                    tracing::warn!(%error, "the link cannot be accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    }
}

async fn converse(
    stream: UnixStream,
    host: &HostId,
    exec: &mpsc::Sender<Inbound>,
    logs: &mut mpsc::Receiver<LogPiece>,
) -> Result<(), BridgeError> {
    let (reader, mut writer) = stream.into_split();
    let (out, mut messages) = mpsc::channel(OUT);
    let write = async {
        loop {
            let message = tokio::select! {
                // Reports before output.
                biased;
                Some(message) = messages.recv() => message,
                Some(piece) = logs.recv() => codec::log(piece),
                else => return Err(BridgeError::Stopping),
            };
            send(&mut writer, &message).await?;
        }
    };
    tokio::select! {
        ended = listen(Frames::new(reader), host, exec, &out) => ended,
        ended = write => ended,
    }
}

/// Hears the link, and has exec's words of a session brought to it until the next one begins.
async fn listen(
    mut frames: Frames<impl tokio::io::AsyncRead + Unpin>,
    host: &HostId,
    exec: &mpsc::Sender<Inbound>,
    out: &mpsc::Sender<wire::ToLink>,
) -> Result<(), BridgeError> {
    let mut session: Option<AbortOnDropHandle<()>> = None;
    loop {
        let inbound = match codec::heard(frames.next().await?, host)? {
            Heard::Dial => {
                let (reply, hello) = oneshot::channel();
                tell(exec, Inbound::Dial(reply)).await?;
                let hello = hello.await.map_err(|_| BridgeError::Stopping)?;
                let said = out.send(codec::hello(hello)).await;
                said.map_err(|_| BridgeError::Closed)?;
                continue;
            }
            Heard::Connected(number, welcome) => {
                // What the last one had to say is said again.
                drop(session.take());
                let (outbox, said) = mpsc::channel(OUT);
                let brought = tokio::task::spawn_local(bring(number, said, out.clone()));
                session = Some(AbortOnDropHandle::new(brought));
                Inbound::Connected { welcome, outbox }
            }
            Heard::Inbound(inbound) => {
                if matches!(inbound, Inbound::Disconnected) {
                    drop(session.take());
                }
                inbound
            }
        };
        tell(exec, inbound).await?;
    }
}

async fn bring(session: u64, mut said: mpsc::Receiver<Outbound>, out: mpsc::Sender<wire::ToLink>) {
    while let Some(message) = said.recv().await {
        if out.send(codec::to_link(session, message)).await.is_err() {
            return;
        }
    }
}

async fn tell(exec: &mpsc::Sender<Inbound>, message: Inbound) -> Result<(), BridgeError> {
    let told = exec.send(message).await;
    told.map_err(|_| BridgeError::Stopping)
}
