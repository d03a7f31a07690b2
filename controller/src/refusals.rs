//! What was refused to whom, on its way into the journal (INV-11).
//!
//! ```text
//! access table, answers, handshakes, sessions -> note -> Ledger: first at once, then counts
//!                                                          -> run -> driver -> record
//! ```
//!
//! Noting costs a lock and waits for nobody. What is written, and when, is decided by
//! [`Ledger`]; what waits when the controller is killed is in its log only.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lockstep_core::Event;
use lockstep_core::refusal::{Caller, Kind, Why};
use lockstep_proto::refusals::{Bounds, Counted, Ledger};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::driver::{Handle, wall_clock};
use crate::identity::{Identity, Peer};

/// A record has less than 400 bytes: 11 MB on a day on which somebody does nothing else.
const BOUNDS: Bounds = Bounds {
    kinds: 256,
    a_minute: 20,
};

/// The name of what is no call.
pub(crate) const HANDSHAKE: &str = "handshake";

/// The name of whatever is in no table.
pub(crate) const OTHER: &str = "other";

/// Where refusals are noted.
#[derive(Debug, Clone)]
pub(crate) struct Refusals(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ledger: Mutex<Ledger<Kind>>,
    noted: Notify,
}

impl Default for Refusals {
    fn default() -> Self {
        let others = Kind {
            who: Caller::Others,
            call: OTHER,
            why: Why::NotAllowed,
        };
        Self(Arc::new(Inner {
            ledger: Mutex::new(Ledger::new(BOUNDS, others)),
            noted: Notify::new(),
        }))
    }
}

impl Refusals {
    /// Somebody was refused something.
    pub(crate) fn note(&self, who: Caller, call: &'static str, why: Why) {
        self.ledger().note(wall_clock(), Kind { who, call, why });
        self.0.noted.notify_one();
    }

    /// A peer was answered like this; not every answer that is no success is a refusal.
    pub(crate) fn note_answer(&self, peer: &Peer, call: &'static str, status: &Status) {
        if let Some(why) = why(status.code()) {
            self.note(caller(peer.identity()), call, why);
        }
    }

    /// Hands what is due to the driver, until `stop`.
    pub(crate) async fn run(self, driver: Handle, stop: CancellationToken) {
        loop {
            let next = self.ledger().next(wall_clock());
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep(at.since(wall_clock()).to_std()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.0.noted.notified() => continue,
                () = due => {}
            }
            let due = self.ledger().take_due(wall_clock());
            if hand_over(&driver, due).await.is_err() {
                return;
            }
        }
    }

    /// Hands over what waits, before the end.
    pub(crate) async fn finish(&self, driver: &Handle) {
        let all = self.ledger().take_all();
        // A driver that has ended writes nothing.
        let _ = hand_over(driver, all).await;
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger<Kind>> {
        // Nothing that holds the lock leaves the ledger half changed.
        self.0.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn hand_over(
    driver: &Handle,
    counted: Vec<Counted<Kind>>,
) -> Result<(), crate::driver::Stopping> {
    for counted in counted {
        driver.event(Event::CallsRefused(counted.into())).await?;
    }
    Ok(())
}

/// Who that is for the journal.
pub(crate) fn caller(identity: &Identity) -> Caller {
    match identity {
        Identity::Nobody => Caller::Nobody,
        Identity::Agent(host) => Caller::Agent(host.clone()),
        Identity::Operator { name, .. } => Caller::Operator(name.clone()),
    }
}

/// Why, by an answer's code; none if it is about the controller, or about what is not there.
fn why(code: Code) -> Option<Why> {
    match code {
        Code::PermissionDenied => Some(Why::NotAllowed),
        Code::Unauthenticated => Some(Why::Certificate),
        Code::InvalidArgument | Code::OutOfRange => Some(Why::Invalid),
        Code::FailedPrecondition => Some(Why::NotNow),
        Code::AlreadyExists => Some(Why::Taken),
        Code::ResourceExhausted => Some(Why::Rate),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => None,
    }
}
