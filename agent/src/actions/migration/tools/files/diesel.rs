//! diesel: `migrations/<version>_<name>/up.sql`, with `down.sql` and `metadata.toml`.
//!
//! As `migrations_internals` 2.3 and `diesel_migrations` 2.3 have it. The table keeps no checksums:
//! whether a migration was changed after it was applied, it cannot say.

use std::path::Path;

use lockstep_proto::report::{Cause, Failure};
use serde::Deserialize;

use super::{Layout, Migration, Script, Walk, Way, names};
use crate::sql::literal;
use crate::step::{failure, hinted};

pub(super) struct Diesel;

/// The directory beside `diesel.toml`.
const MIGRATIONS: &str = "migrations";

/// `metadata.toml` of a migration.
#[derive(Deserialize)]
struct Metadata {
    /// A file that does not say means no, as the tool reads it; without a file it is yes.
    #[serde(default)]
    run_in_transaction: bool,
}

impl Layout for Diesel {
    fn table(&self) -> &'static str {
        "__diesel_schema_migrations"
    }

    fn read(&self, directory: &Path) -> Result<Vec<Migration>, Failure> {
        let mut found = Vec::new();
        for name in names(&directory.join(MIGRATIONS), true)? {
            found.push(read(directory, &name)?);
        }
        found.sort_by(|one, other| one.version.cmp(&other.version));
        Ok(found)
    }

    fn command(&self, walk: &Walk<'_>) -> Result<Vec<String>, Failure> {
        let steps = walk.steps.to_string();
        let args: &[&str] = match walk.way {
            // Without `schema.rs`: a release is immutable.
            Way::Up if walk.to_head => &["run", "--locked-schema"],
            Way::Up => {
                return Err(hinted(
                    Cause::Refused,
                    format!(
                        "diesel goes to its newest migration only, and not to {}",
                        walk.to
                    ),
                    "say `to: head`, or `apply: sql`",
                ));
            }
            Way::Down => &["revert", "--locked-schema", "-n", &steps],
        };
        let all = ["migration", "--migration-dir", MIGRATIONS];
        Ok(all.iter().chain(args).map(|&arg| arg.to_owned()).collect())
    }

    fn rows(&self, table: &str) -> String {
        format!(
            "SELECT version::text, NULL::text, true FROM {table} ORDER BY version::text COLLATE \"C\""
        )
    }

    fn create(&self, table: &str) -> String {
        format!(
            "CREATE TABLE IF NOT EXISTS {table} (\n  version VARCHAR(50) PRIMARY KEY NOT NULL,\n  \
             run_on TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP\n)"
        )
    }

    fn applied(&self, table: &str, migration: &Migration) -> String {
        format!(
            "INSERT INTO {table} (version) VALUES ({})",
            literal(&migration.version)
        )
    }

    fn around(&self, table: &str, migration: &Migration) -> (Option<String>, String) {
        (None, self.applied(table, migration))
    }

    fn reverted(&self, table: &str, migration: &Migration) -> String {
        format!(
            "DELETE FROM {table} WHERE version = {}",
            literal(&migration.version)
        )
    }
}

fn read(directory: &Path, name: &str) -> Result<Migration, Failure> {
    let place = |file: &str| format!("{MIGRATIONS}/{name}/{file}");
    let is_there = |file: &str| directory.join(place(file)).exists();
    let whole = if is_there("metadata.toml") {
        let text = Script::read(directory, &place("metadata.toml"))?.sql;
        let metadata: Metadata = toml::from_str(&text).map_err(|error| {
            failure(
                Cause::Step,
                format!(
                    "cannot read {}: {}",
                    place("metadata.toml"),
                    error.message()
                ),
            )
        })?;
        metadata.run_in_transaction
    } else {
        true
    };
    let script = |file: &str| -> Result<Script, Failure> {
        let script = Script::read(directory, &place(file))?;
        Ok(Script { whole, ..script })
    };
    let version = name.split('_').next().unwrap_or_default().replace('-', "");
    Ok(Migration {
        version,
        description: String::new(),
        checksum: String::new(),
        up: script("up.sql")?,
        down: is_there("down.sql")
            .then(|| script("down.sql"))
            .transpose()?,
    })
}
