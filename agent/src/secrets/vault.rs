//! Secrets in HashiCorp Vault or OpenBao: key/value engines of versions 1 and 2, over HTTP.
//!
//! ```text
//! GET ADDRESS/v1/kv/app        version 1: {"data": {FIELD: VALUE}}
//! GET ADDRESS/v1/kv/data/app   version 2: {"data": {"data": {FIELD: VALUE}, "metadata": {..}}}
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http::header::{HOST, HeaderName, HeaderValue, USER_AGENT};
use http::{HeaderMap, Method, Uri};
use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::{MAX_VALUE, SCHEME, Secret, Source};
use crate::config::Config;
use crate::process::{Redactor, head};
use crate::step::{failure, hinted};
use crate::web;

/// How long the whole exchange may take: a vault answers in milliseconds, or is not well.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// How much of what the vault says of an error is shown, in bytes.
const SHOWN: usize = 300;

/// How the vault is reached: the table `[vault]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vault {
    /// `https://vault.example.com:8200`.
    pub(crate) address: String,
    /// Certificates of the authorities that may have issued the vault's. Default: those that the host trusts.
    #[serde(default)]
    pub(crate) ca: Option<PathBuf>,
    /// The namespace, where the vault has such.
    #[serde(default)]
    pub(crate) namespace: Option<String>,
    /// The secret that is the token: `secret://vault_token`, from another source than the vault.
    pub(crate) token: String,
}

impl Vault {
    /// The token's secret.
    fn token(&self) -> Option<&str> {
        super::named(&self.token).filter(|name| super::is_name(name))
    }

    /// Refuses what can never work, and what would show secrets to the network.
    pub(crate) fn check(&self, secrets: &BTreeMap<String, Source>) -> Result<(), String> {
        let Some(token) = self.token() else {
            return Err(format!(
                "`token` of [vault] must name a secret: {SCHEME}vault_token"
            ));
        };
        if let Some(Source::Vault { .. }) = secrets.get(token) {
            return Err(format!(
                "`token` of [vault] is the secret `{token}`, which comes from the vault itself"
            ));
        }
        let uri = self.uri("kv/x")?;
        if uri.scheme_str() == Some("http") && !web::is_own(&uri) {
            return Err(format!(
                "`address` of [vault] is `{}`: without TLS everybody on the way reads the secrets; \
                 write https://, or let an agent of the vault listen on this host",
                self.address
            ));
        }
        Ok(())
    }

    fn uri(&self, path: &str) -> Result<Uri, String> {
        let address = &self.address;
        let unfit = || {
            format!(
                "`address` of [vault] is `{address}`; write it as https://name:8200, without a path"
            )
        };
        let base: Uri = address.parse().map_err(|_| unfit())?;
        let fit = matches!(base.scheme_str(), Some("http" | "https"))
            && base
                .authority()
                .is_some_and(|it| !it.as_str().contains('@'))
            && matches!(base.path(), "" | "/")
            && base.query().is_none();
        if !fit {
            return Err(unfit());
        }
        let base = address.trim_end_matches('/');
        format!("{base}/v1/{path}").parse().map_err(|_| unfit())
    }
}

/// Reads a field of a secret in the vault.
pub(super) async fn read(
    config: &Config,
    name: &str,
    path: &str,
    field: &str,
) -> Result<Secret, Failure> {
    let Some(vault) = &config.vault else {
        return Err(hinted(
            Cause::Host,
            format!("the secret `{name}` is in a vault, and agent.toml does not say in which"),
            "add [vault] with its `address` and `token`",
        ));
    };
    let token = vault.token().unwrap_or_default();
    let token = match config.secrets.get(token) {
        None => super::stored(config, token),
        // Never of the vault again: a circle would have no end.
        Some(source) => super::local(config, token, source).await,
    };
    let token = token.map_err(|was| Failure {
        message: format!(
            "the secret `{name}` needs the vault's token: {}",
            was.message
        ),
        ..was
    })?;
    let asked = format!("{}/v1/{path}", vault.address.trim_end_matches('/'));
    let unanswered = |why: String| {
        let hint = "see whether the vault is up and reachable: its `/v1/sys/health` says so";
        hinted(
            Cause::Host,
            format!("the secret `{name}`: {asked}: {why}"),
            hint,
        )
    };
    let request = request(vault, path, &token).map_err(unanswered)?;
    let exchange = async {
        let connection = web::connect(&request.uri, vault.ca.as_deref()).await?;
        web::send(request, connection).await
    };
    let answer = timeout(PATIENCE, exchange).await;
    let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")));
    let answer = answer.map_err(unanswered)?;
    let (status, body) = (answer.status, Zeroizing::new(answer.body));
    if status == 200 {
        let found = find(&body, field).map_err(|what| what.explain(name, path, field))?;
        return Ok(found);
    }
    Err(refused(name, path, status, &body, &token))
}

fn request(vault: &Vault, path: &str, token: &Secret) -> Result<web::Request, String> {
    let uri = vault.uri(path)?;
    let authority = uri.authority().expect("`uri` wants one").as_str();
    let value = |what: &str, text: &str| {
        HeaderValue::from_str(text)
            .map_err(|_| format!("{what} has characters that cannot be sent"))
    };
    let mut token = value("the token", token.expose())?;
    token.set_sensitive(true);
    let mut headers = HeaderMap::new();
    headers.insert(HOST, value("the address", authority)?);
    let agent = concat!("lockstep-agent/", env!("CARGO_PKG_VERSION"));
    headers.insert(USER_AGENT, HeaderValue::from_static(agent));
    headers.insert(HeaderName::from_static("x-vault-token"), token);
    // What asks only as a script would is not taken for a browser that was tricked.
    headers.insert(
        HeaderName::from_static("x-vault-request"),
        HeaderValue::from_static("true"),
    );
    if let Some(namespace) = &vault.namespace {
        headers.insert(
            HeaderName::from_static("x-vault-namespace"),
            value("the namespace", namespace)?,
        );
    }
    Ok(web::Request {
        uri,
        method: Method::GET,
        headers,
        body: bytes::Bytes::new(),
    })
}

