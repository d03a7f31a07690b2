//! An agent that a test plays: real TLS, the real contract, and whatever the test wants to say.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyper_util::rt::TokioIo;
use lockstep_proto::ids::{BootId, Epoch, InstanceId};
use lockstep_proto::report::{Report, ReportBody};
use lockstep_proto::wire::agent_v1::agent_service_client::AgentServiceClient;
use lockstep_proto::wire::agent_v1::{self as wire, down, up};
use lockstep_proto::wire::{Hello, PROTOCOL_VERSIONS, Welcome};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use super::PATIENCE;

/// How to reach a controller, and as whom.
#[derive(Debug, Clone)]
pub struct Dial {
    config: Arc<rustls::ClientConfig>,
    /// The controller.
    pub address: SocketAddr,
    /// Where to dial from: loopback has many addresses.
    pub from: SocketAddr,
}

impl Dial {
    /// With a certificate and its key, both in PEM, or as a stranger; `controllers` is who may have
    /// issued the controller's certificate.
    pub fn new(address: SocketAddr, own: Option<(&str, &str)>, controllers: &str) -> Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        for issuer in CertificateDer::pem_slice_iter(controllers.as_bytes()) {
            roots.add(issuer?)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots);
        let mut config = match own {
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_slice_iter(certificate.as_bytes());
                let chain = chain.collect::<Result<Vec<_>, _>>()?;
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes())?;
                builder.with_client_auth_cert(chain, key)?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self {
            config: Arc::new(config),
            address,
            from: ([127, 0, 0, 1], 0).into(),
        })
    }

    /// The same from another address.
    #[must_use]
    pub fn from(&self, from: [u8; 4]) -> Self {
        Self {
            from: (from, 0).into(),
            ..self.clone()
        }
    }

    /// A connection without TLS.
    pub async fn tcp(&self) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(self.from)?;
        socket.connect(self.address).await
    }

    /// A connection that has shaken hands.
    pub async fn tls(&self) -> io::Result<TlsStream<TcpStream>> {
        let tcp = self.tcp().await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::from(self.address.ip());
        TlsConnector::from(self.config.clone())
            .connect(name, tcp)
            .await
    }

    /// A connection that speaks HTTP/2.
    pub async fn channel(&self) -> Result<Channel> {
        let dial = self.clone();
        let connector = tower::service_fn(move |_| {
            let dial = dial.clone();
            async move { dial.tls().await.map(TokioIo::new) }
        });
        let origin = format!("https://{}", self.address).parse()?;
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))?.origin(origin);
        Ok(endpoint.connect_with_connector(connector).await?)
    }
}

/// How an agent introduces itself that has done nothing yet.
pub fn hello(host: &str, instance: u8) -> Result<Hello> {
    Ok(Hello {
        versions: PROTOCOL_VERSIONS,
        host: host.parse()?,
        instance: InstanceId::from_random([instance; 8]),
        boot: BootId::from_bytes([1; 8]),
        highest_epoch: Epoch::NONE,
        last_report: 0,
        labels: [].into(),
        agent_version: "0".into(),
        held_rollout: None,
        acknowledged: 0,
    })
}

/// A session with a controller.
#[derive(Debug)]
pub struct Agent {
    /// What the controller answered.
    pub welcome: Welcome,
    /// The number of the next report.
    pub number: u64,
    ups: mpsc::Sender<wire::Up>,
    downs: Streaming<wire::Down>,
}

impl Agent {
    /// Introduces itself.
    pub async fn begin(channel: Channel, hello: wire::Hello) -> Result<Self, Status> {
        let (ups, messages) = mpsc::channel(16);
        let said = wire::Up {
            message: Some(up::Message::Hello(hello)),
        };
        ups.send(said).await.expect("there is room for one");
        let mut client = AgentServiceClient::new(channel);
        let begun = async {
            let stream = client.session(ReceiverStream::new(messages)).await?;
            let mut downs = stream.into_inner();
            let first = downs.message().await?;
            Ok::<_, Status>((downs, first))
        };
        let begun = timeout(PATIENCE, begun).await;
        let (downs, first) = begun.map_err(|_| Status::deadline_exceeded("no welcome"))??;
        let Some(wire::Down {
            message: Some(down::Message::Welcome(welcome)),
            ..
        }) = first
        else {
            return Err(Status::internal("no welcome"));
        };
        let welcome = Welcome::try_from(welcome);
        let welcome = welcome.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Self {
            number: welcome.acknowledged + 1,
            welcome,
            ups,
            downs,
        })
    }

    /// Sends anything. One that has ended takes it to nobody.
    pub async fn send(&self, message: Option<up::Message>) {
        let _ = self.ups.send(wire::Up { message }).await;
    }

    /// Sends a report with the next number.
    pub async fn report(&mut self, body: ReportBody) {
        let report = Report {
            number: self.number,
            body,
            head: None,
        };
        self.number += 1;
        self.send(Some(up::Message::Report(report.into()))).await;
    }

    /// The next message; an error says how the session ended.
    pub async fn next(&mut self) -> Result<down::Message, Status> {
        let next = timeout(PATIENCE, self.coming()).await;
        next.map_err(|_| Status::deadline_exceeded("the controller says nothing"))?
    }

    /// The next message, whenever that is.
    pub async fn coming(&mut self) -> Result<down::Message, Status> {
        let next = self.downs.message().await?;
        let next = next.ok_or_else(|| Status::ok("ended"))?;
        next.message
            .ok_or_else(|| Status::internal("no message that is known"))
    }

    /// The next message, if there is one within so long.
    pub async fn next_within(&mut self, bound: Duration) -> Option<Result<down::Message, Status>> {
        timeout(bound, self.next()).await.ok()
    }

    /// Waits until reports up to this one are durable, past everything else that comes.
    pub async fn acknowledged(&mut self, number: u64) -> Result<()> {
        loop {
            match self.next().await {
                Ok(down::Message::Acknowledged(upto)) if upto >= number => return Ok(()),
                Ok(_) => {}
                Err(status) => bail!("the session has ended: {status}"),
            }
        }
    }

    /// Waits for an order, past everything else that comes; consents to what is offered.
    pub async fn ordered(&mut self) -> Result<wire::Order> {
        loop {
            match self.next().await.map_err(anyhow::Error::from)? {
                down::Message::Order(order) => return Ok(order),
                down::Message::Offer(offer) => self.consent(offer).await?,
                _ => {}
            }
        }
    }

    /// Waits for an offer, past everything else that comes.
    pub async fn offered(&mut self) -> Result<wire::Offer> {
        loop {
            if let down::Message::Offer(offer) = self.next().await.map_err(anyhow::Error::from)? {
                return Ok(offer);
            }
        }
    }

    async fn consent(&mut self, offer: wire::Offer) -> Result<()> {
        let (rollout, plan, ..) = offer.into_parts().context("the offer")?;
        self.report(ReportBody::Consented {
            rollout,
            plan,
            state: vec![],
            round: 0,
        })
        .await;
        Ok(())
    }
}
