//! A PostgreSQL server for tests: started by the first test that needs it, shared by those that
//! run at the same time, stopped and removed by the last.

use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use lockstep_proto::ids::{Direction, RolloutId, StepRef};
use lockstep_proto::order::{Binding, Fact};

use super::{Database, Session};
use crate::config::{self, Postgres};
use crate::process::User;
use crate::step::Context;
use crate::testing::Host;

pub(crate) use archive::Archive;

mod archive;

static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The password of every role in tests.
pub(crate) const PASSWORD: &str = "canary-pa55:word\\x";

/// A running server.
pub(crate) struct Cluster {
    server: Mutex<Child>,
    port: u16,
    directory: tempfile::TempDir,
    /// Who keeps its log of changes, if anybody does.
    archive: Option<Archive>,
}

impl Cluster {
    /// A server of the test's own.
    pub(crate) fn alone() -> Arc<Self> {
        Arc::new(Self::start(None))
    }

    fn shared() -> Arc<Self> {
        let mut shared = SHARED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Self::start(None));
            *shared = Arc::downgrade(&cluster);
            cluster
        })
    }

    /// A server of its own whose log of changes is archived.
    pub(crate) fn archiving(archive: Archive) -> Arc<Self> {
        assert!(
            Path::new(archive.program()).exists(),
            "{archive:?} is missing: run tests/prepare.sh"
        );
        let cluster = Self::start(Some(archive));
        let conf = cluster.conf().display().to_string();
        let ready = as_server(archive.program())
            .args(archive.setup(&conf))
            .output()
            .unwrap();
        assert!(ready.status.success(), "{ready:?}");
        Arc::new(cluster)
    }

    fn start(archive: Option<Archive>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (root, data) = (directory.path(), directory.path().join("data"));
        if rustix::process::geteuid().is_root() {
            let user = User::find("postgres").unwrap();
            chown(root, Some(user.uid), Some(user.gid)).unwrap();
        }
        let secret = root.join("password");
        std::fs::write(&secret, PASSWORD).unwrap();
        // Backup systems come through the socket, without a password.
        let local = if archive.is_some() {
            "trust"
        } else {
            "scram-sha-256"
        };
        let initialised = server_program("initdb")
            .args(["--auth-host=scram-sha-256", "--auth-local", local])
            .args(["--no-sync", "--encoding=UTF8", "--locale=C"])
            .args(["--username=postgres", "-D"])
            .arg(&data)
            .arg(format!("--pwfile={}", secret.display()))
            .output()
            .unwrap();
        assert!(
            initialised.status.success(),
            "{}",
            String::from_utf8_lossy(&initialised.stderr)
        );
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        if let Some(archive) = archive {
            let shown = root.display().to_string();
            let text = archive.configuration(&shown, port);
            std::fs::write(root.join("archive.conf"), text).unwrap();
            if archive == Archive::Barman {
                let incoming = format!("{shown}/repository/main/incoming");
                let made = as_server("/bin/mkdir").args(["-p", &incoming]).status();
                assert!(made.unwrap().success());
            }
        }
        let server = Mutex::new(launch(root, port, archive));
        Self {
            server,
            port,
            directory,
            archive,
        }
    }

    fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The backup system's configuration.
    pub(crate) fn conf(&self) -> PathBuf {
        self.directory().join("archive.conf")
    }

    /// Where it keeps its backups.
    pub(crate) fn repository(&self) -> PathBuf {
        self.directory().join("repository")
    }

    fn pgbackrest(&self) -> Option<config::Pgbackrest> {
        (self.archive == Some(Archive::Pgbackrest)).then(|| config::Pgbackrest {
            stanza: "main".into(),
            config: Some(self.conf()),
            program: Archive::Pgbackrest.program().into(),
            user: server_user(),
        })
    }

    fn barman(&self) -> Option<config::Barman> {
        (self.archive == Some(Archive::Barman)).then(|| config::Barman {
            server: "main".into(),
            config: Some(self.conf()),
            program: Archive::Barman.program().into(),
            user: server_user(),
        })
    }

    /// The server's service, where it may be recovered.
    fn recover(&self) -> Option<config::Recover> {
        (self.archive == Some(Archive::Pgbackrest)).then(|| config::Recover {
            service: Some("server".into()),
            ..config::Recover::default()
        })
    }

    /// The commands that stop, start and ask it.
    fn service(&self) -> config::Service {
        let (root, data) = (self.directory(), self.data());
        let options = settings(root, self.port).join(" -c ");
        let argv = |args: &[&str]| {
            let program = bin_dir().join("pg_ctl");
            let words = [
                &program.display().to_string(),
                "-D",
                &data.display().to_string(),
                "-w",
            ];
            let words = words.iter().chain(args);
            words.map(|&word| word.to_owned()).collect()
        };
        // The other one is whoever's the test runs as.
        let log = root.join("log.of-service").display().to_string();
        config::Service {
            dir: Some("/".into()),
            user: server_user(),
            start: argv(&["-l", &log, "-o", &format!("-c {options}"), "start"]),
            stop: argv(&["-m", "fast", "stop"]),
            status: argv(&["status"]),
            ..config::Service::default()
        }
    }

    /// A statement in one of its databases, as a shell runs it.
    pub(crate) fn psql(&self, database: &str, sql: &str) -> String {
        format!(
            "{} -X -h {} -p {} -U postgres -d {database} -c '{sql}'",
            bin_dir().join("psql").display(),
            self.directory().display(),
            self.port
        )
    }

    /// The server's files.
    pub(crate) fn data(&self) -> PathBuf {
        self.directory().join("data")
    }

    /// Gives the data of a stopped server another name.
    pub(crate) fn put_data_aside(&self) {
        let data = self.directory().join("data");
        std::fs::rename(&data, self.directory().join("data.aside")).unwrap();
    }

    /// Stops the server, and ends all sessions.
    pub(crate) fn stop(&self) {
        use rustix::process::{Pid, Signal, kill_process};
        let mut server = self.server.lock().unwrap();
        let _ = kill_process(Pid::from_child(&server), Signal::INT);
        let _ = server.wait();
    }

    /// Kills its first process as it is, and starts it again at once, as systemd does.
    pub(crate) fn crash(&self) {
        let mut server = self.server.lock().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
        *server = launch(self.directory(), self.port, self.archive);
    }

    /// Starts it again, and waits until it has recovered.
    pub(crate) fn start_again(&self) {
        *self.server.lock().unwrap() = launch(self.directory(), self.port, self.archive);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
        // One that its service has started is not our child.
        if self.data().join("postmaster.pid").exists() {
            let stop = self.service().stop;
            let _ = as_server(&stop[0]).args(&stop[1..]).output();
        }
    }
}

