//! How this host gets its certificate, and the next one. Its key is made here and stays here.
//!
//! ```text
//! agent.key.next               a key whose certificate is asked for; asked for again, not made anew
//! agent.key.next, .crt.next    the next pair is whole: it takes the place of the present one
//!                .crt.next     the key has taken its place, and the certificate follows
//! ```
//!
//! Whatever ends the process between any two of these, the next one goes on from there. An answer
//! that was lost is given again for the same key.

pub(crate) mod join;
mod place;

use std::io;
use std::path::{Path, PathBuf};

use lockstep_proto::ids::HostId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::Tls;
use crate::identity::replace_file;
use crate::journal::sync_dir;

/// A pair that cannot be made or kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PairError {
    /// A file.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A key or a request.
    #[error("cannot make a key and a request for its certificate")]
    Key(#[from] rcgen::Error),
    /// What the controller sent is not what was asked for.
    #[error("the controller's answer is not a certificate for this host and key: {0}")]
    Answer(String),
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PairError {
    let path = path.to_owned();
    move |source| PairError::File { what, path, source }
}

/// The next one of a file.
fn next(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".next");
    name.into()
}

/// A key whose certificate is not here yet.
pub(crate) struct Pending {
    pair: KeyPair,
}

impl Pending {
    /// The key that is waiting for its certificate, or a new one, durable.
    pub(crate) fn of(tls: &Tls) -> Result<Self, PairError> {
        let path = next(&tls.key);
        if let Ok(pem) = std::fs::read_to_string(&path)
            && let Ok(pair) = KeyPair::from_pem(&pem)
        {
            return Ok(Self { pair });
        }
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let pem = pair.serialize_pem();
        replace_file(&path, pem.as_bytes()).map_err(file("write", &path))?;
        Ok(Self { pair })
    }

    /// The request for its certificate, in DER.
    pub(crate) fn request(&self, domain: &str, host: &HostId) -> Result<Vec<u8>, PairError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uri = format!("spiffe://{domain}/agent/{host}");
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        Ok(params.serialize_request(&self.pair)?.der().to_vec())
    }

    /// Puts the pair in its place: afterwards it is there, or the one before it.
    pub(crate) fn complete(
        self,
        tls: &Tls,
        uri: &str,
        certificates: &[impl AsRef<[u8]>],
    ) -> Result<(), PairError> {
        let wrong = |why: String| PairError::Answer(why);
        let leaf = certificates
            .first()
            .ok_or_else(|| wrong("it is empty".to_owned()))?;
        let leaf = CertificateDer::from(leaf.as_ref());
        let named = uris(&leaf).map_err(wrong)?;
        if named != [uri] {
            return Err(wrong(format!(
                "it names `{}`, not `{uri}`",
                named.join("`, `")
            )));
        }
        if public_key(&leaf).as_deref() != Some(self.pair.public_key_raw()) {
            return Err(wrong("it is for another key".to_owned()));
        }
        let text: String = certificates
            .iter()
            .map(|der| in_pem(der.as_ref()))
            .collect();
        let path = next(&tls.cert);
        replace_file(&path, text.as_bytes()).map_err(file("write", &path))?;
        settle(tls)
    }
}

/// Lets a pair that is whole take its place, also one that a process before this one was about to
/// put there.
pub(crate) fn settle(tls: &Tls) -> Result<(), PairError> {
    let (key, certificate) = (next(&tls.key), next(&tls.cert));
    if !certificate.exists() {
        return Ok(());
    }
    if key.exists() {
        std::fs::rename(&key, &tls.key).map_err(file("write", &tls.key))?;
        sync(&tls.key)?;
    }
    std::fs::rename(&certificate, &tls.cert).map_err(file("write", &tls.cert))?;
    sync(&tls.cert)
}

fn sync(path: &Path) -> Result<(), PairError> {
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    sync_dir(directory).map_err(file("write", directory))
}

/// The names of a certificate that are URIs.
fn uris(certificate: &CertificateDer<'_>) -> Result<Vec<String>, String> {
    use x509_parser::extensions::GeneralName;
    let parsed = X509Certificate::from_der(certificate);
    let (_, parsed) = parsed.map_err(|error| error.to_string())?;
    let names = parsed.subject_alternative_name();
    let names = names.map_err(|error| error.to_string())?;
    let names = names
        .into_iter()
        .flat_map(|names| &names.value.general_names);
    let uris = names.filter_map(|name| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    });
    Ok(uris.collect())
}

