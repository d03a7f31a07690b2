//! The agents' issuer, as the controller holds it: what it signs, and what it takes back.
//!
//! It signs nothing but what the coordinator has granted, and takes nothing from a request but its
//! key and its name.

use std::path::Path;
use std::time::Duration;

use lockstep_core::trust::{Grant, Serial};
use lockstep_proto::ids::{Digest, HostId};
use lockstep_proto::values::{Period, Timestamp};
use rcgen::{
    CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer as Signer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::{Enroll, TlsFiles};
use crate::tls::{TlsError, certificates, is_open};

/// How long a revocation list is valid; it is signed again at half of that.
pub(crate) const LIST_LIFE: Duration = Duration::from_hours(24);

/// The agents' issuer.
pub(crate) struct Issuer {
    domain: String,
    certificate: CertificateDer<'static>,
    signer: Signer<'static, KeyPair>,
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer").finish_non_exhaustive()
    }
}

/// Something that could not be signed.
#[derive(Debug, thiserror::Error)]
#[error("{what} cannot be signed")]
pub(crate) struct SignError {
    what: &'static str,
    #[source]
    source: rcgen::Error,
}

/// A request that was read: its key has signed it.
#[derive(Debug)]
pub(crate) struct Request {
    /// The host that it asks for.
    pub(crate) host: HostId,
    /// SHA-256 of its public key.
    pub(crate) key: Digest,
    inner: CertificateSigningRequestParams,
}

impl Request {
    /// Reads a request, or says what is wrong with it.
    pub(crate) fn read(der: &[u8], domain: &str) -> Result<Self, String> {
        let der = CertificateSigningRequestDer::from(der);
        let inner = CertificateSigningRequestParams::from_der(&der)
            .map_err(|error| format!("the certificate signing request cannot be used: {error}"))?;
        let point = inner.public_key.der_bytes();
        let p256 = *inner.public_key.algorithm() == PKCS_ECDSA_P256_SHA256;
        // An uncompressed point of a curve with 256 bits.
        if !p256 || point.len() != 65 {
            return Err("the key must be an ECDSA key of the curve P-256".to_owned());
        }
        let [SanType::URI(uri)] = &inner.params.subject_alt_names[..] else {
            return Err(format!(
                "a request has exactly one name, the URI `spiffe://{domain}/agent/<host>`"
            ));
        };
        let prefix = format!("spiffe://{domain}/agent/");
        let host = uri.as_str().strip_prefix(&prefix);
        let host = host.and_then(|host| host.parse().ok()).ok_or_else(|| {
            format!("the request's name is `{uri}`, not `spiffe://{domain}/agent/<host>`")
        })?;
        Ok(Self {
            host,
            key: Digest::of(point),
            inner,
        })
    }
}

impl Issuer {
    /// Reads the key, and finds its certificate among the agents' issuers.
    pub(crate) fn load(enroll: &Enroll, tls: &TlsFiles, domain: &str) -> Result<Self, TlsError> {
        let path = &enroll.agent_ca_key;
        let what = "the agents' issuer's key";
        let unusable =
            |source: Box<dyn std::error::Error + Send + Sync>| TlsError::Unusable { what, source };
        if is_open(path) {
            return Err(TlsError::OpenKey(path.clone()));
        }
        let pem = std::fs::read_to_string(path).map_err(|error| TlsError::File {
            what,
            path: path.clone(),
            source: rustls::pki_types::pem::Error::Io(error),
        })?;
        let key = KeyPair::from_pem(&pem).map_err(|error| unusable(error.into()))?;
        let issuers = certificates("the agents' issuer", &tls.agent_ca)?;
        let own = issuers.into_iter().find(|certificate| {
            X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| {
                parsed.public_key().subject_public_key.data == key.der_bytes()
            })
        });
        let certificate = own.ok_or_else(|| TlsError::OtherKey {
            path: path.clone(),
            issuers: tls.agent_ca.clone(),
        })?;
        let signer = Signer::from_ca_cert_der(&certificate, key);
        Ok(Self {
            domain: domain.to_owned(),
            signer: signer.map_err(|error| unusable(error.into()))?,
            certificate,
        })
    }

    /// Signs what was granted. The same grant and key make the same certificate, but for the
    /// signature itself.
    pub(crate) fn sign(&self, grant: &Grant, request: &Request) -> Result<Vec<u8>, SignError> {
        let failed = |source| SignError {
            what: "the certificate",
            source,
        };
        debug_assert_eq!(grant.key, request.key, "a grant is for one key");
        debug_assert_eq!(grant.host, request.host, "a grant is for one host");
        let mut params = CertificateParams::default();
        params.not_before = date(grant.not_before);
        params.not_after = date(grant.not_after);
        params.serial_number = Some(SerialNumber::from(grant.serial.to_bytes()));
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, self.domain.as_str());
        subject.push(DnType::CommonName, grant.host.as_str());
        params.distinguished_name = subject;
        let uri = format!("spiffe://{}/agent/{}", self.domain, grant.host);
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(failed)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = &request.inner.public_key;
        let signed = params.signed_by(key, &self.signer).map_err(failed)?;
        Ok(signed.der().to_vec())
    }

    /// Signs the list of certificates that are void, in PEM.
    pub(crate) fn sign_list(
        &self,
        now: Timestamp,
        revoked: impl IntoIterator<Item = Serial>,
    ) -> Result<String, SignError> {
        let failed = |source| SignError {
            what: "the revocation list",
            source,
        };
        let revoked = revoked.into_iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial.to_bytes()),
            revocation_time: date(now),
            reason_code: None,
            invalidity_date: None,
        });
        let life = u64::try_from(LIST_LIFE.as_millis()).expect("a day");
        let params = CertificateRevocationListParams {
            this_update: date(now),
            next_update: date(now.plus(Period(life))),
            // The clock never goes back, not even over a restart.
            crl_number: SerialNumber::from(now.0),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let signed = params.signed_by(&self.signer).map_err(failed)?;
        signed.pem().map_err(failed)
    }

    /// When the issuer's own certificate ends, in seconds since 1970.
    pub(crate) fn ends(&self) -> i64 {
        X509Certificate::from_der(&self.certificate)
            .map_or(0, |(_, parsed)| parsed.validity().not_after.timestamp())
    }
}

fn date(at: Timestamp) -> time::OffsetDateTime {
    let seconds = i64::try_from(at.0 / 1000).unwrap_or(i64::MAX);
    time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

/// SHA-256 of a certificate's public key with its algorithm, as `--ca-pin` takes it.
pub(crate) fn pin(certificate: &Path) -> Option<String> {
    let certificate = CertificateDer::from_pem_file(certificate).ok()?;
    let (_, parsed) = X509Certificate::from_der(&certificate).ok()?;
    Some(Digest::of(parsed.public_key().raw).to_string())
}
