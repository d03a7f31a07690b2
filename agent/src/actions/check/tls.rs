//! TLS: a server's certificate and its remaining life.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lockstep_proto::action::check::Tls;
use lockstep_proto::report::Failure;
use rustls::pki_types::CertificateDer;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Act, Done, Finding, Probe};
use crate::step::Context;
use crate::web::{connector, server_name};

/// The longest time for connection and handshake.
const PATIENCE: Duration = Duration::from_secs(10);

const DAY: i64 = 86_400;

/// The certificates that a trusted server presents, its own first.
async fn presented(check: &Tls) -> Result<Result<Vec<CertificateDer<'static>>, String>, Failure> {
    let address = check.address.0.as_str();
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let name = server_name(check.name.as_deref().unwrap_or(host))?;
    let connector = connector(check.ca_file.as_deref().map(Path::new))?;
    let handshake = async {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| error.to_string())?;
        let stream = connector
            .connect(name, stream)
            .await
            .map_err(|error| error.to_string())?;
        let (_, session) = stream.get_ref();
        Ok(session.peer_certificates().unwrap_or_default().to_vec())
    };
    let found = timeout(PATIENCE, handshake).await;
    Ok(found.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}"))))
}

/// The certificate of a chain that ends first: its subject, and when, in seconds since 1970.
fn first_to_end(chain: &[CertificateDer<'_>]) -> Option<(String, i64)> {
    let ends = chain.iter().filter_map(|der| {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        Some((
            certificate.subject().to_string(),
            certificate.validity().not_after.timestamp(),
        ))
    });
    ends.min_by_key(|(_, end)| *end)
}

async fn look(check: &Tls) -> Result<Finding, Failure> {
    let address = &check.address.0;
    let chain = match presented(check).await? {
        Ok(chain) => chain,
        Err(error) => {
            let words = format!("{address} has no valid certificate: {error}");
            let hint = Some("renew it, or name the authority with `ca_file`");
            return Ok(Finding {
                hint,
                ..Finding::new(false, words)
            });
        }
    };
    let Some((subject, end)) = first_to_end(&chain) else {
        return Ok(Finding::new(
            false,
            format!("{address} presents no certificate that can be read"),
        ));
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let left = end - i64::try_from(now).unwrap_or(i64::MAX);
    let wanted = i64::try_from(check.valid_for.0 / 1000).unwrap_or(i64::MAX);
    let words = format!(
        "{address}: {subject} is valid for {} more days",
        left.div_euclid(DAY)
    );
    let hint = Some("renew the certificate");
    Ok(Finding {
        hint,
        ..Finding::new(left >= wanted, words)
    })
}

impl Act for Tls {
    async fn probe(&self, _cx: &Context) -> Result<Probe, Failure> {
        Ok(look(self).await?.into_probe())
    }

    async fn apply(&self, _cx: &Context, _before: &Value) -> Result<Done, Failure> {
        look(self).await?.into_done()
    }

    fn describe(&self) -> String {
        format!(
            "check that the certificate of {} is valid for {}",
            self.address.0, self.valid_for
        )
    }
}

#[cfg(test)]
mod tests {
    use lockstep_proto::action::Address;
    use lockstep_proto::values::Period;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use std::sync::Arc;

    use lockstep_proto::report::Cause;

    use rustls::ServerConfig;
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use tokio::net::TcpListener;

    use super::*;
    use crate::testing::Host;

    /// A TLS server whose certificate, for `localhost`, ends in so many days; its authority's file
    /// and its address.
    async fn server(host: &Host, days: u64) -> (String, Address) {
        let mut authority = CertificateParams::new(vec![]).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority =
            CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let ca_file = host.path().join("ca.pem");
        std::fs::write(&ca_file, authority.pem()).unwrap();

        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        // An hour more, so that the day does not end while the test runs.
        let life = Duration::from_secs(days * 86_400 + 3600);
        params.not_after = (SystemTime::now() + life).into();
        let certificate = params.signed_by(&key, &authority).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = acceptor.accept(stream).await;
            }
        });
        (
            ca_file.to_string_lossy().into_owned(),
            Address(format!("127.0.0.1:{port}")),
        )
    }

    #[tokio::test]
    async fn a_certificate_is_held_against_trust_name_and_remaining_life() {
        let host = Host::new();
        let cx = host.context();
        let (ca_file, address) = server(&host, 20).await;
        let check = Tls {
            address,
            name: Some("localhost".into()),
            valid_for: Period(19 * 86_400_000),
            ca_file: Some(ca_file),
        };
        let apply = async |check: &Tls| check.apply(&cx, &Value::Null).await;
        let done = apply(&check).await.unwrap();
        assert!(
            done.summary.ends_with("valid for 20 more days"),
            "{}",
            done.summary
        );

        let longer = Tls {
            valid_for: Period(30 * 86_400_000),
            ..check.clone()
        };
        let failed = apply(&longer).await.unwrap_err();
        assert_eq!(failed.cause, Cause::CheckUnmet);
        assert!(
            failed.message.ends_with("valid for 20 more days"),
            "{}",
            failed.message
        );
        let other_name = Tls {
            name: Some("example.org".into()),
            ..check.clone()
        };
        let failed = apply(&other_name).await.unwrap_err();
        assert!(
            failed.message.contains("no valid certificate"),
            "{}",
            failed.message
        );
        let not_trusted = Tls {
            ca_file: None,
            ..check.clone()
        };
        let failed = apply(&not_trusted).await.unwrap_err();
        assert!(
            failed.message.contains("UnknownIssuer"),
            "{}",
            failed.message
        );
        let no_file = Tls {
            ca_file: Some("/no/such/file".into()),
            ..check
        };
        assert_eq!(apply(&no_file).await.unwrap_err().cause, Cause::Host);
    }
}
