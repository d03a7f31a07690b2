//! Simulated processes: each a `LocalSet` of its own, which may be stopped, or ended between any
//! two of its steps and before and after any of its writes.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::{Duration, Instant};

/// What unwinds a process that was killed in the middle of its own code.
struct Killed;

/// What is known of a process, by whoever looks.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// When it began, in ticks since the boot.
    pub(crate) started: u64,
    /// The host it runs on; none for controllers.
    pub(crate) host: Option<usize>,
    pub(crate) what: String,
    alive: Cell<bool>,
    thaws: Cell<Option<Instant>>,
    waker: RefCell<Option<Waker>>,
    /// Writes that are left before it is killed.
    kill_in: Cell<Option<u64>>,
    /// It was asked to end.
    pub(crate) terminated: Arc<Notify>,
    /// Why it ended, in its own words.
    pub(crate) ended: RefCell<Option<String>>,
}

impl Process {
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.get()
    }

    /// Ends it: no task of it runs again.
    pub(crate) fn kill(&self) {
        self.alive.set(false);
        self.wake();
    }

    /// Ends it when it has come to so many more points.
    pub(crate) fn kill_in(&self, points: u64) {
        self.kill_in.set(Some(points));
    }

    /// Stops it for a time, as SIGSTOP or a slow disk does.
    pub(crate) fn freeze(&self, time: Duration) {
        self.thaws.set(Some(Instant::now() + time));
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.thaws.get().is_some_and(|thaws| thaws > Instant::now())
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// It has come to a point; does not return if it is killed there.
    pub(crate) fn reached(&self, killed: impl FnOnce()) {
        if self.alive.get() {
            match self.kill_in.get() {
                Some(0) => {
                    self.kill_in.set(None);
                    self.alive.set(false);
                    killed();
                }
                left => {
                    self.kill_in.set(left.map(|left| left - 1));
                    return;
                }
            }
        }
        let killed: Box<dyn Any + Send> = Box::new(Killed);
        std::panic::resume_unwind(killed);
    }
}

/// All processes, and which of them runs now.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    all: RefCell<Vec<Rc<Process>>>,
    /// Processes of each host since its boot: process ids begin again with it.
    since_boot: RefCell<BTreeMap<Option<usize>, i32>>,
    current: Cell<i32>,
}

impl Processes {
    /// Makes a process whose tasks are put into `local`.
    pub(crate) fn make(&self, host: Option<usize>, what: String) -> Rc<Process> {
        let mut since_boot = self.since_boot.borrow_mut();
        let number = since_boot.entry(host).or_default();
        *number += 1;
        let place = host.map_or(0, |host| host + 1);
        let process = Rc::new(Process {
            started: u64::try_from(*number).expect("from 1"),
            pid: i32::try_from(place).expect("few hosts") * 10_000 + *number,
            host,
            what,
            alive: Cell::new(true),
            thaws: Cell::new(None),
            waker: RefCell::new(None),
            kill_in: Cell::new(None),
            terminated: Arc::default(),
            ended: RefCell::new(None),
        });
        self.all.borrow_mut().push(process.clone());
        process
    }

    /// The process of an id.
    pub(crate) fn find(&self, pid: i32) -> Option<Rc<Process>> {
        let all = self.all.borrow();
        all.iter().rev().find(|process| process.pid == pid).cloned()
    }

    /// A host starts again: its process ids do too, after those of its own services.
    pub(crate) fn booted(&self, host: usize, by_then: i32) {
        self.since_boot.borrow_mut().insert(Some(host), by_then);
    }

    /// The one that runs now.
    pub(crate) fn current(&self) -> Option<Rc<Process>> {
        self.find(self.current.get())
    }

    /// Those of a host that are alive.
    pub(crate) fn alive_on(&self, host: usize) -> Vec<Rc<Process>> {
        let all = self.all.borrow();
        let there = all
            .iter()
            .filter(|it| it.host == Some(host) && it.is_alive());
        there.cloned().collect()
    }
}

/// Runs a process until it ends, by itself or not.
pub(crate) struct Running {
    pub(crate) processes: Rc<Processes>,
    pub(crate) process: Rc<Process>,
    pub(crate) local: LocalSet,
    pub(crate) timer: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Future for Running {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let process = self.process.clone();
        *process.waker.borrow_mut() = Some(cx.waker().clone());
        if !process.is_alive() {
            return Poll::Ready(());
        }
        if let Some(thaws) = process.thaws.get().filter(|thaws| *thaws > Instant::now()) {
            let mut timer = Box::pin(tokio::time::sleep_until(thaws));
            if timer.as_mut().poll(cx).is_pending() {
                self.timer = Some(timer);
                return Poll::Pending;
            }
        }
        self.timer = None;
        let processes = self.processes.clone();
        let before = processes.current.replace(process.pid);
        let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(&mut self.local).poll(cx)));
        processes.current.set(before);
        if !process.is_alive() {
            return Poll::Ready(());
        }
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(())) => {
                process.alive.set(false);
                Poll::Ready(())
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
