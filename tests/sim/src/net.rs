//! The network: bytes that take their time, stand still or are lost with their connection.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use tokio::time::{Duration, Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::dice::Dice;

/// How often what stands still looks whether it may go on.
const LOOK: Duration = Duration::from_millis(50);

/// Room in one direction of a connection, in bytes.
const ROOM: usize = 64 << 10;

/// The way between one host and whoever has the controller's address.
#[derive(Debug, Default)]
pub(crate) struct Way {
    up_until: Cell<Option<Instant>>,
    down_until: Cell<Option<Instant>>,
    connections: RefCell<Vec<CancellationToken>>,
}

/// Which direction stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the host to the controller.
    Up,
    /// From the controller to the host.
    Down,
}

impl Way {
    /// Nothing passes in a direction for a time; nobody is told.
    pub(crate) fn stall(&self, direction: Direction, time: Duration) {
        self.until(direction).set(Some(Instant::now() + time));
    }

    /// Everything passes again.
    pub(crate) fn heal(&self) {
        self.up_until.set(None);
        self.down_until.set(None);
    }

    fn until(&self, direction: Direction) -> &Cell<Option<Instant>> {
        match direction {
            Direction::Up => &self.up_until,
            Direction::Down => &self.down_until,
        }
    }

    pub(crate) fn is_stalled(&self, direction: Direction) -> bool {
        let until = self.until(direction).get();
        until.is_some_and(|until| until > Instant::now())
    }

    /// Ends every connection; what was under way is lost. Answers whether there was one.
    pub(crate) fn cut(&self) -> bool {
        let mut any = false;
        for connection in self.connections.borrow_mut().drain(..) {
            any |= !connection.is_cancelled();
            connection.cancel();
        }
        any
    }
}

/// Joins two ends over a way, until it is cut or both sides are gone. Returns the ends.
pub(crate) fn join(
    way: &Rc<Way>,
    dice: &Rc<Dice>,
    stands: &Rc<dyn Fn() -> bool>,
) -> (DuplexStream, DuplexStream, impl Future<Output = ()> + use<>) {
    let (host, host_side) = tokio::io::duplex(ROOM);
    let (controller, controller_side) = tokio::io::duplex(ROOM);
    let cut = CancellationToken::new();
    way.connections.borrow_mut().push(cut.clone());
    let (from_host, to_host) = tokio::io::split(host_side);
    let (from_controller, to_controller) = tokio::io::split(controller_side);
    let pump = |direction, from, to| {
        let (way, dice, stands) = (way.clone(), dice.clone(), stands.clone());
        async move { carry(&way, direction, &dice, &*stands, from, to).await }
    };
    let up = pump(Direction::Up, from_host, to_controller);
    let down = pump(Direction::Down, from_controller, to_host);
    let carrying = async move {
        tokio::select! {
            biased;
            () = cut.cancelled() => {}
            // A side that is closed takes the other one with it, as a reset does.
            () = up => {}
            () = down => {}
        }
        // There is nothing left to cut.
        cut.cancel();
    };
    (host, controller, carrying)
}

async fn carry(
    way: &Way,
    direction: Direction,
    dice: &Dice,
    stands: &dyn Fn() -> bool,
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = from.read(&mut buffer).await.unwrap_or(0);
        sleep(Duration::from_millis(dice.between(1, 20))).await;
        // The end of a stream is a message too.
        while way.is_stalled(direction) || stands() {
            sleep(LOOK).await;
        }
        if count == 0 {
            break;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    // What was written before still arrives.
    let _ = to.shutdown().await;
    sleep(Duration::from_millis(50)).await;
}
