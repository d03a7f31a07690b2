//! The controller's life: `Config -> App -> Running -> Drained`.
//!
//! ```text
//! App::build    lock and read the journal, read certificates, bind: everything that can fail
//! App::start    a new term begins; sessions and calls are taken
//! Running::run  until a signal, or the driver ends
//! Running::drain  stop accepting -> tell agents -> finish in-flight -> flush and close
//! ```

mod error;
mod host;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lockstep_core::trust::Subject;
use lockstep_proto::wire::agent_v1::agent_service_server::AgentServiceServer;
use lockstep_proto::wire::control_v1::control_service_server::ControlServiceServer;
use lockstep_proto::wire::enroll_v1::enroll_service_server::EnrollServiceServer;
use lockstep_proto::wire::{MAX_AGENT_MESSAGE, MAX_CONTROL_MESSAGE, MAX_ENROLL_MESSAGE};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;
use tower::util::MapResponseLayer;

use crate::api::access::AccessLayer;
use crate::api::{Control, Submissions, shared};
use crate::blobs::Blobs;
use crate::config::Config;
use crate::driver::{Driver, DriverError, Handle, Parts};
use crate::enroll::issuer::Issuer;
use crate::enroll::{Enrolment, list};
use crate::hub::Hub;
use crate::identity::Peer;
use crate::journal::sled::SledJournal;
use crate::limits;
use crate::logs::Logs;
use crate::notify::{self, Notifier};
use crate::refusals::Refusals;
use crate::secrets::Secrets;
use crate::session::{Agents, Outputs};
use crate::suspensions::Suspensions;
use crate::tls::{Settings, spawn_accepting};
pub(crate) use error::ServeError;
use host::{Asked, Signals, notify_systemd};

/// A start that reads its journal for longer says how to make it shorter.
const LONG_START: Duration = Duration::from_secs(2);

/// From the first signal to the end. Agents do without the controller meanwhile; systemd kills
/// what takes longer.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

/// Of that, what open streams and messages on their way have to come to their end.
const FINISH_WITHIN: Duration = Duration::from_secs(6);

/// Of that, what peers have to close their connections once nothing is open on them.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// A ping on every connection, so that a peer that is gone is noticed within 10 s.
const PING_EVERY: Duration = Duration::from_secs(5);

/// How long a ping may take.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Streams of one connection: an agent has a session, its output and a plan; a person watches a
/// few rollouts.
const STREAMS: u32 = 32;

/// Calls of one connection that are being answered; open streams do not count.
const CALLS: usize = 32;

/// One stream's flow-control window, in bytes: reports are small, and what an agent sends ahead
/// of the driver is memory here. HTTP/2's own default, written down because it is a bound.
const STREAM_WINDOW: u32 = 64 << 10;

/// All streams of one connection together.
const CONNECTION_WINDOW: u32 = 256 << 10;

/// The largest HTTP/2 frame, in bytes: the smallest that HTTP/2 allows.
const FRAME: u32 = 16 << 10;

/// Headers of one call, in bytes.
const HEADERS: u32 = 16 << 10;

/// Streams that a peer may reset before they are looked at (rapid reset).
const PENDING_RESETS: usize = 20;

/// The largest answer to an operator, in bytes: the document of a rollout on 10,000 hosts.
const MAX_ANSWER: usize = 64 << 20;

/// The largest message to an agent, in bytes; the same as what agents take.
const MAX_TO_AGENT: usize = MAX_AGENT_MESSAGE;

/// What `lockstep serve` is told on its command line.
#[derive(Debug, Clone)]
pub(crate) struct ServeOptions {
    /// The configuration file.
    pub(crate) config: PathBuf,
    /// Where to write the address that was bound, once calls are taken.
    pub(crate) ready_file: Option<PathBuf>,
    /// Begin a term above this one: after the state came back from a backup.
    pub(crate) epoch_above: u64,
    /// Go on in the place of another controller, or from an older copy of the state.
    pub(crate) take_over: bool,
    /// Who is suspended before anybody is let in.
    pub(crate) suspend: Vec<Subject>,
}

/// Runs a controller until it is told to stop.
pub(crate) fn serve(options: &ServeOptions) -> Result<Drained, ServeError> {
    let config = Config::load(&options.config)?;
    // One provider for TLS of every kind; an error says that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    limits::turn_off_cores();
    limits::raise_descriptors();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(io_error("start the runtime"))?;
    let result = runtime.block_on(async {
        let app = App::build(config, options).await?;
        let running = app.start()?;
        running.announce(options.ready_file.as_deref())?;
        running.run().await
    });
    // What still runs has nothing to lose: what counts is in the journal.
    runtime.shutdown_background();
    result
}

