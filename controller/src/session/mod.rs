//! The agents' service: sessions, output, plans.
//!
//! ```text
//! Hello -> driver admits -> Welcome | reports up -> driver | messages down <- queue <- driver
//! ```
//!
//! The host that an agent speaks for is the one of its certificate, wherever a message names one
//! too. A session ends when its certificate does, when the agent connects again, when it does not
//! read, or when the controller drains.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod output;
pub(crate) mod registry;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use lockstep_core::refusal::{Caller, Why};
use lockstep_proto::ids::HostId;
use lockstep_proto::report::{MAX_REPORT_BYTES, Report};
use lockstep_proto::wire::agent_v1::agent_service_server::AgentService;
use lockstep_proto::wire::agent_v1::{
    BlobChunk, Down, FetchBlobRequest, LogChunk, LogsSummary, Report as WireReport, Up, up,
};
use lockstep_proto::wire::{CHUNK, Hello, PROTOCOL_VERSIONS};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::blobs::Blobs;
use crate::driver::Handle;
use crate::hub::Hub;
use crate::identity::Peer;
use crate::logs::Logs;
use crate::refusals::Refusals;
pub(crate) use output::Outputs;
use registry::{Candidate, Ending, QUEUE, SessionNumber};

/// An agent says `Hello` as soon as its stream is open.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// Labels and release of one host, in bytes of JSON: they are one record of the journal.
const MAX_LABELS: usize = 16 << 10;

/// The longest name of an agent's release.
const MAX_VERSION: usize = 64;

/// The agents' service.
#[derive(Debug, Clone)]
pub(crate) struct Agents {
    /// The driver.
    pub(crate) driver: Handle,
    /// Compiled plans.
    pub(crate) blobs: Arc<Blobs>,
    /// Output of steps.
    pub(crate) logs: Logs,
    /// Live events.
    pub(crate) hub: Hub,
    /// Sessions that are up.
    pub(crate) tasks: TaskTracker,
    /// Output that comes in.
    pub(crate) outputs: Outputs,
    /// Where it is noted who breaks the contract.
    pub(crate) refusals: Refusals,
}

#[tonic::async_trait]
impl AgentService for Agents {
    type SessionStream = Downstream;
    type FetchBlobStream = Blob;

    async fn session(
        &self,
        request: Request<Streaming<Up>>,
    ) -> Result<Response<Downstream>, Status> {
        let peer = peer(&request)?;
        let host = peer.agent()?.clone();
        let mut inbound = request.into_inner();
        let hello = tokio::time::timeout(HELLO_WITHIN, inbound.message());
        let hello = hello.await.map_err(|_| {
            let why = format!("no Hello within {HELLO_WITHIN:?}");
            Status::deadline_exceeded(why)
        })??;
        let (hello, version) = introduce(&host, hello)?;

        let (queue, messages) = mpsc::channel(QUEUE);
        let ending = Ending::default();
        let candidate = Candidate {
            host: host.clone(),
            instance: hello.instance.clone(),
            peer: peer.address(),
            queue,
            ending: ending.clone(),
        };
        let agent_version = hello.agent_version.clone();
        let number = self.driver.open(hello, version, candidate).await?;
        tracing::info!(%host, peer = %peer.address(), version, agent_version, "session is up");
        let reader = Reader {
            driver: self.driver.clone(),
            host,
            number,
            peer: peer.clone(),
            ending: ending.clone(),
            refusals: self.refusals.clone(),
        };
        self.tasks.spawn(reader.run(inbound, peer.remaining()));
        Ok(Response::new(Downstream::new(messages, ending)))
    }

    async fn logs(
        &self,
        request: Request<Streaming<LogChunk>>,
    ) -> Result<Response<LogsSummary>, Status> {
        let peer = peer(&request)?;
        let _place = self.outputs.take(peer.agent()?)?;
        let kept_bytes = output::receive(self, &peer, request.into_inner()).await?;
        Ok(Response::new(LogsSummary { kept_bytes }))
    }

