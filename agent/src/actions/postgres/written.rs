//! What was written to a database since a moment: the rows that taking its schema or its data back
//! would lose.
//!
//! ```text
//! moment     the first transaction of which nothing is in the database yet, with all its 64 bits
//! row        carries the transaction that wrote it (xmin), with the lower 32 of them
//! distance   from the row's transaction up to the next one, modulo 2^32
//! written    if the distance is not larger than that from the moment to the next one
//! ```
//!
//! So the count is right across a wraparound, and freezing, which leaves xmin as it was, changes
//! nothing. Once the server has given out more than 2^32 transactions, a frozen row of before may
//! carry a number that was given out again since: then the count is too large, never too small.
//! Rows that were deleted leave no trace; they show by comparison with the rows of the moment.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_proto::report::Failure;
use serde::{Deserialize, Serialize};

use super::look::Tally;
use super::measure::TABLE_NAME;
use crate::sql::{Session, ident};

/// Transactions that may pass before nothing can be told any more: half of those that 32 bits hold.
const WINDOW: i64 = 1 << 31;

/// The first version whose snapshots are read here.
const READABLE: u32 = 130_000;

/// The name under which large objects stand among tables.
const LARGE_OBJECTS: &str = "large objects";

/// Where migration tools write down what they have done: not data of the application.
pub(crate) const LEDGERS: &[&str] = &[
    "alembic_version",
    "_prisma_migrations",
    "__diesel_schema_migrations",
    "_sqlx_migrations",
    "lockstep_schema_migrations",
];

/// Tables whose rows are data: also those that outlive no crash, and those of extensions that
/// pg_dump takes along.
const DATA: &str = "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind = 'r' AND c.relpersistence IN ('p', 'u') \
     AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_toast' \
     AND (EXISTS (SELECT 1 FROM pg_extension e WHERE c.oid = ANY (e.extconfig)) \
     OR NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass \
     AND d.objid = c.oid AND d.deptype = 'e'))";

/// Tables in the files of a database that hold what somebody has said: not statistics, which the
/// server gathers by itself, and not large objects, which are counted apart.
const FILES: &str = "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind = 'r' AND c.relpersistence IN ('p', 'u') AND NOT c.relisshared \
     AND c.oid <> ALL (ARRAY['pg_statistic', 'pg_statistic_ext_data', 'pg_largeobject', \
     'pg_largeobject_metadata']::regclass[])";

/// Tables that all databases of a server share, and which of their rows `t` are not those of the
/// session's own database.
const SHARED: [(&str, &str); 9] = [
    ("pg_database", "t.datname <> current_database()"),
    (
        "pg_db_role_setting",
        "t.setdatabase <> (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())",
    ),
    ("pg_authid", "true"),
    ("pg_auth_members", "true"),
    ("pg_tablespace", "true"),
    ("pg_shseclabel", "true"),
    ("pg_parameter_acl", "true"),
    ("pg_subscription", "true"),
    ("pg_replication_origin", "true"),
];

/// A moment in a database's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Moment {
    /// The first transaction of which nothing was in the database.
    xid: u64,
}

/// This moment; `None` on servers that are too old to tell. Rows of transactions that are under
/// way now count as written since.
pub(crate) async fn moment(session: &Session) -> Result<Option<Moment>, Failure> {
    if session.version < READABLE {
        return Ok(None);
    }
    // Those of other databases write nothing here. One that has ended between the two looks counts
    // as under way.
    let sql = "WITH now AS MATERIALIZED (SELECT pg_current_snapshot() AS seen) \
         SELECT least(pg_snapshot_xmax(seen)::text::int8, (SELECT min(x::text::int8) \
         FROM pg_snapshot_xip(seen) x WHERE NOT EXISTS (SELECT 1 FROM pg_locks l \
         JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'transactionid' AND l.granted \
         AND l.mode = 'ExclusiveLock' AND l.transactionid = x::xid AND a.datid <> \
         (SELECT oid FROM pg_database WHERE datname = current_database())))) FROM now";
    let xid: i64 = session.one("asking for the moment", sql, &[]).await?.get(0);
    let xid = xid.unsigned_abs();
    Ok(Some(Moment { xid }))
}

/// This moment on the whole server: nothing of its transaction is in any database.
pub(crate) async fn moment_of_server(session: &Session) -> Result<Moment, Failure> {
    let sql = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::int8";
    let xid: i64 = session.one("asking for the moment", sql, &[]).await?.get(0);
    let xid = xid.unsigned_abs();
    Ok(Moment { xid })
}

/// The server's next transaction.
pub(crate) async fn next(session: &Session) -> Result<u64, Failure> {
    let sql = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8";
    let row = session
        .one("asking for the next transaction", sql, &[])
        .await?;
    Ok(row.get::<_, i64>(0).unsigned_abs())
}

