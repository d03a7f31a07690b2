//! What everyone else has of the driver: a bounded channel, and the questions that go through it.

use lockstep_core::{Answer, Call, Coordinator, Event, Refused};
use lockstep_proto::ids::{HostId, OperatorName};
use lockstep_proto::report::Report;
use lockstep_proto::wire::Hello;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::session::registry::{Candidate, SessionNumber};

/// Something for the driver.
pub(super) enum Input {
    Event(Event),
    Call {
        operator: OperatorName,
        groups: Vec<String>,
        call: Call,
        answer: Asker,
    },
    Ask {
        event: Event,
        answer: Asker,
    },
    Open {
        hello: Box<Hello>,
        version: u32,
        candidate: Candidate,
        admitted: oneshot::Sender<Result<SessionNumber, Status>>,
    },
    Report {
        host: HostId,
        session: SessionNumber,
        report: Report,
    },
    Closed {
        host: HostId,
        session: SessionNumber,
    },
    Read(Read),
    Drain,
    Stop,
}

/// Who waits for an answer.
pub(super) type Asker = oneshot::Sender<Result<Answer, Refused>>;

pub(super) type Read = Box<dyn FnOnce(&Coordinator) + Send>;

/// The driver has ended, or is about to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the controller is stopping")]
pub(crate) struct Stopping;

impl From<Stopping> for Status {
    fn from(stopping: Stopping) -> Self {
        Self::unavailable(stopping.to_string())
    }
}

/// What everyone else has of the driver.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    pub(super) inputs: mpsc::Sender<Input>,
}

impl Handle {
    /// Hands over an event; waits while the driver is busy.
    pub(crate) async fn event(&self, event: Event) -> Result<(), Stopping> {
        self.send(Input::Event(event)).await
    }

    /// Asks for what an operator wants; the answer is durable.
    pub(crate) async fn call(
        &self,
        operator: OperatorName,
        groups: Vec<String>,
        call: Call,
    ) -> Result<Result<Answer, Refused>, Stopping> {
        let (answer, answered) = oneshot::channel();
        self.send(Input::Call {
            operator,
            groups,
            call,
            answer,
        })
        .await?;
        answered.await.map_err(|_| Stopping)
    }

    /// Hands over an event that is answered; the answer is durable.
    pub(crate) async fn ask(&self, event: Event) -> Result<Result<Answer, Refused>, Stopping> {
        let (answer, answered) = oneshot::channel();
        self.send(Input::Ask { event, answer }).await?;
        answered.await.map_err(|_| Stopping)
    }

    /// Asks for a session to be admitted. `Welcome` is the first message in its queue.
    pub(crate) async fn open(
        &self,
        hello: Hello,
        version: u32,
        candidate: Candidate,
    ) -> Result<SessionNumber, Status> {
        let (admitted, answered) = oneshot::channel();
        self.send(Input::Open {
            hello: Box::new(hello),
            version,
            candidate,
            admitted,
        })
        .await?;
        answered.await.map_err(|_| Status::from(Stopping))?
    }

    /// Hands over what an agent reports in a session.
    pub(crate) async fn report(
        &self,
        host: HostId,
        session: SessionNumber,
        report: Report,
    ) -> Result<(), Stopping> {
        let input = Input::Report {
            host,
            session,
            report,
        };
        self.send(input).await
    }

    /// Says that a session is gone.
    pub(crate) async fn closed(
        &self,
        host: HostId,
        session: SessionNumber,
    ) -> Result<(), Stopping> {
        self.send(Input::Closed { host, session }).await
    }

    /// Reads the coordinator's state; everything that is seen is durable.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Coordinator) -> T + Send + 'static,
    ) -> Result<T, Stopping> {
        let (answer, answered) = oneshot::channel();
        let read = move |coordinator: &Coordinator| {
            // Who asked may be gone.
            let _ = answer.send(read(coordinator));
        };
        self.send(Input::Read(Box::new(read))).await?;
        answered.await.map_err(|_| Stopping)
    }

    /// Tells every agent to come back later, ends all sessions and admits no more.
    pub(crate) async fn drain(&self) -> Result<(), Stopping> {
        self.send(Input::Drain).await
    }

    /// Asks the driver to finish what it was handed before, and to close the journal.
    pub(crate) async fn stop(&self) -> Result<(), Stopping> {
        self.send(Input::Stop).await
    }

    async fn send(&self, input: Input) -> Result<(), Stopping> {
        self.inputs.send(input).await.map_err(|_| Stopping)
    }
}