    async fn fetch_blob(
        &self,
        request: Request<FetchBlobRequest>,
    ) -> Result<Response<Blob>, Status> {
        let host = peer(&request)?.agent()?.clone();
        let digest = request.get_ref().digest();
        let digest = digest.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let reader = host.clone();
        let may_read =
            move |coordinator: &lockstep_core::Coordinator| coordinator.may_read(&reader, digest);
        // What is not there and what is not for this host look the same.
        let not_found = || Status::not_found(format!("nothing of {digest} is here for {host}"));
        if !self.driver.read(may_read).await? {
            return Err(not_found());
        }
        // In memory: the coordinator has the plan of every rollout that it knows.
        let bytes = self.blobs.plan_bytes(digest).map_err(|error| {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a plan cannot be read"
            );
            Status::data_loss(error.to_string())
        })?;
        Ok(Response::new(Blob(bytes.ok_or_else(not_found)?)))
    }
}

/// Who calls; the access layer lets nobody through whom it does not know.
fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    let peer = request.extensions().get::<Peer>();
    peer.cloned()
        .ok_or_else(|| Status::unauthenticated("no certificate"))
}

/// Checks what an agent says of itself, and agrees on a protocol version.
fn introduce(host: &HostId, first: Option<Up>) -> Result<(Hello, u32), Status> {
    let invalid = |why: String| Status::invalid_argument(why);
    let Some(Up {
        message: Some(up::Message::Hello(hello)),
    }) = first
    else {
        return Err(invalid("the first message is Hello".to_owned()));
    };
    let hello = Hello::try_from(hello).map_err(|error| invalid(error.to_string()))?;
    if hello.host != *host {
        return Err(Status::permission_denied(format!(
            "the certificate is {host}'s, but the agent says that it is {}",
            hello.host
        )));
    }
    let labels = serde_json::to_vec(&hello.labels).map_or(usize::MAX, |json| json.len());
    if labels > MAX_LABELS {
        return Err(invalid(format!(
            "the host's labels have {labels} bytes, more than {MAX_LABELS}"
        )));
    }
    if hello.agent_version.len() > MAX_VERSION {
        return Err(invalid("the agent's release is too long".to_owned()));
    }
    let version = PROTOCOL_VERSIONS.common(hello.versions).ok_or_else(|| {
        Status::failed_precondition(format!(
            "the agent speaks protocol versions {} to {}, this controller {} to {}; upgrade the \
             older of the two",
            hello.versions.min, hello.versions.max, PROTOCOL_VERSIONS.min, PROTOCOL_VERSIONS.max
        ))
    })?;
    Ok((hello, version))
}

/// Reads what an agent says, until the session ends.
struct Reader {
    driver: Handle,
    host: HostId,
    number: SessionNumber,
    peer: Peer,
    ending: Ending,
    refusals: Refusals,
}

impl Reader {
    async fn run(self, mut inbound: Streaming<Up>, valid_for: Duration) {
        let why = tokio::select! {
            biased;
            why = self.stopped(valid_for) => why,
            why = self.read(&mut inbound) => why,
        };
        let Self { host, peer, .. } = &self;
        tracing::info!(%host, peer = %peer.address(), why, "session is down");
        // The way down ends too, in case only the way up has.
        self.ending.end_well();
        // If the driver is gone, so is what would have to know.
        let _ = self.driver.closed(self.host.clone(), self.number).await;
    }

    /// Waits until the session is not to go on, and says why.
    async fn stopped(&self, valid_for: Duration) -> String {
        let cut = self.peer.when_cut();
        tokio::select! {
            biased;
            () = self.ending.token().cancelled() => "ended by the controller".to_owned(),
            () = cut.cancelled() => {
                self.ending.end(self.peer.cut_status());
                "cut".to_owned()
            }
            () = tokio::time::sleep(valid_for) => {
                let why = "the agent's certificate has ended";
                self.ending.end(Status::unauthenticated(why));
                why.to_owned()
            }
        }
    }

    /// Reads until nothing more comes, and says why. Where it is dropped with a report in its hand,
    /// that one is not acknowledged, and the agent says it again. Handing one over takes from the
    /// task's budget, so that an agent that never ceases to talk is stopped, too.
    async fn read(&self, inbound: &mut Streaming<Up>) -> String {
        loop {
            if let Err(why) = self.take(inbound.message().await).await {
                return why;
            }
        }
    }

