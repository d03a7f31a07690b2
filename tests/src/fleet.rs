//! A fleet of real systemd hosts, through `tests/fleet/hosts.sh`, and what users install on them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_proto::ids::Digest;

use crate::binaries::Binaries;
use crate::cluster::PEOPLE;
use crate::hosts::{quote, quote_path};
use crate::operator::Operator;
use crate::reaper::Reaper;
use crate::snapshot::Snapshot;
use crate::{example, repository, wait};

/// The name of this fleet; another one on the machine does not meet it.
const NAME: &str = "runbook";

/// The hosts under agents.
pub const HOSTS: [(&str, &str); 3] = [("db-1", "db"), ("app-1", "app"), ("app-2", "app")];

/// The host of the controller.
pub const CONTROL: &str = "control";

/// The port in the example's configuration files.
const PORT: u16 = 7443;

/// Running hosts with everything installed.
#[derive(Debug)]
pub struct Fleet {
    addresses: BTreeMap<String, String>,
    binaries: Binaries,
    work: tempfile::TempDir,
    secrets: BTreeMap<&'static str, String>,
    _reaper: Reaper,
    // Let go of after the reaper has cleaned up.
    _lock: File,
}

impl Fleet {
    /// Boots the hosts and installs Lockstep, PostgreSQL and what the application needs.
    pub fn start(mut tell: impl FnMut(&str)) -> Result<Self> {
        ensure!(
            crate::is_root(),
            "systemd hosts need root: run `sudo make fleet`"
        );
        let binaries = Binaries::find()?;
        let lock = File::create(format!("/run/lockstep-fleet-{NAME}.lock"))?;
        let free = lock.try_lock();
        free.context("another `make fleet` runs on this machine: wait until it has ended")?;
        let reaper = Reaper::of_fleet(NAME)?;
        hosts(&["prepare"])?;
        tell("booting four hosts");
        let names = [CONTROL].into_iter().chain(HOSTS.map(|(name, _)| name));
        let mut arguments = vec!["up"];
        arguments.extend(names);
        let listed = hosts(&arguments)?;
        let addresses = listed.lines().filter_map(|line| line.split_once(' '));
        let mut fleet = Self {
            addresses: addresses
                .map(|(name, ip)| (name.to_owned(), ip.to_owned()))
                .collect(),
            binaries,
            work: tempfile::Builder::new().prefix("lockstep-").tempdir()?,
            secrets: BTreeMap::new(),
            _reaper: reaper,
            _lock: lock,
        };
        for name in ["migrator", "app", "secret_key", "admin"] {
            fleet
                .secrets
                .insert(name, format!("{name}-{}", crate::cluster::token()?));
        }
        tell("installing PostgreSQL's roles, the units and the configurations");
        fleet.make_certificates()?;
        fleet.install_database()?;
        fleet.install_controller()?;
        for (name, role) in HOSTS {
            fleet.install_host(name, role)?;
        }
        fleet.make_profiles()?;
        fleet.wait_connected()?;
        Ok(fleet)
    }

    /// A command on a host; its standard output.
    pub fn on(&self, host: &str, argv: &[&str]) -> Result<String> {
        self.on_with(host, argv, "")
    }

    fn on_with(&self, host: &str, argv: &[&str], input: &str) -> Result<String> {
        ensure!(
            self.addresses.contains_key(host),
            "the fleet has no host {host}"
        );
        let mut arguments = vec!["exec", host];
        arguments.extend(argv);
        hosts_with(&arguments, input)
    }

    /// A person at the command line of this machine.
    pub fn operator(&self, name: &str) -> Operator {
        let groups = PEOPLE
            .iter()
            .find(|(person, _)| *person == name)
            .map(|(_, groups)| *groups);
        Operator {
            name: name.to_owned(),
            groups: groups
                .into_iter()
                .flatten()
                .map(|group| (*group).to_owned())
                .collect(),
            binary: self.binaries.lockstep.clone(),
            profile: self
                .work
                .path()
                .join("operators")
                .join(name)
                .join("profile.toml"),
        }
    }

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

