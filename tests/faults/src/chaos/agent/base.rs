//! What all workers share: the server with databases to copy, the repository, alembic.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use lockstep_proto::ids::Digest;
use lockstep_tests::daemon::PATH;
use lockstep_tests::example;
use lockstep_tests::postgres::{Postgres, SUPERUSER};

use super::kinds::{Base as Data, Kind};
use super::lab::copy;

/// The database with the schema of v0.9.5, and that of v1.0.0.
const FIRST: &str = "chaos_first";
const SECOND: &str = "chaos_second";

/// Rows, and a ledger that the server itself keeps: a statement that is rolled back is not in it.
const ROWS: &str = "
INSERT INTO public.departments (name) SELECT 'd' || n FROM generate_series(1, 5) n;
INSERT INTO public.employees (first_name, last_name, department_id)
    SELECT 'f' || n, 'l' || n, 1 + n % 5 FROM generate_series(1, 50) n;
CREATE SCHEMA chaos;
CREATE TABLE chaos.ledger (tag text NOT NULL);
CREATE FUNCTION chaos.note() RETURNS event_trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO chaos.ledger VALUES (tg_tag); END $$;
CREATE EVENT TRIGGER chaos_note ON ddl_command_end
    WHEN TAG IN ('ALTER TABLE', 'CREATE TABLE', 'CREATE INDEX') EXECUTE FUNCTION chaos.note();
";

/// What all workers share.
pub(super) struct Base {
    root: PathBuf,
    postgres: Option<Arc<Postgres>>,
}

impl Base {
    /// Makes what these kinds need.
    pub(super) fn make<'a>(root: &Path, kinds: impl Iterator<Item = &'a Kind>) -> Result<Self> {
        // Tools that run as other users pass.
        fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
        let mut base = Self {
            root: root.to_owned(),
            postgres: None,
        };
        example::make_history(&root.join("git"))?;
        if kinds.into_iter().any(|kind| kind.base != Data::None) {
            base.releases()?;
            base.databases()?;
        }
        Ok(base)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn postgres(&self) -> Option<Arc<Postgres>> {
        self.postgres.clone()
    }

    /// The template of a kind's database.
    pub(super) fn template(data: Data) -> Option<&'static str> {
        match data {
            Data::None => None,
            Data::First => Some(FIRST),
            Data::Second => Some(SECOND),
        }
    }

    /// Releases with alembic, to be copied.
    pub(super) fn release_sources(&self) -> PathBuf {
        self.root.join("releases")
    }

    fn releases(&self) -> Result<()> {
        let app = example::directory().join("app");
        let venv = environment(&app.join("base/backend/requirements.txt"))?;
        for release in ["v0.9.5", "v1.0.0"] {
            let backend = self.release_sources().join(release).join("backend");
            copy(&app.join("base/backend"), &backend)?;
            if release == "v1.0.0" {
                copy(&app.join("v1.0.0/backend"), &backend)?;
            }
            std::os::unix::fs::symlink(&venv, backend.join("venv"))?;
        }
        let files = self.release_sources().join("v1.0.0/files");
        for (file, sql) in migrations() {
            let path = files.join(file);
            fs::create_dir_all(path.parent().context("a directory")?)?;
            fs::write(path, sql)?;
        }
        Ok(())
    }

    fn databases(&mut self) -> Result<()> {
        let password = self.root.join("password");
        fs::write(&password, "chaos")?;
        let postgres = Postgres::start(&self.root.join("postgres"), &password)?;
        // Nothing of it outlives the run, so nothing is synced.
        let quick = "ALTER SYSTEM SET fsync = off;\nALTER SYSTEM SET log_statement = none;\n\
                     SELECT pg_reload_conf();\n";
        postgres.query("postgres", quick)?;
        example::make_database(&postgres, "m", "a")?;
        let create = |name: &str, from: &str| format!("CREATE DATABASE {name} TEMPLATE {from};");
        postgres.query("postgres", &create(FIRST, "template0"))?;
        self.migrate(&postgres, FIRST, "v0.9.5")?;
        postgres.query(FIRST, ROWS)?;
        postgres.query("postgres", &create(SECOND, FIRST))?;
        self.migrate(&postgres, SECOND, "v1.0.0")?;
        self.postgres = Some(Arc::new(postgres));
        Ok(())
    }

    fn migrate(&self, postgres: &Postgres, database: &str, release: &str) -> Result<()> {
        let backend = self.release_sources().join(release).join("backend");
        let url = format!(
            "postgresql://{SUPERUSER}:chaos@127.0.0.1:{}/{database}",
            postgres.port
        );
        let mut alembic = Command::new(backend.join("venv/bin/alembic"));
        alembic
            .args(["upgrade", "head"])
            .current_dir(&backend)
            .env_clear()
            .env("PATH", PATH)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("DATABASE_URL", url);
        succeed(alembic)
    }
}

