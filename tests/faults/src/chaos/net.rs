//! Connections of agents and people to a controller: mutual TLS 1.3, and a proxy that can cut them.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

/// As agents have it: a connection without a sign of life for 10 s is given up.
const PING_EVERY: Duration = Duration::from_secs(5);
const PONG_WITHIN: Duration = Duration::from_secs(5);

/// For the handshakes of TCP and TLS together.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Who dials, and whom it trusts.
pub type Identity = Arc<rustls::ClientConfig>;

/// Reads an identity from its files in PEM.
pub fn identity(issuer: &Path, certificate: &Path, key: &Path) -> Result<Identity> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(issuer)?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(certificate)?],
            PrivateKeyDer::from_pem_file(key)?,
        )?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Dials a controller.
pub async fn connect(address: SocketAddr, identity: &Identity) -> Result<Channel> {
    let tls = TlsConnector::from(identity.clone());
    let connector = tower::service_fn(move |_: http::Uri| {
        let tls = tls.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
            Ok::<_, io::Error>(TokioIo::new(tls.connect(name, tcp).await?))
        }
    });
    let endpoint = Endpoint::from_static("http://controller.test")
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_WITHIN)
        .keep_alive_while_idle(true);
    let channel = endpoint.connect_with_connector(connector);
    let channel = tokio::time::timeout(CONNECT_WITHIN, channel).await?;
    channel.with_context(|| format!("cannot connect to {address}"))
}

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// Bytes go through.
    Fine,
    /// Connections stay, and no byte goes through.
    Stalled,
    /// Connections are reset, and none is taken.
    Cut,
}

/// A proxy before a controller. It ends with its runtime.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    weather: watch::Sender<Weather>,
    upstream: watch::Sender<SocketAddr>,
}

impl Proxy {
    /// Begins to carry connections to `upstream`.
    pub async fn start(upstream: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (weather, seen) = watch::channel(Weather::Fine);
        let (upstream, to) = watch::channel(upstream);
        tokio::spawn(async move {
            while let Ok((inner, _)) = listener.accept().await {
                let (seen, to) = (seen.clone(), *to.borrow());
                tokio::spawn(async move {
                    // A connection that breaks is what a proxy is for.
                    let _ = carry(inner, to, seen).await;
                });
            }
        });
        Ok(Self {
            address,
            weather,
            upstream,
        })
    }

    /// Changes the weather, for connections that are open too.
    pub fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// From now on, new connections go there.
    pub fn lead_to(&self, upstream: SocketAddr) {
        self.upstream.send_replace(upstream);
    }
}

async fn carry(
    inner: TcpStream,
    upstream: SocketAddr,
    weather: watch::Receiver<Weather>,
) -> io::Result<()> {
    let mut end = weather.clone();
    let both = async {
        let outer = TcpStream::connect(upstream).await?;
        inner.set_nodelay(true)?;
        outer.set_nodelay(true)?;
        let (inner_read, inner_write) = inner.into_split();
        let (outer_read, outer_write) = outer.into_split();
        tokio::try_join!(
            pipe(inner_read, outer_write, weather.clone()),
            pipe(outer_read, inner_write, weather),
        )?;
        Ok(())
    };
    tokio::select! {
        result = both => result,
        _ = end.wait_for(|weather| *weather == Weather::Cut) => Ok(()),
    }
}

async fn pipe(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut weather: watch::Receiver<Weather>,
) -> io::Result<()> {
    let mut piece = vec![0; 16 << 10];
    loop {
        let read = from.read(&mut piece).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        // What was read before a stall waits with it.
        let fine = weather.wait_for(|weather| *weather == Weather::Fine).await;
        fine.map_err(io::Error::other)?;
        to.write_all(&piece[..read]).await?;
    }
}
