//! What is on its way to one watcher: events that come soon after one another go together.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

use crate::hub::{PIECE, Piece};

/// Bytes that go together: what fits into one frame of HTTP/2 and one record of TLS, and so takes
/// one write.
const PARCEL: usize = 2 * PIECE;

/// What comes sooner than this after a parcel waits for what else comes, so that ten thousand events
/// a second are forty wake-ups of a connection. Nobody sees a delay.
const PACE: Duration = Duration::from_millis(25);

/// What is on its way to one watcher.
#[derive(Debug)]
pub(super) struct Outbox {
    sender: mpsc::Sender<Result<Bytes, Status>>,
    /// The newest event that was put in.
    last: u64,
    parcel: BytesMut,
    /// When the last parcel went.
    sent: Option<Instant>,
}

impl Outbox {
    /// One for a watcher who has had the events up to a number.
    pub(super) fn new(after: u64, sender: mpsc::Sender<Result<Bytes, Status>>) -> Self {
        Self {
            sender,
            last: after,
            parcel: BytesMut::new(),
            sent: None,
        }
    }

    /// The newest event that the watcher has, or that is on its way.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Adds what the watcher has not had; says whether anything was new.
    pub(super) async fn put(&mut self, piece: &Piece) -> Result<bool, Status> {
        let Some((bytes, newest)) = piece.after(self.last) else {
            return Ok(false);
        };
        if self.parcel.len() + bytes.len() > PARCEL {
            self.send().await?;
        }
        self.parcel.extend_from_slice(&bytes);
        self.last = newest;
        Ok(true)
    }

    /// Sends what is in it. Waits for a watcher who is slow.
    pub(super) async fn send(&mut self) -> Result<(), Status> {
        if self.parcel.is_empty() {
            return Ok(());
        }
        let parcel = std::mem::take(&mut self.parcel).freeze();
        let sent = self.sender.send(Ok(parcel)).await;
        self.sent = Some(Instant::now());
        sent.map_err(|_| Status::cancelled("nobody watches any more"))
    }

    /// Waits until the next parcel may go.
    pub(super) async fn rest(&self) {
        if let Some(sent) = self.sent {
            tokio::time::sleep_until(sent + PACE).await;
        }
    }
}
