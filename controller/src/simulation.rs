//! The controller in a simulated world: the same coordinator, driver and sessions, over a journal
//! in memory and a network that a test makes up. With the feature `faults` only.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use lockstep_core::{Answer, Call, Coordinator, Entry, Refused};
use lockstep_proto::ids::{HostId, OperatorName, RolloutId};
use lockstep_proto::seal::SealedPlan;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{Control, Submissions};
use crate::app::{Services, serve_on};
use crate::blobs::Blobs;
use crate::driver::{Driver, DriverError, Handle, Parts};
use crate::enroll::Enrolment;
use crate::hub::Hub;
use crate::identity::Peer;
use crate::journal::memory::{Memory, MemoryJournal};
use crate::journal::{AppendError, Head, Journal, JournalId, OpenError};
use crate::logs::Logs;
use crate::refusals::Refusals;
use crate::session::{Agents, Outputs};
use crate::tls::Connection;

/// What is simulated beside the network.
pub trait World {
    /// The machine's clock, in milliseconds since 1970.
    fn wall_clock(&self) -> u64;
    /// Whether the controller that asks gives way to a higher term.
    fn heeds_terms(&self) -> bool;
    /// Any number.
    fn random(&self) -> u64;
    /// Records are about to be appended, or are durable now.
    fn appending(&self, entries: &[Entry], durable: bool);
}

thread_local! {
    static WORLD: RefCell<Option<Rc<dyn World>>> = const { RefCell::new(None) };
}

/// Puts this thread's controllers into a world, or back into the real one.
pub fn enter(world: Option<Rc<dyn World>>) {
    WORLD.set(world);
}

/// The world of this thread; none in the real one.
pub(crate) fn world() -> Option<Rc<dyn World>> {
    WORLD.with_borrow(Clone::clone)
}

/// One end of a connection.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What an agent has dialled: the controller's end.
pub struct Dialled {
    /// Whose agent, as if its certificate had been verified.
    pub host: HostId,
    /// The bytes.
    pub stream: Box<dyn Stream>,
}

impl From<Dialled> for Connection<Box<dyn Stream>> {
    fn from(dialled: Dialled) -> Self {
        let forever = SystemTime::now() + std::time::Duration::from_hours(24 * 3650);
        Self::simulated(dialled.stream, Peer::simulated(dialled.host, forever))
    }
}

/// A disk: the journal and the plans of a controller, whoever runs on it.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    journal: Memory,
    plans: Vec<Arc<SealedPlan>>,
}

impl Disk {
    /// Another disk with the same content.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self {
            journal: self.journal.copy(),
            plans: self.plans.clone(),
        }
    }

    /// Keeps a plan.
    pub fn store(&mut self, plan: Arc<SealedPlan>) {
        self.plans.push(plan);
    }

    /// What the journal holds.
    pub fn entries(&self) -> Vec<Entry> {
        let journal = self.journal.open();
        let payloads = journal.payloads();
        let read = |payload: Result<Vec<u8>, OpenError>| read(&payload.expect("in memory"));
        payloads.map(read).collect()
    }
}

fn read(payload: &[u8]) -> Entry {
    serde_json::from_slice(payload).expect("a controller wrote it")
}

/// A journal whose world may end the process before or after it is written.
#[derive(Debug)]
struct Watched(MemoryJournal);

impl Journal for Watched {
    fn id(&self) -> JournalId {
        self.0.id()
    }

    fn head(&self) -> Head {
        self.0.head()
    }

    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<Head, AppendError> {
        if payloads.is_empty() {
            return self.0.append(payloads);
        }
        let entries: Vec<Entry> = payloads.iter().map(|payload| read(payload)).collect();
        let world = world().expect("a simulated controller has a world");
        world.appending(&entries, false);
        let head = self.0.append(payloads)?;
        world.appending(&entries, true);
        Ok(head)
    }

    fn payloads(&self) -> Box<dyn Iterator<Item = Result<Vec<u8>, OpenError>> + '_> {
        self.0.payloads()
    }

    fn close(self: Box<Self>) {}
}

/// A controller that runs.
#[derive(Debug, Clone)]
pub struct Controller {
    driver: Handle,
    blobs: Arc<Blobs>,
}

/// Starts a controller on a disk; must be called within the `LocalSet` that is its process. `dir`
/// is for blobs and output. The second value resolves when it ends, with the reason.
pub fn start(
    disk: &Disk,
    dir: &Path,
    take_over: bool,
    connections: mpsc::Receiver<Dialled>,
) -> Result<(Controller, impl Future<Output = Result<(), String>> + use<>), String> {
    let blobs = Arc::new(Blobs::open(dir.join("blobs")).map_err(|error| error.to_string())?);
    for plan in &disk.plans {
        let stored = blobs.store_plan(plan, "");
        stored.map_err(|error| error.to_string())?;
    }
    let logs = Logs::open(dir.join("logs")).map_err(|error| error.to_string())?;
    let hub = Hub::default();
    let parts = Parts {
        journal: Box::new(Watched(disk.journal.open())),
        hub: hub.clone(),
        notices: mpsc::channel(1).0,
        suspensions: Arc::default(),
        epoch_above: 0,
        compact_above: None,
        take_over,
        break_glass: None,
        suspend: vec![],
    };
    let find = |digest| blobs.plan(digest).ok().flatten();
    let driver = Driver::recover(parts, find).map_err(|error| error.to_string())?;
    let (handle, run) = driver.here();
    let tasks = TaskTracker::new();
    let agents = Agents {
        driver: handle.clone(),
        blobs: Arc::clone(&blobs),
        logs: logs.clone(),
        hub: hub.clone(),
        tasks: tasks.clone(),
        outputs: Outputs::default(),
        refusals: Refusals::default(),
    };
    let control = Control {
        driver: handle.clone(),
        blobs: Arc::clone(&blobs),
        logs,
        hub,
        tasks,
        draining: CancellationToken::new(),
        started: SystemTime::now(),
        list: None,
        submissions: Submissions::default(),
    };
    let services = Services {
        agents,
        control,
        enrolment: Enrolment::none(handle.clone()),
        suspensions: Arc::default(),
        refusals: Refusals::default(),
    };
    let connections =
        ReceiverStream::new(connections).map(|it| Ok::<_, io::Error>(Connection::from(it)));
    let serving = serve_on(connections, services, CancellationToken::new());
    tokio::task::spawn_local(serving);
    let ended = async {
        run.await.map_err(|error| match error {
            DriverError::Superseded { .. } => format!("superseded: {error}"),
            error => error.to_string(),
        })
    };
    let controller = Controller {
        driver: handle,
        blobs,
    };
    Ok((controller, ended))
}

impl Controller {
    /// Submits a plan under an id; none if the controller has ended.
    pub async fn submit(
        &self,
        plan: &Arc<SealedPlan>,
        rollout: &RolloutId,
    ) -> Option<Result<Answer, Refused>> {
        self.blobs.store_plan(plan, "").ok()?;
        let call = Call::Submit {
            rollout: rollout.clone(),
            plan: Arc::clone(plan),
            dry_run: false,
            signatures: vec![],
        };
        self.call(call).await
    }

    /// An operator's call; none if the controller has ended.
    pub async fn call(&self, call: Call) -> Option<Result<Answer, Refused>> {
        let operator: OperatorName = "olga".parse().expect("a name");
        self.driver.call(operator, vec![], call).await.ok()
    }

    /// Reads the coordinator; none if the controller has ended.
    pub async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Coordinator) -> T + Send + 'static,
    ) -> Option<T> {
        self.driver.read(read).await.ok()
    }
}
