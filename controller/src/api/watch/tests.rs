//! Watchers of a rollout that a driver runs over a journal in memory.

use bytes::BufMut as _;
use lockstep_core::Call;
use prost::Message as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::api::Submissions;
use crate::blobs::Blobs;
use crate::driver::{self, Driver, Parts};
use crate::hub::Hub;
use crate::journal::memory::Memory;
use crate::logs::Logs;

/// So few pieces that one who does not read is soon behind.
const LAG: usize = 16;

/// More than a watcher's queue and its channel have room for.
const TIMES: usize = 300;

struct World {
    control: Control,
    rollout: RolloutId,
    _dir: tempfile::TempDir,
}

impl World {
    /// A rollout that waits for the consent of a host that is not there.
    async fn new() -> Self {
        let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::with_lag(LAG));
        let parts = Parts {
            hub: hub.clone(),
            ..driver::tests::parts(&Memory::default(), &Arc::default())
        };
        let (driver, _) = Driver::recover(parts, |_| None).unwrap().spawn();
        let control = Control {
            driver,
            blobs: Arc::new(Blobs::open(dir.path().join("blobs")).unwrap()),
            logs: Logs::open(dir.path().join("logs")).unwrap(),
            hub,
            tasks: TaskTracker::new(),
            draining: CancellationToken::new(),
            started: std::time::SystemTime::now(),
            list: None,
            submissions: Submissions::default(),
        };
        let (mut hello, (candidate, _messages)) = (
            driver::tests::hello("app-1"),
            driver::tests::candidate("app-1"),
        );
        hello.labels.insert("role".into(), "app".into());
        control.driver.open(hello, 1, candidate).await.unwrap();
        let world = Self {
            control,
            rollout: RolloutId::from_random([1; 6]),
            _dir: dir,
        };
        world
            .call(Call::Submit {
                rollout: world.rollout.clone(),
                plan: Arc::new(driver::tests::plan()),
                dry_run: false,
                signatures: vec![],
            })
            .await;
        world
    }

    async fn call(&self, call: Call) {
        let driver = &self.control.driver;
        let answer = driver.call("dora".into(), vec![], call).await;
        answer.unwrap().unwrap();
    }

    /// Many things happen, one after the other.
    async fn live(&self) {
        for _ in 0..TIMES {
            let rollout = self.rollout.clone();
            self.call(Call::Pause { rollout }).await;
            let rollout = self.rollout.clone();
            self.call(Call::Resume { rollout }).await;
        }
    }

    async fn end(&self) {
        let rollout = self.rollout.clone();
        let reason = "enough".to_owned();
        self.call(Call::Cancel { rollout, reason }).await;
    }

    fn watch(&self, after: u64) -> mpsc::Receiver<Result<Bytes, Status>> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (control, rollout) = (self.control.clone(), self.rollout.clone());
        tokio::spawn(async move { watch(control, rollout, after, sender).await.unwrap() });
        receiver
    }

    /// What tonic would make of every event there is.
    async fn all(&self) -> Vec<u8> {
        let asked = self.rollout.clone();
        let read = move |coordinator: &Coordinator| coordinator.events(&asked, 0).unwrap().to_vec();
        let events = self.control.driver.read(read).await.unwrap();
        let mut all = vec![];
        for event in events {
            let message = convert::event(&event).encode_to_vec();
            all.put_u8(0);
            all.put_u32(u32::try_from(message.len()).unwrap());
            all.extend(message);
        }
        all
    }
}

/// All that comes, in its parts.
fn reading(mut watched: mpsc::Receiver<Result<Bytes, Status>>) -> JoinHandle<Vec<Bytes>> {
    tokio::spawn(async move {
        let mut parcels = vec![];
        while let Some(parcel) = watched.recv().await {
            parcels.push(parcel.unwrap());
        }
        parcels
    })
}

#[tokio::test]
async fn a_slow_and_a_fast_watcher_get_every_event_once_and_in_order() {
    let world = World::new().await;
    let mut idle = world.control.hub.subscribe(&world.rollout);
    let fast = reading(world.watch(0));
    let slow = world.watch(0);
    world.live().await;
    let lagged = matches!(idle.try_recv(), Err(TryRecvError::Lagged(_)));
    assert!(lagged, "nobody was slow");
    world.end().await;
    let fast = fast.await.unwrap().concat();
    let slow = reading(slow).await.unwrap().concat();
    let all = world.all().await;
    assert!(fast == all, "{} bytes of {}", fast.len(), all.len());
    assert!(slow == all, "{} bytes of {}", slow.len(), all.len());
}

#[tokio::test]
async fn what_comes_together_goes_together() {
    let world = World::new().await;
    let mut watched = world.watch(0);
    // What was there when it began.
    watched.recv().await.unwrap().unwrap();
    let event = |number, kind: EventKind| RolloutEvent {
        number,
        kind: kind.into(),
        ..RolloutEvent::default()
    };
    for number in 1001..1000 + LAG as u64 {
        let event = event(number, EventKind::StepOk);
        world.control.hub.publish(&world.rollout, [event]);
    }
    let ended = event(2000, EventKind::Ended);
    world.control.hub.publish(&world.rollout, [ended]);
    let parcels = reading(watched).await.unwrap();
    assert_eq!(parcels.len(), 1, "{parcels:?}");
}

#[tokio::test]
async fn one_who_has_had_some_gets_the_rest() {
    let world = World::new().await;
    world.live().await;
    world.end().await;
    let all = world.all().await;
    let rest = reading(world.watch(100)).await.unwrap().concat();
    assert!(!rest.is_empty() && rest.len() < all.len());
    assert!(all.ends_with(&rest));
    let nothing = reading(world.watch(u64::MAX)).await.unwrap();
    assert!(nothing.is_empty());
}
