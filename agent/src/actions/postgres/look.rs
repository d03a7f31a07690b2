//! `postgres.counts` and `postgres.assert`: they look, and cannot write.

use std::collections::BTreeMap;
use std::fmt;

use lockstep_proto::action::postgres::{Assert, Assertion, Counts};
use lockstep_proto::order::{Binding, Fact};
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::check_sql::{Wanted, shorten};
use super::manifest::Store;
use super::measure::{TABLE_NAME, TABLES, is_whole, rows_fact};
use crate::actions::{Act, Done, Probe};
use crate::sql::{Database, Session};
use crate::step::{Context, failure, hinted};

/// A transaction that sees one state and all rows of it, or fails where it may not.
const READ_ALL: &str =
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL row_security = off";

/// Rows by table.
pub(crate) type Tally = BTreeMap<String, u64>;

/// Counts rows, of some tables or of all, in one state of the database.
pub(crate) async fn count(session: &Session, only: &[String]) -> Result<Tally, Failure> {
    let what = "counting rows";
    session.run(what, READ_ALL).await?;
    let counted = count_inside(session, only).await;
    let ended = session.run(what, "ROLLBACK").await;
    let counted = counted?;
    ended.map(|()| counted)
}

async fn count_inside(session: &Session, only: &[String]) -> Result<Tally, Failure> {
    let what = "counting rows";
    let sql = format!(
        "SELECT {TABLE_NAME}, format('SELECT count(*) FROM ONLY %I.%I', n.nspname, c.relname), \
         c.relname::text, n.nspname || '.' || c.relname FROM {TABLES} ORDER BY 1"
    );
    let tables = session.query(what, &sql, &[]).await?;
    let named = |row: &tokio_postgres::Row, name: &str| {
        let (shown, table, full): (&str, &str, &str) = (row.get(0), row.get(2), row.get(3));
        // Quoted or not; a bare name means the one in `public`.
        name == shown
            || name == full
            || (name == table && full.strip_prefix("public.") == Some(table))
    };
    let mut missing: Vec<&str> = only.iter().map(String::as_str).collect();
    missing.retain(|name| !tables.iter().any(|row| named(row, name)));
    if !missing.is_empty() {
        let message = format!("there is no table {}", missing.join(", "));
        return Err(failure(Cause::CheckUnmet, message));
    }
    let mut tally = Tally::new();
    for row in &tables {
        if !only.is_empty() && !only.iter().any(|name| named(row, name)) {
            continue;
        }
        let count: i64 = session.one(what, row.get(1), &[]).await?.get(0);
        tally.insert(row.get(0), count.unsigned_abs());
    }
    Ok(tally)
}

/// The rows of all tables in the rollout's newest backup of a database: on the host that made it as
/// its manifest says them, elsewhere as its report does. `None` if neither says all of them.
pub(crate) fn of_backup(cx: &Context, database: &str) -> Option<Tally> {
    let backup = cx.bindings.iter().rev().find(
        |binding| matches!(&binding.fact, Fact::Backup { database: of, .. } if of == database),
    );
    in_manifest(cx, database, backup).or_else(|| {
        let rows = |binding: &Binding| match &binding.fact {
            Fact::Rows {
                database: of,
                tables,
            } if of == database => {
                // Other steps count, too: the backup's own rows come from the step that made it.
                let own = backup.is_none_or(|backup| backup.origin == binding.origin);
                (own && is_whole(tables)).then(|| tables.iter().cloned().collect())
            }
            _ => None,
        };
        cx.bindings.iter().rev().find_map(rows)
    })
}

