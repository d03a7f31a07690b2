//! What a database holds, in figures that a dump and its restore share: the rows of each table, an
//! order-free checksum over them, and a fingerprint of the schema. Sequences, statistics and
//! what belongs to extensions are left out.

use std::collections::BTreeMap;

use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde::{Deserialize, Serialize};

use super::tools::Tools;
use crate::sql::{Database, Session};
use crate::step::{Context, failure};

/// A table's rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Table {
    /// Its columns, by name.
    pub(crate) columns: Vec<String>,
    /// How many rows.
    pub(crate) rows: u64,
    /// The sum over their hashes, whatever their order; empty if none was made.
    pub(crate) checksum: String,
}

/// The tables of a database, by name: with the schema if it is not `public`, quoted if need be.
pub(crate) type Contents = BTreeMap<String, Table>;

/// A transaction that others may share the view of.
pub(super) struct Snapshot {
    session: Session,
    id: String,
}

/// The name of a table for people: `n` is its schema's row, `c` its own.
pub(super) const TABLE_NAME: &str = "(CASE n.nspname WHEN 'public' THEN '' \
     ELSE quote_ident(n.nspname) || '.' END || quote_ident(c.relname))";

/// The permanent tables of users, partitions each for itself.
pub(super) const TABLES: &str = "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind = 'r' AND c.relpersistence = 'p' \
     AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_toast' \
     AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass \
     AND d.objid = c.oid AND d.deptype = 'e')";

impl Snapshot {
    /// Begins a transaction that sees one state, and exports it.
    pub(super) async fn take(session: Session) -> Result<Self, Failure> {
        let what = "taking a snapshot";
        // The settings make one value one text.
        session
            .run(
                what,
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; \
                 SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO'; \
                 SET LOCAL intervalstyle = 'postgres'; SET LOCAL extra_float_digits = 1; \
                 SET LOCAL bytea_output = 'hex'; SET LOCAL row_security = off; \
                 SET LOCAL search_path = pg_catalog",
            )
            .await?;
        let id = session
            .one(what, "SELECT pg_export_snapshot()", &[])
            .await?
            .get(0);
        Ok(Self { session, id })
    }

    /// What pg_dump's `--snapshot` takes.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The session, inside its transaction.
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Counts and sums up every table, reading it once.
    pub(super) async fn contents(&self) -> Result<Contents, Failure> {
        self.read("coalesce(sum(hashtextextended(ROW(%1$s)::text, 0)::numeric), 0)::text")
            .await
    }

    /// Counts every table; the checksums are empty.
    pub(super) async fn counts(&self) -> Result<Contents, Failure> {
        self.read("NULL::text").await
    }

    /// Counts every table, and asks for one more value over its rows `t`, in which `%1$s` stands
    /// for its columns.
    async fn read(&self, sum: &str) -> Result<Contents, Failure> {
        let what = "counting rows";
        let sql = format!(
            "SELECT {TABLE_NAME}, \
             format('SELECT count(*), {sum} FROM ONLY %2$I.%3$I', \
                    (SELECT string_agg('t.' || quote_ident(attname), ',' ORDER BY attname) \
                     FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 \
                     AND NOT attisdropped), n.nspname, c.relname) || ' t', \
             ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 \
                   AND NOT attisdropped ORDER BY attname) \
             FROM {TABLES} ORDER BY 1"
        );
        let mut contents = Contents::new();
        for table in self.session.query(what, &sql, &[]).await? {
            let (name, sql): (String, String) = (table.get(0), table.get(1));
            let what = format!("counting the rows of {name}");
            let row = self.session.one(&what, &sql, &[]).await?;
            let rows = row.get::<_, i64>(0).unsigned_abs();
            let table = Table {
                columns: table.get(2),
                rows,
                checksum: row.get::<_, Option<String>>(1).unwrap_or_default(),
            };
            contents.insert(name, table);
        }
        Ok(contents)
    }
}

/// The schema's fingerprint: equal between a database and its restored copy, and before an upgrade
/// and after its downgrade. With a snapshot, that of the snapshot.
pub(super) async fn fingerprint(
    tools: &Tools<'_>,
    dbname: &str,
    snapshot: Option<&str>,
) -> Result<Digest, Failure> {
    let file = tools.file("schema.sql")?;
    let output = file.display().to_string();
    let mut args = vec![
        "-s",
        "--no-owner",
        "--no-privileges",
        "--lock-wait-timeout=5s",
        "-f",
        &output,
    ];
    let snapshot = snapshot.map(|id| format!("--snapshot={id}"));
    args.extend(snapshot.as_deref());
    tools.run("pg_dump", Some(dbname), &args).await?;
    let text = std::fs::read(&file)
        .map_err(|error| failure(Cause::Host, format!("cannot read {output}: {error}")))?;
    let _ = std::fs::remove_file(&file);
    Ok(Digest::of(&schema_lines(&text)))
}

