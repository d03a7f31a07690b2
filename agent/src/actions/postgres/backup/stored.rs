//! Copies in object stores, by requests that were signed beforehand.
//!
//! Whoever has a presigned URL may do what it says until it expires, so it is a secret of the host,
//! and no more of it is shown than scheme, host and path. Where a backup may go stands in the plan,
//! as `store`, and in the host's policy: a URL that leads elsewhere is refused before it is asked.

use std::path::Path;
use std::time::Duration;

use http::header::{HOST, HeaderName, HeaderValue, USER_AGENT};
use http::{HeaderMap, Uri};
use lockstep_proto::action::postgres::{CopyStore, Presigned};
use lockstep_proto::ids::Digest;
use lockstep_proto::report::{Cause, Failure};
use sha2::Digest as _;
use tokio::time::{timeout, timeout_at};

use super::super::archive::{ARCHIVE, Dir};
use super::super::manifest::{GLOBALS, MANIFEST, Manifest, blocking};
use super::copies::{differs, expected, files};
use crate::process::{Redactor, head};
use crate::secrets::{Secret, named};
use crate::step::{Context, hinted};
use crate::web::{self, Connection, bulk};

/// How long it may take to get a connection, with TLS.
const CONNECTING: Duration = Duration::from_secs(10);

/// How much of what a store says of an error is shown, in bytes.
const SHOWN: usize = 300;

/// Values of a query from this length on are taken for signatures and tokens, and hidden.
const TOKEN: usize = 17;

/// Refuses what cannot be sent, before anything is made to be copied: requests that the host does
/// not have, or that lead elsewhere, and a store that cannot be reached.
pub(super) async fn find(cx: &Context, to: &CopyStore) -> Result<(), Failure> {
    let mut last = None;
    for (_, request) in to.requests() {
        for text in [&request.put, &request.get] {
            last = Some(Signed::find(cx, to, text).await?);
        }
    }
    let Some(signed) = last else { return Ok(()) };
    let connected = within(cx, to, signed.connect(to)).await?;
    connected.map(drop).map_err(|why| {
        hinted(
            Cause::Host,
            format!("the store {} cannot be reached: {why}", signed.shown),
            "see whether this host gets there, and trusts its certificate (`ca_file`)",
        )
    })
}

/// Sends the files of a backup, its manifest last, and reads them back.
pub(super) async fn send(
    cx: &Context,
    directory: &Path,
    made: &Manifest,
    to: &CopyStore,
) -> Result<(), Failure> {
    let headers = headers(cx, to).await?;
    for name in files(made) {
        let signed = Signed::find(cx, to, &request(to, name)?.put).await?;
        let size = expected(directory, made, name).await?.1;
        let held = directory.to_owned();
        let open = move || Dir::open(&held)?.file(name);
        let file = blocking("cannot read the backup", open).await?;
        let headers = signed.headers(headers.clone());
        let sent = async {
            let connection = signed.connect(to).await?;
            bulk::put(&signed.uri, headers, file, size, connection).await
        };
        let (why, hint) = match within(cx, to, sent).await? {
            Ok(said) if (200..300).contains(&said.status) => continue,
            Ok(said) => (signed.words(&said), advice(said.status)),
            Err(why) => (signed.hide(&why), NO_ANSWER),
        };
        let (id, shown) = (&made.id, &signed.shown);
        let message = format!("cannot send {name} of {id} to {shown}: {why}");
        return Err(hinted(Cause::Host, message, hint));
    }
    check(cx, directory, made, to).await?;
    cx.log
        .line(&format!("sent to {}, and read back equal", to.store));
    Ok(())
}