fn in_manifest(cx: &Context, database: &str, backup: Option<&Binding>) -> Option<Tally> {
    let database = Database::find(cx, database).ok()?;
    let made = Store::of(cx, &database).all().into_iter();
    let made = made
        .filter(|made| made.key.rollout == cx.key.rollout && made.is_counted())
        .find(|made| match backup.map(|backup| &backup.fact) {
            Some(Fact::Backup { id, digest, .. }) => (id, digest) == (&made.id, &made.digest),
            _ => true,
        })?;
    let rows = made.contents.into_iter();
    Some(rows.map(|(name, table)| (name, table.rows)).collect())
}

/// The tables whose rows differ from the backup's, in words: `users: 12 rows, 10 in the backup`.
pub(crate) fn changes(backup: &Tally, now: &Tally) -> Vec<String> {
    let all: std::collections::BTreeSet<&String> = backup.keys().chain(now.keys()).collect();
    let change = |name: &&String| match (backup.get(*name), now.get(*name)) {
        (Some(was), Some(is)) if was == is => None,
        (Some(was), Some(is)) => Some(format!("{name}: {is} rows, {was} in the backup")),
        (Some(was), None) => Some(format!("{name}: gone, {was} rows in the backup")),
        (None, Some(is)) => Some(format!("{name}: {is} rows, not in the backup")),
        (None, None) => None,
    };
    all.iter().filter_map(change).collect()
}

/// The probe of an action that only looks.
pub(super) async fn probe(act: &impl Act, cx: &Context) -> Result<Probe, Failure> {
    match act.apply(cx, &Value::Null).await {
        Ok(done) => Ok(Probe::Present(done.summary)),
        Err(unmet) if unmet.cause == Cause::CheckUnmet => Ok(Probe::Unmet(unmet)),
        Err(failure) => Err(failure),
    }
}

/// Refuses to compare with rows that are not known here.
pub(super) fn no_rows(cx: &Context, database: &str) -> Failure {
    let is_backup = |binding: &Binding| matches!(&binding.fact, Fact::Backup { database: of, .. } if of == database);
    if !cx.bindings.iter().any(is_backup) {
        return no_backup(database);
    }
    hinted(
        Cause::Refused,
        format!("how many rows each table of `{database}` had in its backup is not known here"),
        "let `postgres.backup` measure row_counts, and compare on the host that made it: other \
         hosts are told of a few hundred tables at most",
    )
}

/// A step that needs a backup which the rollout has not made.
pub(super) fn no_backup(database: &str) -> Failure {
    hinted(
        Cause::Refused,
        format!("this rollout has no backup of `{database}`"),
        "put `postgres.backup` before this step",
    )
}

impl Act for Counts {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        probe(self, cx).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let session = Database::find(cx, &self.database)?.connect(cx).await?;
        let tally = count(&session, &self.tables).await?;
        let rows: u64 = tally.values().sum();
        let summary = format!(
            "{rows} rows in {} tables of `{}`",
            tally.len(),
            self.database
        );
        for (table, rows) in &tally {
            cx.log.line(&format!("{table}: {rows}"));
        }
        let facts = vec![rows_fact(&self.database, tally.into_iter())];
        Ok(Done {
            changed: false,
            summary,
            facts,
        })
    }

    fn describe(&self) -> String {
        format!("counts the rows of `{}`", self.database)
    }
}