/// A schema dump without comments, blank lines, and the random words that newer versions of
/// pg_dump put around it.
fn schema_lines(text: &[u8]) -> Vec<u8> {
    let passing: &[&[u8]] = &[b"--", b"\\restrict", b"\\unrestrict"];
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    lines
        .filter(|line| !line.trim_ascii().is_empty())
        .filter(|line| !passing.iter().any(|start| line.starts_with(start)))
        .flatten()
        .copied()
        .collect()
}

/// The revisions that migration tools have written down: alembic's, if it was here.
pub(crate) async fn revisions(session: &Session) -> Result<Vec<String>, Failure> {
    let Some(table) = revisions_table(session).await? else {
        return Ok(vec![]);
    };
    let sql = format!("SELECT version_num::text FROM {table} ORDER BY 1");
    let rows = session.query("asking for the revision", &sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The table in which alembic writes them down, with its schema. The tool's default is the first
/// schema of the search path, which is `public` nearly always.
pub(crate) async fn revisions_table(session: &Session) -> Result<Option<String>, Failure> {
    let sql = "SELECT format('%I.%I', n.nspname, c.relname) \
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
               WHERE c.relname = 'alembic_version' AND c.relkind = 'r' \
               ORDER BY n.nspname <> 'public', n.nspname LIMIT 1";
    let found = session.query("asking for the revision", sql, &[]).await?;
    Ok(found.first().map(|row| row.get(0)))
}

/// The database's part of the host's state ([`Fact::State`]).
pub(super) async fn state(cx: &Context, database: &Database) -> Result<Fact, Failure> {
    let session = database.connect(cx).await?;
    let major = session.major();
    let snapshot = Snapshot::take(session).await?;
    let tools = Tools::new(cx, database, major).await?;
    let contents = snapshot.contents().await?;
    let schema = fingerprint(&tools, database.dbname(), Some(snapshot.id())).await?;
    let revisions = revisions(snapshot.session()).await?;
    let bytes = serde_json::to_vec(&(schema, &contents)).expect("texts and numbers are JSON");
    let revision = match revisions.as_slice() {
        [] => String::new(),
        revisions => format!(", revision {}", revisions.join(" and ")),
    };
    Ok(Fact::State {
        name: format!("database {}", database.name),
        digest: Digest::of(&bytes),
        text: format!("{}{revision}", summary(&contents)),
    })
}

/// `3 tables, 215 rows`.
pub(super) fn summary(contents: &Contents) -> String {
    let rows: u64 = contents.values().map(|table| table.rows).sum();
    let plural = |count: u64, word: &str| match count {
        1 => format!("1 {word}"),
        _ => format!("{count} {word}s"),
    };
    format!(
        "{}, {}",
        plural(contents.len() as u64, "table"),
        plural(rows, "row")
    )
}

/// The most that a [`Fact::Rows`] takes of a report, in bytes: the rest has room beside it.
const MAX_ROWS_BYTES: usize = 16 << 10;

/// The rows as a fact; of very many tables the largest.
pub(super) fn rows_fact(database: &str, tables: impl Iterator<Item = (String, u64)>) -> Fact {
    let mut tables: Vec<(String, u64)> = tables.collect();
    tables.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
    let mut bytes = 0;
    tables.retain(|(name, _)| {
        bytes += name.len() + 32;
        bytes <= MAX_ROWS_BYTES
    });
    tables.sort();
    Fact::Rows {
        database: database.to_owned(),
        tables,
    }
}

/// Whether such a fact tells of all tables for sure. One that was cut has no room for another name,
/// of at most 63 bytes, quoted, with its schema's.
pub(super) fn is_whole(tables: &[(String, u64)]) -> bool {
    const LONGEST: usize = 2 * (2 * 63 + 2) + 1 + 32;
    let bytes: usize = tables.iter().map(|(name, _)| name.len() + 32).sum();
    bytes <= MAX_ROWS_BYTES - LONGEST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_compared_without_what_changes_by_itself() {
        let one =
            b"-- Dumped by 15.1\n\\restrict abc\n\nCREATE TABLE t (a int);\n\\unrestrict abc\n";
        let two = b"--\n\n-- Dumped by 15.2\n\nCREATE TABLE t (a int);\n";
        assert_eq!(schema_lines(one), schema_lines(two));
        assert_ne!(
            schema_lines(one),
            schema_lines(b"CREATE TABLE t (b int);\n")
        );
    }

    #[test]
    fn very_many_tables_still_fit_into_a_report() {
        let tables = (0..5000).map(|n| (format!("a_table_with_a_long_name_{n}"), n));
        let fact = rows_fact("db", tables);
        assert!(serde_json::to_vec(&fact).unwrap().len() < MAX_ROWS_BYTES + 100);
        let Fact::Rows { tables, .. } = fact else {
            unreachable!("it makes rows")
        };
        assert!(!is_whole(&tables), "the others would be thought gone");
        assert!(is_whole(&tables[..tables.len() / 2]));
        assert!(tables.contains(&("a_table_with_a_long_name_4999".into(), 4999)));
    }
}
