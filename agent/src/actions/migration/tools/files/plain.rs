//! Plain SQL: `NNN_name.sql`, and `NNN_name.down.sql` for the way back. The table is Lockstep's own.

use std::path::Path;

use lockstep_proto::report::{Cause, Failure};

use super::{Layout, Migration, Script, names};
use crate::sql::literal;
use crate::step::hinted;

pub(super) struct Plain;

/// The first line of a file whose one statement cannot run in a transaction.
const ALONE: &str = "-- lockstep:no-transaction";

const DOWN: &str = ".down.sql";

impl Layout for Plain {
    fn table(&self) -> &'static str {
        "lockstep_schema_migrations"
    }

    fn read(&self, directory: &Path) -> Result<Vec<Migration>, Failure> {
        let names = names(directory, false)?;
        let mut found = Vec::new();
        for file in names
            .iter()
            .filter(|name| name.strip_suffix(".sql").is_some())
        {
            let up = match file.strip_suffix(DOWN) {
                None => file.clone(),
                Some(stem) => format!("{stem}.sql"),
            };
            let number = up.split_once('_').and_then(|(digits, _)| number(digits));
            let Some(number) = number.filter(|_| names.contains(&up)) else {
                return Err(hinted(
                    Cause::Step,
                    format!("{} is no migration", directory.join(file).display()),
                    "call it NNN_name.sql, with NNN_name.down.sql beside it for the way back",
                ));
            };
            if up == *file {
                found.push((number, read(directory, file, &names)?));
            }
        }
        found.sort_by_key(|(number, _)| *number);
        if let Some(same) = found.windows(2).find(|two| two[0].0 == two[1].0) {
            let [one, other] = [&same[0].1.version, &same[1].1.version];
            return Err(hinted(
                Cause::Step,
                format!("{one} and {other} have the same number"),
                "give each its own: the numbers are their order",
            ));
        }
        Ok(found.into_iter().map(|(_, migration)| migration).collect())
    }

    fn rows(&self, table: &str) -> String {
        format!(
            "SELECT name, sha256, state = 'done' FROM {table} \
             ORDER BY substring(name FROM '^[0-9]+')::numeric"
        )
    }

    fn create(&self, table: &str) -> String {
        format!(
            "CREATE TABLE IF NOT EXISTS {table} (\n  name text PRIMARY KEY,\n  sha256 text NOT NULL,\n  \
             state text NOT NULL CHECK (state IN ('running', 'done')),\n  \
             applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),\n  \
             step text NOT NULL DEFAULT current_setting('application_name'),\n  ms bigint\n)"
        )
    }

    fn applied(&self, table: &str, migration: &Migration) -> String {
        format!(
            "INSERT INTO {table} (name, sha256, state, ms) VALUES ({}, {}, 'done', \
             extract(epoch FROM clock_timestamp() - now()) * 1000)",
            literal(&migration.version),
            literal(&migration.checksum)
        )
    }

    fn around(&self, table: &str, migration: &Migration) -> (Option<String>, String) {
        let name = literal(&migration.version);
        let before = format!(
            "INSERT INTO {table} (name, sha256, state) VALUES ({name}, {}, 'running')",
            literal(&migration.checksum)
        );
        let after = format!(
            "UPDATE {table} SET state = 'done', ms = extract(epoch FROM clock_timestamp() - \
             applied_at) * 1000 WHERE name = {name}"
        );
        (Some(before), after)
    }

    fn reverted(&self, table: &str, migration: &Migration) -> String {
        format!(
            "DELETE FROM {table} WHERE name = {}",
            literal(&migration.version)
        )
    }

    /// The table is ours: where there was none before, there is none again.
    fn emptied(&self, table: &str) -> Option<String> {
        Some(format!("DROP TABLE {table}"))
    }
}

fn number(digits: &str) -> Option<u64> {
    let all = digits.bytes().all(|byte| byte.is_ascii_digit());
    all.then(|| digits.parse().ok()).flatten()
}

fn read(directory: &Path, file: &str, names: &[String]) -> Result<Migration, Failure> {
    let stem = file.strip_suffix(".sql").unwrap_or(file);
    let script = |file: &str| -> Result<Script, Failure> {
        let script = Script::read(directory, file)?;
        let first = script.sql.lines().next().unwrap_or_default();
        let whole = first.trim_end() != ALONE;
        Ok(Script { whole, ..script })
    };
    let down = format!("{stem}{DOWN}");
    let up = script(file)?;
    Ok(Migration {
        version: stem.to_owned(),
        description: String::new(),
        checksum: up.sha256(),
        up,
        down: names.contains(&down).then(|| script(&down)).transpose()?,
    })
}
