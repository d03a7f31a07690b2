//! One connection: files read anew, so that a renewed certificate counts from the next dial on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lockstep_proto::ids::HostId;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use super::LinkError;
use crate::config::Config;
use crate::tls::{Identity, client_config};

/// For the address to accept, and then for the handshake.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// The controller is asked whether it is there so often, streams or not, and given this long to
/// answer: a half-open connection is found within 10 s.
const PING_EVERY: Duration = Duration::from_secs(5);
const PONG_WITHIN: Duration = Duration::from_secs(5);

/// How long sent bytes may stay unacknowledged by the kernel of the other side, in milliseconds.
const UNACKNOWLEDGED: u32 = 15_000;

/// What may be under way on one stream, in bytes: the largest message, once.
const STREAM_WINDOW: u32 = 256 << 10;

/// And on the connection: a plan's pieces beside orders.
const CONNECTION_WINDOW: u32 = 512 << 10;

/// Messages on their way into the connection.
const BUFFER: usize = 16;

/// Headers are few and small.
const HEADER_LIST: u32 = 16 << 10;

pub(super) async fn connect(config: &Config) -> Result<Channel, LinkError> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return simulated(config, world).await;
    }
    let identity = Identity::load(&config.tls)?;
    check_host(&identity.host, config)?;
    let tls = client_config(&config.tls, &identity)?;
    let address = config.controller.clone();
    let invalid = || LinkError::Address(address.clone());
    let host = address.rsplit_once(':').ok_or_else(invalid)?.0;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = config.controller_name.as_deref().unwrap_or(host).to_owned();
    let name = ServerName::try_from(name).map_err(|_| invalid())?;
    let dial = Dial { tls, name };
    // The scheme of the first URI would make tonic look for a TLS of its own.
    let origin = format!("https://{address}")
        .parse()
        .map_err(|_| invalid())?;
    let endpoint = endpoint(&address)?.origin(origin);
    let target = address.clone();
    let connector = tower::service_fn(move |_| {
        let (dial, target) = (dial.clone(), target.clone());
        async move { dial.connect(&target).await.map(TokioIo::new) }
    });
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|source| LinkError::Connect { address, source })
}

fn endpoint(address: &str) -> Result<Endpoint, LinkError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| LinkError::Address(address.to_owned()))?
        .connect_timeout(CONNECT_WITHIN)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_WITHIN)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(HEADER_LIST)
        .buffer_size(BUFFER);
    Ok(endpoint)
}

/// The same over the simulated network; who is who is the test's business there.
#[cfg(feature = "faults")]
async fn simulated(
    config: &Config,
    world: std::rc::Rc<dyn crate::simulation::World>,
) -> Result<Channel, LinkError> {
    let address = config.controller.clone();
    // The connection is made here: the connector must be `Send`, and the world is not.
    let connect = async {
        let stream = tokio::time::timeout(CONNECT_WITHIN, world.dial(&config.host)).await;
        stream.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    };
    let mut stream = connect.await.ok();
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or(io::ErrorKind::ConnectionRefused);
        async move { stream.map(TokioIo::new).map_err(io::Error::from) }
    });
    endpoint(&address)?
        .connect_with_connector(connector)
        .await
        .map_err(|source| LinkError::Connect { address, source })
}

fn check_host(certificate: &HostId, config: &Config) -> Result<(), LinkError> {
    if *certificate == config.host {
        return Ok(());
    }
    Err(LinkError::OtherHost {
        certificate: certificate.to_string(),
        config: config.host.to_string(),
    })
}

#[derive(Clone)]
struct Dial {
    tls: Arc<rustls::ClientConfig>,
    name: ServerName<'static>,
}

impl Dial {
    async fn connect(&self, address: &str) -> io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(address).await?;
        // Orders are small and somebody waits for each.
        tcp.set_nodelay(true)?;
        rustix::net::sockopt::set_tcp_user_timeout(&tcp, UNACKNOWLEDGED)?;
        TlsConnector::from(self.tls.clone())
            .connect(self.name.clone(), tcp)
            .await
    }
}