    /// Takes one message; what breaks the contract ends the session.
    async fn take(&self, message: Result<Option<Up>, Status>) -> Result<(), String> {
        let message = match message {
            Ok(Some(up)) => up.message,
            Ok(None) => return Err("ended by the agent".to_owned()),
            Err(status) => return Err(status.message().to_owned()),
        };
        let report = match message {
            Some(up::Message::Report(report)) => read_report(&self.host, report),
            Some(up::Message::Hello(_)) => Err("Hello is said once".to_owned()),
            None => Err("a message of a kind that this controller does not know".to_owned()),
        };
        let report = report.map_err(|why| {
            tracing::error!(host = %self.host, why, "the agent breaks the contract");
            let agent = Caller::Agent(self.host.clone());
            self.refusals.note(agent, "Session", Why::Invalid);
            self.ending.end(Status::invalid_argument(why.clone()));
            why
        })?;
        let handed = self.driver.report(self.host.clone(), self.number, report);
        let handed = handed.await;
        handed.map_err(|stopping| stopping.to_string())
    }
}

/// Reads a report; an agent speaks for its own host only.
fn read_report(host: &HostId, report: WireReport) -> Result<Report, String> {
    use lockstep_proto::report::ReportBody;
    if report.body_json.len() > MAX_REPORT_BYTES {
        return Err(format!("report {} is too large", report.number));
    }
    let number = report.number;
    let report = Report::try_from(report);
    let report = report.map_err(|error| format!("report {number}: {error}"))?;
    // What is journalled is this one's own encoding, and it may be longer than the agent's.
    let encoded = serde_json::to_vec(&report.body).map_or(usize::MAX, |json| json.len());
    if encoded > MAX_REPORT_BYTES {
        return Err(format!("report {number} is too large: {encoded} bytes"));
    }
    match &report.body {
        ReportBody::Started { key } | ReportBody::Finished { key, .. } if key.host != *host => {
            Err(format!("report {number} is about {}", key.host))
        }
        _ => Ok(report),
    }
}

/// The messages down, and how the stream ends.
#[derive(Debug)]
pub(crate) struct Downstream {
    messages: mpsc::Receiver<registry::Down>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    ending: Ending,
    done: bool,
}

impl Downstream {
    fn new(messages: mpsc::Receiver<registry::Down>, ending: Ending) -> Self {
        Self {
            messages,
            ended: Box::pin(ending.token().clone().cancelled_owned()),
            ending,
            done: false,
        }
    }
}

impl Stream for Downstream {
    type Item = Result<Down, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        // What was queued before the end still goes out.
        match self.messages.poll_recv(cx) {
            Poll::Ready(Some(message)) => return Poll::Ready(Some(Ok(*message))),
            Poll::Ready(None) => {}
            Poll::Pending => std::task::ready!(self.ended.as_mut().poll(cx)),
        }
        self.done = true;
        Poll::Ready(self.ending.status().map(Err))
    }
}

impl Drop for Downstream {
    /// The agent is gone: so is what reads from it.
    fn drop(&mut self) {
        self.ending.end_well();
    }
}

/// A plan's bytes, piece by piece.
#[derive(Debug)]
pub(crate) struct Blob(bytes::Bytes);

impl Stream for Blob {
    type Item = Result<BlobChunk, Status>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.0.is_empty() {
            return Poll::Ready(None);
        }
        let size = self.0.len().min(CHUNK);
        let data = self.0.split_to(size);
        Poll::Ready(Some(Ok(BlobChunk { data })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_measured_as_it_will_be_written() {
        let refusals = |count: usize| vec![r#"{"reason":""}"#; count].join(",");
        let report = |count: usize| WireReport {
            number: 1,
            body_json: format!(
                r#"{{"declined":{{"rollout":"ro_000000000000","refusals":[{}]}}}}"#,
                refusals(count)
            )
            .into_bytes()
            .into(),
            head: None,
        };
        let host: HostId = "app-1".parse().expect("a host's name");
        read_report(&host, report(1)).unwrap();
        let many = report(2000);
        assert!(many.body_json.len() < MAX_REPORT_BYTES);
        let why = read_report(&host, many).unwrap_err();
        assert!(why.contains("too large"), "{why}");
    }
}
