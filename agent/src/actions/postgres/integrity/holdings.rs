//! What a database holds at one moment, in figures.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_proto::ids::{Digest, StepKey};
use lockstep_proto::report::Failure;
use lockstep_proto::values::{ByteSize, Timestamp};
use serde::{Deserialize, Serialize};

use crate::actions::postgres::look::foreign_keys;
use crate::actions::postgres::manifest;
use crate::actions::postgres::measure::{Snapshot, TABLE_NAME, TABLES, fingerprint, revisions};
use crate::actions::postgres::tools::Tools;
use crate::sql::{Database, Session, ident};
use crate::step::Context;

/// What a database holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Holdings {
    /// Its name: database, time and step key.
    pub(crate) id: String,
    /// The attempt that looked.
    pub(crate) key: StepKey,
    /// The database, as plans name it.
    pub(crate) database: String,
    /// When, by the server's clock.
    pub(crate) taken_at: Timestamp,
    /// The server's version: 150018 for 15.18.
    pub(crate) server_version: u32,
    /// The schema's fingerprint.
    pub(crate) schema: Digest,
    /// The rows of the migration tool's table.
    pub(crate) revisions: Vec<String>,
    /// By name: with the schema if it is not `public`, quoted if need be.
    pub(crate) tables: BTreeMap<String, Held>,
    /// Sequences that fill a column, by name.
    pub(crate) sequences: BTreeMap<String, Sequence>,
    /// How many rows have no parent, by foreign key.
    pub(crate) orphans: BTreeMap<String, u64>,
    /// Indexes that are not valid, or not ready.
    pub(crate) invalid_indexes: BTreeSet<String>,
    /// Constraints that were not held against all rows.
    pub(crate) unvalidated: BTreeSet<String>,
    /// How many large objects there are.
    pub(crate) large_objects: u64,
    /// How many pages had a wrong checksum; `None` if the server computes none.
    pub(crate) bad_pages: Option<u64>,
}

/// What a table holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Held {
    /// How many rows.
    pub(crate) rows: u64,
    /// Its columns, by name.
    pub(crate) columns: Vec<String>,
    /// What is in them; `None` if the table is too large to look.
    pub(crate) values: Option<Values>,
}

/// Sums over hashes, whatever the rows' order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Values {
    /// Over whole rows, as far as they consist of the columns of `each`.
    pub(crate) rows: String,
    /// Over each column by itself.
    pub(crate) each: BTreeMap<String, String>,
}

/// A sequence that fills a column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sequence {
    /// The value that it gives next.
    pub(crate) next: i64,
    /// The column, and the value in it that is furthest along.
    pub(crate) column: String,
    /// See `column`; `None` if there is no row.
    pub(crate) furthest: Option<i64>,
    /// Whether it is about to give a value that is there already.
    pub(crate) behind: bool,
}

/// What is wrong with the database itself is asked under this name.
const WHAT: &str = "looking at what the database holds";

impl Holdings {
    /// Looks, in one transaction. Of tables larger than `values_up_to` rows are counted only. For
    /// a comparison with `before`, values are those of the columns and tables that were there.
    pub(crate) async fn take(
        cx: &Context,
        database: &Database,
        values_up_to: Option<ByteSize>,
        before: Option<&Self>,
    ) -> Result<Self, Failure> {
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        let (server_version, major) = (session.version, session.major());
        let snapshot = Snapshot::take(session).await?;
        let tools = Tools::new(cx, database, major).await?;
        let session = snapshot.session();
        let sql = "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD\"T\"HH24MISS\"Z\"'), \
                   (extract(epoch FROM now()) * 1000)::int8, \
                   (SELECT count(*) FROM pg_largeobject_metadata), \
                   (SELECT checksum_failures FROM pg_stat_database \
                    WHERE datname = current_database())";
        let row = session.one(WHAT, sql, &[]).await?;
        let stamp: String = row.get(0);
        let number = |at| row.get::<_, i64>(at).unsigned_abs();
        let keys = foreign_keys(session).await?;
        let orphans = keys
            .iter()
            .map(|key| (format!("{} of {}", key.name, key.child), key.orphans));
        Ok(Self {
            id: manifest::id(&database.name, &stamp, &cx.key),
            key: cx.key.clone(),
            database: database.name.clone(),
            taken_at: Timestamp(number(1)),
            server_version,
            schema: fingerprint(&tools, database.dbname(), Some(snapshot.id())).await?,
            revisions: revisions(session).await?,
            tables: tables(cx, session, values_up_to, before).await?,
            sequences: sequences(session).await?,
            orphans: orphans.collect(),
            invalid_indexes: names(session, INVALID_INDEXES).await?,
            unvalidated: names(session, UNVALIDATED).await?,
            large_objects: number(2),
            bad_pages: row.get::<_, Option<i64>>(3).map(i64::unsigned_abs),
        })
    }

