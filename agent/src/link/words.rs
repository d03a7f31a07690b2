//! Why there is no session, in words: handshakes fail with values that only programmers read.

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError, OtherError};
use tonic::Status;

/// An error with all its causes, each said once, TLS in words.
pub(super) fn words(error: &(dyn Error + 'static)) -> String {
    let causes = || {
        let mut next = Some(error);
        std::iter::from_fn(move || {
            let cause = next?;
            next = cause.source();
            Some(cause)
        })
    };
    let refused = causes().find_map(tls_error);
    let mut text = String::new();
    for cause in causes() {
        let mut said = match status(cause) {
            Some(status) => status_words(status),
            None => cause.to_string(),
        };
        // Layers between quote it.
        if let Some(refused) = refused {
            said = said.replace(&refused.to_string(), &tls(refused));
        }
        // Some layers repeat what they wrap.
        if !text.ends_with(&said) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&said);
        }
        if tls_error(cause).is_some() {
            break;
        }
    }
    text
}

fn status<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Status> {
    let boxed = || error.downcast_ref::<Box<Status>>().map(Box::as_ref);
    error.downcast_ref().or_else(boxed)
}

/// Why a handshake failed.
pub(crate) fn tls_words(error: &io::Error) -> String {
    tls_error(error).map_or_else(|| error.to_string(), tls)
}

/// Whether an error holds that the other side's certificate was refused.
pub(super) fn is_bad_certificate(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(tls) = tls_error(cause) {
            return matches!(tls, rustls::Error::InvalidCertificate(_));
        }
        next = cause.source();
    }
    false
}

/// The error of TLS that this one is, or holds.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    error.downcast_ref().or_else(|| {
        let inner = error.downcast_ref::<io::Error>()?.get_ref()?;
        inner.downcast_ref()
    })
}

/// What the controller says; its code only where it says nothing.
fn status_words(status: &Status) -> String {
    match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    }
}

fn tls(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(refused) => certificate(refused),
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "it does not know the issuer of this host's certificate".to_owned()
            }
            AlertDescription::CertificateExpired => {
                "it says that this host's certificate has expired".to_owned()
            }
            AlertDescription::CertificateRevoked => {
                "it says that this host's certificate was revoked".to_owned()
            }
            alert => format!("it refuses this host's certificate or its way to speak ({alert:?})"),
        },
        rustls::Error::InvalidMessage(_) => "what answers there does not speak TLS".to_owned(),
        other => other.to_string(),
    }
}

fn certificate(refused: &CertificateError) -> String {
    use CertificateError as E;
    match refused {
        E::UnknownIssuer => "its certificate is of an issuer that `controller_ca` does not hold",
        E::BadSignature => "its certificate was not signed by the issuer in `controller_ca`",
        E::Expired | E::ExpiredContext { .. } => "its certificate has expired",
        E::NotValidYet | E::NotValidYetContext { .. } => "its certificate is not valid yet",
        E::NotValidForName | E::NotValidForNameContext { .. } => {
            "its certificate is not for the name that was dialled"
        }
        E::Revoked => "its certificate was revoked",
        E::Other(OtherError(other)) => return other.to_string(),
        other => return other.to_string(),
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::LinkError;

    #[test]
    fn a_failed_handshake_is_said_in_words() {
        for (refused, word) in [
            (CertificateError::UnknownIssuer, "`controller_ca`"),
            (CertificateError::Expired, "expired"),
            (CertificateError::NotValidForName, "name"),
        ] {
            let refused = rustls::Error::InvalidCertificate(refused);
            let said = words(&io::Error::new(io::ErrorKind::InvalidData, refused));
            assert!(said.contains(word) && !said.contains('{'), "{said}");
        }
        let refused = CertificateError::UnknownIssuer;
        let refused = rustls::Error::InvalidCertificate(refused);
        let refused = io::Error::new(io::ErrorKind::InvalidData, refused);
        assert!(is_bad_certificate(&refused));
        let alert = rustls::Error::AlertReceived(AlertDescription::UnknownCA);
        assert!(words(&alert).contains("does not know the issuer"));
        assert!(!is_bad_certificate(&alert));
    }

    #[test]
    fn what_the_controller_says_is_said_once() {
        let status = Status::already_exists("another agent is connected as app-1");
        assert_eq!(
            words(&LinkError::from(status)),
            "the controller ended the session: another agent is connected as app-1"
        );
        let silent = words(&LinkError::from(Status::unavailable("")));
        assert_eq!(silent.matches("unavailable").count(), 1, "{silent}");
    }
}