    /// The agent's tests of systemd itself, on a host; what they say.
    pub fn test_systemd(&self, host: &str, program: &Path) -> Result<String> {
        let stage = Stage::new(self.work.path().join("stage/tests"))?;
        let installed = "usr/local/bin/lockstep-agent-tests";
        stage.copy(program, installed, 0o755)?;
        stage.put(host)?;
        let directory = "LOCKSTEP_TEST_UNIT_DIR=/run/systemd/system";
        let said = self.on(
            host,
            &[
                "env",
                directory,
                &format!("/{installed}"),
                "--ignored",
                "systemd",
            ],
        )?;
        self.on(host, &["rm", &format!("/{installed}")])?;
        Ok(said)
    }

    /// Fails if a text holds one of the fleet's secrets.
    pub fn holds_no_secret(&self, what: &str, text: &str) -> Result<()> {
        for (name, secret) in &self.secrets {
            ensure!(!text.contains(secret), "{what} shows the secret `{name}`");
        }
        Ok(())
    }

    /// Removes the hosts, and stops the daemon if it was started for them.
    pub fn stop(self) -> Result<()> {
        hosts(&["down"])?;
        hosts(&["stop-daemon"])?;
        Ok(())
    }

    fn pki(&self) -> PathBuf {
        self.work.path().join("pki")
    }

