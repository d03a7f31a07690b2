//! Failed handshakes in words.

use std::io;

use rustls::{AlertDescription, CertificateError, OtherError};

/// Why a handshake failed, for people: rustls prints some of its causes as they stand in code.
pub(crate) fn words(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    let Some(tls) = inner else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => "the other side ended the connection".to_owned(),
            _ => error.to_string(),
        };
    };
    match tls {
        rustls::Error::InvalidCertificate(refused) => certificate_words(refused),
        rustls::Error::NoCertificatesPresented => "no certificate was shown".to_owned(),
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA => {
                "the other side does not know the issuer of this one's certificate".to_owned()
            }
            AlertDescription::CertificateExpired => {
                "the other side says that this one's certificate has ended".to_owned()
            }
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied => {
                "the other side does not accept this one's certificate".to_owned()
            }
            AlertDescription::CertificateRequired => {
                "the other side asks for a certificate".to_owned()
            }
            AlertDescription::ProtocolVersion => {
                "the two have no version of TLS in common; only 1.3 is spoken here".to_owned()
            }
            _ => tls.to_string(),
        },
        rustls::Error::PeerIncompatible(_) => {
            format!("{tls}; only TLS 1.3 is spoken here")
        }
        rustls::Error::InvalidMessage(_) => "that is no TLS".to_owned(),
        other => other.to_string(),
    }
}

fn certificate_words(refused: &CertificateError) -> String {
    match refused {
        CertificateError::UnknownIssuer => "its certificate is of an issuer that is not trusted",
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has ended"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet; compare the clocks"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "its certificate does not name the address that was dialled"
        }
        CertificateError::BadSignature => {
            "its certificate is not what it claims: it was not signed by the issuer that it names"
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "its certificate is for another purpose"
        }
        CertificateError::Revoked => "its certificate was revoked",
        CertificateError::Other(OtherError(other)) => return other.to_string(),
        other => return other.to_string(),
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::identity::InvalidIdentity;

    #[test]
    fn a_failed_handshake_is_said_in_words() {
        let said = |refused: CertificateError| {
            let refused = rustls::Error::InvalidCertificate(refused);
            words(&io::Error::new(io::ErrorKind::InvalidData, refused))
        };
        let stranger = InvalidIdentity::Uri {
            uri: "spiffe://other.com/agent/app-1".to_owned(),
            domain: "example.com".to_owned(),
        };
        let stranger = said(CertificateError::Other(OtherError(Arc::new(stranger))));
        assert!(
            stranger.starts_with("the certificate's URI `spiffe://other.com"),
            "{stranger}"
        );
        let unknown = said(CertificateError::UnknownIssuer);
        assert!(
            unknown.contains("of an issuer that is not trusted"),
            "{unknown}"
        );
        for words in [stranger, unknown, said(CertificateError::Expired)] {
            assert!(!words.contains("Other") && !words.contains('{'), "{words}");
        }
        let alert = rustls::Error::AlertReceived(AlertDescription::UnknownCA);
        let alert = words(&io::Error::new(io::ErrorKind::InvalidData, alert));
        assert!(alert.contains("does not know the issuer"), "{alert}");
    }
}
