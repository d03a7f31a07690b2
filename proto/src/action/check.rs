//! Checks: they look, and what they create they remove.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Address;
use crate::values::{ByteSize, Period};

/// The longest JSONPath, in bytes.
const MAX_JSON_PATH: usize = 1 << 10;

/// The greatest number of filters, and of brackets around conditions, in one JSONPath.
const MAX_FILTERS: usize = 4;
const MAX_CONDITIONS: usize = 8;

/// Refuses a JSONPath that would take long to be read: each filter within another one doubles it.
pub fn check_json_path(path: &str) -> Result<(), &'static str> {
    let count = |c: char| path.matches(c).count();
    if path.len() > MAX_JSON_PATH {
        return Err("it has more than 1024 bytes");
    }
    if count('?') > MAX_FILTERS || count('(') > MAX_CONDITIONS {
        return Err("it has more than 4 filters, or more than 8 brackets in them");
    }
    Ok(())
}

/// An HTTP method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    /// Ask.
    #[default]
    Get,
    /// Ask for the head only.
    Head,
    /// Create, or send a form.
    Post,
    /// Replace.
    Put,
    /// Change in part.
    Patch,
    /// Remove.
    Delete,
}

/// The state that a port should be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// It accepts connections.
    #[default]
    Open,
    /// It refuses connections.
    Refused,
}

/// Whether a process should run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ProcessState {
    /// At least one runs.
    #[default]
    Running,
    /// None runs.
    Absent,
}

/// What an HTTP answer must be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// The status code. Default: 200.
    #[serde(default = "ok")]
    pub status: u16,
    /// Values that the JSON body must hold, by JSONPath.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub json: BTreeMap<String, serde_json::Value>,
    /// A regular expression that the body must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matches: Option<String>,
    /// The longest time the answer may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub faster_than: Option<Period>,
}

impl Default for Expect {
    fn default() -> Self {
        Self {
            status: ok(),
            json: BTreeMap::new(),
            matches: None,
            faster_than: None,
        }
    }
}

/// One request of a chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Absolute, http or https.
    pub url: String,
    /// Default: GET.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub method: Method,
    /// Header values may hold captures and secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// A form to send. Values may hold captures and secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub form: BTreeMap<String, String>,
    /// A JSON body to send. Strings in it may hold captures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json: Option<serde_json::Value>,
    /// What the answer must be. Default: status 200.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub expect: Expect,
    /// Names for values of the answer, each with its JSONPath; used later as `${capture.NAME}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub capture: BTreeMap<String, String>,
}

/// Arguments of `check.http`: a first request, those that follow, and those that clean up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Absolute, http or https.
    pub url: String,
    /// Default: GET.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub method: Method,
    /// Header values may hold captures and secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// A form to send. Values may hold captures and secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub form: BTreeMap<String, String>,
    /// A JSON body to send. Strings in it may hold captures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json: Option<serde_json::Value>,
    /// What the answer must be. Default: status 200.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub expect: Expect,
    /// Names for values of the answer, each with its JSONPath; used later as `${capture.NAME}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub capture: BTreeMap<String, String>,
    /// Requests that follow, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub then: Vec<Request>,
    /// Requests that remove what the chain created. Each runs once its captures exist, whatever happened in between.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cleanup: Vec<Request>,
    /// Ask the first request again until it is met, for so long. Default: ask once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Period>,
    /// The longest time for one request. Default: 10s.
    #[serde(default = "timeout")]
    pub timeout: Period,
}

impl Http {
    /// The first request of the chain.
    pub fn first(&self) -> Request {
        Request {
            url: self.url.clone(),
            method: self.method,
            headers: self.headers.clone(),
            form: self.form.clone(),
            json: self.json.clone(),
            expect: self.expect.clone(),
            capture: self.capture.clone(),
        }
    }
}

/// Arguments of `check.tcp`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Tcp {
    /// The address to connect to.
    pub address: Address,
    /// Default: open.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub expect: PortState,
    /// Ask again until it is met, for so long. Default: ask once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Period>,
}

/// Arguments of `check.port`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The port on this host.
    pub port: u16,
    /// Default: open.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub expect: PortState,
}

/// Arguments of `check.process`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// The program's name, without its directory.
    pub name: String,
    /// Default: running.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub expect: ProcessState,
}

/// Arguments of `check.disk`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// A path on the file system.
    pub path: String,
    /// The least free space.
    pub free: ByteSize,
}

/// Arguments of `check.tls`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The server.
    pub address: Address,
    /// The name that the certificate must be valid for. Default: the host of the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The least remaining life.
    pub valid_for: Period,
    /// Trust anchors in PEM. Default: those that the host trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<String>,
}

/// Arguments of `check.sql`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Sql {
    /// The database, as the host's configuration names it.
    pub database: String,
    /// A read-only statement that returns one value.
    pub sql: String,
    /// The value expected, as PostgreSQL prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<String>,
    /// The least value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<i64>,
    /// The greatest value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<i64>,
}

/// Arguments of `check.log`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// The log file.
    pub path: String,
    /// Regular expressions; a new line that matches one fails the check.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
    /// Regular expressions; each must match some new line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub require: Vec<String>,
    /// Keep reading for so long. Default: read once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watch: Option<Period>,
}

/// Arguments of `check.command`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Program and arguments. There is no shell. The host's policy must list it.
    pub argv: Vec<String>,
    /// The directory to run in. Default: `/`. If it or the program lies within an
    /// application's root on the host, the command runs as that application's user and with
    /// its variables, else as the agent's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// Variables to set; they win over the application's. A value may be `secret://NAME` if
    /// the host's policy lists it in `env`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The exit code expected. Default: 0.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub exit: i32,
    /// A regular expression that standard output must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matches: Option<String>,
    /// Run it again until it is met, for so long. Default: run once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Period>,
}

fn ok() -> u16 {
    200
}

fn timeout() -> Period {
    Period::seconds(10)
}