/// A value in an answer. Texts are wiped when they are dropped, whichever was asked for.
enum Field {
    Text(Secret),
    Map(BTreeMap<String, Field>),
    Other,
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyField;
        impl<'de> Visitor<'de> for AnyField {
            type Value = Field;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_str<E>(self, text: &str) -> Result<Field, E> {
                Ok(Field::Text(text.into()))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Field, E> {
                Ok(Field::Other)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Field, E> {
                Ok(Field::Other)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Field, E> {
                Ok(Field::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Field, E> {
                Ok(Field::Other)
            }

            fn visit_unit<E>(self) -> Result<Field, E> {
                Ok(Field::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Field, A::Error> {
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Field::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Field, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((name, value)) = fields.next_entry()? {
                    map.insert(name, value);
                }
                Ok(Field::Map(map))
            }
        }
        deserializer.deserialize_any(AnyField)
    }
}

/// What is wrong with an answer of status 200.
enum Unfound {
    /// It is no answer of a vault.
    Foreign,
    /// It is no secret of a key/value engine.
    NoData,
    /// There is no such field; these are.
    NoField(Vec<String>),
    /// It is no text.
    NoText,
    /// It is too long.
    TooLong,
}

impl Unfound {
    fn explain(self, name: &str, path: &str, field: &str) -> Failure {
        let (what, hint) = match self {
            Self::Foreign => (
                "what answered is no vault".to_owned(),
                "check `address` of [vault] in agent.toml".to_owned(),
            ),
            Self::NoData => (
                format!("`{path}` is no secret of a key/value engine"),
                "version 2 wants `data` after the engine's name: kv/data/app".to_owned(),
            ),
            Self::NoField(there) if there.is_empty() => (
                format!("`{path}` has no field `{field}`; it has none at all"),
                "write the secret, or correct `field` in agent.toml".to_owned(),
            ),
            Self::NoField(there) => (
                format!(
                    "`{path}` has no field `{field}`; it has {}",
                    there.join(", ")
                ),
                "correct `field` in agent.toml".to_owned(),
            ),
            Self::NoText => (
                format!("the field `{field}` of `{path}` is no text"),
                "write it into the vault as a text".to_owned(),
            ),
            Self::TooLong => (
                format!("the field `{field}` of `{path}` is longer than 64 KiB"),
                "a secret of this size belongs into a file".to_owned(),
            ),
        };
        hinted(Cause::Host, format!("the secret `{name}`: {what}"), hint)
    }
}

/// The field in an answer.
fn find(body: &[u8], field: &str) -> Result<Secret, Unfound> {
    let Ok(Field::Map(mut answer)) = json::read(body) else {
        return Err(Unfound::Foreign);
    };
    let Some(data) = answer.remove("data") else {
        return Err(Unfound::Foreign);
    };
    let Field::Map(mut data) = data else {
        return Err(Unfound::NoData);
    };
    // In version 2 both are objects, whatever a secret of version 1 may call its texts.
    if let (Some(Field::Map(_)), Some(Field::Map(_))) = (data.get("data"), data.get("metadata"))
        && let Some(Field::Map(inner)) = data.remove("data")
    {
        data = inner;
    }
    match data.remove(field) {
        Some(Field::Text(value)) if value.expose().len() > MAX_VALUE => Err(Unfound::TooLong),
        Some(Field::Text(value)) => Ok(value),
        Some(_) => Err(Unfound::NoText),
        None => Err(Unfound::NoField(data.into_keys().collect())),
    }
}

/// An answer that is none, in words for people.
fn refused(name: &str, path: &str, status: u16, body: &[u8], token: &Secret) -> Failure {
    #[derive(Default, Deserialize)]
    struct Errors {
        #[serde(default)]
        errors: Vec<String>,
    }
    let said = json::read::<Errors>(body).unwrap_or_default();
    let said = said.errors.join("; ");
    let said = Redactor::new(std::slice::from_ref(token)).hide(&said);
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let said: String = head(said.trim(), SHOWN).chars().map(plain).collect();
    let said = if said.is_empty() {
        format!("status {status}")
    } else {
        format!("status {status}: {said}")
    };
    let (what, hint) = match status {
        403 => (
            format!("the vault refuses to show `{path}` ({said})"),
            "give the token a policy with `read` on that path; see whether it has expired: \
             `vault token lookup`",
        ),
        404 => (
            format!("the vault has nothing at `{path}` ({said})"),
            "check the path (version 2 has `data` after the engine's name: kv/data/app) and \
             whether the newest version was deleted",
        ),
        503 => (
            format!("the vault is sealed, or not in service ({said})"),
            "have it unsealed: `vault status` says how it is",
        ),
        501 => (
            format!("the vault is not initialised ({said})"),
            "have it initialised and unsealed",
        ),
        300..=399 => (
            format!("the vault sends elsewhere, which is not followed ({said})"),
            "let `address` of [vault] name the active server, or a balancer before it",
        ),
        _ => (
            format!("the vault does not show `{path}` ({said})"),
            "its own log says more",
        ),
    };
    Failure {
        hint: Some(hint.to_owned()),
        ..failure(Cause::Host, format!("the secret `{name}`: {what}"))
    }
}

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
#[cfg(test)]
mod tests;