    fn make_certificates(&self) -> Result<()> {
        let pki = self.pki();
        let pki = pki
            .to_str()
            .context("the temporary directory's path is UTF-8")?;
        let make = |arguments: &[&str]| {
            let output = Command::new(&self.binaries.lockstep)
                .arg("pki")
                .args(arguments)
                .output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.success(),
                "lockstep pki {arguments:?}: {said}"
            );
            Ok(())
        };
        let at = ["--dir", pki, "--out", pki];
        make(&["init", "--dir", pki, "--domain", "example.com"])?;
        let address = &self.addresses[CONTROL];
        let names = [
            "controller",
            CONTROL,
            "--address",
            CONTROL,
            "--address",
            address,
        ];
        make(&[&names[..], &at].concat())?;
        for (host, _) in HOSTS {
            make(&[&["agent", host][..], &at].concat())?;
        }
        for (name, groups) in PEOPLE {
            let groups = groups.iter().flat_map(|group| ["--group", group]);
            let mut arguments = vec!["operator", name];
            arguments.extend(groups);
            arguments.extend(at);
            make(&arguments)?;
        }
        Ok(())
    }

    fn install_database(&self) -> Result<()> {
        let as_postgres = ["runuser", "-u", "postgres", "--"];
        self.on("db-1", &["systemctl", "enable", "--now", "postgresql"])?;
        self.on("db-1", &["systemctl", "start", "postgresql@15-main"])?;
        let psql = [
            &as_postgres[..],
            &["psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", "-"],
        ]
        .concat();
        let setup = fs::read_to_string(example::directory().join("app/db/setup.sql"))?;
        let passwords = format!(
            "\\setenv MIGRATOR_PASSWORD {}\n\\setenv APP_PASSWORD {}\n",
            self.secrets["migrator"], self.secrets["app"]
        );
        self.on_with("db-1", &psql, &format!("{passwords}{setup}"))?;
        self.on_with("db-1", &psql, "ALTER SYSTEM SET listen_addresses = '*'")?;
        let files = example::directory().join("hosts/db");
        for name in ["pg_hba.conf", "pg_ident.conf"] {
            let installed = format!("/etc/postgresql/15/main/{name}");
            let ours = fs::read_to_string(files.join(name))?;
            let theirs = self.on("db-1", &["cat", &installed])?;
            self.on_with("db-1", &["tee", &installed], &format!("{ours}{theirs}"))?;
        }
        self.on("db-1", &["systemctl", "restart", "postgresql@15-main"])?;
        let private = ["install", "-d", "-m", "700"];
        let copies = ["/backups", "/backups/production"];
        self.on("db-1", &[&private[..], &copies].concat())?;
        let backups = ["-o", "postgres", "-g", "postgres", "/var/backups/lockstep"];
        self.on("db-1", &[&private[..], &backups].concat())?;
        Ok(())
    }

    fn install_controller(&self) -> Result<()> {
        let stage = Stage::new(self.work.path().join("stage").join(CONTROL))?;
        let deploy = repository().join("deploy/systemd");
        stage.copy(&self.binaries.lockstep, "usr/bin/lockstep", 0o755)?;
        stage.copy(
            &deploy.join("lockstep-sysusers.conf"),
            "usr/lib/sysusers.d/lockstep.conf",
            0o644,
        )?;
        let unit = "lockstep-controller.service";
        stage.copy(
            &deploy.join(unit),
            &format!("etc/systemd/system/{unit}"),
            0o644,
        )?;
        stage.copy(
            &deploy.join("controller.toml"),
            "etc/lockstep/controller.toml",
            0o640,
        )?;
        let certificate = |kind: &str| self.pki().join(format!("controller-{CONTROL}.{kind}"));
        stage.copy(
            &certificate("crt"),
            "etc/lockstep/tls/controller.crt",
            0o644,
        )?;
        stage.copy(
            &certificate("key"),
            "etc/lockstep/tls/controller.key",
            0o640,
        )?;
        for ca in ["ca-agents.crt", "ca-operators.crt"] {
            stage.copy(
                &self.pki().join(ca),
                &format!("etc/lockstep/tls/{ca}"),
                0o644,
            )?;
        }
        stage.put(CONTROL)?;
        self.on(CONTROL, &["systemd-sysusers"])?;
        self.on(
            CONTROL,
            &["install", "-d", "-m", "750", "/etc/lockstep/secrets"],
        )?;
        self.on(CONTROL, &["chgrp", "-R", "lockstep", "/etc/lockstep"])?;
        // Python's own mail server, which prints what it gets into its journal.
        let mail = [
            "systemd-run",
            "--unit=mail",
            "/usr/bin/python3",
            "-u",
            "-m",
            "smtpd",
            "-n",
        ];
        self.on(
            CONTROL,
            &[&mail[..], &["-c", "DebuggingServer", "127.0.0.1:25"]].concat(),
        )?;
        self.on(CONTROL, &["systemctl", "daemon-reload"])?;
        self.on(
            CONTROL,
            &["systemctl", "enable", "--now", "lockstep-controller"],
        )?;
        Ok(())
    }

    fn install_host(&self, name: &str, role: &str) -> Result<()> {
        let stage = Stage::new(self.work.path().join("stage").join(name))?;
        let deploy = repository().join("deploy/systemd");
        stage.copy(&self.binaries.agent, "usr/bin/lockstep-agent", 0o755)?;
        for unit in ["lockstep-agent.service", "lockstep-steps.slice"] {
            stage.copy(
                &deploy.join(unit),
                &format!("etc/systemd/system/{unit}"),
                0o644,
            )?;
        }
        let files = example::directory().join("hosts").join(role);
        stage.copy(
            &files.join("policy.toml"),
            "etc/lockstep/policy.toml",
            0o644,
        )?;
        stage.write(
            "etc/lockstep/agent.toml",
            &configuration(&files, name)?,
            0o600,
        )?;
        stage.copy(
            &self.pki().join("ca-controllers.crt"),
            "etc/lockstep/tls/ca-controllers.crt",
            0o644,
        )?;
        for kind in ["crt", "key"] {
            let file = self.pki().join(format!("agent-{name}.{kind}"));
            stage.copy(&file, &format!("etc/lockstep/tls/agent.{kind}"), 0o600)?;
        }
        if role == "app" {
            self.stage_app(&stage, &files)?;
        }
        stage.put(name)?;
        self.on(name, &["chmod", "700", "/etc/lockstep"])?;
        if role == "app" {
            let user = ["useradd", "--system", "--create-home", "employee"];
            self.on(name, &user)?;
            let own = ["install", "-d", "-o", "employee", "-g", "employee"];
            let places = ["/var/www/employee-system", "/var/log/employee-system"];
            self.on(name, &[&own[..], &places].concat())?;
            // git gives a repository to nobody but its owner.
            self.on(name, &["chown", "-R", "employee:", "/srv/git"])?;
        }
        self.on(name, &["systemctl", "daemon-reload"])?;
        self.on(name, &["systemctl", "enable", "--now", "lockstep-agent"])?;
        Ok(())
    }

    fn stage_app(&self, stage: &Stage, files: &Path) -> Result<()> {
        let unit = "employee-backend.service";
        stage.copy(
            &files.join(unit),
            &format!("etc/systemd/system/{unit}"),
            0o644,
        )?;
        example::make_history(&stage.directory.join("srv/git/employee-system"))?;
        let url = |user: &str, password: &str| {
            format!("postgresql://{user}:{password}@db-1/{}", example::DATABASE)
        };
        let secret = |name: &str| self.secrets[name].as_str();
        for (name, value) in [
            ("migrator_password", secret("migrator").to_owned()),
            (
                "migrator_database_url",
                url("employee_migrator", secret("migrator")),
            ),
            ("app_database_url", url("employee_app", secret("app"))),
            ("secret_key", secret("secret_key").repeat(2)),
            ("admin_password", secret("admin").to_owned()),
        ] {
            stage.write(&format!("etc/lockstep/secrets/{name}"), &value, 0o600)?;
        }
        Ok(())
    }

    fn make_profiles(&self) -> Result<()> {
        for (name, _) in PEOPLE {
            let profile = self.operator(name).profile;
            fs::create_dir_all(profile.parent().expect("a profile has a directory"))?;
            let pki = self.pki();
            let text = format!(
                "controller = {}\nca = {}\ncert = {}\nkey = {}\n",
                quote(&format!("{}:{PORT}", self.addresses[CONTROL])),
                quote_path(&pki.join("ca-controllers.crt")),
                quote_path(&pki.join(format!("operator-{name}.crt"))),
                quote_path(&pki.join(format!("operator-{name}.key"))),
            );
            fs::write(profile, text)?;
        }
        Ok(())
    }

    fn wait_connected(&self) -> Result<()> {
        let operator = self.operator(PEOPLE[0].0);
        let waited = wait::until("the agents to be connected", wait::SOON, || {
            let known = operator
                .json(&["hosts"])
                .map_err(|error| format!("{error:#}"))?;
            let connected = crate::operator::list(&known["hosts"])
                .filter(|host| host["connected"] == true)
                .count();
            if connected == HOSTS.len() {
                Ok(())
            } else {
                Err(known.to_string())
            }
        });
        waited.with_context(|| {
            let journal = ["journalctl", "--no-pager", "-n", "12", "-u", "lockstep-*"];
            let names = self.addresses.keys();
            let said = names
                .map(|name| format!("{name}:\n{}", self.on(name, &journal).unwrap_or_default()));
            said.collect::<String>()
        })
    }
}

