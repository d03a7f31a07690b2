//! For fuzzers: what must hold of a host's request for a certificate.

use lockstep_proto::ids::HostId;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

use super::issuer::Request;
use crate::pki::roles::ATTRIBUTE;

const DOMAIN: &str = "example.com";

/// A request, in DER. Whoever asks has the key, and can ask for nothing but one name of a host.
pub fn csr(der: &[u8]) {
    let Ok(request) = Request::read(der, DOMAIN) else {
        return;
    };
    let host: HostId = request.host.as_str().parse().expect("a host's name");
    assert_eq!(host, request.host);
    // One byte in the signed part, and its signature is another's.
    let mut changed = der.to_vec();
    let place = 8 + usize::from(request.key.0[0]) % (changed.len() / 2);
    changed[place] ^= 1;
    if let Ok(other) = Request::read(&changed, DOMAIN) {
        assert!(
            other.host == request.host && other.key == request.key,
            "byte {place}"
        );
    }
}

/// A request as a host makes it, for seeds.
pub fn csr_of(uri: &str) -> Option<Vec<u8>> {
    let key = KeyPair::generate().ok()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().ok()?)];
    let request = params.serialize_request(&key).ok()?;
    Some(request.der().to_vec())
}

/// A certificate with this name, for seeds; its own key has signed it.
pub fn certificate_of(uri: &str) -> Option<Vec<u8>> {
    let key = KeyPair::generate().ok()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().ok()?)];
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationalUnitName, "dba,qa_lead");
    subject.push(DnType::CustomDnType(ATTRIBUTE.to_vec()), "viewer,admin");
    params.distinguished_name = subject;
    let certificate = params.self_signed(&key).ok()?;
    Some(certificate.der().to_vec())
}
