//! A PostgreSQL cluster of the test's own.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::daemon::{Daemon, Launch, PATH};
use crate::wait;

/// The superuser's name.
pub const SUPERUSER: &str = "postgres";

/// A running server with its own data.
#[derive(Debug)]
pub struct Postgres {
    server: Daemon,
    directory: PathBuf,
    tools: PathBuf,
    /// On loopback and, below [`Postgres::socket`], as a socket.
    pub port: u16,
}

impl Postgres {
    /// Makes a cluster in a new directory and starts it. The superuser's password is the file's
    /// content. As root, the server runs as the user `postgres`: it refuses root.
    pub fn start(directory: &Path, password: &Path) -> Result<Self> {
        let tools = tools()?;
        fs::create_dir_all(directory)?;
        let user = owner(directory)?;
        initialise(&tools, directory, password, user)?;
        let pass = directory.join("pgpass");
        let line = format!(
            "*:*:*:{SUPERUSER}:{}\n",
            fs::read_to_string(password)?.trim_end()
        );
        fs::write(&pass, line)?;
        fs::set_permissions(&pass, Permissions::from_mode(0o600))?;
        // Between the look for a free port and the bind another process may take it.
        let mut last = None;
        for _ in 0..5 {
            match Self::launch(directory, &tools, user) {
                Ok(postgres) => return Ok(postgres),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("five attempts have failed"))
    }

    fn launch(directory: &Path, tools: &Path, user: Option<&str>) -> Result<Self> {
        let port = free_port()?;
        let log = directory.join("server.log");
        let mut argv = vec![tools.join("postgres").into_os_string(), "-D".into()];
        argv.push(directory.join("data").into());
        for setting in [
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={port}"),
            format!("unix_socket_directories={}", directory.display()),
            "max_connections=60".to_owned(),
            "shared_buffers=16MB".to_owned(),
            // Every statement goes to the log: stories search it for what must not be there.
            "log_statement=all".to_owned(),
            "log_line_prefix=%m %u@%d %a ".to_owned(),
            // What is archived goes nowhere; restore points ask that it goes somewhere.
            "archive_mode=on".to_owned(),
            "archive_command=/bin/true".to_owned(),
        ] {
            argv.push("-c".into());
            argv.push(setting.into());
        }
        let launch = Launch {
            name: "PostgreSQL",
            argv,
            env: vec![("LC_ALL".to_owned(), "C.UTF-8".into())],
            dir: directory,
            log: &log,
            user,
            stop: Signal::INT,
        };
        let server = Daemon::spawn(launch)?;
        let mut postgres = Self {
            server,
            directory: directory.to_owned(),
            tools: tools.to_owned(),
            port,
        };
        wait::until("PostgreSQL to answer", wait::SOON, || {
            if let Err(ended) = postgres.server.check() {
                return Ok(Err(ended));
            }
            match postgres.query("postgres", "SELECT 1") {
                Ok(_) => Ok(Ok(())),
                Err(error) => Err(format!("{error:#}")),
            }
        })?
        .map_err(anyhow::Error::msg)?;
        Ok(postgres)
    }

    /// The directory of its socket.
    pub fn socket(&self) -> &Path {
        &self.directory
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.directory.join("server.log")
    }

    /// Runs statements as the superuser; the answer is unaligned text without headings.
    pub fn query(&self, database: &str, sql: &str) -> Result<String> {
        let mut psql = self.tool("psql");
        psql.args([
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            database,
            "-f",
            "-",
        ]);
        answer(psql, sql)
    }

    /// Runs a file of statements as the superuser, with variables of the environment for it.
    pub fn run_file(&self, file: &Path, env: &BTreeMap<&str, String>) -> Result<()> {
        let mut psql = self.tool("psql");
        psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-f"]);
        psql.arg(file).envs(env);
        answer(psql, "").map(drop)
    }

    /// The schema of a database as SQL, with nothing in it that differs between two dumps.
    pub fn schema(&self, database: &str) -> Result<String> {
        let mut dump = self.tool("pg_dump");
        dump.args(["--schema-only", "-d", database]);
        let text = answer(dump, "")?;
        // Newer releases fence a dump with a random word.
        let fenced =
            |line: &&str| line.starts_with("\\restrict") || line.starts_with("\\unrestrict");
        Ok(text
            .lines()
            .filter(|line| !fenced(line))
            .collect::<Vec<_>>()
            .join("\n"))
    }

    /// The tables of a database's schema `public`.
    pub fn tables(&self, database: &str) -> Result<Vec<String>> {
        let sql = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1";
        Ok(self
            .query(database, sql)?
            .lines()
            .map(str::to_owned)
            .collect())
    }

    /// The rows of a table as sorted text: equal if and only if the tables hold the same rows.
    pub fn rows(&self, database: &str, table: &str) -> Result<Vec<String>> {
        let sql = format!("SELECT row_to_json(t)::text FROM public.\"{table}\" t ORDER BY 1");
        Ok(self
            .query(database, &sql)?
            .lines()
            .map(str::to_owned)
            .collect())
    }

    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(self.tools.join(name));
        command
            .env_clear()
            .env("PATH", PATH)
            .env("LC_ALL", "C.UTF-8")
            .env("PGHOST", &self.directory)
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", SUPERUSER)
            .env("PGPASSFILE", self.directory.join("pgpass"))
            .current_dir("/");
        command
    }
}

