//! The driver over a journal in memory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lockstep_core::Call;
use lockstep_proto::action::Action;
use lockstep_proto::action::check::{Port, PortState};
use lockstep_proto::ids::{BootId, InstanceId};
use lockstep_proto::plan::{
    CompiledPlan, FORMAT, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::report::{Report, ReportBody};
use lockstep_proto::seal;
use lockstep_proto::values::Period;
use lockstep_proto::wire::{Hello, VersionRange};

use lockstep_core::{Effects, Message};
use lockstep_proto::ids::RolloutId;

use super::*;
use crate::journal::memory::Memory;
use crate::journal::{Head, JournalId};
use crate::session::registry::{self, Candidate, Ending, QUEUE};

/// A journal whose disk can break.
#[derive(Debug)]
struct Breakable {
    inner: Box<dyn Journal>,
    broken: Arc<AtomicBool>,
}

impl Journal for Breakable {
    fn id(&self) -> JournalId {
        self.inner.id()
    }

    fn head(&self) -> Head {
        self.inner.head()
    }

    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<Head, AppendError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(AppendError::Poisoned);
        }
        self.inner.append(payloads)
    }

    fn payloads(&self) -> Box<dyn Iterator<Item = Result<Vec<u8>, OpenError>> + '_> {
        self.inner.payloads()
    }

    fn close(self: Box<Self>) {
        self.inner.close();
    }
}

/// What a driver is made of.
pub(crate) fn parts(memory: &Memory, broken: &Arc<AtomicBool>) -> Parts {
    Parts {
        suspensions: Arc::default(),
        journal: Box::new(Breakable {
            inner: Box::new(memory.open()),
            broken: Arc::clone(broken),
        }),
        hub: Hub::default(),
        notices: mpsc::channel(1).0,
        take_over: false,
        suspend: vec![],
        epoch_above: 0,
        compact_above: None,
        break_glass: None,
    }
}

fn driver(memory: &Memory) -> Driver {
    Driver::recover(parts(memory, &Arc::default()), |_| None).unwrap()
}

/// What an agent says first.
pub(crate) fn hello(host: &str) -> Hello {
    Hello {
        versions: VersionRange { min: 1, max: 1 },
        host: host.parse().unwrap(),
        instance: InstanceId::from_random([1; 8]),
        boot: BootId::from_bytes([1; 8]),
        highest_epoch: Epoch::NONE,
        last_report: 0,
        labels: BTreeMap::new(),
        agent_version: "0.1.0".into(),
        held_rollout: None,
        acknowledged: 0,
    }
}

/// An agent that would like a session.
pub(crate) fn candidate(host: &str) -> (Candidate, mpsc::Receiver<registry::Down>) {
    let (queue, messages) = mpsc::channel(QUEUE);
    let candidate = Candidate {
        host: host.parse().unwrap(),
        instance: InstanceId::from_random([1; 8]),
        peer: "127.0.0.1:1".parse().unwrap(),
        queue,
        ending: Ending::default(),
    };
    (candidate, messages)
}

#[tokio::test]
async fn nothing_is_sent_of_a_batch_that_is_not_durable() {
    let (memory, broken) = (Memory::default(), Arc::default());
    let driver = Driver::recover(parts(&memory, &broken), |_| None).unwrap();
    let (handle, end) = driver.spawn();
    let (healthy, mut messages) = candidate("app-1");
    handle.open(hello("app-1"), 1, healthy).await.unwrap();
    assert!(messages.recv().await.is_some(), "the welcome");

    broken.store(true, Ordering::Relaxed);
    let (candidate, mut messages) = candidate("app-2");
    let refused = handle.open(hello("app-2"), 1, candidate).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unavailable);
    assert!(messages.recv().await.is_none(), "a welcome was sent");
    let end = end.await.expect("the driver ends by itself");
    assert!(matches!(end, Err(DriverError::Append(_))), "{end:?}");
    assert_eq!(handle.read(|_| ()).await, Err(Stopping));
}

#[tokio::test]
async fn whoever_was_let_in_just_before_the_suspension_gets_no_session() {
    let memory = Memory::default();
    let suspended = Parts {
        suspend: vec![Subject::Host("app-1".parse().unwrap())],
        ..parts(&memory, &Arc::default())
    };
    // Nobody has asked the list of the suspended here, as it is when that was asked too early.
    let (handle, _end) = Driver::recover(suspended, |_| None).unwrap().spawn();
    let (candidate, mut messages) = candidate("app-1");
    let refused = handle.open(hello("app-1"), 1, candidate).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert!(messages.recv().await.is_none(), "a welcome was sent");
    let (candidate, _messages) = self::candidate("app-2");
    handle.open(hello("app-2"), 1, candidate).await.unwrap();
}