impl Act for Assert {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        probe(self, cx).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let session = Database::find(cx, &self.database)?.connect(cx).await?;
        if let Some(timeout) = self.statement_timeout {
            session.limit_statements(cx, timeout.to_std()).await?;
        }
        let mut unmet = missing(&session, &self.tables).await?;
        for check in &self.checks {
            match answer(&session, check).await {
                Ok(None) => {}
                Ok(Some(why)) => unmet.push(format!("{}: {why}", check.sql)),
                // The others still have their say, unless nothing can be asked.
                Err(failed) if failed.cause == Cause::Host => return Err(failed),
                Err(failed) => unmet.push(format!("{}: {}", check.sql, failed.message)),
            }
        }
        let mut checked = self.checks.len() + self.tables.len();
        if self.foreign_keys {
            let (keys, orphans) = orphans(&session).await?;
            checked += keys;
            unmet.extend(orphans);
        }
        for line in &unmet {
            cx.log.line(line);
        }
        if !unmet.is_empty() {
            let what = format!(
                "{} of {checked} checks of `{}` are not met",
                unmet.len(),
                self.database
            );
            return Err(super::scratch::unequal(&what, &unmet));
        }
        let summary = format!("{checked} checks of `{}` are met", self.database);
        Ok(Done {
            changed: false,
            summary,
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        format!("checks what `{}` holds", self.database)
    }
}

/// Why a statement's answer is not the one wanted; `None` if it is.
async fn answer(session: &Session, check: &Assertion) -> Result<Option<String>, Failure> {
    if check.empty {
        let rows = session.rows_up_to("a check", &check.sql, SOME).await?;
        return Ok(match rows {
            0 => None,
            SOME => Some(format!("returns {SOME} rows or more, and must return none")),
            rows => Some(format!("returns {rows} rows, and must return none")),
        });
    }
    let value = session.value("a check", &check.sql).await?;
    let wanted = Wanted {
        equals: check.equals.as_deref(),
        at_least: check.at_least,
        at_most: check.at_most,
    };
    let shown = shorten(value.as_deref().unwrap_or("NULL"));
    let unmet = wanted.unmet(value.as_deref());
    Ok(unmet.map(|why| format!("returns {shown}, and {why}")))
}

/// As many rows are counted where there must be none.
const SOME: usize = 1000;

/// Which of the tables are not there.
async fn missing(session: &Session, tables: &[String]) -> Result<Vec<String>, Failure> {
    let mut unmet = vec![];
    for table in tables {
        // `public` first for bare names, as everywhere in plans.
        let bare = format!("public.{table}");
        let named = if table.contains('.') { table } else { &bare };
        let sql = "SELECT to_regclass($1) IS NOT NULL";
        if !session
            .one("looking for a table", sql, &[named])
            .await?
            .get::<_, bool>(0)
        {
            unmet.push(format!("there is no table {table}"));
        }
    }
    Ok(unmet)
}

/// How many foreign keys there are, and those whose rows have no parent.
async fn orphans(session: &Session) -> Result<(usize, Vec<String>), Failure> {
    let what = "looking for rows without parents";
    session.run(what, READ_ALL).await?;
    let keys = foreign_keys(session).await;
    let ended = session.run(what, "ROLLBACK").await;
    let keys = keys?;
    ended?;
    let orphans = keys.iter().filter(|key| key.orphans > 0);
    Ok((keys.len(), orphans.map(ToString::to_string).collect()))
}

/// A foreign key, and how many rows have no parent by it.
pub(super) struct ForeignKey {
    /// The constraint's name.
    pub(super) name: String,
    /// The table of the rows.
    pub(super) child: String,
    parent: String,
    /// How many of them have no parent.
    pub(super) orphans: u64,
}

impl fmt::Display for ForeignKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            child,
            parent,
            orphans,
        } = self;
        write!(
            f,
            "{orphans} rows of {child} have no parent in {parent} ({name})"
        )
    }
}

/// All foreign keys, inside a transaction.
pub(super) async fn foreign_keys(session: &Session) -> Result<Vec<ForeignKey>, Failure> {
    let what = "looking for rows without parents";
    let mut keys = vec![];
    for key in session.query(what, FOREIGN_KEYS, &[]).await? {
        let orphans: i64 = session.one(what, key.get(3), &[]).await?.get(0);
        keys.push(ForeignKey {
            name: key.get(0),
            child: key.get(1),
            parent: key.get(2),
            orphans: orphans.unsigned_abs(),
        });
    }
    Ok(keys)
}