/// What migration tools have written down, as a digest of each of their tables.
pub(crate) type Ledgers = BTreeMap<String, String>;

/// The same as it is now. An empty table says what none says.
pub(crate) async fn ledgers(session: &Session) -> Result<Ledgers, Failure> {
    let what = "looking what was migrated";
    let sql = format!(
        "SELECT {TABLE_NAME}, format('SELECT encode(sha256(convert_to(string_agg(t::text, E''\\n'' \
         ORDER BY t::text), ''UTF8'')), ''hex'') FROM ONLY %I.%I t', n.nspname, c.relname) \
         FROM {DATA} AND c.relname = ANY ($1)"
    );
    let mut ledgers = Ledgers::new();
    for table in session.query(what, &sql, &[&LEDGERS]).await? {
        let digest: Option<String> = session.one(what, table.get(1), &[]).await?.get(0);
        if let Some(digest) = digest {
            ledgers.insert(table.get(0), digest);
        }
    }
    Ok(ledgers)
}

/// Those of the tables that say something else.
pub(crate) fn migrated(was: &Ledgers, now: &Ledgers) -> Vec<String> {
    let all: BTreeSet<&String> = was.keys().chain(now.keys()).collect();
    let differs = all
        .into_iter()
        .filter(|name| was.get(*name) != now.get(*name));
    differs.cloned().collect()
}

/// A column, as far as it matters for who reads and writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Column {
    /// Its type, as SQL says it.
    pub(crate) kind: String,
    /// Whether every new row must name it.
    pub(crate) required: bool,
}

/// The columns of the tables, by name.
pub(crate) type Columns = BTreeMap<String, BTreeMap<String, Column>>;

/// The columns that there are now.
pub(crate) async fn columns(session: &Session) -> Result<Columns, Failure> {
    let sql = format!(
        "SELECT t.name, a.attname::text, format_type(a.atttypid, a.atttypmod), \
         a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' \
         FROM (SELECT c.oid, {TABLE_NAME} AS name FROM {DATA}) t \
         JOIN pg_attribute a ON a.attrelid = t.oid WHERE a.attnum > 0 AND NOT a.attisdropped"
    );
    let mut columns = Columns::new();
    for row in session.query("asking for the columns", &sql, &[]).await? {
        let (table, name): (String, String) = (row.get(0), row.get(1));
        let column = Column {
            kind: row.get(2),
            required: row.get(3),
        };
        columns.entry(table).or_default().insert(name, column);
    }
    Ok(columns)
}

/// Which rows are asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Which {
    /// All of every table.
    All,
    /// The same, and all else that the database's files hold: the tables of migration tools, of
    /// extensions and of the catalogue, so that a change of the schema shows, too.
    Files,
    /// Those of some tables that hold a value in one of these columns; of a table without columns,
    /// all.
    Of(BTreeMap<String, BTreeSet<String>>),
}

/// What was written to one table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Count {
    /// How many rows it has.
    rows: u64,
    /// How many of them were written since.
    written: u64,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// By table; or why it cannot be counted.
    tables: BTreeMap<String, Result<Count, String>>,
    /// Whether transactions have come round, so that counts may be too large.
    at_most: bool,
}

impl Written {
    /// Nothing yet, on a server whose next transaction this is.
    fn at(next: Option<i64>) -> Self {
        Self {
            tables: BTreeMap::new(),
            at_most: next.is_some_and(|next| next > i64::from(u32::MAX)),
        }
    }

    /// What would be lost, table by table, in words: nothing means nothing. What cannot be counted
    /// may be lost.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines_since(None)
    }

    /// The same, with what was deleted of the rows of the moment.
    pub(crate) fn lines_and_gone(&self, was: &Tally) -> Vec<String> {
        self.lines_since(Some(was))
    }

    fn lines_since(&self, was: Option<&Tally>) -> Vec<String> {
        let at_most = if self.at_most { "at most " } else { "" };
        let line = |(table, count): (&String, &Result<Count, String>)| {
            let count = match count {
                Ok(count) => count,
                Err(why) => return Some(format!("{table}: cannot be counted: {why}")),
            };
            let mut words = vec![];
            if count.written > 0 {
                words.push(format!("{at_most}{} written since", rows(count.written)));
            }
            if let Some(was) = was {
                let untouched = count.rows - count.written;
                match was.get(table) {
                    None if count.written == 0 && count.rows > 0 => {
                        words.push(format!("{}, not known before", rows(count.rows)));
                    }
                    Some(was) if untouched < *was => words.push(format!(
                        "{} of the {was} of before changed or deleted",
                        rows(was - untouched)
                    )),
                    None | Some(_) => {}
                }
            }
            (!words.is_empty()).then(|| format!("{table}: {}", words.join(", ")))
        };
        let mut lines: Vec<String> = self.tables.iter().filter_map(line).collect();
        for (table, rows_then) in was.into_iter().flatten() {
            if !self.tables.contains_key(table) && *rows_then > 0 {
                lines.push(format!("{table}: gone, with {}", rows(*rows_then)));
            }
        }
        lines.sort();
        lines
    }

    /// How many rows each table has; of those that can be counted.
    pub(crate) fn tally(&self) -> Tally {
        let rows = |(table, count): (&String, &Result<Count, String>)| {
            Some((table.clone(), count.as_ref().ok()?.rows))
        };
        self.tables.iter().filter_map(rows).collect()
    }
}

