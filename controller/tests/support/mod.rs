//! A controller as a process, with certificates of its own, and clients that dial it.

#[path = "../../src/pki/mod.rs"]
#[allow(dead_code, unreachable_pub, reason = "the controller's own module")]
pub(crate) mod pki;

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use lockstep_proto::wire::agent_v1::agent_service_client::AgentServiceClient;
use lockstep_proto::wire::agent_v1::{Down, Epoch, Hello, Up, down, up};
use lockstep_proto::wire::control_v1::control_service_client::ControlServiceClient;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

pub(crate) const DOMAIN: &str = "example.com";

/// The operators' API.
pub(crate) type Api = ControlServiceClient<Channel>;

/// Things that take milliseconds, on a machine that does much else.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A directory with issuers, certificates, configuration and state.
pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        pki::init(&place.pki(), DOMAIN).unwrap();
        let addresses = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        pki::issue_controller(&place.pki(), "c1", &addresses, place.path()).unwrap();
        for name in ["ca-agents.crt", "ca-operators.crt", "ca-controllers.crt"] {
            fs::copy(place.pki().join(name), place.path().join(name)).unwrap();
        }
        let config = format!(
            "listen = \"127.0.0.1:0\"\nstate_dir = \"state\"\ndomain = \"{DOMAIN}\"\n[tls]\n\
             cert = \"controller-c1.crt\"\nkey = \"controller-c1.key\"\n\
             agent_ca = \"ca-agents.crt\"\noperator_ca = \"ca-operators.crt\"\n"
        );
        fs::write(place.path().join("controller.toml"), config).unwrap();
        place
    }

    /// One whose controller lets hosts join; certificates live for so long.
    pub(crate) fn enrolling(life: &str) -> Self {
        let place = Self::new();
        let file = place.path().join("controller.toml");
        let mut config = fs::read_to_string(&file).unwrap();
        config.push_str("\n[enroll]\nagent_ca_key = \"pki/ca-agents.key\"\n");
        config.push_str("controller_ca = \"ca-controllers.crt\"\n");
        let _ = writeln!(config, "life = \"{life}\"");
        fs::write(file, config).unwrap();
        place
    }

    /// An operator with roles.
    pub(crate) fn with_roles(&self, name: &str, roles: &[pki::roles::Role]) -> Identity {
        let mut person = pki::Person::new(name, &[]);
        person.roles = pki::roles::Roles::of(roles);
        self.person(&person)
    }

    pub(crate) fn admin(&self) -> Identity {
        self.with_roles("ada", &[pki::roles::Role::Admin])
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn pki(&self) -> PathBuf {
        self.path().join("pki")
    }

    pub(crate) fn agent(&self, host: &str) -> Identity {
        Identity::of(pki::issue_agent(&self.pki(), host, self.path()).unwrap())
    }

    pub(crate) fn operator(&self, name: &str, groups: &[&str]) -> Identity {
        let groups: Vec<String> = groups.iter().map(ToString::to_string).collect();
        self.person(&pki::Person::new(name, &groups))
    }

    pub(crate) fn person(&self, person: &pki::Person<'_>) -> Identity {
        Identity::of(pki::issue_operator(&self.pki(), person, self.path()).unwrap())
    }

    /// A certificate that ends so many seconds from now, for a name of any kind, by any issuer.
    pub(crate) fn aged(&self, issuer: &str, name: &str, ends: i64) -> Identity {
        use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
        let file = |kind: &str| {
            let path = self.pki().join(format!("ca-{issuer}.{kind}"));
            fs::read_to_string(path).unwrap()
        };
        let key = KeyPair::from_pem(&file("key")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&file("crt"), key).unwrap();
        let mut params = CertificateParams::default();
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
        let ends = time::OffsetDateTime::from_unix_timestamp(now + ends).unwrap();
        params.not_before = ends - time::Duration::days(30);
        params.not_after = ends;
        let uri = format!("spiffe://{DOMAIN}/{name}");
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        let pair = KeyPair::generate().unwrap();
        let signed = params.signed_by(&pair, &issuer).unwrap();
        let stem = format!("aged-{}-{}", ends.unix_timestamp(), name.replace('/', "-"));
        let identity = Identity {
            certificate: self.path().join(format!("{stem}.crt")),
            key: self.path().join(format!("{stem}.key")),
        };
        fs::write(&identity.certificate, signed.pem()).unwrap();
        fs::write(&identity.key, pair.serialize_pem()).unwrap();
        identity
    }

    /// The operators' revocation list with these certificates, in PEM; it ends so many seconds
    /// from now.
    pub(crate) fn operators_list(&self, revoked: &[&Identity], ends: i64) -> String {
        use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair};
        use rcgen::{RevokedCertParams, SerialNumber};
        let file = |kind: &str| {
            let path = self.pki().join(format!("ca-operators.{kind}"));
            fs::read_to_string(path).unwrap()
        };
        let key = KeyPair::from_pem(&file("key")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&file("crt"), key).unwrap();
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
        let at = |seconds| time::OffsetDateTime::from_unix_timestamp(seconds).unwrap();
        let entry = |identity: &&Identity| RevokedCertParams {
            serial_number: SerialNumber::from(hex::decode(identity.serial()).unwrap()),
            revocation_time: at(now - 100),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: at(now - 100),
            next_update: at(now + ends),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&issuer).unwrap().pem().unwrap()
    }

    pub(crate) fn start(&self) -> Controller {
        self.start_with(&[])
    }

    pub(crate) fn start_with(&self, more: &[&str]) -> Controller {
        let ready = self.path().join("ready");
        let _ = fs::remove_file(&ready);
        let mut child = self.spawn(more);
        let deadline = Instant::now() + SOON;
        let address = loop {
            if let Ok(address) = fs::read_to_string(&ready) {
                break address.trim().parse().unwrap();
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the controller ended: {status}\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "not ready:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        };
        Controller {
            child,
            address,
            issuer: self.path().join("ca-controllers.crt"),
        }
    }

    /// Runs a controller that is expected not to start.
    pub(crate) fn fail(&self) -> (Option<i32>, String) {
        let mut child = self.spawn(&[]);
        let status = wait(&mut child);
        (status.code(), self.log())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path().join("log")).unwrap_or_default()
    }

    fn spawn(&self, more: &[&str]) -> Child {
        let log = fs::File::create(self.path().join("log")).unwrap();
        Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .arg("serve")
            .arg("--config")
            .arg(self.path().join("controller.toml"))
            .arg("--ready-file")
            .arg(self.path().join("ready"))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }
}

fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "the controller does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A controller that takes calls; killed when dropped.
pub(crate) struct Controller {
    child: Child,
    pub(crate) address: SocketAddr,
    issuer: PathBuf,
}

impl Controller {
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> Option<i32> {
        wait(&mut self.child).code()
    }

    /// Ends it as a power loss would, but for the page cache.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn terminate(mut self) -> Option<i32> {
        self.signal(rustix::process::Signal::TERM);
        self.wait()
    }

    /// A channel; what is wrong with it may show only at the first call.
    pub(crate) async fn dial(&self, identity: Option<&Identity>) -> Result<Channel, String> {
        self.dial_from(identity, [127, 0, 0, 1]).await
    }

    /// A channel from one of this machine's addresses.
    pub(crate) async fn dial_from(
        &self,
        identity: Option<&Identity>,
        from: [u8; 4],
    ) -> Result<Channel, String> {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(&self.issuer).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            Some(identity) => config
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_file(&identity.certificate).unwrap()],
                    PrivateKeyDer::from_pem_file(&identity.key).unwrap(),
                )
                .unwrap(),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
        let address = self.address;
        let connector = tower::service_fn(move |_: http::Uri| {
            let tls = tls.clone();
            async move {
                let socket = tokio::net::TcpSocket::new_v4()?;
                socket.bind((from, 0).into())?;
                let tcp = socket.connect(address).await?;
                let name = ServerName::try_from("localhost").unwrap();
                let tls = tls.connect(name, tcp).await?;
                Ok::<_, io::Error>(TokioIo::new(tls))
            }
        });
        let endpoint = Endpoint::from_static("http://controller.test");
        let channel = endpoint.connect_with_connector(connector).await;
        channel.map_err(|error| format!("{error:?}"))
    }

    pub(crate) async fn control(&self, identity: &Identity) -> Api {
        ControlServiceClient::new(self.dial(Some(identity)).await.unwrap())
    }

    pub(crate) async fn agents(&self, identity: &Identity) -> AgentServiceClient<Channel> {
        AgentServiceClient::new(self.dial(Some(identity)).await.unwrap())
    }

    /// Opens a session and waits for the welcome.
    pub(crate) async fn session(
        &self,
        identity: &Identity,
        hello: Hello,
    ) -> Result<Session, Status> {
        let mut client = self.agents(identity).await;
        let (up, receiver) = mpsc::channel(4);
        up.send(Up {
            message: Some(up::Message::Hello(hello)),
        })
        .await
        .unwrap();
        let down = client.session(ReceiverStream::new(receiver)).await?;
        let mut session = Session {
            up,
            down: down.into_inner(),
            epoch: Epoch::default(),
            acknowledged: 0,
        };
        match session.next().await?.message {
            Some(down::Message::Welcome(welcome)) => {
                session.epoch = welcome.epoch.unwrap();
                session.acknowledged = welcome.acknowledged;
                Ok(session)
            }
            other => panic!("the first message is {other:?}"),
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A certificate and its key.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Identity {
    pub(crate) fn of(issued: pki::Issued) -> Self {
        Self {
            certificate: issued.certificate,
            key: issued.key,
        }
    }
}

impl Identity {
    /// The certificate's serial number, in hexadecimal digits.
    pub(crate) fn serial(&self) -> String {
        use x509_parser::prelude::{FromDer as _, X509Certificate};
        let der = CertificateDer::from_pem_file(&self.certificate).unwrap();
        let (_, parsed) = X509Certificate::from_der(&der).unwrap();
        let digits = hex::encode(parsed.raw_serial());
        digits.trim_start_matches("00").to_owned()
    }
}

/// An agent's session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) up: mpsc::Sender<Up>,
    pub(crate) down: Streaming<Down>,
    pub(crate) epoch: Epoch,
    pub(crate) acknowledged: u64,
}

impl Session {
    /// The next message, or how the stream ended.
    pub(crate) async fn next(&mut self) -> Result<Down, Status> {
        let next = tokio::time::timeout(SOON, self.down.message()).await;
        let next = next.expect("a message in time")?;
        next.ok_or_else(|| Status::ok("the stream has ended"))
    }
}

pub(crate) fn hello(host: &str) -> Hello {
    Hello {
        min_version: 1,
        max_version: 1,
        host: host.to_owned(),
        instance: "in_0000000000000001".to_owned(),
        boot: "bt_0000000000000001".to_owned(),
        highest_epoch: Some(Epoch::default()),
        agent_version: "0.1.0".to_owned(),
        ..Hello::default()
    }
}
