//! One worker's host: its directory, the agent on it, its database, its service, a small server.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lockstep_proto::action::{CATALOGUE, Site};
use lockstep_proto::ids::RolloutId;
use lockstep_tests::played::{Controller, Issuer, Keys, Side};
use lockstep_tests::postgres::{Postgres, SUPERUSER, free_port};
use lockstep_tests::processes;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::play::Event;
use super::things::Things;

/// The host's name.
pub(super) const HOST: &str = "app-1";

const DOMAIN: &str = "example.org";

/// The service: says that it starts, listens, and says that it stops.
const SERVICE: &str = "
import signal, socket, sys
def say(word):
    with open(sys.argv[2], 'a') as file: file.write(word + '\\n')
def stop(*_):
    say('stop')
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
say('start')
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(('127.0.0.1', int(sys.argv[1])))
server.listen(16)
while True: server.accept()[0].close()
";

/// A worker's host.
pub(super) struct Lab {
    root: PathBuf,
    worker: usize,
    agent_program: PathBuf,
    planted: Option<String>,
    /// Whether the fault is planted now.
    pub(super) is_planted: bool,
    postgres: Option<Arc<Postgres>>,
    /// The controller that the test plays.
    pub(super) controller: Controller,
    /// The application's server, which counts requests.
    pub(super) things: Things,
    /// Where the service listens.
    pub(super) port: u16,
    /// Whether the kind at hand has a database.
    pub(super) has_database: bool,
    /// What makes the database's rights and settings what they were: they belong to no template.
    settings: String,
    agent: Option<tokio::process::Child>,
}

/// Everything that a lab is made of.
pub(super) struct Parts<'a> {
    pub(super) root: &'a Path,
    pub(super) worker: usize,
    pub(super) agent: &'a Path,
    pub(super) postgres: Option<Arc<Postgres>>,
    pub(super) planted: Option<String>,
}

