//! An issuer of certificates, for controllers that a test plays.

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer as Signer, KeyPair,
    SanType,
};

/// An issuer with its key.
#[derive(Debug)]
pub struct Issuer {
    signer: Signer<'static, KeyPair>,
    pem: String,
}

/// Which side of a connection a certificate is for.
#[derive(Debug, Clone, Copy)]
pub enum Side {
    /// Whoever dials.
    Client,
    /// Whoever is dialled.
    Server,
}

impl Issuer {
    /// A new one.
    #[expect(clippy::new_without_default, reason = "two are never alike")]
    pub fn new() -> Self {
        let key = KeyPair::generate().expect("a key can be made");
        let mut params = CertificateParams::new(vec![]).expect("no names are no bad names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let own = params.self_signed(&key).expect("it can sign itself");
        let pem = own.pem();
        Self {
            signer: Signer::new(params, key),
            pem,
        }
    }

    /// One whose certificate and key are in PEM: a stolen one.
    pub fn stolen(certificate: &str, key: &str) -> anyhow::Result<Self> {
        let key = KeyPair::from_pem(key)?;
        Ok(Self {
            signer: Signer::from_ca_cert_pem(certificate, key)?,
            pem: certificate.to_owned(),
        })
    }

    /// Its own certificate, in PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Issues a certificate for `spiffe://DOMAIN/NAME`, and a key for it; both in PEM.
    pub fn issue(&self, domain: &str, name: &str, side: Side) -> (String, String) {
        let key = KeyPair::generate().expect("a key can be made");
        let names = vec!["localhost".to_owned()];
        let mut params = CertificateParams::new(names).expect("localhost is a name");
        let uri = format!("spiffe://{domain}/{name}").try_into();
        let uri = uri.expect("a SPIFFE id is plain text");
        params.subject_alt_names.push(SanType::URI(uri));
        params.extended_key_usages = vec![match side {
            Side::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Side::Server => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        let signed = params.signed_by(&key, &self.signer);
        let signed = signed.expect("an issuer can sign");
        (signed.pem(), key.serialize_pem())
    }
}