/// Everything that a controller needs, before it takes the first call.
#[derive(Debug)]
pub(crate) struct App {
    config: Config,
    driver: Driver,
    notices: mpsc::Receiver<lockstep_core::Notify>,
    notifier: Notifier,
    blobs: Arc<Blobs>,
    logs: Logs,
    hub: Hub,
    tls: Arc<Settings>,
    suspensions: Arc<Suspensions>,
    refusals: Refusals,
    listener: TcpListener,
    signals: Signals,
}

impl App {
    /// Does everything that can fail: a controller that starts is one that works.
    pub(crate) async fn build(config: Config, options: &ServeOptions) -> Result<Self, ServeError> {
        let signals = Signals::new()?;
        let suspensions = Arc::new(Suspensions::default());
        let refusals = Refusals::default();
        let tls = Settings::load(&config, &suspensions, &refusals)?;
        if let Some(enroll) = &config.enroll {
            // What cannot sign is found out now, and not by the first host that wants to join.
            let issuer = Issuer::load(enroll, &config.tls, &config.domain)?;
            warn_of_end(issuer.ends());
        }
        let state = &config.state_dir;
        let (blobs_dir, logs_dir) = (state.join("blobs"), state.join("logs"));
        if !state.join("journal").exists() && (blobs_dir.exists() || logs_dir.exists()) {
            return Err(ServeError::JournalMissing(state.clone()));
        }
        let begun = Instant::now();
        let journal = SledJournal::open(state)?;
        let blobs = Arc::new(Blobs::open(blobs_dir)?);
        let logs = Logs::open(logs_dir).map_err(io_error("open the logs' directory"))?;
        let hub = Hub::default();
        let (sender, notices) = mpsc::channel(notify::WAITING);
        let secrets = Secrets::new(config.secrets_dir.clone());
        let notifier = Notifier::new(config.email.clone(), secrets)?;
        let parts = Parts {
            journal: Box::new(journal),
            hub: hub.clone(),
            notices: sender,
            suspensions: Arc::clone(&suspensions),
            epoch_above: options.epoch_above,
            take_over: options.take_over,
            break_glass: config.break_glass.clone(),
            suspend: options.suspend.clone(),
            compact_above: config.compact_above,
        };
        let driver = Driver::recover(parts, |digest| {
            blobs.plan(digest).unwrap_or_else(|error| {
                tracing::error!(error = &error as &dyn std::error::Error, "a plan is lost");
                None
            })
        })?;
        warn_of_long_start(begun.elapsed(), state);
        let address = config.listen;
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| ServeError::Bind { address, source })?;
        Ok(Self {
            config,
            driver,
            notices,
            notifier,
            blobs,
            logs,
            hub,
            tls,
            suspensions,
            refusals,
            listener,
            signals,
        })
    }

    /// Starts every part.
    pub(crate) fn start(self) -> Result<Running, ServeError> {
        let Self {
            config,
            driver,
            notices,
            notifier,
            blobs,
            logs,
            hub,
            tls,
            suspensions,
            refusals,
            listener,
            signals,
        } = self;
        let address = listener
            .local_addr()
            .map_err(io_error("ask for the address"))?;
        let (driver, driver_end) = driver.spawn();
        let stop_accepting = CancellationToken::new();
        let draining = CancellationToken::new();
        let (calls, messages) = (TaskTracker::new(), TaskTracker::new());

        let (reload, asked) = mpsc::channel(1);
        tokio::spawn(Arc::clone(&tls).keep_fresh(asked, draining.clone()));
        let list = list::path(&config.state_dir);
        if let Some(enroll) = config.enroll.clone() {
            let lists = list::Lists {
                path: list.clone(),
                enroll,
                tls: config.tls.clone(),
                domain: config.domain.clone(),
                driver: driver.clone(),
                suspensions: Arc::clone(&suspensions),
            };
            tokio::spawn(lists.run(draining.clone()));
        }
        tokio::spawn(notifier.run(notices, driver.clone(), messages.clone()));
        let agents = Agents {
            driver: driver.clone(),
            blobs: Arc::clone(&blobs),
            logs: logs.clone(),
            hub: hub.clone(),
            tasks: calls.clone(),
            outputs: Outputs::default(),
            refusals: refusals.clone(),
        };
        let control = Control {
            driver: driver.clone(),
            blobs,
            logs,
            hub,
            tasks: calls.clone(),
            draining: draining.clone(),
            started: SystemTime::now(),
            list: config.enroll.is_some().then_some(list),
            submissions: Submissions::default(),
        };
        tokio::spawn(refusals.clone().run(driver.clone(), draining.clone()));
        let enrolment = Enrolment::new(driver.clone(), &config);
        let services = Services {
            agents,
            control,
            enrolment,
            suspensions,
            refusals: refusals.clone(),
        };
        let connections = spawn_accepting(listener, tls, stop_accepting.clone());
        let connections = ReceiverStream::new(connections).map(Ok::<_, io::Error>);
        let serving = serve_on(connections, services, stop_accepting.clone());
        let server = tokio::spawn(serving);
        tracing::info!(%address, domain = config.domain, "started");
        Ok(Running {
            address,
            driver,
            driver_end,
            server,
            stop_accepting,
            draining,
            calls,
            messages,
            refusals,
            reload,
            signals,
        })
    }
}