    /// The rows of each table.
    pub(crate) fn rows(&self) -> BTreeMap<String, u64> {
        let rows = self.tables.iter();
        rows.map(|(name, held)| (name.clone(), held.rows)).collect()
    }

    /// One line for people.
    pub(crate) fn summary(&self) -> String {
        let rows: u64 = self.tables.values().map(|held| held.rows).sum();
        let unseen = self.tables.values().filter(|held| held.values.is_none());
        let unseen = match unseen.count() {
            0 => String::new(),
            some => format!(" ({some} of them only counted)"),
        };
        let revision = match self.revisions.as_slice() {
            [] => String::new(),
            revisions => format!(", revision {}", revisions.join(" and ")),
        };
        let faults = match self.to_be_seen_to().len() {
            0 => "nothing amiss".to_owned(),
            1 => "1 thing amiss".to_owned(),
            some => format!("{some} things amiss"),
        };
        format!(
            "{} tables{unseen} with {rows} rows, {} foreign keys, schema {}{revision}: {faults}",
            self.tables.len(),
            self.orphans.len(),
            self.schema.short(),
        )
    }

    /// What is amiss already, line by line.
    pub(crate) fn to_be_seen_to(&self) -> Vec<String> {
        let orphans = self.orphans.iter().filter(|(_, rows)| **rows > 0);
        let orphans = orphans.map(|(key, rows)| format!("{rows} rows have no parent by {key}"));
        let behind = self.sequences.iter().filter(|(_, it)| it.behind);
        let behind = behind.map(|(name, it)| it.said(name));
        let indexes = self.invalid_indexes.iter();
        let indexes = indexes.map(|name| format!("the index {name} is not valid"));
        let unvalidated = self.unvalidated.iter();
        let unvalidated = unvalidated.map(|name| format!("{name} was not held against all rows"));
        let pages = self.bad_pages.filter(|pages| *pages > 0);
        let pages = pages.map(|pages| format!("{pages} pages had a wrong checksum"));
        let all = orphans.chain(behind).chain(indexes);
        all.chain(unvalidated).chain(pages).collect()
    }
}

impl Sequence {
    /// That it is behind, in words.
    pub(crate) fn said(&self, name: &str) -> String {
        let there = self.furthest.map_or_else(String::new, |it| it.to_string());
        format!(
            "the sequence {name} gives {} next, and {} has {there} already",
            self.next, self.column
        )
    }
}

async fn tables(
    cx: &Context,
    session: &Session,
    values_up_to: Option<ByteSize>,
    before: Option<&Holdings>,
) -> Result<BTreeMap<String, Held>, Failure> {
    let sql = format!(
        "SELECT {TABLE_NAME}, n.nspname::text, c.relname::text, coalesce(pg_table_size(c.oid), 0)::int8, \
         ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 \
               AND NOT attisdropped ORDER BY attname) FROM {TABLES} ORDER BY 1"
    );
    let all = session.query(WHAT, &sql, &[]).await?;
    let bytes = |row: &tokio_postgres::Row| row.get::<_, i64>(3).unsigned_abs();
    let total: u64 = all.iter().map(bytes).sum::<u64>().max(1);
    let mut done = 0;
    let mut tables = BTreeMap::new();
    for row in &all {
        let (name, columns): (String, Vec<String>) = (row.get(0), row.get(4));
        let wanted: Option<Vec<&String>> = match before {
            Some(before) => {
                let held = before.tables.get(&name);
                let values = held.and_then(|held| held.values.as_ref());
                values.map(|values| {
                    let both = columns
                        .iter()
                        .filter(|name| values.each.contains_key(*name));
                    both.collect()
                })
            }
            None => values_up_to
                .is_none_or(|most| bytes(row) <= most.0)
                .then(|| columns.iter().collect()),
        };
        #[expect(clippy::cast_precision_loss, reason = "a share is not exact")]
        let share = done as f64 / total as f64;
        cx.log.progress(share * 0.9, &format!("reading {name}"));
        let (rows, values) = read(session, row.get(1), row.get(2), wanted.as_deref()).await?;
        done += bytes(row);
        let held = Held {
            rows,
            columns,
            values,
        };
        tables.insert(name, held);
    }
    Ok(tables)
}