/// Every foreign key, with a statement that counts its orphans as the server looks for them: by the
/// key's own operators, and without tables that inherit.
const FOREIGN_KEYS: &str = r"
WITH fk AS (
  SELECT c.conname, n1.nspname ns, t1.relname rel, n2.nspname fns, t2.relname frel,
    CASE t1.relkind WHEN 'p' THEN '' ELSE 'ONLY ' END AS only1,
    CASE t2.relkind WHEN 'p' THEN '' ELSE 'ONLY ' END AS only2,
    (SELECT string_agg(format('f.%I OPERATOR(%I.%s) c.%I', fa.attname, os.nspname, o.oprname, a.attname),
                       ' AND ' ORDER BY k.ord)
     FROM unnest(c.conkey, c.confkey, c.conpfeqop) WITH ORDINALITY k(a, f, op, ord)
     JOIN pg_operator o ON o.oid = k.op JOIN pg_namespace os ON os.oid = o.oprnamespace
     JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.a
     JOIN pg_attribute fa ON fa.attrelid = c.confrelid AND fa.attnum = k.f) AS j,
    (SELECT string_agg(format('c.%I IS NOT NULL', a.attname),
                       CASE WHEN c.confmatchtype = 'f' THEN ' OR ' ELSE ' AND ' END ORDER BY k.ord)
     FROM unnest(c.conkey) WITH ORDINALITY k(a, ord)
     JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.a) AS nn
  FROM pg_constraint c
  JOIN pg_class t1 ON t1.oid = c.conrelid JOIN pg_namespace n1 ON n1.oid = t1.relnamespace
  JOIN pg_class t2 ON t2.oid = c.confrelid JOIN pg_namespace n2 ON n2.oid = t2.relnamespace
  WHERE c.contype = 'f' AND c.conparentid = 0
    AND n1.nspname NOT IN ('pg_catalog', 'information_schema'))
SELECT conname::text, format('%I.%I', ns, rel), format('%I.%I', fns, frel),
  format('SELECT count(*) FROM %s%I.%I c WHERE (%s) AND NOT EXISTS (SELECT 1 FROM %s%I.%I f WHERE %s)',
         only1, ns, rel, nn, only2, fns, frel, j)
FROM fk ORDER BY ns, rel, conname";

#[cfg(test)]
mod tests {
    use lockstep_proto::values::Period;

    use super::*;
    use crate::sql::cluster::Bench;

    const NULL: Value = Value::Null;

    #[tokio::test]
    async fn orphans_are_looked_for_as_the_server_does() {
        let bench = Bench::with_rows().await;
        bench
            .sql(
                "CREATE EXTENSION citext SCHEMA public; \
                 CREATE TABLE public.names (name public.citext PRIMARY KEY); \
                 CREATE TABLE public.alike (name public.citext REFERENCES public.names); \
                 INSERT INTO public.names VALUES ('Bob'); INSERT INTO public.alike VALUES ('bob'); \
                 CREATE TABLE public.elders (id int PRIMARY KEY); \
                 CREATE TABLE public.heirs () INHERITS (public.elders); \
                 CREATE TABLE public.lost (id int); \
                 INSERT INTO public.heirs VALUES (1); INSERT INTO public.lost VALUES (1); \
                 ALTER TABLE public.lost ADD FOREIGN KEY (id) REFERENCES public.elders NOT VALID",
            )
            .await;
        let session = bench.session("staff").await;
        let keys = foreign_keys(&session).await.unwrap();
        let orphans = |child: &str| keys.iter().find(|key| key.child == child).unwrap().orphans;
        assert_eq!((orphans("public.alike"), orphans("public.lost")), (0, 1));
    }

