//! Who gets through the handshake: a certificate of its kind's issuer, of nobody who is suspended.

use std::io;
use std::sync::Arc;

use lockstep_core::refusal::Why;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore,
    SignatureScheme,
};

use super::{TlsError, words};
use crate::identity::{self, Claim, Identity, Peer};
use crate::refusals::{HANDSHAKE, Refusals, caller};
use crate::suspensions::Suspensions;

/// Asks the issuers of the role that a certificate claims.
#[derive(Debug)]
pub(super) struct RoleVerifier {
    domain: Arc<str>,
    suspensions: Arc<Suspensions>,
    refusals: Refusals,
    /// Whether one without a certificate is let through, for the one call that it may make.
    optional: bool,
    agents: Arc<dyn ClientCertVerifier>,
    operators: Arc<dyn ClientCertVerifier>,
    hints: Vec<DistinguishedName>,
}

impl RoleVerifier {
    /// Trusts these issuers, each for its own kind. `lists` are the operators' revocation lists;
    /// none: nothing is known of them, and every certificate is taken.
    pub(super) fn new(
        domain: &str,
        agents: Vec<CertificateDer<'static>>,
        operators: Vec<CertificateDer<'static>>,
        lists: Vec<CertificateRevocationListDer<'static>>,
        optional: bool,
        suspensions: Arc<Suspensions>,
        refusals: Refusals,
    ) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let verifier = |what, issuers: Vec<CertificateDer<'static>>, lists: Vec<_>| {
            let mut roots = RootCertStore::empty();
            for issuer in issuers {
                roots.add(issuer).map_err(|source| TlsError::Unusable {
                    what,
                    source: source.into(),
                })?;
            }
            let provider = Arc::clone(&provider);
            let builder = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
            let builder = if lists.is_empty() {
                builder
            } else {
                // By default a list that has ended is believed for ever.
                builder
                    .with_crls(lists)
                    .only_check_end_entity_revocation()
                    .enforce_revocation_expiration()
            };
            builder.build().map_err(|source| TlsError::Unusable {
                what,
                source: source.into(),
            })
        };
        let agents = verifier("the agents' issuers", agents, vec![])?;
        let operators = verifier("the operators' issuers", operators, lists)?;
        let hints = [&agents, &operators].map(|verifier| verifier.root_hint_subjects());
        let hints = hints.concat();
        Ok(Self {
            domain: domain.into(),
            suspensions,
            refusals,
            optional,
            agents,
            operators,
            hints,
        })
    }
}

impl RoleVerifier {
    /// What a certificate claims, and who has to stand for that.
    fn issuers_of(
        &self,
        certificate: &CertificateDer<'_>,
    ) -> Result<(Claim, &dyn ClientCertVerifier), rustls::Error> {
        let claimed = identity::read(certificate, &self.domain);
        let claimed = claimed.map_err(|error| {
            let error = OtherError(Arc::new(error));
            rustls::Error::InvalidCertificate(CertificateError::Other(error))
        })?;
        let verifier = match claimed.identity {
            Identity::Agent(_) => &*self.agents,
            Identity::Operator { .. } => &*self.operators,
            Identity::Nobody => unreachable!("a certificate names somebody"),
        };
        Ok((claimed, verifier))
    }

    /// Why a peer that was let in before would not be let in now; none if it would.
    pub(super) fn why_not(&self, peer: &Peer) -> Option<String> {
        let (certificate, intermediates) = peer.chain().split_first()?;
        let verified = self.issuers_of(certificate).and_then(|(_, verifier)| {
            verifier.verify_client_cert(certificate, intermediates, UnixTime::now())
        });
        let error = io::Error::new(io::ErrorKind::InvalidData, verified.err()?);
        Some(words(&error))
    }
}

impl ClientCertVerifier for RoleVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn client_auth_mandatory(&self) -> bool {
        !self.optional
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let (claimed, verifier) = self.issuers_of(end_entity)?;
        let verified = verifier.verify_client_cert(end_entity, intermediates, now);
        let verified = verified.inspect_err(|error| {
            // Its issuer is the right one: it is looked for in the list only then.
            if matches!(
                error,
                rustls::Error::InvalidCertificate(CertificateError::Revoked)
            ) {
                let who = caller(&claimed.identity);
                self.refusals.note(who, HANDSHAKE, Why::Suspended);
            }
        })?;
        if let Some(why) = self.suspensions.why(&claimed.identity, &claimed.serial) {
            let identity = &claimed.identity;
            tracing::warn!(%identity, serial = %claimed.serial, why, "a handshake was refused");
            self.refusals
                .note(caller(identity), HANDSHAKE, Why::Suspended);
            // The alert says so to the other side.
            return Err(rustls::Error::InvalidCertificate(CertificateError::Revoked));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Never asked: no version but 1.3 is offered.
        let refused = rustls::PeerIncompatible::Tls12NotOffered;
        Err(rustls::Error::PeerIncompatible(refused))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Both use the same provider; a signature has nothing to do with the role.
        self.agents.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.agents.supported_verify_schemes()
    }
}
