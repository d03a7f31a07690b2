//! The state of a fleet seen with other eyes than Lockstep's: what pg_dump, links and HTTP say.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};
use lockstep_proto::ids::Digest;

use crate::cluster::Cluster;
use crate::example;

/// Schema, rows, releases and answers at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// SHA-256 of the schema as pg_dump writes it.
    pub schema: Digest,
    /// For each table, its rows' number and SHA-256.
    pub tables: BTreeMap<String, (usize, Digest)>,
    /// For each application host, what its `current` link names.
    pub releases: BTreeMap<String, String>,
    /// For each application host, status and body of `/health`.
    pub health: BTreeMap<String, String>,
    /// For each application host, SHA-256 of its environment file.
    pub env_files: BTreeMap<String, Digest>,
}

impl Snapshot {
    /// Looks at a cluster.
    pub fn take(cluster: &Cluster) -> Result<Self> {
        let postgres = cluster.postgres();
        let mut tables = BTreeMap::new();
        for table in postgres.tables(example::DATABASE)? {
            let rows = postgres.rows(example::DATABASE, &table)?;
            tables.insert(table, (rows.len(), Digest::of(rows.join("\n").as_bytes())));
        }
        let mut snapshot = Self {
            schema: Digest::of(postgres.schema(example::DATABASE)?.as_bytes()),
            tables,
            releases: BTreeMap::new(),
            health: BTreeMap::new(),
            env_files: BTreeMap::new(),
        };
        for host in cluster.app_hosts() {
            let name = host.name.clone();
            snapshot.releases.insert(name.clone(), host.release());
            let (status, body) = get(&host.address, "/health").unwrap_or_default();
            snapshot
                .health
                .insert(name.clone(), format!("{status} {body}"));
            let env = std::fs::read(host.app().join("shared/.env")).unwrap_or_default();
            snapshot.env_files.insert(name, Digest::of(&env));
        }
        Ok(snapshot)
    }

    /// What is not equal, in words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = vec![];
        let mut compare = |what: String, before: String, after: String| {
            if before != after {
                found.push(format!("{what}: {before} -> {after}"));
            }
        };
        compare("schema".into(), self.schema.short(), other.schema.short());
        let names = self.tables.keys().chain(other.tables.keys());
        let names: std::collections::BTreeSet<_> = names.collect();
        let rows =
            |tables: &BTreeMap<String, (usize, Digest)>, name: &String| match tables.get(name) {
                Some((rows, digest)) => format!("{rows} rows, {}", digest.short()),
                None => "absent".to_owned(),
            };
        for name in names {
            let (before, after) = (rows(&self.tables, name), rows(&other.tables, name));
            compare(format!("table {name}"), before, after);
        }
        for (host, before) in &self.releases {
            let after = other.releases.get(host).cloned().unwrap_or_default();
            compare(format!("release on {host}"), before.clone(), after);
        }
        for (host, before) in &self.health {
            let after = other.health.get(host).cloned().unwrap_or_default();
            compare(format!("/health of {host}"), before.clone(), after);
        }
        for (host, before) in &self.env_files {
            let after = other
                .env_files
                .get(host)
                .map(Digest::short)
                .unwrap_or_default();
            compare(format!("environment file of {host}"), before.short(), after);
        }
        found
    }

    /// A few lines for people.
    pub fn lines(&self) -> Vec<String> {
        let rows: Vec<String> = self
            .tables
            .iter()
            .map(|(table, (rows, digest))| format!("{table} {rows} ({})", digest.short()))
            .collect();
        let mut lines = vec![
            format!("schema     {}", self.schema.short()),
            format!("rows       {}", rows.join(", ")),
        ];
        for (host, release) in &self.releases {
            lines.push(format!(
                "{host}      {release}, /health answers {}",
                self.health[host]
            ));
        }
        lines
    }
}

/// Status and body of an HTTP answer of the application.
pub fn get(address: &str, path: &str) -> Result<(u16, String)> {
    let bound = Duration::from_secs(5);
    let to = SocketAddr::new(address.parse()?, example::PORT);
    let mut stream = TcpStream::connect_timeout(&to, bound)?;
    stream.set_read_timeout(Some(bound))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("the answer has no end of its head")?;
    let status = head
        .split(' ')
        .nth(1)
        .context("the answer has no status")?
        .parse()?;
    Ok((status, body.trim().to_owned()))
}