impl Lab {
    pub(super) async fn new(parts: Parts<'_>) -> Result<Self> {
        let root = parts.root.join(format!("w{}", parts.worker));
        fs::create_dir_all(&root)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755))?;
        let (agents, controllers) = (Issuer::new(), Issuer::new());
        let (certificate, key) = controllers.issue(DOMAIN, "controller/main", Side::Server);
        let keys = Keys {
            certificate,
            key,
            agents: agents.pem().to_owned(),
        };
        let lab = Self {
            worker: parts.worker,
            agent_program: parts.agent.to_owned(),
            planted: parts.planted,
            is_planted: false,
            postgres: parts.postgres,
            controller: Controller::start(&keys, "127.0.0.1:0".parse()?).await,
            things: Things::serve(&root.join("ledger.requests"))?,
            port: free_port()?,
            has_database: false,
            settings: String::new(),
            agent: None,
            root,
        };
        lab.configure(parts.root, &agents, &controllers)?;
        Ok(lab)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A path as plans write it.
    pub(super) fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The rollout of all cases of this worker.
    pub(super) fn rollout(&self) -> RolloutId {
        let worker = u8::try_from(self.worker).expect("a few workers");
        RolloutId::from_random([worker + 1; 6])
    }

    /// The database's name on the server.
    pub(super) fn dbname(&self) -> String {
        format!("w{}_live", self.worker)
    }

    /// A text without what differs between attempts.
    pub(super) fn neutral(text: &str) -> String {
        let mut text = text.to_owned();
        for attempt in 1..5 {
            text = text.replace(&format!("\"attempt\": {attempt}"), "\"attempt\": N");
            for direction in ["do", "undo"] {
                let from = format!(".{direction}.{attempt}@");
                text = text.replace(&from, &format!(".{direction}.N@"));
            }
        }
        text
    }

    fn configure(&self, shared: &Path, agents: &Issuer, controllers: &Issuer) -> Result<()> {
        let (cert, key) = agents.issue(DOMAIN, &format!("agent/{HOST}"), Side::Client);
        let private = |name: &str, text: &str| -> Result<()> {
            let path = self.path(name);
            fs::write(&path, text)?;
            Ok(fs::set_permissions(
                path,
                fs::Permissions::from_mode(0o600),
            )?)
        };
        private("agent.pem", &cert)?;
        private("agent.key", &key)?;
        private("ca.pem", controllers.pem())?;
        private("service.py", SERVICE)?;
        let allowed = CATALOGUE.iter().filter(|row| row.site == Site::Host);
        let allow = |name| format!("[[allow]]\naction = '{name}'\n");
        let policy: String = allowed.map(|row| allow(row.name)).collect();
        private("policy.toml", &policy)?;
        fs::create_dir_all(self.path("secrets"))?;
        fs::set_permissions(self.path("secrets"), fs::Permissions::from_mode(0o700))?;
        if self.postgres.is_some() {
            let password = fs::read_to_string(shared.join("password"))?;
            private("secrets/pg", &password)?;
        }
        let root = self.root.display();
        let mut text = format!(
            "host = '{HOST}'\ncontroller = 'localhost:{port}'\nstate_dir = '{root}/state'\n\
             run_dir = '{root}/run'\nsteps = 'session'\n\
             [tls]\ncontroller_ca = 'ca.pem'\ncert = 'agent.pem'\nkey = 'agent.key'\n\
             [labels]\nrole = 'app'\n\
             [apps.shop]\nroot = '{root}/world/app'\n\
             [apps.shop.env]\nMIGRATION_LEDGER = '{root}/ledger.migrations'\n\
             [services.web]\nargv = ['/usr/bin/python3', '-S', '-E', '{root}/service.py', \
             '{service}', '{root}/ledger.service']\noutput = '{root}/service.log'\n",
            port = self.controller.address.port(),
            service = self.port,
        );
        if let Some(postgres) = &self.postgres {
            let _ = write!(
                text,
                "[postgres.staff]\nhost = '{}'\nport = {}\ndbname = '{}'\nuser = '{SUPERUSER}'\n\
                 password = 'pg'\nbackup_dir = '{root}/backups'\n",
                postgres.socket().display(),
                postgres.port,
                self.dbname(),
            );
        }
        private("agent.toml", &text)
    }

    /// Removes all that a case left: the host is empty, and its agent new.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.end_processes()?;
        for dir in ["world", "state", "run", "backups", "copies"] {
            remove(&self.path(dir))?;
        }
        for entry in fs::read_dir(&self.root)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let log = Path::new(&name).extension() == Some("log".as_ref());
            if log || name.starts_with("ledger.") || name.starts_with("points.") {
                fs::remove_file(entry.path())?;
            }
        }
        self.things.clear();
        for dir in ["world", "backups", "copies"] {
            fs::create_dir(self.path(dir))?;
        }
        Ok(())
    }

    /// Keeps what is there as the world before every case of a kind.
    pub(super) fn save(&mut self) -> Result<()> {
        for dir in ["world", "backups", "copies"] {
            let saved = self.path(&format!("saved.{dir}"));
            remove(&saved)?;
            copy(&self.path(dir), &saved)?;
        }
        if self.has_database {
            let live = self.dbname();
            self.settings = self.query("postgres", &settings_of(&live))?;
            let sql = format!(
                "DROP DATABASE IF EXISTS {live}_saved WITH (FORCE); \
                 ALTER DATABASE {live} RENAME TO {live}_saved"
            );
            self.query("postgres", &sql.replace("; ", ";\n"))?;
        }
        Ok(())
    }

    /// Puts back what was kept.
    pub(super) fn restore(&mut self) -> Result<()> {
        self.clear()?;
        for dir in ["world", "backups", "copies"] {
            remove(&self.path(dir))?;
            copy(&self.path(&format!("saved.{dir}")), &self.path(dir))?;
        }
        if self.has_database {
            let saved = format!("{}_saved", self.dbname());
            self.make_database(&saved)?;
            let settings = self.settings.clone();
            self.query("postgres", &settings)?;
        }
        Ok(())
    }

    /// Makes the database from another one.
    pub(super) fn make_database(&self, template: &str) -> Result<()> {
        let (live, worker) = (self.dbname(), self.worker);
        let stale = format!(
            "SELECT format('DROP DATABASE %I WITH (FORCE)', datname) FROM pg_database WHERE \
             (datname LIKE 'w{worker}\\_%' AND datname NOT LIKE '%\\_saved') \
             OR datname LIKE 'lockstep_verify_{}%'\n\\gexec\n\
             CREATE DATABASE {live} TEMPLATE {template};\n\
             REVOKE ALL ON DATABASE {live} FROM PUBLIC;\n\
             GRANT CONNECT ON DATABASE {live} TO employee_app;\n",
            self.rollout()
        );
        self.query("postgres", &stale).map(drop)
    }

    fn query(&self, database: &str, sql: &str) -> Result<String> {
        let postgres = self.postgres.as_ref().context("no server was started")?;
        postgres.query(database, sql)
    }

    /// Lines `kind|name|value` about all databases of this worker.
    pub(super) fn look_at_databases(&self) -> Result<String> {
        let (worker, live, rollout) = (self.worker, self.dbname(), self.rollout());
        let mine = format!("datname LIKE 'w{worker}\\_%' AND datname NOT LIKE '%\\_saved'");
        let sql = format!(
            "SELECT 'state|database ' || datname || '|' || datallowconn || ' ' || \
             coalesce((SELECT string_agg(a::text, ',' ORDER BY a::text) FROM unnest(datacl) a), '') \
             FROM pg_database WHERE {mine};\n\
             SELECT 'identity|database ' || datname || '|' || oid FROM pg_database WHERE {mine};\n\
             SELECT 'state|settings ' || datname || '|' || s.setconfig::text FROM \
             pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase WHERE {mine};\n\
             SELECT 'identity|settings ' || datname || '|' || s.setconfig::text FROM \
             pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase WHERE {mine};\n\
             SELECT 'left|database|' || datname FROM pg_database \
             WHERE datname LIKE 'lockstep_verify_{rollout}%';\n\
             SELECT 'left|session|' || application_name || ' ' || left(query, 60) FROM \
             pg_stat_activity WHERE application_name LIKE 'lockstep:{rollout}:%';\n\
             SELECT count(*) > 0 AS open FROM pg_database WHERE datname = '{live}' AND \
             datallowconn \\gset\n\\if :open\n\\connect {live}\n\
             SELECT 'state|columns|' || md5(string_agg(table_name || '.' || column_name || ' ' || \
             data_type, ',' ORDER BY table_name, ordinal_position)) FROM \
             information_schema.columns WHERE table_schema = 'public';\n\
             SELECT 'state|revision|' || version_num FROM public.alembic_version;\n\
             SELECT 'state|employees|' || count(*) || ' ' || sum(id) || ' ' || \
             md5(string_agg(last_name, ',' ORDER BY id)) FROM public.employees;\n\
             SELECT 'state|rows ' || relname || '|' || (xpath('//n/text()', query_to_xml(format( \
             'SELECT count(*) AS n FROM %s', oid::regclass), false, true, '')))[1]::text FROM \
             pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r';\n\
             SELECT 'state|index ' || indexrelid::regclass || '|' || indisvalid FROM pg_index \
             JOIN pg_class ON oid = indexrelid WHERE relnamespace = 'public'::regnamespace;\n\
             SELECT 'count|ddl ' || tag || '|' || count(*) FROM chaos.ledger GROUP BY tag;\n\
             \\endif\n"
        );
        self.query("postgres", &sql)
    }

    /// Starts the service as the agent would have, note and all.
    pub(super) fn start_service(&self) -> Result<()> {
        let log = fs::File::create(self.path("service.log"))?;
        let mut command = std::process::Command::new("setsid");
        command
            .args(["/usr/bin/python3", "-S", "-E"])
            .arg(self.path("service.py"))
            .arg(self.port.to_string())
            .arg(self.path("ledger.service"))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        // In a group of its own `setsid` forks; the session's leader is found by its name.
        let mut child = command.spawn()?;
        let began = Instant::now();
        loop {
            let listens = std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok();
            let found = processes::of(&self.root);
            let service = found.iter().find(|process| {
                process
                    .argv
                    .iter()
                    .any(|word| word.ends_with("/service.py"))
            });
            if let Some(service) = service.filter(|_| listens) {
                child.wait()?;
                let pid = service.pid.as_raw_nonzero().get();
                let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
                let fields = stat.rsplit_once(')').context("a stat line")?.1;
                let started: u64 = fields
                    .split_whitespace()
                    .nth(19)
                    .context("a start time")?
                    .parse()?;
                let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
                let note = json!({
                    "pid": pid, "started": started, "boot": boot.trim(), "output_from": 0,
                });
                fs::create_dir_all(self.path("run/services"))?;
                fs::set_permissions(self.path("run"), fs::Permissions::from_mode(0o711))?;
                return Ok(fs::write(
                    self.path("run/services/web.json"),
                    note.to_string(),
                )?);
            }
            ensure!(
                began.elapsed() < Duration::from_secs(20),
                "the service does not start: {}",
                fs::read_to_string(self.path("service.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts the agent.
    pub(super) fn start_agent(&mut self) -> Result<()> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("agent.log"))?;
        let mut command = tokio::process::Command::new(&self.agent_program);
        command
            .args(["run", "--config"])
            .arg(self.path("agent.toml"))
            .env("LOCKSTEP_POINTS", format!("@{}", self.at("points.agent")))
            .env(
                "LOCKSTEP_STEP_POINTS",
                format!("@{}", self.at("points.step")),
            )
            .stdin(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        if let Some(fault) = self.planted.as_ref().filter(|_| self.is_planted) {
            command.env("LOCKSTEP_PLANTED", fault);
        }
        self.agent = Some(command.spawn()?);
        Ok(())
    }

    /// The agent ends, or dials.
    pub(super) async fn next_event(&mut self) -> Event {
        tokio::select! {
            biased;
            ended = ends(&mut self.agent) => Event::Ended(ended),
            session = self.controller.dialled() => Event::Dialled(Box::new(session)),
        }
    }

    /// Kills the agent.
    pub(super) async fn kill_agent(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().await?;
        }
        Ok(())
    }

    /// The command lines of all that runs in this lab, but the agent.
    pub(super) fn processes(&self) -> Vec<String> {
        let found = processes::of(&self.root).into_iter();
        let lines = found.map(|process| process.argv.join(" "));
        lines
            .filter(|line| !line.contains(" run --config"))
            .collect()
    }

    /// Waits for the step processes that still run.
    pub(super) async fn steps_end(&self) -> Result<()> {
        let began = Instant::now();
        let is_step = |line: &String| line.contains(" step --config");
        while self.processes().iter().any(is_step) {
            ensure!(
                began.elapsed() < Duration::from_secs(20),
                "step processes of {} do not end",
                self.root.display()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Kills all that runs in this lab.
    pub(super) fn end_processes(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let found = processes::of(&self.root);
            if found.is_empty() {
                return Ok(());
            }
            for process in found {
                let _ = kill_process(process.pid, Signal::KILL);
            }
            ensure!(
                began.elapsed() < Duration::from_secs(20),
                "processes of {} do not end",
                self.root.display()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What a reboot does: nothing runs, and the run directory is empty.
    pub(super) async fn reboot(&mut self) -> Result<()> {
        self.kill_agent().await?;
        self.end_processes()?;
        if self.has_database {
            let live = self.dbname();
            let sql = format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE \
                 '{live}%' OR application_name LIKE 'lockstep:{}:%'",
                self.rollout()
            );
            self.query("postgres", &sql)?;
        }
        remove(&self.path("run"))
    }

    /// The agent's log.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// Says what processes do at their points.
    pub(super) fn plan_points(&self, of: &str, plan: Option<&str>) -> Result<()> {
        let file = self.path(&format!("points.{of}"));
        if let Some(plan) = plan {
            fs::write(file, plan)?;
        } else {
            let _ = fs::remove_file(file);
        }
        Ok(())
    }

    /// Whether a process is to be killed that was not: who is killed removes the plan first.
    pub(super) fn awaits_kill(&self, of: &str) -> bool {
        let plan = fs::read_to_string(self.path(&format!("points.{of}")));
        plan.is_ok_and(|plan| plan.starts_with("kill:"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(pid) = self.agent.as_ref().and_then(tokio::process::Child::id) {
            let _ = Pid::from_raw(pid.cast_signed()).map(|pid| kill_process(pid, Signal::KILL));
        }
        let _ = self.end_processes();
    }
}

async fn ends(agent: &mut Option<tokio::process::Child>) -> String {
    match agent {
        Some(child) => match child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        },
        None => std::future::pending().await,
    }
}

/// A query whose answer is statements that give a database the rights and settings it has.
fn settings_of(dbname: &str) -> String {
    format!(
        "SELECT format('ALTER DATABASE {dbname} SET %s = %L;', split_part(c, '=', 1), \
         substr(c, strpos(c, '=') + 1)) FROM pg_db_role_setting s, unnest(s.setconfig) c \
         WHERE s.setdatabase = (SELECT oid FROM pg_database WHERE datname = '{dbname}');\n\
         SELECT 'REVOKE CONNECT ON DATABASE {dbname} FROM employee_app;' WHERE NOT \
         has_database_privilege('employee_app', '{dbname}', 'CONNECT');\n"
    )
}

pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Copies a tree, with links as links and modes as they are.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