/// Reads the copies back. One that is lost, or not equal, fails by its place.
pub(super) async fn check(
    cx: &Context,
    directory: &Path,
    made: &Manifest,
    to: &CopyStore,
) -> Result<(), Failure> {
    for name in files(made) {
        let signed = Signed::find(cx, to, &request(to, name)?.get).await?;
        let (digest, size) = expected(directory, made, name).await?;
        let (mut hash, mut came) = (sha2::Sha256::new(), 0);
        let asked = async {
            let connection = signed.connect(to).await?;
            let taken = |bytes: &[u8]| {
                came += bytes.len() as u64;
                hash.update(bytes);
                if came > size {
                    return Err("it is longer than what was sent".to_owned());
                }
                Ok(())
            };
            let headers = signed.headers(HeaderMap::new());
            bulk::get(&signed.uri, headers, connection, taken).await
        };
        let (why, hint) = match within(cx, to, asked).await? {
            Ok(said) if said.status == 200 => {
                let found = (Digest(hash.finalize().into()), came);
                match differs(found, (digest, size)) {
                    None => continue,
                    Some(why) => (why, "take a new backup, and see who writes there"),
                }
            }
            Ok(said) => (
                format!("does not come back: {}", signed.words(&said)),
                advice(said.status),
            ),
            Err(why) => (
                format!("does not come back: {}", signed.hide(&why)),
                NO_ANSWER,
            ),
        };
        let (id, shown) = (&made.id, &signed.shown);
        let message = format!("the copy of {id} at {shown} is none: {name} {why}");
        return Err(hinted(Cause::CheckUnmet, message, hint));
    }
    Ok(())
}

const NO_ANSWER: &str = "see whether the store is up, and what is between it and this host";

/// What to do about an answer that is none.
fn advice(status: u16) -> &'static str {
    match status {
        401 | 403 => {
            "sign the request anew: it may have expired, or be for another method, key or header; \
             a clock that is wrong makes it so, too"
        }
        404 => "see whether the bucket is there, and who removes what is in it",
        300..=399 => "sign it for the bucket's own region and address: nothing is followed",
        413 => "the store takes no file of this size in one request",
        _ => "the store's own log says more",
    }
}

/// The requests for a file.
fn request<'a>(to: &'a CopyStore, name: &str) -> Result<&'a Presigned, Failure> {
    let found = match name {
        ARCHIVE => Some(&to.archive),
        MANIFEST => Some(&to.manifest),
        GLOBALS => to.globals.as_ref(),
        _ => None,
    };
    found.ok_or_else(|| {
        let message = format!("the copy to {} has no requests for {name}", to.store);
        hinted(Cause::Refused, message, "add them to `copies`")
    })
}

/// The headers that the plan wants.
async fn headers(cx: &Context, to: &CopyStore) -> Result<HeaderMap, Failure> {
    let mut headers = HeaderMap::new();
    for (name, text) in &to.headers {
        let unfit = || {
            let message = format!(
                "the header `{name}` of the copy to {} cannot be sent",
                to.store
            );
            hinted(Cause::Refused, message, "see its name, and its value")
        };
        let key: HeaderName = name.parse().map_err(|_| unfit())?;
        let value = cx.secret(text).await?;
        let mut value = HeaderValue::from_str(value.expose()).map_err(|_| unfit())?;
        value.set_sensitive(true);
        headers.insert(key, value);
    }
    Ok(headers)
}

/// Work that ends with the step.
async fn within<T>(
    cx: &Context,
    to: &CopyStore,
    work: impl Future<Output = T>,
) -> Result<T, Failure> {
    timeout_at(cx.deadline, work).await.map_err(|_| {
        hinted(
            Cause::TimedOut,
            format!(
                "the copy to {} was not done at the step's timeout",
                to.store
            ),
            "raise the step's `timeout` if it needs longer",
        )
    })
}

/// A presigned request.
struct Signed {
    uri: Uri,
    /// Scheme, host and path.
    shown: String,
    /// What no message may show.
    hidden: Redactor,
}