#[tokio::test]
async fn what_was_handed_over_before_a_stop_is_still_done() {
    let memory = Memory::default();
    let (handle, end) = driver(&memory).spawn();
    let (candidate, mut messages) = candidate("app-1");
    let opening = handle.open(hello("app-1"), 1, candidate);
    let (opened, stopped) = tokio::join!(opening, handle.stop());
    opened.unwrap();
    stopped.unwrap();
    assert!(messages.recv().await.is_some());
    assert!(matches!(end.await, Ok(Ok(()))));
    let records = memory.open().payloads().count();
    assert_eq!(records, 2, "a term and a host");
}

#[test]
fn a_term_is_above_every_earlier_one() {
    let memory = Memory::default();
    let mut last = 0;
    for _ in 0..3 {
        let mut driver = driver(&memory);
        assert!(driver.epoch.counter > last);
        last = driver.epoch.counter;
        let effects = driver.coordinator.resume(driver.clock.now());
        let mut round = Round::default();
        round.take(&driver.sessions, effects);
        driver.finish(round).unwrap();
    }
    let mut parts = parts(&memory, &Arc::default());
    parts.epoch_above = 40;
    let driver = Driver::recover(parts, |_| None).unwrap();
    assert_eq!(driver.epoch.counter, 41);
}

#[test]
fn a_session_with_many_reports_in_a_batch_is_told_once() {
    let mut sessions = Registry::default();
    let mut queues = ["app-1", "app-2"].map(|host| {
        let (candidate, queue) = candidate(host);
        sessions.admit(candidate).unwrap();
        queue
    });
    let mut round = Round::default();
    for number in 1..=100 {
        for host in ["app-1", "app-2"] {
            let message = Message::Acknowledged(number);
            let effects = Effects {
                send: vec![(host.parse().unwrap(), message)],
                ..Effects::default()
            };
            round.take(&sessions, effects);
        }
    }
    assert!(round.sends.is_empty(), "they wait for an order to go with");
    for (host, number, upto) in round.acknowledged {
        sessions.owe(&host, number, upto);
    }
    let lost = sessions.pay(&witnessed());
    assert_eq!(lost, vec![]);
    for queue in &mut queues {
        let told = queue.try_recv().unwrap();
        let upto = wire::down::Message::Acknowledged(100);
        assert_eq!(told.message, Some(upto));
        assert_eq!(told.head, Some(witnessed()), "INV-11");
        assert!(queue.try_recv().is_err(), "once");
    }
}

fn witnessed() -> wire::Head {
    wire::Head {
        journal: "a".into(),
        number: 7,
        hash: vec![7; 32].into(),
    }
}

#[test]
fn an_order_takes_along_what_an_agent_is_owed() {
    let mut sessions = Registry::default();
    let (candidate, mut queue) = candidate("app-1");
    let host = candidate.host.clone();
    let number = sessions.admit(candidate).unwrap();
    sessions.owe(&host, number, 3);
    let order = wire::down::Message::Release(wire::Release::default());
    let order = registry::down(order);
    assert!(!sessions.send(&host, number, order.clone().into(), &witnessed()));
    let first = queue.try_recv().unwrap().message;
    assert_eq!(first, Some(wire::down::Message::Acknowledged(3)));
    assert_eq!(*queue.try_recv().unwrap(), order);
    let lost = sessions.pay(&witnessed());
    assert!(lost.is_empty() && queue.try_recv().is_err(), "it was told");

    // What an older session was owed, the newer one knows from its welcome.
    sessions.owe(&host, number, 4);
    let (mut again, mut newer) = self::candidate("app-1");
    again.instance = InstanceId::from_random([1; 8]);
    sessions.admit(again).unwrap();
    let lost = sessions.pay(&witnessed());
    assert!(lost.is_empty() && newer.try_recv().is_err());
    assert!(queue.try_recv().is_err());
}

#[test]
fn time_never_goes_back() {
    let future = Timestamp(u64::MAX / 4);
    let clock = Clock::starting_at(future);
    assert!(clock.now() >= future);
    let clock = Clock::starting_at(Timestamp(0));
    let now = clock.now();
    assert!(now > Timestamp(1_600_000_000_000), "the wall clock");
    assert!(clock.instant(now.plus(Period::seconds(5))) > Instant::now());
    // A deadline at the end of all time does not overflow.
    let _ = clock.instant(Timestamp(u64::MAX));
}

