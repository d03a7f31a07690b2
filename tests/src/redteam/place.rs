//! The host that is attacked: a real agent, link and exec apart, with every setting that says whose
//! word counts.
//!
//! ```text
//! HOST/srv/place/effects     the ledger: each licensed command writes its line
//! HOST/srv/place/allowed/    where environment files may lie, and links that lead away
//! HOST/srv/place/rated/      twice an hour
//! HOST/srv/place/closed/     not at this time of the day
//! ROOT/outside/              where nothing may ever change
//! ```

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use lockstep_proto::sshsig::SigningKey;
use serde_json::Value;

use super::watch::Watch;
use crate::cluster::Cluster;
use crate::hosts::quote;
use crate::played::Keys;

/// The host.
pub(super) const HOST: &str = "app-1";

/// The fleet that its plans are of.
pub(super) const FLEET: &str = "prod";

/// Writes its third argument to the ledger, as it came.
const NOTE: &str = "import sys\nopen(sys.argv[1], 'a').write(repr(sys.argv[2:]) + '\\n')\n";

/// Keys by small numbers: 1 to 3 seal plans, 5 and 6 approve, 8 is another host's; others are nobody's.
pub(super) fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

/// The cluster, after its controller's keys were stolen.
pub(super) struct Place {
    pub(super) cluster: Cluster,
    /// Watched for whatever nobody licensed.
    pub(super) watch: Watch,
}

impl Place {
    /// Starts everything, and ends the real controller: the thief takes its place.
    pub(super) fn start() -> Result<Self> {
        let mut cluster = Cluster::builder()
            .without_database()
            .hosts(&[(HOST, "app")])
            .enrolling("24h")
            .policy(HOST, Some(""))
            .start()?;
        let outside = cluster.root().join("outside");
        fs::create_dir_all(&outside)?;
        fs::write(outside.join("there"), "before\n")?;
        let host = cluster.host_mut(HOST);
        let place = host.root.join("srv/place");
        for name in ["allowed/sub", "rated", "closed"] {
            fs::create_dir_all(place.join(name))?;
        }
        fs::write(place.join("note"), NOTE)?;
        symlink(&outside, place.join("allowed/away"))?;
        symlink(outside.join("there"), place.join("allowed/there.env"))?;
        symlink("secret.env", place.join("allowed/alias.env"))?;
        fs::write(host.root.join("policy.toml"), policy(&place)?)?;
        host.stop_agent();
        host.split();
        host.start_agent()?;
        cluster.wait_connected(&[HOST.to_owned()])?;
        cluster.kill_controller();
        let root = &cluster.host(HOST).root;
        let own = ["state", "run", "log/agent.log"].map(|name| root.join(name));
        let watch = Watch::begin(vec![root.clone(), outside], own.into());
        Ok(Self { cluster, watch })
    }

    /// Everything that makes the controller: its certificate and key. With the agents' issuer,
    /// which a controller has where hosts may join, it could also make agents; here that helps it
    /// with nothing.
    pub(super) fn stolen(&self) -> Result<Keys> {
        let read = |name: &str| {
            let path = self.cluster.pki().join(name);
            fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        Ok(Keys {
            certificate: read("controller-main.crt")?,
            key: read("controller-main.key")?,
            agents: read("ca-agents.crt")?,
        })
    }

    /// A path below the place.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.cluster.host(HOST).root.join("srv/place").join(name)
    }

    /// The ledger's lines.
    pub(super) fn ledger(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("effects")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// The agent's own records, a value a line.
    pub(super) fn audit(&self) -> Result<Vec<Value>> {
        let output = Command::new(&self.cluster.binaries().agent)
            .args(["audit", "export", "--config"])
            .arg(self.cluster.host(HOST).config())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "audit export: {said}");
        let text = String::from_utf8(output.stdout)?;
        let lines = text.lines().map(serde_json::from_str);
        Ok(lines.collect::<Result<_, _>>()?)
    }
}

fn policy(place: &Path) -> Result<String> {
    let path = |name: &str| quote(&place.join(name).to_string_lossy());
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let hour = (now.as_secs() / 3600 + 12) % 24;
    let mut text = String::from("approvals = \"signed\"\nbindings = \"signed\"\n");
    let public = |seed: u8| key(seed).public();
    let keys: Vec<String> = (1..=3)
        .map(|seed| quote(&format!("{} signer-{seed}", public(seed))))
        .collect();
    writeln!(
        text,
        "[seal]\nfleet = \"{FLEET}\"\nthreshold = 2\nkeys = [{}]",
        keys.join(", ")
    )?;
    for (name, group, seed) in [("bob", "dba", 5), ("carol", "qa_lead", 6)] {
        let key = public(seed);
        writeln!(
            text,
            "[[approver]]\nname = \"{name}\"\ngroups = [\"{group}\"]\nkey = \"{key}\""
        )?;
    }
    let key = public(8);
    writeln!(text, "[[evidence]]\nhost = \"db-1\"\nkey = \"{key}\"")?;
    writeln!(
        text,
        "[[allow]]\naction = \"exec.run\"\n[allow.where]\n\
         argv = [[\"/usr/bin/python3\", {}, {}, \"*\"]]\ndir = [\"(default)\"]\nenv = [\"(default)\"]",
        path("note"),
        path("effects"),
    )?;
    let rules = [
        ("allowed/*.env", String::new()),
        ("rated/*.env", "per_hour = 2\n".to_owned()),
        (
            "closed/*.env",
            format!("windows = [{{ utc = \"{hour:02}:00-{hour:02}:59\" }}]\n"),
        ),
    ];
    for (name, limits) in rules {
        writeln!(
            text,
            "[[allow]]\naction = \"env.render\"\n{limits}[allow.where]\npath = [{}]\n\
             owner = [\"(default)\"]\nmode = [\"0600\"]",
            path(name)
        )?;
    }
    let secret = path("allowed/secret.env");
    writeln!(
        text,
        "[[deny]]\naction = \"env.render\"\nwhere = {{ path = [{secret}] }}\n\
         [[allow]]\naction = \"service.*\"\nwhere = {{ service = [\"employee-*\", \"worker@1\"] }}\n\
         [[deny]]\naction = \"service.*\"\nwhere = {{ service = [\"employee-db\"] }}\n\
         [[allow]]\naction = \"check.http\"\nwhere = {{ url = [\"http://localhost:8000/health*\"] }}\n\
         [[allow]]\naction = \"check.log\"\nwhere = {{ path = [{}] }}",
        path("allowed/*.log")
    )?;
    Ok(text)
}