fn answer(mut command: Command, input: &str) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    // What is asked fits into a pipe, so that nobody waits for anybody.
    child
        .stdin
        .take()
        .expect("it is piped")
        .write_all(input.as_bytes())?;
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output()?;
    ensure!(
        status.success(),
        "{name} ended with {status}: {}",
        String::from_utf8_lossy(&stderr)
    );
    Ok(String::from_utf8(stdout)?)
}

/// The newest server's directory of programs.
pub fn tools() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let newest = versions
        .filter_map(|entry| {
            Some((
                entry.file_name().to_str()?.parse::<u32>().ok()?,
                entry.path(),
            ))
        })
        .map(|(version, path)| (version, path.join("bin")))
        .filter(|(_, bin)| bin.join("postgres").is_file())
        .max();
    match newest {
        Some((_, bin)) => Ok(bin),
        None => bail!("there is no PostgreSQL server on this machine: run `make prepare`"),
    }
}

/// A port of loopback that nobody listens on.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

/// Whom the server runs as, if not as this process; the directory becomes that user's.
fn owner(directory: &Path) -> Result<Option<&'static str>> {
    give(directory)?;
    Ok(crate::is_root().then_some("postgres"))
}

/// Gives a file or directory to the user postgres, where this process is root.
fn give(path: &Path) -> Result<()> {
    if !crate::is_root() {
        return Ok(());
    }
    let passwd = fs::read_to_string("/etc/passwd")?;
    let entry = passwd
        .lines()
        .find_map(|line| line.strip_prefix("postgres:"))
        .context("there is no user postgres: run `make prepare`")?;
    let mut ids = entry.split(':').skip(1).take(2).map(str::parse);
    let (Some(Ok(user)), Some(Ok(group))) = (ids.next(), ids.next()) else {
        bail!("the entry of postgres in /etc/passwd has no ids");
    };
    Ok(chown(path, Some(user), Some(group))?)
}

fn initialise(tools: &Path, directory: &Path, password: &Path, user: Option<&str>) -> Result<()> {
    let file = directory.join("password");
    fs::copy(password, &file)?;
    fs::set_permissions(&file, Permissions::from_mode(0o600))?;
    give(&file)?;
    let mut command = Command::new("setpriv");
    if let Some(user) = user {
        command.args(["--reuid", user, "--regid", user, "--init-groups"]);
    }
    command.arg("--").arg(tools.join("initdb"));
    command.args([
        "--username",
        SUPERUSER,
        "--auth",
        "scram-sha-256",
        "--encoding",
        "UTF8",
    ]);
    // The locale decides messages and order; a sync is not needed for data of minutes.
    command.args(["--locale", "C.UTF-8", "--no-sync", "-D"]);
    command.arg(directory.join("data"));
    command.arg("--pwfile").arg(&file);
    command.env_clear().env("PATH", PATH).current_dir("/");
    answer(command, "")?;
    Ok(fs::remove_file(file)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_of_its_own_has_the_example_s_database_and_leaves_nothing() {
        let root = tempfile::Builder::new()
            .prefix("lockstep-")
            .tempdir()
            .unwrap();
        fs::set_permissions(root.path(), Permissions::from_mode(0o755)).unwrap();
        let password = root.path().join("password");
        fs::write(&password, "one two").unwrap();
        let postgres = Postgres::start(&root.path().join("postgres"), &password).unwrap();
        crate::example::make_database(&postgres, "m", "a").unwrap();
        let database = crate::example::DATABASE;
        let empty = postgres.schema(database).unwrap();
        assert_eq!(
            postgres.schema(database).unwrap(),
            empty,
            "two dumps of one schema are equal"
        );
        postgres
            .query(database, "CREATE TABLE t AS SELECT 2 AS a UNION SELECT 1")
            .unwrap();
        assert_ne!(postgres.schema(database).unwrap(), empty);
        assert_eq!(postgres.tables(database).unwrap(), ["t"]);
        assert_eq!(
            postgres.rows(database, "t").unwrap(),
            [r#"{"a":1}"#, r#"{"a":2}"#]
        );
        drop(postgres);
        assert_eq!(crate::processes::of(root.path()).len(), 0);
    }
}
