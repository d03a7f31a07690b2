//! A request of the plan, with captures and secrets put in.

use std::collections::BTreeMap;

use http::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use http::{HeaderMap, Uri};
use lockstep_proto::action::check::{Method, Request};
use lockstep_proto::report::Failure;
use serde_json::Value;

use super::Unmet;
use super::captures::{Captures, percent_encode, refused};
use crate::secrets::{Secret, named};
use crate::step::Context;
use crate::web;

/// Which attempt a request belongs to: so what it created can be told from what people made.
pub(super) const STEP: &str = "x-lockstep-step";

/// A request that is ready to be sent.
pub(super) struct Prepared {
    /// The method and the URL as the plan has it: what was captured does not show.
    pub(super) label: String,
    pub(super) request: web::Request,
}

impl Prepared {
    /// Puts captures and secrets in; the secrets are also added to those to hide.
    pub(super) async fn of(
        cx: &Context,
        request: &Request,
        captures: &Captures,
        secrets: &mut Vec<Secret>,
    ) -> Result<Self, Unmet> {
        let values = values(cx, request).await.map_err(Unmet::Unfit)?;
        secrets.extend(values.values().cloned());
        let Request {
            url,
            method,
            headers: own,
            form,
            json,
            ..
        } = request;
        let label = label(request);
        let secret = |text: &str| values.get(text).map(Secret::expose);
        let value = |text: &str, encode: fn(&str) -> String| -> Result<String, Unmet> {
            match secret(text) {
                Some(value) => Ok(encode(value)),
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
                let filled = captures.fill_json(json, &secret);
                let filled = filled.map_err(Unmet::NotCaptured)?;
                (Some("application/json"), filled.to_string())
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
        let request = web::Request {
            uri,
            method: word(*method),
            headers,
            body: body.into(),
        };
        Ok(Self { label, request })
    }
}

/// The values of the secrets that stand in a request, by the text that stands for each.
async fn values(cx: &Context, request: &Request) -> Result<BTreeMap<String, Secret>, Failure> {
    fn in_json<'a>(value: &'a Value, texts: &mut Vec<&'a str>) {
        match value {
            Value::String(text) => texts.push(text),
            Value::Array(values) => values.iter().for_each(|value| in_json(value, texts)),
            Value::Object(fields) => fields.values().for_each(|value| in_json(value, texts)),
            _ => {}
        }
    }
    let fields = request.headers.values().chain(request.form.values());
    let mut texts: Vec<&str> = fields.map(String::as_str).collect();
    request
        .json
        .iter()
        .for_each(|json| in_json(json, &mut texts));
    let mut values = BTreeMap::new();
    for text in texts.into_iter().filter(|text| named(text).is_some()) {
        values.insert(text.to_owned(), cx.secret(text).await?);
    }
    Ok(values)
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
