//! How hosts get their certificates: `lockstep.enroll.v1`.
//!
//! ```text
//! Join   token, request -> bounds -> driver: redeemed once, persisted -> signed -> certificate
//! Renew         request -> driver: one child for each certificate     -> signed -> certificate
//! ```
//!
//! The driver decides and persists; only then is anything signed. What was granted to a key is
//! signed for that key again, so an answer that is lost costs nothing.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub(crate) mod issuer;
mod limits;
pub(crate) mod list;

use std::sync::Arc;
use std::time::{Instant, UNIX_EPOCH};

use lockstep_core::trust::{Grant, Serial, Wanted};
use lockstep_core::{Answer, Event};
use lockstep_proto::ids::Digest;
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::enroll_v1::enroll_service_server::EnrollService;
use lockstep_proto::wire::enroll_v1::{JoinRequest, JoinResponse, RenewRequest, RenewResponse};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use crate::api::convert;
use crate::config::{Config, Enroll};
use crate::driver::Handle;
use crate::identity::Peer;
use issuer::Issuer;
use limits::Limits;

/// Hosts that are let in at a time: each is a write to the journal and a signature.
const AT_A_TIME: usize = 16;

/// The longest token that is looked at, in bytes: a host's name, a colon, 40 digits.
const LONGEST_TOKEN: usize = 128;

/// The enrolment service.
#[derive(Debug, Clone)]
pub(crate) struct Enrolment {
    driver: Handle,
    /// What is needed to sign; none: this controller enrols nobody.
    config: Option<Arc<Signing>>,
    limits: Arc<Limits>,
    joining: Arc<Semaphore>,
}

#[derive(Debug)]
struct Signing {
    enroll: Enroll,
    tls: crate::config::TlsFiles,
    domain: String,
}

impl Enrolment {
    /// The service of a controller with this configuration.
    pub(crate) fn new(driver: Handle, config: &Config) -> Self {
        let signing = config.enroll.as_ref().map(|enroll| {
            Arc::new(Signing {
                enroll: enroll.clone(),
                tls: config.tls.clone(),
                domain: config.domain.clone(),
            })
        });
        Self::of(driver, signing)
    }

    /// One that enrols nobody.
    #[cfg(feature = "faults")]
    pub(crate) fn none(driver: Handle) -> Self {
        Self::of(driver, None)
    }

    fn of(driver: Handle, config: Option<Arc<Signing>>) -> Self {
        Self {
            driver,
            config,
            limits: Arc::default(),
            joining: Arc::new(Semaphore::new(AT_A_TIME)),
        }
    }

    fn signing(&self) -> Result<&Arc<Signing>, Status> {
        self.config.as_ref().ok_or_else(|| {
            Status::failed_precondition(
                "this controller does not hold the agents' issuer: `[enroll]` is not in its \
                 configuration",
            )
        })
    }

    async fn ask(&self, event: Event) -> Result<Grant, Status> {
        match self.driver.ask(event).await? {
            Ok(Answer::Granted(grant)) => Ok(*grant),
            Ok(_) => unreachable!("a wish is granted or refused"),
            Err(refused) => Err(convert::refused(&refused)),
        }
    }
}

impl Signing {
    fn wanted(&self, request: &issuer::Request) -> Wanted {
        let mut serial: [u8; 16] = rand::random();
        // A serial number is positive; and it has all its bytes.
        serial[0] = serial[0] & 0x7f | 0x40;
        Wanted {
            host: request.host.clone(),
            key: request.key,
            serial: Serial::from_bytes(&serial),
            life: Period(u64::try_from(self.enroll.life.as_millis()).unwrap_or(u64::MAX)),
        }
    }

    /// Signs on a thread that may wait: for the files, which may have been replaced since.
    async fn sign(
        self: &Arc<Self>,
        grant: Grant,
        request: issuer::Request,
    ) -> Result<Vec<bytes::Bytes>, Status> {
        let signing = Arc::clone(self);
        let signed = tokio::task::spawn_blocking(move || {
            let Signing {
                enroll,
                tls,
                domain,
            } = &*signing;
            let issuer = Issuer::load(enroll, tls, domain).map_err(|error| say(&error))?;
            let certificate = issuer.sign(&grant, &request).map_err(|error| say(&error))?;
            Ok(vec![certificate.into()])
        });
        signed
            .await
            .unwrap_or_else(|_| Err(Status::internal("signing has failed")))
    }
}

/// The reason stands in the log: it is about files of the controller's own.
fn say(error: &dyn std::error::Error) -> Status {
    tracing::error!(error = error.to_string(), "a certificate cannot be signed");
    Status::unavailable("the controller cannot sign certificates now; its log says why")
}

#[tonic::async_trait]
impl EnrollService for Enrolment {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let address = request
            .extensions()
            .get::<Peer>()
            .ok_or_else(|| Status::unauthenticated("nobody has connected"))?
            .address();
        let signing = self.signing()?;
        if !self.limits.may_try(address.ip(), Instant::now()) {
            let why = "too many hosts want to join from this address; try again in a minute";
            return Err(Status::resource_exhausted(why));
        }
        let Ok(_joining) = Arc::clone(&self.joining).try_acquire_owned() else {
            let why = "too many hosts want to join at this moment; try again";
            return Err(Status::resource_exhausted(why));
        };
        let JoinRequest { token, csr } = request.into_inner();
        if token.len() > LONGEST_TOKEN {
            return Err(Status::invalid_argument("this is no token"));
        }
        let token = Digest::of(token.as_bytes());
        let read = issuer::Request::read(&csr, &signing.domain);
        let wanted = match &read {
            Ok(request) => Ok(signing.wanted(request)),
            Err(why) => Err(why.clone()),
        };
        let asked = self.ask(Event::Join {
            token,
            wanted: Box::new(wanted),
        });
        let grant = asked.await.inspect_err(|status| {
            tracing::warn!(
                peer = %address, token = token.short(), why = status.message(),
                "a host was not let in"
            );
        })?;
        tracing::info!(
            host = %grant.host, peer = %address, serial = %grant.serial, "a host was let in"
        );
        // What nobody could read was refused.
        let request = read.map_err(Status::invalid_argument)?;
        let certificates = signing.sign(grant, request).await?;
        Ok(Response::new(JoinResponse { certificates }))
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<RenewResponse>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("no certificate"))?;
        let host = peer.agent()?.clone();
        let signing = self.signing()?;
        let csr = request.into_inner().csr;
        let request = issuer::Request::read(&csr, &signing.domain);
        let request = request.map_err(Status::invalid_argument)?;
        let ends = peer
            .not_after()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let asked = self.ask(Event::Renew {
            host: host.clone(),
            parent: peer.serial().clone(),
            parent_ends: Timestamp(u64::try_from(ends.as_millis()).unwrap_or(u64::MAX)),
            wanted: Box::new(signing.wanted(&request)),
        });
        let grant = asked.await.inspect_err(|status| {
            tracing::error!(
                %host, peer = %peer.address(), parent = %peer.serial(), why = status.message(),
                "a certificate was not renewed"
            );
        })?;
        tracing::info!(%host, serial = %grant.serial, "a certificate was renewed");
        let certificates = signing.sign(grant, request).await?;
        Ok(Response::new(RenewResponse { certificates }))
    }
}