/// The example's configuration with this host's name, and how this machine reaches packages.
fn configuration(files: &Path, name: &str) -> Result<String> {
    let text = fs::read_to_string(files.join("agent.toml"))?;
    let mut out = String::new();
    for line in text.lines() {
        if line.starts_with("host = ") && !out.contains('[') {
            write!(out, "host = {}", quote(name))?;
        } else {
            out.push_str(line);
        }
        out.push('\n');
        if line == "[apps.employee-system.env]" {
            for (variable, value) in example::package_indexes() {
                writeln!(out, "{variable} = {}", quote(&value))?;
            }
        }
    }
    Ok(out)
}

/// Files for a host, put there in one go.
struct Stage {
    directory: PathBuf,
}

impl Stage {
    fn new(directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self { directory })
    }

    fn at(&self, path: &str, mode: u32, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let path = self.directory.join(path);
        fs::create_dir_all(path.parent().expect("a file has a directory"))?;
        write(&path).with_context(|| format!("cannot stage {}", path.display()))?;
        Ok(fs::set_permissions(&path, Permissions::from_mode(mode))?)
    }

    fn copy(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        self.at(to, mode, |path| Ok(fs::copy(from, path).map(drop)?))
    }

    fn write(&self, to: &str, text: &str, mode: u32) -> Result<()> {
        self.at(to, mode, |path| Ok(fs::write(path, text)?))
    }

    fn put(&self, host: &str) -> Result<()> {
        let directory = self.directory.to_str().context("the path is UTF-8")?;
        hosts(&["put", host, directory, "/"]).map(drop)
    }
}

/// Runs `hosts.sh`; its standard output.
fn hosts(arguments: &[&str]) -> Result<String> {
    hosts_with(arguments, "")
}

fn hosts_with(arguments: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new(repository().join("tests/fleet/hosts.sh"))
        .args(arguments)
        .env("LOCKSTEP_FLEET", NAME)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().expect("it is piped");
    // A command that reads nothing may have ended already.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "hosts.sh {}: {}\n{said}",
            arguments.join(" "),
            output.status
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
