//! One request over a connection of its own: HTTP/1.1, no redirects, no proxies, no cookies.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use http::{HeaderMap, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use lockstep_proto::action::check::{Method, Request};
use lockstep_proto::report::Failure;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::super::tls;
use super::Unmet;
use super::captures::{Captures, percent_encode, refused};
use crate::step::Context;

/// The largest answer that is read, in bytes.
const MAX_BODY: usize = 1 << 20;

/// Which attempt a request belongs to: so what it created can be told from what people made.
pub(super) const STEP: &str = "x-lockstep-step";

/// A request that is ready to be sent.
pub(super) struct Prepared {
    /// The method and the URL as the plan has it: what was captured does not show.
    pub(super) label: String,
    uri: Uri,
    method: Method,
    headers: HeaderMap,
    body: Bytes,
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
    /// From the beginning of the connection to the end of the body.
    pub(super) took: Duration,
}

impl Prepared {
    /// Puts captures and secrets in; the secrets are also added to those to hide.
    pub(super) fn of(
        cx: &Context,
        request: &Request,
        captures: &Captures,
        secrets: &mut Vec<String>,
    ) -> Result<Self, Unmet> {
        let Request {
            url,
            method,
            headers: own,
            form,
            json,
            ..
        } = request;
        let label = label(request);
        let mut secret = |text: &str| -> Result<Option<String>, Failure> {
            if !text.starts_with("secret://") {
                return Ok(None);
            }
            let value = cx.secret(text)?;
            secrets.push(value.clone());
            Ok(Some(value))
        };
        let mut value = |text: &str, encode: fn(&str) -> String| -> Result<String, Unmet> {
            match secret(text).map_err(Unmet::Unfit)? {
                Some(value) => Ok(encode(&value)),
                None => captures.fill(text, encode).map_err(Unmet::NotCaptured),
            }
        };
        let uri = captures
            .fill(url, percent_encode)
            .map_err(Unmet::NotCaptured)?;
        let uri = absolute(&uri, url).map_err(Unmet::Unfit)?;

        let mut headers = HeaderMap::new();
        let authority = uri.authority().expect("checked by `absolute`").as_str();
        let step = cx.key.to_string();
        let agent = concat!("lockstep-agent/", env!("CARGO_PKG_VERSION"));
        for (name, text) in [(HOST, authority), (USER_AGENT, agent)] {
            let value = header_value(name.as_str(), text)?;
            headers.insert(name, value);
        }
        headers.insert(HeaderName::from_static(STEP), header_value(STEP, &step)?);
        let mut form_pairs = vec![];
        for (name, text) in form {
            form_pairs.push(format!(
                "{}={}",
                percent_encode(name),
                value(text, percent_encode)?
            ));
        }
        for (name, text) in own {
            let parsed: HeaderName = name
                .parse()
                .map_err(|_| Unmet::Unfit(refused(format!("`{name}` is no name of a header"))))?;
            let mut field = header_value(name, &value(text, str::to_owned)?)?;
            field.set_sensitive(true);
            headers.insert(parsed, field);
        }
        let (kind, body) = match json {
            Some(json) => {
                let filled = captures
                    .fill_json(json, &mut secret)
                    .map_err(Unmet::Unfit)?;
                (
                    Some("application/json"),
                    filled.map_err(Unmet::NotCaptured)?.to_string(),
                )
            }
            None if form.is_empty() => (None, String::new()),
            None => (
                Some("application/x-www-form-urlencoded"),
                form_pairs.join("&"),
            ),
        };
        if let Some(kind) = kind
            && !headers.contains_key(CONTENT_TYPE)
        {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        Ok(Self {
            label,
            uri,
            method: *method,
            headers,
            body: body.into(),
        })
    }
}

/// The method and the URL as the plan has it.
pub(super) fn label(request: &Request) -> String {
    format!("{} {}", word(request.method), request.url)
}

fn header_value(name: &str, text: &str) -> Result<HeaderValue, Unmet> {
    // The value itself may be a secret.
    HeaderValue::from_str(text).map_err(|_| {
        Unmet::Unfit(refused(format!(
            "the value of header {name} has control characters"
        )))
    })
}

/// Reads a URL that says scheme and host, and no password.
fn absolute(url: &str, shown: &str) -> Result<Uri, Failure> {
    let unfit = |why: &str| refused(format!("`{shown}` is no URL to ask: {why}"));
    // What follows `#` is never sent.
    let url = url.split_once('#').map_or(url, |(url, _)| url);
    let uri: Uri = url.parse().map_err(|_| unfit("it cannot be read"))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(unfit("it begins neither with http:// nor with https://"));
    }
    match uri.authority() {
        None => Err(unfit("it names no host")),
        Some(authority) if authority.as_str().contains('@') => Err(unfit(
            "a password belongs into a header, as `secret://NAME`",
        )),
        Some(_) => Ok(uri),
    }
}

