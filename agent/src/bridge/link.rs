//! The link's end of the socket.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use lockstep_proto::wire::Hello;
use lockstep_proto::wire::host_v1::{self as wire, to_exec};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::codec::{self, Said};
use super::{BridgeError, Frames, send};
use crate::errors::chain;
use crate::exec::{Inbound, LogPiece, Outbound};
use crate::notify::notify;
use crate::watchdog::{Due, WELL};

/// Exec is on the same host, and restarts within a second.
const AGAIN: Duration = Duration::from_secs(1);

/// Stands for exec in the link's process: carries what the link says to the socket, and back, until
/// `stop`. While exec is away nobody answers, and the link dials no controller.
pub(crate) async fn relay(
    socket: &Path,
    mut from: mpsc::Receiver<Inbound>,
    logs: mpsc::Sender<LogPiece>,
    stop: CancellationToken,
) {
    let mut sessions = 0;
    loop {
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            ended = converse(socket, &mut from, &logs, &mut sessions) => ended,
        };
        let Err(error) = ended;
        if matches!(error, BridgeError::Stopping) {
            return;
        }
        let why = chain(&error);
        tracing::warn!(socket = %socket.display(), why, "exec is not there");
        notify(&format!("STATUS=exec is not there: {why}"));
        // It is not this process that is not well.
        notify(WELL);
        let pause = tokio::time::sleep(AGAIN);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = &mut pause => break,
                // A reply that is dropped says that nobody answers.
                lost = from.recv() => if lost.is_none() {
                    return;
                },
            }
        }
    }
}

/// What the link waits for from exec.
#[derive(Default)]
struct Waiting {
    hellos: VecDeque<oneshot::Sender<Hello>>,
    session: Option<(u64, mpsc::Sender<Outbound>)>,
    /// What the session has no room for yet.
    held_up: Option<Outbound>,
}

async fn converse(
    socket: &Path,
    from: &mut mpsc::Receiver<Inbound>,
    logs: &mpsc::Sender<LogPiece>,
    sessions: &mut u64,
) -> Result<std::convert::Infallible, BridgeError> {
    let stream = UnixStream::connect(socket).await?;
    let peer = stream.peer_cred()?.uid();
    // Nobody but root, or whoever runs both, may pose as exec.
    if peer != 0 && peer != rustix::process::geteuid().as_raw() {
        return Err(BridgeError::Io(std::io::Error::other(format!(
            "it belongs to user {peer}, not to root"
        ))));
    }
    let (reader, mut writer) = stream.into_split();
    let mut frames = Frames::new(reader);
    let mut waiting = Waiting::default();
    notify("READY=1");
    let mut due = Due::new();
    loop {
        let (held_up, room) = waiting.room();
        tokio::select! {
            () = due.come() => {
                let (reply, hello) = oneshot::channel();
                waiting.hellos.push_back(reply);
                send(&mut writer, &codec::dial()).await?;
                // A round through both processes.
                tokio::task::spawn_local(async move {
                    if hello.await.is_ok() {
                        notify(WELL);
                    }
                });
            }
            message = from.recv() => {
                let message = message.ok_or(BridgeError::Stopping)?;
                if let Some(message) = waiting.say(message, sessions) {
                    send(&mut writer, &message).await?;
                }
            }
            // A network that is slow on the way up must not keep orders from coming down.
            () = room => waiting.hand_over(),
            message = frames.next(), if !held_up => waiting.hear(message?, logs)?,
        }
    }
}

impl Waiting {
    fn say(&mut self, message: Inbound, sessions: &mut u64) -> Option<wire::ToExec> {
        match message {
            Inbound::Dial(reply) => {
                self.hellos.push_back(reply);
                Some(codec::dial())
            }
            Inbound::Connected { welcome, outbox } => {
                *sessions += 1;
                (self.session, self.held_up) = (Some((*sessions, outbox)), None);
                let connected = wire::Connected {
                    session: *sessions,
                    welcome: Some(welcome.into()),
                };
                Some(codec::exec_message(to_exec::Message::Connected(connected)))
            }
            message => {
                if matches!(message, Inbound::Disconnected) {
                    (self.session, self.held_up) = (None, None);
                }
                codec::to_exec(message)
            }
        }
    }

    fn hear(
        &mut self,
        message: wire::ToLink,
        logs: &mpsc::Sender<LogPiece>,
    ) -> Result<(), BridgeError> {
        match codec::said(message)? {
            Said::Hello(hello) => {
                if let Some(reply) = self.hellos.pop_front() {
                    // The link may have given up meanwhile.
                    let _ = reply.send(hello);
                }
            }
            // Output is lossy, and must not hold up reports.
            Said::Log(piece) => _ = logs.try_send(piece),
            // What was said in a session that has ended is said again in the next one.
            Said::Outbound(number, outbound) => {
                let is_current = |(current, _): &(u64, _)| *current == number;
                if self.session.as_ref().is_some_and(is_current) {
                    self.held_up = Some(outbound);
                    self.hand_over();
                }
            }
        }
        Ok(())
    }

    /// Whether something is held up, and when there is room for it.
    fn room(&self) -> (bool, impl Future<Output = ()> + use<>) {
        let held_up = self.held_up.is_some();
        let outbox = self.session.as_ref().filter(|_| held_up);
        let outbox = outbox.map(|(_, outbox)| outbox.clone());
        let room = async move {
            match outbox {
                // Closed or not: handing over finds out.
                Some(outbox) => _ = outbox.reserve().await,
                None => std::future::pending().await,
            }
        };
        (held_up, room)
    }

    fn hand_over(&mut self) {
        let (Some((_, outbox)), Some(outbound)) = (&self.session, self.held_up.take()) else {
            return;
        };
        match outbox.try_send(outbound) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(outbound)) => self.held_up = Some(outbound),
            Err(mpsc::error::TrySendError::Closed(_)) => self.session = None,
        }
    }
}