fn public_key(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(parsed.public_key().subject_public_key.data.to_vec())
}

/// Whether a certificate and a key are there and belong together.
fn is_pair(tls: &Tls) -> bool {
    let key = std::fs::read_to_string(&tls.key).ok();
    let key = key.and_then(|pem| KeyPair::from_pem(&pem).ok());
    let leaf = CertificateDer::from_pem_file(&tls.cert).ok();
    let (Some(key), Some(leaf)) = (key, leaf) else {
        return false;
    };
    public_key(&leaf).as_deref() == Some(key.public_key_raw())
}

/// A certificate in PEM.
fn in_pem(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// Signs what is asked for, as a controller would.
    fn sign(request: &[u8]) -> Vec<u8> {
        let issuer = KeyPair::generate().unwrap();
        let params = CertificateParams::default();
        let signer = rcgen::Issuer::from_params(&params, &issuer);
        let request = rcgen::CertificateSigningRequestParams::from_der(&request.into()).unwrap();
        request.signed_by(&signer).unwrap().der().to_vec()
    }

    fn place() -> (tempfile::TempDir, Tls) {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let tls = Tls {
            controller_ca: at("ca.crt"),
            cert: at("agent.crt"),
            key: at("agent.key"),
        };
        (dir, tls)
    }

    const URI: &str = "spiffe://example.com/agent/app-1";

    fn request(pending: &Pending) -> Vec<u8> {
        pending
            .request("example.com", &"app-1".parse().unwrap())
            .unwrap()
    }

    #[test]
    fn a_key_that_waits_is_asked_for_again_and_is_nobody_elses() {
        let (_dir, tls) = place();
        let first = Pending::of(&tls).unwrap();
        let mode = std::fs::metadata(next(&tls.key))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = Pending::of(&tls).unwrap();
        assert_eq!(first.pair.public_key_raw(), again.pair.public_key_raw());
        let certificate = sign(&request(&again));
        again.complete(&tls, URI, &[certificate]).unwrap();
        assert!(is_pair(&tls) && !next(&tls.key).exists() && !next(&tls.cert).exists());
        let mode = std::fs::metadata(&tls.key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let other = Pending::of(&tls).unwrap();
        assert_ne!(first.pair.public_key_raw(), other.pair.public_key_raw());
        assert!(
            is_pair(&tls),
            "the present pair stays until the next one is whole"
        );
    }

    #[test]
    fn a_pair_takes_its_place_whatever_ends_the_process_before() {
        let (_dir, tls) = place();
        let first = Pending::of(&tls).unwrap();
        let certificate = sign(&request(&first));
        first.complete(&tls, URI, &[certificate]).unwrap();
        let before = std::fs::read(&tls.cert).unwrap();
        for killed_after_the_key in [false, true] {
            let pending = Pending::of(&tls).unwrap();
            let text = in_pem(&sign(&request(&pending)));
            std::fs::write(next(&tls.cert), &text).unwrap();
            if killed_after_the_key {
                std::fs::rename(next(&tls.key), &tls.key).unwrap();
                assert!(!is_pair(&tls));
            }
            settle(&tls).unwrap();
            assert!(is_pair(&tls), "{killed_after_the_key}");
            assert_eq!(std::fs::read_to_string(&tls.cert).unwrap(), text);
            assert_ne!(std::fs::read(&tls.cert).unwrap(), before);
            settle(&tls).unwrap();
        }
    }

    #[test]
    fn an_answer_for_another_key_or_name_changes_nothing() {
        let (_dir, tls) = place();
        let (_other_dir, other_tls) = place();
        let pending = Pending::of(&tls).unwrap();
        let other = sign(&request(&Pending::of(&other_tls).unwrap()));
        assert!(pending.complete(&tls, URI, &[other]).is_err());
        let pending = Pending::of(&tls).unwrap();
        let own = sign(&request(&pending));
        let name = "spiffe://example.com/agent/app-2";
        assert!(pending.complete(&tls, name, &[own]).is_err());
        let nothing: [Vec<u8>; 0] = [];
        assert!(
            Pending::of(&tls)
                .unwrap()
                .complete(&tls, URI, &nothing)
                .is_err()
        );
        assert!(!tls.cert.exists() && !tls.key.exists());
    }
}