/// What the server is told when it starts.
fn settings(root: &Path, port: u16) -> Vec<String> {
    vec![
        "listen_addresses=127.0.0.1".to_owned(),
        format!("port={port}"),
        format!("unix_socket_directories={}", root.display()),
        "fsync=off".to_owned(),
        "max_connections=60".to_owned(),
    ]
}

/// Who the server's programs run as, if not as whoever the test runs as.
fn server_user() -> Option<String> {
    rustix::process::geteuid()
        .is_root()
        .then(|| "postgres".into())
}

/// Starts the server, and waits until it takes connections.
fn launch(root: &Path, port: u16, archive: Option<Archive>) -> Child {
    let data = root.join("data");
    let mut server = server_program("postgres");
    server.arg("-D").arg(&data);
    for setting in settings(root, port) {
        server.args(["-c", &setting]);
    }
    if let Some(archive) = archive {
        // In the file, for tests that change it.
        let file = data.join("postgresql.auto.conf");
        if !std::fs::read_to_string(&file).is_ok_and(|text| text.contains("archive_mode")) {
            let push = archive.command(&root.display().to_string());
            let text = format!("archive_mode = on\narchive_command = '{push}'\n");
            std::fs::write(&file, text).unwrap();
        }
    }
    server.stdout(Stdio::null());
    let mut spawn = || {
        let log = std::fs::File::create(root.join("log")).unwrap();
        server.stderr(log).spawn().unwrap()
    };
    let mut running = spawn();
    let began = Instant::now();
    // One that was killed has left its file.
    let is_ready = |running: &Child| {
        let text = std::fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
        text.lines().next() == Some(&*running.id().to_string()) && text.contains("ready")
    };
    while !is_ready(&running) {
        let log = || std::fs::read_to_string(root.join("log")).unwrap_or_default();
        assert!(began.elapsed() < Duration::from_mins(1), "{}", log());
        std::thread::sleep(Duration::from_millis(20));
        // It refuses as long as sessions of one that was killed are at work.
        if running.try_wait().unwrap().is_some() {
            running = spawn();
        }
    }
    running
}

