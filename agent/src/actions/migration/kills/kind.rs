//! The kinds of migrations that are killed, and their files.

use lockstep_proto::action::migration::{By, Tool};

/// Each tool and who runs it; and how long that takes about, in milliseconds.
pub(super) const KINDS: [(Tool, By, u64); 8] = [
    (Tool::Sql, By::Sql, 900),
    (Tool::Alembic, By::Tool, 6000),
    (Tool::Prisma, By::Sql, 900),
    (Tool::Sqlx, By::Tool, 900),
    (Tool::Diesel, By::Tool, 900),
    (Tool::Alembic, By::Sql, 5000),
    (Tool::Sqlx, By::Sql, 900),
    (Tool::Diesel, By::Sql, 900),
];

/// A kind of migration: how it is run, and whether it makes an index outside of a transaction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) tool: Tool,
    pub(super) by: By,
    pub(super) index: bool,
}

/// Three steps: a table with rows, an index that takes its time, and a change of all rows. Each
/// leaves a witness of having run, the index by being there.
pub(super) fn files(kind: Kind) -> Vec<(String, String)> {
    let table = "CREATE TABLE rooms AS SELECT n, n AS size FROM generate_series(1, 300) n; \
                 CREATE FUNCTION slow(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \
                 'BEGIN PERFORM pg_sleep(0.0003); RETURN n; END'; \
                 INSERT INTO witness VALUES ('table'); SELECT pg_sleep(0.1);";
    let index = if kind.index {
        "CREATE INDEX CONCURRENTLY rooms_slow ON rooms (public.slow(n));"
    } else {
        "CREATE INDEX rooms_slow ON rooms (public.slow(n));"
    };
    let rows = "UPDATE rooms SET size = -size; INSERT INTO witness VALUES ('rows'); \
                SELECT pg_sleep(0.1);";
    let texts = [table, index, rows];
    let name = |at: usize| match kind.tool {
        Tool::Sqlx => format!("migrations/{at}_step.sql"),
        Tool::Diesel => format!("migrations/{at}_step/up.sql"),
        Tool::Prisma => format!("migrations/{at}_step/migration.sql"),
        Tool::Sql | Tool::Alembic => format!("{at}_step.sql"),
    };
    let mut files: Vec<(String, String)> = (1..).map(name).zip(texts.map(str::to_owned)).collect();
    if kind.tool == Tool::Alembic {
        let texts = files.iter().zip(1..);
        let mut files: Vec<(String, String)> = texts
            .map(|((_, sql), at)| revision(at, sql, kind.index && at == 2))
            .collect();
        files.push((
            "alembic.ini".into(),
            "[alembic]\nscript_location = %(here)s/scripts\n".into(),
        ));
        files.push(("scripts/env.py".into(), ENV.into()));
        return files;
    }
    if kind.index {
        let alone = match kind.tool {
            Tool::Sqlx => "-- no-transaction\n",
            Tool::Sql => "-- lockstep:no-transaction\n",
            _ => "",
        };
        files[1].1.insert_str(0, alone);
    }
    if kind.tool == Tool::Diesel {
        let metadata = format!("run_in_transaction = {}", !kind.index);
        files.push(("migrations/2_step/metadata.toml".into(), metadata));
        files.push(("diesel.toml".into(), String::new()));
    }
    files
}

/// A revision of alembic's that runs some SQL, outside of a transaction if need be.
fn revision(at: usize, sql: &str, alone: bool) -> (String, String) {
    let down = match at {
        1 => "None".to_owned(),
        _ => format!("'{}_step'", at - 1),
    };
    let run = format!("op.execute(\"\"\"{sql}\"\"\")");
    let run = if alone {
        format!("with op.get_context().autocommit_block():\n        {run}")
    } else {
        run
    };
    let script = format!(
        "from alembic import op\nrevision = '{at}_step'\ndown_revision = {down}\n\n\n\
         def upgrade():\n    {run}\n\n\ndef downgrade():\n    pass\n"
    );
    (format!("scripts/versions/{at}_step.py"), script)
}

/// All pending revisions in one transaction, as alembic's own template has it.
const ENV: &str = r#"import os

from alembic import context
from sqlalchemy import create_engine

if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
    with create_engine(url).connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()
"#;