    #[tokio::test]
    async fn rows_are_counted_by_name() {
        let bench = Bench::with_rows().await;
        let counts = |tables: &[&str]| Counts {
            database: "staff".into(),
            tables: tables.iter().map(|&name| name.to_owned()).collect(),
        };
        let missing = counts(&["nosuch"]).probe(&bench.cx(0, vec![])).await;
        assert!(matches!(missing.unwrap(), Probe::Unmet(_)));
        let done = counts(&[])
            .apply(&bench.cx(0, vec![]), &NULL)
            .await
            .unwrap();
        let all = vec![("hr.notes".to_owned(), 100), ("users".to_owned(), 200)];
        assert_eq!(
            done.facts,
            [Fact::Rows {
                database: "staff".into(),
                tables: all
            }]
        );
        let done = counts(&["users"])
            .apply(&bench.cx(0, vec![]), &NULL)
            .await
            .unwrap();
        assert_eq!(done.summary, "200 rows in 1 tables of `staff`");
        let failed = counts(&["notes", "hr.notes"])
            .apply(&bench.cx(0, vec![]), &NULL)
            .await;
        assert_eq!(failed.unwrap_err().message, "there is no table notes");
    }

    #[tokio::test]
    async fn assertions_name_all_that_is_wrong() {
        let bench = Bench::with_rows().await;
        let check = |sql: &str, equals: &str| Assertion {
            sql: sql.into(),
            equals: Some(equals.into()),
            ..Assertion::default()
        };
        let none = |sql: &str| Assertion {
            sql: sql.into(),
            empty: true,
            ..Assertion::default()
        };
        let at_most = |sql: &str, bound| Assertion {
            sql: sql.into(),
            at_most: Some(bound),
            ..Assertion::default()
        };
        let assert = Assert {
            database: "staff".into(),
            checks: vec![
                check("SELECT count(*) FROM users", "200"),
                check("SELECT 1 = 1", "t"),
                at_most("SELECT count(*) FROM users", 200),
                none("SELECT * FROM users WHERE name IS NULL"),
                none("WITH a AS (SELECT 1 WHERE false) TABLE a; "),
            ],
            tables: vec!["users".into(), "hr.notes".into()],
            foreign_keys: true,
            statement_timeout: Some(Period::seconds(2)),
        };
        let done = assert.apply(&bench.cx(0, vec![]), &NULL).await.unwrap();
        assert_eq!(done.summary, "8 checks of `staff` are met");
        // A superuser can plant what a foreign key forbids.
        let session = bench.session("staff").await;
        session
            .run(
                "",
                "SET session_replication_role = replica; DELETE FROM public.users WHERE id < 4",
            )
            .await
            .unwrap();
        let assert = Assert {
            checks: vec![
                check("SELECT count(*) FROM users", "200"),
                check("SELECT nonsense", "1"),
                check("DROP TABLE users", "1"),
                at_most("SELECT count(*) FROM users", 196),
                none("SELECT id, name FROM users LIMIT 7"),
                none("SELECT generate_series(1, 100000000)"),
                none("DELETE FROM users RETURNING 1"),
                none("DROP TABLE users"),
                none("SELECT pg_sleep(30)"),
            ],
            tables: vec!["users".into(), "gone".into()],
            ..assert
        };
        let failed = assert.apply(&bench.cx(0, vec![]), &NULL).await.unwrap_err();
        assert_eq!(failed.cause, Cause::CheckUnmet);
        for why in [
            "11 of 12 checks",
            "count(*) FROM users: returns 197, and must return 200",
            "nonsense",
            "0 columns",
            "no table gone",
            "count(*) FROM users: returns 197, and must return at most 196",
            "LIMIT 7: returns 7 rows, and must return none",
            "generate_series(1, 100000000): returns 1000 rows or more",
            "syntax error at or near \"DELETE\"",
            "statement timeout",
        ] {
            assert!(failed.message.contains(why), "{why}: {}", failed.message);
        }
        // Those that do not fit are in the log.
        assert!(failed.message.ends_with("and 1 more"), "{}", failed.message);
        assert_eq!(
            session
                .value("", "SELECT count(*) FROM users")
                .await
                .unwrap()
                .unwrap(),
            "197"
        );
    }
}
