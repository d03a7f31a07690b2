//! prisma: `migrations/<name>/migration.sql` beside the schema. There are no ways back, but for a
//! `down.sql` that the application's authors put beside.
//!
//! The tool's engine is a download of its own that many hosts cannot make, so Lockstep never calls
//! the tool: it runs the file and writes the row of `_prisma_migrations` as the engine does, both in
//! one transaction.

use std::path::Path;

use lockstep_proto::report::Failure;

use super::{Layout, Migration, Script, names};
use crate::sql::{literal, statements};

pub(super) struct Prisma;

/// The directory beside `schema.prisma`.
const MIGRATIONS: &str = "migrations";

impl Layout for Prisma {
    fn table(&self) -> &'static str {
        "_prisma_migrations"
    }

    fn read(&self, directory: &Path) -> Result<Vec<Migration>, Failure> {
        let names = names(&directory.join(MIGRATIONS), true)?;
        names.iter().map(|name| read(directory, name)).collect()
    }

    fn rows(&self, table: &str) -> String {
        format!(
            "SELECT migration_name::text, checksum::text, finished_at IS NOT NULL FROM {table} \
             WHERE rolled_back_at IS NULL ORDER BY migration_name::text COLLATE \"C\""
        )
    }

    fn create(&self, table: &str) -> String {
        format!(
            "CREATE TABLE IF NOT EXISTS {table} (\n  id VARCHAR(36) PRIMARY KEY NOT NULL,\n  \
             checksum VARCHAR(64) NOT NULL,\n  finished_at TIMESTAMPTZ,\n  \
             migration_name VARCHAR(255) NOT NULL,\n  logs TEXT,\n  rolled_back_at TIMESTAMPTZ,\n  \
             started_at TIMESTAMPTZ NOT NULL DEFAULT now(),\n  \
             applied_steps_count INTEGER NOT NULL DEFAULT 0\n)"
        )
    }

    fn applied(&self, table: &str, migration: &Migration) -> String {
        insert(table, migration, "clock_timestamp()", 1)
    }

    fn around(&self, table: &str, migration: &Migration) -> (Option<String>, String) {
        let after = format!(
            "UPDATE {table} SET finished_at = clock_timestamp(), applied_steps_count = 1 \
             WHERE migration_name = {} AND finished_at IS NULL AND rolled_back_at IS NULL",
            literal(&migration.version)
        );
        (Some(insert(table, migration, "NULL", 0)), after)
    }

    fn reverted(&self, table: &str, migration: &Migration) -> String {
        format!(
            "DELETE FROM {table} WHERE migration_name = {} AND rolled_back_at IS NULL",
            literal(&migration.version)
        )
    }
}

fn read(directory: &Path, name: &str) -> Result<Migration, Failure> {
    let script = |file: &str| -> Result<Script, Failure> {
        let script = Script::read(directory, &format!("{MIGRATIONS}/{name}/{file}"))?;
        // As the engine does it: the server's implicit transaction, which these are refused in.
        let alone = statements(&script.sql)
            .iter()
            .any(|one| one.tokens.iter().any(|token| token.is("CONCURRENTLY")));
        Ok(Script {
            whole: !alone,
            ..script
        })
    };
    let has_down = directory
        .join(MIGRATIONS)
        .join(name)
        .join("down.sql")
        .exists();
    let up = script("migration.sql")?;
    Ok(Migration {
        version: name.to_owned(),
        description: String::new(),
        checksum: up.sha256(),
        up,
        down: has_down.then(|| script("down.sql")).transpose()?,
    })
}

fn insert(table: &str, migration: &Migration, finished: &str, steps: u8) -> String {
    format!(
        "INSERT INTO {table} (id, checksum, migration_name, started_at, finished_at, \
         applied_steps_count) VALUES (gen_random_uuid()::text, {}, {}, now(), {finished}, {steps})",
        literal(&migration.checksum),
        literal(&migration.version)
    )
}
