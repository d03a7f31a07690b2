//! One HTTP request over a connection of its own: HTTP/1.1, no redirects, no proxies, no cookies.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use lockstep_proto::report::{Cause, Failure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use rustls_native_certs::CertificateResult;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::step::{failure, hinted};

pub(crate) mod bulk;

/// The largest answer that is read, in bytes.
const MAX_BODY: usize = 1 << 20;

/// A request that is ready to be sent. Its URL says scheme and host.
pub(crate) struct Request {
    pub(crate) uri: Uri,
    pub(crate) method: Method,
    /// All of them, `Host` too.
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What came back.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
    /// From the sending of the request to the end of the body.
    pub(crate) took: Duration,
}

/// A connection, with TLS if the URL says so.
pub(crate) type Connection = Box<dyn Stream>;

/// Any body: one type for all of them keeps one client in the program.
type Outgoing = UnsyncBoxBody<Bytes, std::io::Error>;

/// What a request is sent through.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// A client that trusts the certificates in a file, or those that the host trusts.
pub(crate) fn connector(ca_file: Option<&Path>) -> Result<TlsConnector, Failure> {
    let roots = match ca_file {
        Some(path) => in_file(path)?,
        None => of_host(rustls_native_certs::load_native_certs())?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has suites for every version")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn in_file(path: &Path) -> Result<RootCertStore, Failure> {
    let unreadable = |error: &dyn std::fmt::Display| {
        failure(
            Cause::Host,
            format!("cannot read certificates from {}: {error}", path.display()),
        )
    };
    let mut roots = RootCertStore::empty();
    let found = CertificateDer::pem_file_iter(path).map_err(|error| unreadable(&error))?;
    for certificate in found {
        let certificate = certificate.map_err(|error| unreadable(&error))?;
        roots.add(certificate).map_err(|error| unreadable(&error))?;
    }
    if roots.is_empty() {
        return Err(unreadable(&"there is none in it"));
    }
    Ok(roots)
}

/// What other programs of the host trust. One odd certificate among them spoils nothing.
fn of_host(found: CertificateResult) -> Result<RootCertStore, Failure> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map(|error| format!(": {error}"));
        return Err(hinted(
            Cause::Host,
            format!("this host trusts no authority{}", why.unwrap_or_default()),
            "install its package ca-certificates, or name the authority with `ca_file`",
        ));
    }
    Ok(roots)
}

/// The name that a server's certificate must be valid for.
pub(crate) fn server_name(name: &str) -> Result<ServerName<'static>, Failure> {
    let name = name.trim_matches(['[', ']']).to_owned();
    ServerName::try_from(name.clone())
        .map_err(|_| failure(Cause::Refused, format!("`{name}` is no name of a server")))
}

/// Connects to where a URL points; nothing is sent yet. The error says in words what went wrong.
pub(crate) async fn connect(uri: &Uri, ca_file: Option<&Path>) -> Result<Connection, String> {
    let https = uri.scheme_str() == Some("https");
    let host = uri
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']'])
        .to_owned();
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    let stream = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(|error| format!("cannot connect: {error}"))?;
    if !https {
        return Ok(Box::new(stream));
    }
    let name = server_name(&host).map_err(|failure| failure.message)?;
    let connector = connector(ca_file).map_err(|failure| failure.message)?;
    let stream = connector.connect(name, stream).await;
    let stream = stream.map_err(|error| format!("TLS failed: {error}"))?;
    Ok(Box::new(stream))
}

/// Whether a URL stays on this host, so that nobody on the way reads what is sent without TLS.
pub(crate) fn is_own(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host.parse::<IpAddr>()
        .map_or(host == "localhost", |ip| ip.is_loopback())
}

/// Sends a request and reads the answer. The error says in words what went wrong.
pub(crate) async fn send(request: Request, connection: Connection) -> Result<Answer, String> {
    let began = Instant::now();
    let Request {
        uri,
        method,
        headers,
        body,
    } = request;
    let body = Full::new(body).map_err(|never| match never {});
    let request = addressed(&uri, method, headers, body.boxed_unsync())?;
    let mut bytes = vec![];
    let status = exchange(connection, request, |_, data| {
        if bytes.len() + data.len() > MAX_BODY {
            return Err("the answer is larger than 1 MiB".to_owned());
        }
        bytes.extend_from_slice(data);
        Ok(true)
    });
    let status = status.await?;
    Ok(Answer {
        status,
        body: bytes,
        took: began.elapsed(),
    })
}

/// In HTTP/1.1 the request line has the path only; the host stands in its header.
fn addressed(
    uri: &Uri,
    method: Method,
    headers: HeaderMap,
    body: Outgoing,
) -> Result<http::Request<Outgoing>, String> {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = http::Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = path
        .parse()
        .map_err(|_| "its path cannot be sent".to_owned())?;
    *request.headers_mut() = headers;
    Ok(request)
}

/// Sends a request; `taken` gets the answer's status with each piece of its body, and says whether
/// it wants more.
async fn exchange(
    stream: Connection,
    request: http::Request<Outgoing>,
    mut taken: impl FnMut(u16, &[u8]) -> Result<bool, String>,
) -> Result<u16, String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| format!("no HTTP connection: {error}"))?;
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| chain(&error))?;
        let status = response.status().as_u16();
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| chain(&error))?;
            if let Some(data) = frame.data_ref()
                && !taken(status, data)?
            {
                break;
            }
        }
        Ok(status)
    };
    let (mut answer, mut connection) = (std::pin::pin!(answer), std::pin::pin!(connection));
    let mut ended: Option<Result<(), String>> = None;
    loop {
        tokio::select! {
            // A server that refuses a body answers, and closes while that is still being sent: what
            // it said comes before what became of the connection.
            biased;
            answer = &mut answer => return match (answer, ended) {
                (Err(_), Some(Err(error))) => Err(error),
                (answer, _) => answer,
            },
            end = &mut connection, if ended.is_none() => {
                ended = Some(end.map_err(|error| chain(&error)));
            }
        }
    }
}

/// What `%2e` and the like stand for.
pub(crate) fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escaped = after.get(..2).filter(|_| *first == b'%');
        let byte = escaped
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// An error with its causes: hyper's own words alone say little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_trusted_with_what_it_trusts_and_one_that_trusts_nobody_says_so() {
        let named = rcgen::generate_simple_self_signed(["authority".to_owned()]).unwrap();
        let mut found = CertificateResult::default();
        let refused = of_host(found).unwrap_err();
        assert!(refused.hint.unwrap().contains("ca-certificates"));
        found = CertificateResult::default();
        found.certs = vec![
            CertificateDer::from(vec![1, 2, 3]),
            named.cert.der().clone(),
        ];
        assert_eq!(of_host(found).unwrap().len(), 1);
    }
}