fn word(method: Method) -> http::Method {
    match method {
        Method::Get => http::Method::GET,
        Method::Head => http::Method::HEAD,
        Method::Post => http::Method::POST,
        Method::Put => http::Method::PUT,
        Method::Patch => http::Method::PATCH,
        Method::Delete => http::Method::DELETE,
    }
}

/// A connection, with TLS if the request's URL says so.
pub(super) type Connection = Box<dyn Stream>;

/// What a request is sent through.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// Connects to where a request goes; nothing of it is sent yet. The error says in words what went
/// wrong.
pub(super) async fn connect(request: &Prepared) -> Result<Connection, String> {
    let https = request.uri.scheme_str() == Some("https");
    let host = request
        .uri
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']'])
        .to_owned();
    let port = request
        .uri
        .port_u16()
        .unwrap_or(if https { 443 } else { 80 });
    let stream = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(|error| format!("cannot connect: {error}"))?;
    if !https {
        return Ok(Box::new(stream));
    }
    let name = tls::server_name(&host).map_err(|failure| failure.message)?;
    let connector = tls::connector(None).map_err(|failure| failure.message)?;
    let stream = connector.connect(name, stream).await;
    let stream = stream.map_err(|error| format!("TLS failed: {error}"))?;
    Ok(Box::new(stream))
}

/// Sends a request and reads the answer. The error says in words what went wrong.
pub(super) async fn send(request: Prepared, connection: Connection) -> Result<Answer, String> {
    let began = Instant::now();
    let (status, body) = exchange(connection, request).await?;
    Ok(Answer {
        status,
        body,
        took: began.elapsed(),
    })
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    prepared: Prepared,
) -> Result<(u16, Vec<u8>), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| format!("no HTTP connection: {error}"))?;
    let Prepared {
        uri,
        method,
        headers,
        body,
        ..
    } = prepared;
    // In HTTP/1.1 the request line has the path only; the host stands in its header.
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = http::Request::new(Full::new(body));
    *request.method_mut() = word(method);
    *request.uri_mut() = path
        .parse()
        .map_err(|_| "its path cannot be sent".to_owned())?;
    *request.headers_mut() = headers;
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| chain(&error))?;
        let status = response.status().as_u16();
        let mut body = response.into_body();
        let mut bytes = vec![];
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| chain(&error))?;
            if let Some(data) = frame.data_ref() {
                if bytes.len() + data.len() > MAX_BODY {
                    return Err("the answer is larger than 1 MiB".to_owned());
                }
                bytes.extend_from_slice(data);
            }
        }
        Ok((status, bytes))
    };
    let (mut answer, mut connection) = (std::pin::pin!(answer), std::pin::pin!(connection));
    let mut open = true;
    loop {
        tokio::select! {
            answer = &mut answer => return answer,
            ended = &mut connection, if open => {
                ended.map_err(|error| chain(&error))?;
                open = false;
            }
        }
    }
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