impl Signed {
    /// Fetches a request that is for something below the store.
    async fn find(cx: &Context, to: &CopyStore, text: &str) -> Result<Self, Failure> {
        let name = named(text).unwrap_or_default();
        let unfit = |what: String| {
            hinted(
                Cause::Refused,
                format!("the secret `{name}` {what}"),
                format!("it must hold a presigned URL of something in {}", to.store),
            )
        };
        let value = cx.secret(text).await?;
        let is_url = |uri: &Uri| {
            let of_host = |authority: &http::uri::Authority| !authority.as_str().contains('@');
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.authority().is_some_and(of_host)
        };
        let uri = value.expose().trim().parse::<Uri>().ok().filter(is_url);
        // Of what is none, nothing is shown: it may be any secret.
        let uri = uri.ok_or_else(|| unfit("holds no URL".to_owned()))?;
        let store = to.store.parse::<Uri>().ok().filter(is_url);
        let store = store.ok_or_else(|| {
            let message = format!("`{}` is no URL of a store", to.store);
            hinted(Cause::Refused, message, "write it as https://HOST/PATH/")
        })?;
        if !is_below(&uri, &store) {
            let host = uri.host().unwrap_or_default();
            return Err(unfit(format!(
                "leads elsewhere: to {host}, and not below {}",
                to.store
            )));
        }
        if uri.query().is_none_or(str::is_empty) {
            return Err(unfit("holds a URL without a signature".to_owned()));
        }
        if uri.scheme_str() == Some("http") && !web::is_own(&uri) {
            let message = format!(
                "without TLS everybody on the way to {} reads the backup",
                to.store
            );
            return Err(hinted(Cause::Refused, message, "use https://"));
        }
        let (whole, query) = (value.expose(), uri.query().unwrap_or_default());
        let values = query.split('&').filter_map(|pair| pair.split_once('='));
        let values = values.flat_map(|(_, value)| [value.to_owned(), web::unescaped(value)]);
        let long = values.filter(|value| value.len() >= TOKEN);
        let hidden: Vec<Secret> = [whole.to_owned(), query.to_owned()]
            .into_iter()
            .chain(long)
            .map(Secret::from)
            .collect();
        let authority = uri.authority().expect("checked above");
        Ok(Self {
            shown: format!(
                "{}://{authority}{}",
                uri.scheme_str().unwrap_or_default(),
                uri.path()
            ),
            hidden: Redactor::new(&hidden),
            uri,
        })
    }

    async fn connect(&self, to: &CopyStore) -> Result<Connection, String> {
        let ca_file = to.ca_file.as_ref().map(Path::new);
        let connected = timeout(CONNECTING, web::connect(&self.uri, ca_file)).await;
        connected.unwrap_or_else(|_| Err(format!("no connection within {CONNECTING:?}")))
    }

    /// Headers of a request, beside those that the plan wants.
    fn headers(&self, mut headers: HeaderMap) -> HeaderMap {
        let authority = self.uri.authority().expect("checked by `find`").as_str();
        let authority = HeaderValue::from_str(authority);
        headers.insert(HOST, authority.expect("a host and a port are plain text"));
        let agent = concat!("lockstep-agent/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        headers
    }

    /// What a store said, in words for people: the code and the message of its error, where there are.
    fn words(&self, said: &bulk::Said) -> String {
        let text = self.hide(&String::from_utf8_lossy(&said.body));
        let words = match (inner(&text, "Code"), inner(&text, "Message")) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code.to_owned(),
            _ => text.clone(),
        };
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        let words: String = words.chars().map(plain).collect();
        match head(words.trim(), SHOWN) {
            "" => format!("status {}", said.status),
            words => format!("status {}: {words}", said.status),
        }
    }

    fn hide(&self, text: &str) -> String {
        self.hidden.hide(text).into_owned()
    }
}

/// Whether a request is for something in a store: of the same server, and below its path, however
/// that is read.
fn is_below(uri: &Uri, store: &Uri) -> bool {
    let same = uri.scheme() == store.scheme() && uri.authority() == store.authority();
    let path = web::unescaped(uri.path()).replace('\\', "/");
    let climbs = path.split('/').any(|part| matches!(part, "." | ".."));
    same && !climbs && store.path().ends_with('/') && uri.path().starts_with(store.path())
}

/// What stands in an element of XML.
fn inner<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, after) = text.split_once(&format!("<{name}>"))?;
    Some(after.split_once(&format!("</{name}>"))?.0)
}