/// What is served.
pub(crate) struct Services {
    /// To agents.
    pub(crate) agents: Agents,
    /// To operators.
    pub(crate) control: Control,
    /// To hosts that want a certificate.
    pub(crate) enrolment: Enrolment,
    /// To whom not.
    pub(crate) suspensions: Arc<Suspensions>,
    /// Who was refused what.
    pub(crate) refusals: Refusals,
}

/// A start reads all of the journal: some microseconds for each order that it holds. A controller makes
/// it shorter by itself, but for what goes on and the newest rollout that has ended.
fn warn_of_long_start(took: Duration, state: &Path) {
    if took > LONG_START {
        tracing::warn!(
            took_ms = took.as_millis(),
            "reading the journal took long: while no controller runs, `lockstep journal compact \
             --dir {} --older-than 90d` takes rollouts that have ended out of it",
            state.display()
        );
    }
}

/// Says in time that hosts will not get certificates any more.
fn warn_of_end(ends: i64) {
    let now = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    let days = ends.saturating_sub_unsigned(now) / (24 * 3600);
    if days < 90 {
        tracing::warn!(
            days,
            "the agents' issuer ends soon; make another, and trust both meanwhile"
        );
    }
}

/// Serves both sides on these connections, until it is stopped and the last one is closed.
pub(crate) async fn serve_on<C>(
    connections: impl tokio_stream::Stream<Item = io::Result<C>>,
    services: Services,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error>
where
    C: AsyncRead + AsyncWrite + Connected<ConnectInfo = Peer> + Unpin + Send + 'static,
{
    let Services {
        agents,
        control,
        enrolment,
        suspensions,
        refusals,
    } = services;
    tonic::transport::Server::builder()
        .layer(AccessLayer {
            suspensions,
            refusals,
        })
        .layer(MapResponseLayer::new(shared::in_its_place))
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .max_concurrent_streams(STREAMS)
        .concurrency_limit_per_connection(CALLS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .http2_max_header_list_size(HEADERS)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(PENDING_RESETS))
        // Calls wait for the driver, which answers or is gone; a time limit
        // here would also cut the agents' output streams, whose answer comes at their end.
        .add_service(
            AgentServiceServer::new(agents)
                .max_decoding_message_size(MAX_AGENT_MESSAGE)
                .max_encoding_message_size(MAX_TO_AGENT),
        )
        .add_service(
            ControlServiceServer::new(control)
                .max_decoding_message_size(MAX_CONTROL_MESSAGE)
                .max_encoding_message_size(MAX_ANSWER),
        )
        .add_service(
            EnrollServiceServer::new(enrolment)
                .max_decoding_message_size(MAX_ENROLL_MESSAGE)
                .max_encoding_message_size(MAX_ENROLL_MESSAGE),
        )
        .serve_with_incoming_shutdown(connections, stop.cancelled_owned())
        .await
}

/// A controller that takes calls.
#[derive(Debug)]
pub(crate) struct Running {
    address: SocketAddr,
    driver: Handle,
    driver_end: oneshot::Receiver<Result<(), DriverError>>,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    stop_accepting: CancellationToken,
    draining: CancellationToken,
    /// Sessions and streams.
    calls: TaskTracker,
    /// Messages to people that are being sent.
    messages: TaskTracker,
    refusals: Refusals,
    reload: mpsc::Sender<()>,
    signals: Signals,
}

/// A controller that has come to its end, with nothing left to lose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Drained;

impl Running {
    /// Tells everyone who waits for it that calls are taken: the log, a file, systemd.
    pub(crate) fn announce(&self, ready_file: Option<&Path>) -> Result<(), ServeError> {
        tracing::info!("listening on {}", self.address);
        if let Some(path) = ready_file {
            let temporary = path.with_extension("tmp");
            fs::write(&temporary, format!("{}\n", self.address))
                .and_then(|()| fs::rename(&temporary, path))
                .map_err(io_error("write the ready file"))?;
        }
        notify_systemd("READY=1");
        Ok(())
    }

    /// Runs until a signal or an error, then drains.
    pub(crate) async fn run(mut self) -> Result<Drained, ServeError> {
        if let Some(every) = host::watchdog() {
            tokio::spawn(say_well(self.driver.clone(), every));
        }
        loop {
            tokio::select! {
                end = &mut self.driver_end => return Err(ended_early(end)),
                end = &mut self.server => {
                    // It ends by itself only if accepting has.
                    end.map_err(|error| io_error("run the server")(io::Error::other(error)))??;
                    return Err(io_error("go on accepting")(io::Error::other("the server ended")));
                }
                asked = self.signals.next() => match asked {
                    // A reload that is asked for already does.
                    Asked::Reload => _ = self.reload.try_send(()),
                    Asked::Stop => break,
                }
            }
        }
        self.drain().await
    }

    /// Ends in phases, within ten seconds; a second signal ends it at once.
    async fn drain(self) -> Result<Drained, ServeError> {
        notify_systemd("STOPPING=1");
        let Self {
            driver,
            mut driver_end,
            server,
            stop_accepting,
            draining,
            calls,
            messages,
            refusals,
            mut signals,
            ..
        } = self;
        let phases = async {
            tracing::info!("draining: no more connections");
            stop_accepting.cancel();
            tracing::info!("draining: agents are told to come back, watchers are sent away");
            // If the driver has ended, its result is below.
            let _ = driver.drain().await;
            draining.cancel();
            tracing::info!("draining: finishing what is open");
            calls.close();
            messages.close();
            let finishing = async { tokio::join!(calls.wait(), messages.wait()) };
            let finished = tokio::time::timeout(FINISH_WITHIN, finishing).await;
            if finished.is_err() {
                tracing::warn!(
                    streams = calls.len(),
                    messages = messages.len(),
                    "draining: not everything ended in time; the rest is cut"
                );
            }
            let closed = tokio::time::timeout(CLOSE_WITHIN, server).await;
            if closed.is_err() {
                tracing::info!("draining: some peers keep their connections; they are cut");
            }
            tracing::info!("draining: closing the journal");
            refusals.finish(&driver).await;
            let _ = driver.stop().await;
            match (&mut driver_end).await {
                Ok(Ok(())) => Ok(Drained),
                end => Err(ended_early(end)),
            }
        };
        tokio::select! {
            result = tokio::time::timeout(DRAIN_WITHIN, phases) => result.unwrap_or_else(|_| {
                Err(io_error("end in time")(io::ErrorKind::TimedOut.into()))
            }),
            () = signals.stop() => Err(ServeError::Hurried),
        }
    }
}

/// Tells systemd's watchdog that the controller is well, for as long as the driver answers: it does
/// so between two writes of the journal, and not while the disk hangs.
async fn say_well(driver: Handle, every: Duration) {
    while driver.read(|_| ()).await.is_ok() {
        notify_systemd("WATCHDOG=1");
        tokio::time::sleep(every).await;
    }
}

fn ended_early(end: Result<Result<(), DriverError>, oneshot::error::RecvError>) -> ServeError {
    match end {
        Ok(Err(error)) => error.into(),
        Ok(Ok(())) => DriverError::Thread("it ended without being asked to".to_owned()).into(),
        Err(_) => DriverError::Thread("it panicked; see the lines above".to_owned()).into(),
    }
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_without_its_files_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("controller.toml");
        let options = ServeOptions {
            config: file.clone(),
            ready_file: None,
            epoch_above: 0,
            take_over: false,
            suspend: vec![],
        };
        let hint = || serve(&options).unwrap_err().hint().unwrap_or_default();
        assert!(hint().contains("--config"), "{}", hint());
        let text = "listen = \"127.0.0.1:0\"\nstate_dir = \"state\"\ndomain = \"example.com\"\n\
                    [tls]\ncert = \"c.crt\"\nkey = \"c.key\"\nagent_ca = \"a.crt\"\n\
                    operator_ca = \"o.crt\"\n";
        fs::write(&file, text).unwrap();
        assert!(hint().contains("lockstep pki controller"), "{}", hint());
    }
}
