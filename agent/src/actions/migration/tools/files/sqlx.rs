//! sqlx: `migrations/<version>_<description>.sql`, or `.up.sql` with `.down.sql`.
//!
//! As sqlx-core 0.9 has it: `src/migrate/source.rs`, and `src/migrate.rs` of sqlx-postgres.

use std::collections::BTreeMap;
use std::path::Path;

use lockstep_proto::report::{Cause, Failure};
use sha2::{Digest as _, Sha384};

use super::{Layout, Migration, Script, Walk, Way, names};
use crate::sql::{Database, literal, url};
use crate::step::failure;

pub(super) struct Sqlx;

/// The directory beside the tool's configuration.
const MIGRATIONS: &str = "migrations";

/// How a file begins that runs outside of a transaction.
const ALONE: &str = "-- no-transaction";

const DOWN: &str = ".down.sql";

impl Layout for Sqlx {
    fn table(&self) -> &'static str {
        "_sqlx_migrations"
    }

    fn read(&self, directory: &Path) -> Result<Vec<Migration>, Failure> {
        let mut ways: BTreeMap<i64, (Option<Migration>, Option<Script>)> = BTreeMap::new();
        for name in names(&directory.join(MIGRATIONS), false)? {
            // The tool passes by what is called otherwise, too.
            let Some((version, rest)) = name.split_once('_') else {
                continue;
            };
            if rest.strip_suffix(".sql").is_none() {
                continue;
            }
            let number: i64 = version.parse().map_err(|_| {
                failure(
                    Cause::Step,
                    format!("{MIGRATIONS}/{name} does not begin with a number"),
                )
            })?;
            let script = Script::read(directory, &format!("{MIGRATIONS}/{name}"))?;
            let whole = !script.sql.starts_with(ALONE);
            let script = Script { whole, ..script };
            let both = ways.entry(number).or_default();
            let twice = if rest.ends_with(DOWN) {
                both.1.replace(script).is_some()
            } else {
                both.0.replace(migration(number, rest, script)).is_some()
            };
            if twice {
                return Err(failure(
                    Cause::Step,
                    format!("several migrations of the release have the version {number}"),
                ));
            }
        }
        let joined = ways.into_iter().map(|(number, (up, down))| {
            let up = up.ok_or_else(|| {
                failure(
                    Cause::Step,
                    format!("the migration {number} has a way back, and no way there"),
                )
            })?;
            Ok(Migration { down, ..up })
        });
        joined.collect()
    }

    /// It wants a host before the path. The socket's directory behind it goes before that.
    fn url(&self, database: &Database) -> String {
        url(&database.config, database.dbname()).replacen("@/", "@localhost/", 1)
    }

    fn command(&self, walk: &Walk<'_>) -> Result<Vec<String>, Failure> {
        let (verb, to) = match walk.way {
            Way::Up => ("run", walk.to),
            Way::Down if walk.to.is_empty() => ("revert", "0"),
            Way::Down => ("revert", walk.to),
        };
        let args = [
            "migrate",
            verb,
            "--no-dotenv",
            "--source",
            MIGRATIONS,
            "--target-version",
            to,
        ];
        Ok(args.map(str::to_owned).into())
    }

    fn rows(&self, table: &str) -> String {
        format!(
            "SELECT version::text, encode(checksum, 'hex'), success FROM {table} AS rows \
             ORDER BY rows.version"
        )
    }

    fn create(&self, table: &str) -> String {
        format!(
            "CREATE TABLE IF NOT EXISTS {table} (\n  version BIGINT PRIMARY KEY,\n  \
             description TEXT NOT NULL,\n  installed_on TIMESTAMPTZ NOT NULL DEFAULT now(),\n  \
             success BOOLEAN NOT NULL,\n  checksum BYTEA NOT NULL,\n  \
             execution_time BIGINT NOT NULL\n)"
        )
    }

    fn applied(&self, table: &str, migration: &Migration) -> String {
        let took = "extract(epoch FROM clock_timestamp() - now()) * 1000000000";
        insert(table, migration, "TRUE", took)
    }

    fn around(&self, table: &str, migration: &Migration) -> (Option<String>, String) {
        let after = format!(
            "UPDATE {table} SET success = TRUE, execution_time = \
             extract(epoch FROM clock_timestamp() - installed_on) * 1000000000 WHERE version = {}",
            migration.version
        );
        (Some(insert(table, migration, "FALSE", "-1")), after)
    }

    fn reverted(&self, table: &str, migration: &Migration) -> String {
        format!("DELETE FROM {table} WHERE version = {}", migration.version)
    }
}

fn migration(number: i64, rest: &str, up: Script) -> Migration {
    let suffix = if rest.ends_with(".up.sql") {
        ".up.sql"
    } else {
        ".sql"
    };
    Migration {
        version: number.to_string(),
        description: rest.trim_end_matches(suffix).replace('_', " "),
        checksum: hex::encode(Sha384::digest(&up.sql)),
        up,
        down: None,
    }
}

fn insert(table: &str, migration: &Migration, success: &str, took: &str) -> String {
    format!(
        "INSERT INTO {table} (version, description, success, checksum, execution_time) VALUES \
         ({}, {}, {success}, decode('{}', 'hex'), {took})",
        migration.version,
        literal(&migration.description),
        migration.checksum
    )
}