/// Counts a table's rows, and sums up the hashes of what they hold in these columns.
async fn read(
    session: &Session,
    schema: &str,
    table: &str,
    columns: Option<&[&String]>,
) -> Result<(u64, Option<Values>), Failure> {
    let what = format!("reading {schema}.{table}");
    let from = format!("FROM ONLY {}.{} t", ident(schema), ident(table));
    let Some(columns) = columns else {
        let sql = format!("SELECT count(*) {from}");
        let row = session.one(&what, &sql, &[]).await?;
        return Ok((row.get::<_, i64>(0).unsigned_abs(), None));
    };
    let sum =
        |of: &str| format!("coalesce(sum(hashtextextended({of}::text, 0)::numeric), 0)::text");
    let each: Vec<String> = columns
        .iter()
        .map(|it| format!("t.{}", ident(it)))
        .collect();
    let whole = sum(&format!("ROW({})", each.join(",")));
    let sums: Vec<String> = each.iter().map(|column| sum(column)).collect();
    let sql = format!(
        "SELECT count(*), {whole}, ARRAY[{}]::text[] {from}",
        sums.join(",")
    );
    let row = session.one(&what, &sql, &[]).await?;
    let sums: Vec<String> = row.get(2);
    let names = columns.iter().map(|&name| name.clone());
    let values = Values {
        rows: row.get(1),
        each: names.zip(sums).collect(),
    };
    Ok((row.get::<_, i64>(0).unsigned_abs(), Some(values)))
}

async fn sequences(session: &Session) -> Result<BTreeMap<String, Sequence>, Failure> {
    let mut sequences = BTreeMap::new();
    for row in session.query(WHAT, SEQUENCES, &[]).await? {
        let (name, sql, up): (String, &str, bool) = (row.get(0), row.get(2), row.get(3));
        let now = session.one(WHAT, sql, &[]).await?;
        let next: i64 = now.get(0);
        let furthest: Option<i64> = now.get(1);
        let behind = furthest.is_some_and(|it| if up { it >= next } else { it <= next });
        let sequence = Sequence {
            next,
            column: row.get(1),
            furthest,
            behind,
        };
        sequences.insert(name, sequence);
    }
    Ok(sequences)
}

async fn names(session: &Session, sql: &str) -> Result<BTreeSet<String>, Failure> {
    let rows = session.query(WHAT, sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Sequences that fill a column of whole numbers, each with a statement for its next value and the
/// furthest one in the column, and whether it counts upwards. At its end a sequence has no next
/// value; the last one stands for it.
const SEQUENCES: &str = "
SELECT sc.oid::regclass::text, tc.oid::regclass::text || '.' || quote_ident(a.attname),
  format('SELECT CASE WHEN NOT s.is_called OR s.last_value = %s THEN s.last_value \
          ELSE s.last_value + %s END, (SELECT %s(t.%I)::int8 FROM %I.%I t) FROM %I.%I s',
         CASE WHEN q.seqincrement > 0 THEN q.seqmax ELSE q.seqmin END, q.seqincrement,
         CASE WHEN q.seqincrement > 0 THEN 'max' ELSE 'min' END,
         a.attname, tn.nspname, tc.relname, sn.nspname, sc.relname),
  q.seqincrement > 0
FROM pg_depend d
JOIN pg_class sc ON sc.oid = d.objid AND sc.relkind = 'S'
JOIN pg_sequence q ON q.seqrelid = sc.oid
JOIN pg_namespace sn ON sn.oid = sc.relnamespace
JOIN pg_class tc ON tc.oid = d.refobjid AND tc.relpersistence = 'p'
JOIN pg_namespace tn ON tn.oid = tc.relnamespace
JOIN pg_attribute a ON a.attrelid = tc.oid AND a.attnum = d.refobjsubid
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
  AND d.deptype IN ('a', 'i')
  AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)";

const INVALID_INDEXES: &str =
    "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid OR NOT indisready";

const UNVALIDATED: &str = "SELECT format('the constraint %I of %s', conname, conrelid::regclass) \
     FROM pg_constraint WHERE NOT convalidated";