/// A few lines for a message, and how many more there are: the log has them all.
pub(crate) fn few(lines: &[String]) -> String {
    match lines.split_at_checked(10) {
        Some((shown, more)) if !more.is_empty() => {
            format!("{}; and {} more", shown.join("; "), more.len())
        }
        _ => lines.join("; "),
    }
}

fn rows(count: u64) -> String {
    match count {
        1 => "1 row".to_owned(),
        _ => format!("{count} rows"),
    }
}

/// Counts what was written since a moment, in one state of the database.
pub(crate) async fn since(
    session: &Session,
    moment: Option<Moment>,
    which: &Which,
) -> Result<Written, Failure> {
    let what = "counting what was written";
    session
        .run(
            what,
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL row_security = off",
        )
        .await?;
    let counted = inside(session, what, moment, which).await;
    let ended = session.run(what, "ROLLBACK").await;
    let counted = counted?;
    ended.map(|()| counted)
}

/// Counts what was written since to the tables that all databases share: databases, roles, their
/// settings. What is of the session's own database is left out.
pub(crate) async fn since_in_shared(session: &Session, moment: Moment) -> Result<Written, Failure> {
    let what = "counting what was written for the whole server";
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
    session.run(what, begin).await?;
    let counted = inside_shared(session, what, moment).await;
    let ended = session.run(what, "ROLLBACK").await;
    let counted = counted?;
    ended.map(|()| counted)
}

async fn inside_shared(session: &Session, what: &str, moment: Moment) -> Result<Written, Failure> {
    let (next, is_new) = newness(session, Some(moment)).await?;
    let mut written = Written::at(next);
    for (name, others) in SHARED {
        let sql = "SELECT to_regclass('pg_catalog.' || $1) IS NOT NULL";
        if !session.one(what, sql, &[&name]).await?.get::<_, bool>(0) {
            // Servers of earlier versions do not have it.
            continue;
        }
        let count = match &is_new {
            Ok(is_new) => {
                let sql = format!(
                    "SELECT count(*), count(*) FILTER (WHERE {is_new}) FROM pg_catalog.{name} t \
                     WHERE {others}"
                );
                count(session, name, &sql).await?
            }
            Err(why) => Err(why.clone()),
        };
        written.tables.insert(name.to_owned(), count);
    }
    Ok(written)
}

/// The server's next transaction, and the condition for a row `t` that was written since a moment,
/// or why there is none.
async fn newness(
    session: &Session,
    moment: Option<Moment>,
) -> Result<(Option<i64>, Result<String, String>), Failure> {
    let next = if session.version < READABLE {
        None
    } else {
        Some(next(session).await?.cast_signed())
    };
    let passed = next
        .zip(moment)
        .map(|(next, moment)| next - moment.xid.cast_signed());
    let is_new = match (next, passed) {
        (Some(next), Some(passed)) if (0..=WINDOW).contains(&passed) => Ok(is_new(next, passed)),
        (Some(_), Some(_)) => Err("too many transactions have passed since".to_owned()),
        (Some(_), None) => Err("the moment was not recorded".to_owned()),
        (None, _) => Err("the server is older than PostgreSQL 13".to_owned()),
    };
    Ok((next, is_new))
}