/// A plan for one host, to be ended ten minutes after it was submitted.
pub(crate) fn plan() -> SealedPlan {
    let step = Step {
        name: None,
        action: Action::CheckPort(Port {
            port: 8000,
            expect: PortState::default(),
        }),
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line: 1,
    };
    let fleet = Selector {
        labels: BTreeMap::from([("role".to_owned(), "app".to_owned())]),
    };
    seal::seal(CompiledPlan {
        format: FORMAT,
        plan: "ports".into(),
        serial: 1,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::MAX / 2),
        deadline: Period::seconds(600),
        inputs: BTreeMap::new(),
        fleet: BTreeMap::from([("app".to_owned(), fleet)]),
        phases: vec![Phase {
            name: "look".into(),
            stages: vec![Stage {
                target: Target::Groups(vec!["app".into()]),
                strategy: Strategy::All,
                steps: vec![step],
            }],
            deadline: None,
            planned: None,
        }],
        after_rollback: None,
        max_failures: None,
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    })
    .unwrap()
}

/// A session of a host that the plan is for.
fn open(driver: &mut Driver, round: &mut Round, host: &str) -> mpsc::Receiver<registry::Down> {
    let mut hello = hello(host);
    hello.labels.insert("role".into(), "app".into());
    hello.last_report = 1;
    let (candidate, queue) = candidate(host);
    let opened = driver.open(round, hello, 1, candidate);
    opened.unwrap().unwrap();
    queue
}

/// Dora's wish for the plan.
fn submission() -> Event {
    let call = Call::Submit {
        rollout: RolloutId::from_random([1; 6]),
        plan: Arc::new(plan()),
        dry_run: false,
        signatures: vec![],
    };
    Event::Operator {
        operator: "dora".parse().unwrap(),
        groups: vec![],
        call,
    }
}

/// What an agent reports in the session that it has now.
fn report(driver: &Driver, host: &str, number: u64, body: ReportBody) -> Input {
    let host = host.parse().unwrap();
    Input::Report {
        session: driver.sessions.current(&host).unwrap(),
        host,
        report: Report {
            number,
            body,
            head: None,
        },
    }
}

fn surveyed() -> ReportBody {
    ReportBody::Surveyed {
        rollout: RolloutId::from_random([1; 6]),
        state: vec![],
    }
}

/// The last consent makes everybody's first order due, and is settled at the end of its batch.
#[test]
fn a_session_begins_with_its_welcome_whatever_came_in_the_same_batch() {
    use wire::down::Message as Wire;
    let mut driver = driver(&Memory::default());
    let mut round = Round::default();
    let mut queues = ["app-1", "app-2"].map(|host| open(&mut driver, &mut round, host));
    driver.handle(&mut round, submission());
    driver.finish(round).unwrap();

    let mut round = Round::default();
    for host in ["app-1", "app-2"] {
        let body = ReportBody::Consented {
            rollout: RolloutId::from_random([1; 6]),
            plan: plan().digest(),
            state: vec![],
            round: 0,
        };
        let report = report(&driver, host, 1, body);
        driver.take_input(&mut round, report).unwrap();
    }
    // Its reader has one more in its hand.
    let late = report(&driver, "app-2", 2, surveyed());
    let mut again = open(&mut driver, &mut round, "app-2");
    driver.take_input(&mut round, late).unwrap();
    driver.settle(&mut round);
    driver.finish(round).unwrap();
    let first = again.try_recv().unwrap().message;
    assert!(matches!(first, Some(Wire::Welcome(_))), "{first:?}");
    for queue in [&mut queues[0], &mut again] {
        let messages = std::iter::from_fn(|| queue.try_recv().ok());
        let orders = messages.filter(|it| matches!(it.message, Some(Wire::Order(_))));
        assert_eq!(orders.count(), 1, "its order");
    }
}

#[test]
fn a_deadline_that_stays_due_does_not_keep_the_driver_busy() {
    let mut driver = driver(&Memory::default());
    let mut round = Round::default();
    let _queue = open(&mut driver, &mut round, "app-1");
    let now = driver.clock.now();
    let effects = driver.coordinator.handle(now, submission());
    assert!(matches!(effects.answer, Some(Ok(_))), "{effects:?}");
    assert!(driver.wake_at().unwrap() > Instant::now());

    // An hour later, every deadline has come.
    driver.clock = Clock::starting_at(now.plus(Period::seconds(3600)));
    let now = driver.clock.now();
    assert!(driver.wake_at().unwrap() <= Instant::now());
    let begun = Instant::now();
    driver.rest_after(now, true);
    let wake = driver.wake_at().unwrap();
    assert!(wake >= begun + Duration::from_secs(1), "no rest");
    assert!(wake < begun + Duration::from_secs(10), "too long a rest");

    // A tick that did something may have to be followed by another one at once.
    driver.rest_after(now, false);
    assert!(driver.wake_at().unwrap() <= Instant::now());

    // Whatever else comes is not kept waiting, nor are deadlines in the same batch.
    driver.rest_after(now, true);
    driver.round(&mut Vec::new()).unwrap();
    let wake = driver.wake_at();
    assert!(wake.is_none_or(|at| at > Instant::now()), "still due");
}
