//! Connections as the agent makes them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use lockstep_tests::cluster::{Cluster, DOMAIN};
use lockstep_tests::played::{self, Issuer, Side};
use serde::{Deserialize, Serialize};
use tonic::transport::{Channel, Endpoint};

/// As in the agent.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
const PING_EVERY: Duration = Duration::from_secs(5);
const PONG_WITHIN: Duration = Duration::from_secs(5);
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 512 << 10;
const HEADER_LIST: u32 = 16 << 10;
const BUFFER: usize = 16;

/// Where the controller is, and who issues certificates.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Place {
    /// `ADDRESS:PORT`.
    pub(crate) address: String,
    /// The cluster's issuers.
    pub(crate) pki: PathBuf,
}

impl Place {
    /// Where a cluster's controller is.
    pub(crate) fn of(cluster: &Cluster) -> Self {
        Self {
            address: cluster.address().to_owned(),
            pki: cluster.pki(),
        }
    }

    /// A person's way to the controller.
    pub(crate) fn operator(&self, name: &str) -> Result<played::Dial> {
        let certificate = self.read(&format!("operator-{name}.crt"))?;
        let key = self.read(&format!("operator-{name}.key"))?;
        let own = Some((certificate.as_str(), key.as_str()));
        played::Dial::new(
            self.address.parse()?,
            own,
            &self.read("ca-controllers.crt")?,
        )
    }

    pub(crate) fn read(&self, name: &str) -> Result<String> {
        let path = self.pki.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// Who issues agents' certificates.
    pub(crate) fn issuer(&self) -> Result<Issuer> {
        Issuer::stolen(&self.read("ca-agents.crt")?, &self.read("ca-agents.key")?)
    }
}

/// One agent's way to the controller.
#[derive(Debug)]
pub(crate) struct Dial {
    dial: played::Dial,
}

impl Dial {
    /// With a certificate and a key of its own, from an address of its own: one address has fewer
    /// ports than there are agents.
    pub(crate) fn new(place: &Place, issuer: &Issuer, host: &str, number: usize) -> Result<Self> {
        let (certificate, key) = issuer.issue(DOMAIN, &format!("agent/{host}"), Side::Client);
        let own = Some((certificate.as_str(), key.as_str()));
        let address = place.address.parse()?;
        let dial = played::Dial::new(address, own, &place.read("ca-controllers.crt")?)?;
        let [_, high, low, _] = u32::try_from(number * 256)?.to_be_bytes();
        let dial = dial.from([127, 1 + high, low, 1]);
        Ok(Self { dial })
    }

    pub(crate) async fn channel(&self) -> Result<Channel, tonic::transport::Error> {
        let dial = self.dial.clone();
        let origin = format!("https://{}", dial.address);
        let endpoint = Endpoint::from_shared(format!("http://{}", dial.address))?
            .origin(origin.parse().expect("an address makes a URI"))
            .connect_timeout(CONNECT_WITHIN)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PONG_WITHIN)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_max_header_list_size(HEADER_LIST)
            .buffer_size(BUFFER);
        let connector = tower::service_fn(move |_| {
            let dial = dial.clone();
            async move { dial.tls().await.map(TokioIo::new) }
        });
        endpoint.connect_with_connector(connector).await
    }
}