/// One of the server's programs, as a user that it accepts.
fn server_program(name: &str) -> Command {
    as_server(&bin_dir().join(name).display().to_string())
}

/// A program, run as whoever the server runs as.
pub(crate) fn as_server(path: &str) -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(path);
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
        .arg(path);
    command
}

/// Where the newest server's programs are.
pub(crate) fn bin_dir() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
    let newest = versions.flatten().filter_map(|entry| {
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        let directory = entry.path().join("bin");
        directory
            .join("initdb")
            .exists()
            .then_some((version, directory))
    });
    newest.max().expect("a server is installed").1
}

/// A host with one database of its own, called `staff` in plans: owned by `<name>_owner`, used by
/// `<name>_app`, reached by the superuser.
pub(crate) struct Bench {
    /// The host.
    pub(crate) host: Host,
    /// The database's name on the server, and the beginning of its roles' names.
    pub(crate) name: String,
    rollout: RolloutId,
    /// The server runs as long as somebody uses it.
    cluster: Arc<Cluster>,
}

impl Bench {
    /// A host with an empty database that only its owner and the application may enter.
    pub(crate) async fn new() -> Self {
        Self::on(Cluster::shared()).await
    }

    /// The same on a server of the test's own.
    pub(crate) async fn on(cluster: Arc<Cluster>) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("staff_{number}");
        let mut host = Host::new();
        host.secret("db", PASSWORD);
        host.secret("wrong", "not it");
        let config = |dbname: &str, user: &str| Postgres {
            host: cluster.directory().display().to_string(),
            port: cluster.port,
            dbname: Some(dbname.to_owned()),
            user: user.to_owned(),
            password: Some("db".into()),
            migrate_as: None,
            migrate_password: None,
            os_user: None,
            bin_dir: None,
            backup_dir: None,
            pgbackrest: cluster.pgbackrest(),
            barman: cluster.barman(),
            recover: cluster.recover(),
        };
        let (owner, app) = (format!("{name}_owner"), format!("{name}_app"));
        let sections = [
            ("staff", config(&name, "postgres")),
            ("as_owner", config(&name, &owner)),
            ("as_app", config(&name, &app)),
            ("maintenance", config("postgres", "postgres")),
        ];
        host.config.postgres = sections
            .into_iter()
            .map(|(name, config)| (name.to_owned(), config))
            .collect();
        if let Some(recover) = cluster.recover() {
            let name = recover.service.expect("it has one");
            host.config.services.insert(name, cluster.service());
        }
        let mut rollout = [0; 6];
        rollout[..4].copy_from_slice(&std::process::id().to_be_bytes());
        rollout[4..].copy_from_slice(&u16::try_from(number).unwrap().to_be_bytes());
        let bench = Self {
            host,
            name,
            rollout: RolloutId::from_random(rollout),
            cluster,
        };
        let setup = bench.session("maintenance").await;
        for sql in [
            format!(
                "CREATE ROLE {owner} LOGIN PASSWORD {}",
                super::literal(PASSWORD)
            ),
            format!(
                "CREATE ROLE {app} LOGIN PASSWORD {}",
                super::literal(PASSWORD)
            ),
            format!(
                "CREATE DATABASE {} OWNER {owner} TEMPLATE template0",
                bench.name
            ),
            format!("REVOKE ALL ON DATABASE {} FROM PUBLIC", bench.name),
            format!("GRANT CONNECT ON DATABASE {} TO {app}", bench.name),
        ] {
            setup.run("setup", &sql).await.unwrap();
        }
        bench
    }

    /// The same with two tables, one of them in a schema of its own, and 300 rows.
    pub(crate) async fn with_rows() -> Self {
        Self::with_rows_on(Cluster::shared()).await
    }

    /// The same on a server of the test's own.
    pub(crate) async fn with_rows_on(cluster: Arc<Cluster>) -> Self {
        let bench = Self::on(cluster).await;
        let app = bench.app();
        bench
            .sql(&format!(
                "CREATE TABLE public.users (id int PRIMARY KEY, name text NOT NULL); \
                 CREATE SCHEMA hr; \
                 CREATE TABLE hr.notes (id int PRIMARY KEY, user_id int REFERENCES public.users, body text); \
                 INSERT INTO public.users SELECT n, 'user ' || n FROM generate_series(1, 200) n; \
                 INSERT INTO hr.notes SELECT n, n, repeat(md5(n::text), 20) FROM generate_series(1, 100) n; \
                 GRANT SELECT, INSERT, UPDATE, DELETE ON public.users TO {app}"
            ))
            .await;
        bench
    }

    /// Its server.
    pub(crate) fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// The server's first process, the parent of all others.
    pub(crate) fn server(&self) -> u32 {
        self.cluster.server.lock().unwrap().id()
    }

    /// The application's role.
    pub(crate) fn app(&self) -> String {
        format!("{}_app", self.name)
    }

    /// What the next attempt at a step of phase 0 sees.
    pub(crate) fn cx(&self, step: u16, facts: Vec<Fact>) -> Context {
        let mut cx = self.host.context();
        cx.key.rollout = self.rollout.clone();
        cx.key.at = StepRef { phase: 0, step };
        let origin = cx.key.clone();
        let bind = |fact| Binding {
            origin: origin.clone(),
            fact,
            signature: None,
        };
        cx.bindings = facts.into_iter().map(bind).collect();
        cx
    }

    /// The same for an undo.
    pub(crate) fn undo(&self, step: u16, facts: Vec<Fact>) -> Context {
        let mut cx = self.cx(step, facts);
        cx.key.direction = Direction::Undo;
        cx
    }

    /// A session in one of the host's databases, under a name of the test's own.
    pub(crate) async fn session(&self, database: &str) -> Session {
        self.try_session(database).await.unwrap()
    }

    /// The same if it can be had.
    pub(crate) async fn try_session(
        &self,
        database: &str,
    ) -> Result<Session, lockstep_proto::report::Failure> {
        let cx = self.cx(999, vec![]);
        let session = Database::find(&cx, database)?.connect(&cx).await?;
        session
            .run("naming the test's session", "SET application_name = 'test'")
            .await?;
        Ok(session)
    }

    /// Runs statements in the database as its owner.
    pub(crate) async fn sql(&self, sql: &str) {
        self.session("as_owner")
            .await
            .run("test", sql)
            .await
            .unwrap();
    }

    /// One value, as text, from the server.
    pub(crate) async fn ask(&self, sql: &str) -> String {
        let session = self.session("maintenance").await;
        session
            .value("test", sql)
            .await
            .unwrap()
            .unwrap_or_default()
    }
}

/// What a host sees where `staff` is reached as the database's owner, who is no superuser.
pub(crate) fn as_owner(mut cx: Context) -> Context {
    let config = Arc::make_mut(&mut cx.config);
    let owner = config.postgres["as_owner"].clone();
    config.postgres.insert("staff".into(), owner);
    cx
}