async fn inside(
    session: &Session,
    what: &str,
    moment: Option<Moment>,
    which: &Which,
) -> Result<Written, Failure> {
    let (next, is_new) = newness(session, moment).await?;
    let mut written = Written::at(next);
    // What is taken of a parent is taken of its children.
    let which = match which {
        Which::Of(some) if any_is_inherited(session, some).await? => &Which::All,
        which => which,
    };
    let tables = if *which == Which::Files { FILES } else { DATA };
    let sql = format!(
        "SELECT {TABLE_NAME}, format('%I.%I', n.nspname, c.relname), c.relname::text FROM {tables}"
    );
    for table in session.query(what, &sql, &[]).await? {
        let (name, full, bare): (String, &str, &str) = (table.get(0), table.get(1), table.get(2));
        if *which != Which::Files && LEDGERS.contains(&bare) {
            continue;
        }
        let columns = match which {
            Which::All | Which::Files => None,
            Which::Of(some) => match some.get(&name) {
                Some(columns) => Some(columns),
                None => continue,
            },
        };
        let count = match &is_new {
            Ok(is_new) => {
                let is_meant = meant(is_new, columns);
                let sql = format!(
                    "SELECT count(*), count(*) FILTER (WHERE {is_meant}) FROM ONLY {full} t"
                );
                count(session, &name, &sql).await?
            }
            Err(why) => Err(why.clone()),
        };
        written.tables.insert(name, count);
    }
    if let Some(count) = large_objects(session, which, &is_new).await? {
        written.tables.insert(LARGE_OBJECTS.to_owned(), count);
    }
    Ok(written)
}

/// Whether one of the tables has others that inherit from it. A partitioned one is not among them.
async fn any_is_inherited(
    session: &Session,
    tables: &BTreeMap<String, BTreeSet<String>>,
) -> Result<bool, Failure> {
    let sql = format!(
        "SELECT EXISTS (SELECT 1 FROM {DATA} AND {TABLE_NAME} = ANY ($1) \
         AND EXISTS (SELECT 1 FROM pg_inherits i WHERE i.inhparent = c.oid))"
    );
    let names: Vec<&String> = tables.keys().collect();
    let row = session
        .one("looking for tables that inherit", &sql, &[&names])
        .await?;
    Ok(row.get(0))
}

/// The condition for a row `t` that one of the last transactions has written, so many as have
/// `passed` before the `next` one.
fn is_new(next: i64, passed: i64) -> String {
    // Numbers below 3 are no transactions: such rows are older than all of them.
    format!(
        "t.xmin::text::int8 > 2 AND ({next} - t.xmin::text::int8) & 4294967295 \
         BETWEEN 1 AND {passed}"
    )
}

/// The condition for a row that was written since and holds something that is asked about.
fn meant(is_new: &str, columns: Option<&BTreeSet<String>>) -> String {
    let holds: Vec<String> = columns
        .into_iter()
        .flatten()
        // Of a composite value `IS NOT NULL` would ask about its fields.
        .map(|column| format!("t.{} IS DISTINCT FROM NULL", ident(column)))
        .collect();
    if holds.is_empty() {
        is_new.to_owned()
    } else {
        format!("{is_new} AND ({})", holds.join(" OR "))
    }
}

/// Counts in one table. One that cannot be read leaves the others readable.
async fn count(session: &Session, name: &str, sql: &str) -> Result<Result<Count, String>, Failure> {
    let what = format!("counting what was written to {name}");
    session.run(&what, "SAVEPOINT one").await?;
    match session.one(&what, sql, &[]).await {
        Ok(row) => {
            // What is not released takes the server's memory until the end, table by table.
            session.run(&what, "RELEASE one").await?;
            let number = |at| row.get::<_, i64>(at).unsigned_abs();
            Ok(Ok(Count {
                rows: number(0),
                written: number(1),
            }))
        }
        Err(failed) => {
            // Fails in turn if the session is gone.
            session.run(&what, "ROLLBACK TO one; RELEASE one").await?;
            Ok(Err(failed.message))
        }
    }
}

/// What was written to large objects, which only a superuser may read; `None` if nobody asks.
async fn large_objects(
    session: &Session,
    which: &Which,
    is_new: &Result<String, String>,
) -> Result<Option<Result<Count, String>>, Failure> {
    if matches!(which, Which::Of(_)) {
        return Ok(None);
    }
    let what = "counting large objects";
    let sql = "SELECT count(*), has_table_privilege('pg_catalog.pg_largeobject', 'SELECT') \
               FROM pg_catalog.pg_largeobject_metadata";
    let row = session.one(what, sql, &[]).await?;
    let (there, readable): (i64, bool) = (row.get(0), row.get(1));
    Ok(match is_new {
        Err(why) if there > 0 => Some(Err(why.clone())),
        Ok(_) if there > 0 && !readable => Some(Err("only a superuser may read them".to_owned())),
        Ok(is_new) if readable => {
            let sql = format!(
                "SELECT (SELECT count(*) FROM pg_largeobject_metadata), \
                 (SELECT count(*) FROM (SELECT t.loid FROM pg_largeobject t WHERE {is_new} \
                 UNION SELECT t.oid FROM pg_largeobject_metadata t WHERE {is_new}) new)"
            );
            Some(count(session, LARGE_OBJECTS, &sql).await?)
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests;