/// The same migration for each tool that has files: a table, an index, and a change of rows that is
/// counted as the server counts what was done.
fn migrations() -> Vec<(String, String)> {
    let steps = [
        (
            "table",
            "CREATE TABLE public.rooms (id int);",
            "DROP TABLE public.rooms;",
        ),
        (
            "index",
            "CREATE INDEX rooms_id ON public.rooms (id);",
            "DROP INDEX public.rooms_id;",
        ),
        (
            "rows",
            "INSERT INTO public.rooms SELECT generate_series(1, 9); \
             UPDATE public.employees SET last_name = last_name || '!'; \
             INSERT INTO chaos.ledger VALUES ('rows');",
            "DELETE FROM public.rooms; UPDATE public.employees SET last_name = rtrim(last_name, '!'); \
             INSERT INTO chaos.ledger VALUES ('rows back');",
        ),
    ];
    let mut files = vec![("diesel/diesel.toml".to_owned(), String::new())];
    for ((name, up, down), at) in steps.into_iter().zip(1..) {
        let alone = up.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY");
        let alone = if name == "index" {
            format!("-- lockstep:no-transaction\n{alone}")
        } else {
            alone
        };
        for (file, text) in [
            (format!("sql/{at}_{name}.sql"), up),
            (format!("sql/{at}_{name}.down.sql"), down),
            (format!("concurrently/{at}_{name}.sql"), &alone),
            (format!("concurrently/{at}_{name}.down.sql"), down),
            (format!("sqlx/migrations/{at}_{name}.up.sql"), up),
            (format!("sqlx/migrations/{at}_{name}.down.sql"), down),
            (format!("diesel/migrations/{at}_{name}/up.sql"), up),
            (format!("diesel/migrations/{at}_{name}/down.sql"), down),
            (format!("prisma/migrations/{at}_{name}/migration.sql"), up),
            (format!("prisma/migrations/{at}_{name}/down.sql"), down),
        ] {
            files.push((file, text.to_owned()));
        }
    }
    files
}

/// A virtual environment with the application's requirements: made once, kept beside the build.
fn environment(requirements: &Path) -> Result<PathBuf> {
    let wanted = Digest::of(&fs::read(requirements)?);
    let cache = lockstep_tests::target().join("cache");
    fs::create_dir_all(&cache)?;
    let venv = cache.join(format!("chaos-venv-{}", wanted.short()));
    let lock = fs::File::create(cache.join("chaos-venv.lock"))?;
    lock.lock()?;
    let ready = venv.join("ready");
    if !ready.exists() {
        let mut make = Command::new("/usr/bin/python3");
        make.args(["-m", "venv", "--clear"]).arg(&venv);
        succeed(make)?;
        let mut install = Command::new(venv.join("bin/pip"));
        install.args(["install", "-q", "-r"]).arg(requirements);
        succeed(install)?;
        fs::write(ready, "")?;
    }
    Ok(venv)
}

fn succeed(mut command: Command) -> Result<()> {
    let output = command.output();
    let program = command.get_program().display();
    let output = output.with_context(|| format!("cannot start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed: {said}");
    Ok(())
}
