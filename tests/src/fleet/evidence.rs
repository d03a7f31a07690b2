//! What the hosts' own tools say: the fleet's state, and what is kept of a run.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use lockstep_proto::ids::Digest;

use super::{Fleet, HOSTS};
use crate::example;
use crate::snapshot::Snapshot;

impl Fleet {
    /// The state of the fleet, by the hosts' own tools.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let database = example::DATABASE;
        let psql = |sql: &str| {
            let argv = [
                "runuser", "-u", "postgres", "--", "psql", "-XqAt", "-d", database,
            ];
            self.on_with("db-1", &argv, sql)
        };
        let dump = [
            "runuser",
            "-u",
            "postgres",
            "--",
            "pg_dump",
            "--schema-only",
            "-d",
            database,
        ];
        let schema = self.on("db-1", &dump)?;
        let fenced =
            |line: &&str| line.starts_with("\\restrict") || line.starts_with("\\unrestrict");
        let schema: Vec<&str> = schema.lines().filter(|line| !fenced(line)).collect();
        let mut snapshot = Snapshot {
            schema: Digest::of(schema.join("\n").as_bytes()),
            tables: BTreeMap::new(),
            releases: BTreeMap::new(),
            health: BTreeMap::new(),
            env_files: BTreeMap::new(),
        };
        let tables =
            psql("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")?;
        for table in tables.lines() {
            let rows = psql(&format!(
                "SELECT row_to_json(t) FROM public.\"{table}\" t ORDER BY t::text"
            ))?;
            let digest = Digest::of(rows.as_bytes());
            snapshot
                .tables
                .insert(table.to_owned(), (rows.lines().count(), digest));
        }
        for (name, _) in HOSTS.iter().filter(|(_, role)| *role == "app") {
            let link = self.on(name, &["readlink", "/var/www/employee-system/current"])?;
            let release = link
                .trim()
                .rsplit('/')
                .next()
                .unwrap_or_default()
                .to_owned();
            snapshot.releases.insert((*name).to_owned(), release);
            let curl = [
                "curl",
                "-sS",
                "-w",
                " %{http_code}",
                "http://127.0.0.1:8000/health",
            ];
            snapshot
                .health
                .insert((*name).to_owned(), self.on(name, &curl)?);
            let env = self.on(name, &["cat", "/var/www/employee-system/shared/.env"])?;
            snapshot
                .env_files
                .insert((*name).to_owned(), Digest::of(env.as_bytes()));
        }
        Ok(snapshot)
    }

    /// Writes what journals and systemd say of every host into a directory. No secret is in it, nor
    /// in what Lockstep keeps on the hosts.
    pub fn collect(&self, into: &Path) -> Result<()> {
        let common: [(&str, &[&str]); 4] = [
            (
                "units.txt",
                &["systemctl", "list-units", "--all", "--no-pager", "--plain"],
            ),
            (
                "lockstep.journal",
                &["journalctl", "--no-pager", "-u", "lockstep-*"],
            ),
            ("systemd.journal", &["journalctl", "--no-pager", "_PID=1"]),
            ("units.show", &["systemctl", "show", "*", "--no-pager"]),
        ];
        for host in self.addresses.keys() {
            let directory = into.join(host);
            fs::create_dir_all(&directory)?;
            for (file, argv) in common {
                let said = self.on(host, argv)?;
                self.holds_no_secret(&format!("{file} of {host}"), &said)?;
                fs::write(directory.join(file), said)?;
            }
            for (name, secret) in &self.secrets {
                let kept = "/var/lib/lockstep /var/lib/lockstep-agent /run/lockstep-agent /tmp";
                let search = format!("grep -rlsaF -e {secret} {kept} || true");
                let found = self.on(host, &["sh", "-c", &search])?;
                ensure!(
                    found.is_empty(),
                    "on {host} these hold the secret `{name}`: {found}"
                );
            }
        }
        for (name, _) in HOSTS.iter().filter(|(_, role)| *role == "app") {
            let show = ["systemctl", "show", "employee-backend", "--no-pager"];
            fs::write(
                into.join(name).join("employee-backend.show"),
                self.on(name, &show)?,
            )?;
            let journal = ["journalctl", "--no-pager", "-u", "employee-backend"];
            fs::write(
                into.join(name).join("employee-backend.journal"),
                self.on(name, &journal)?,
            )?;
        }
        Ok(())
    }

    /// Fails if a text holds one of the fleet's secrets.
    pub fn holds_no_secret(&self, what: &str, text: &str) -> Result<()> {
        for (name, secret) in &self.secrets {
            ensure!(!text.contains(secret), "{what} shows the secret `{name}`");
        }
        Ok(())
    }
}
