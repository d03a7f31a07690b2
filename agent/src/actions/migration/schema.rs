//! What a schema consists of, a line for each part, so that people see what a migration that was
//! cut off has left. Only the server's catalogue is asked: no tool has to be there for it.

use std::collections::BTreeSet;

use lockstep_proto::report::Failure;

use crate::sql::Session;

/// The most lines that a message has room for.
const FEW: usize = 8;

/// The parts of the schema, sorted. What belongs to extensions is left out.
pub(super) async fn lines(session: &Session) -> Result<Vec<String>, Failure> {
    let rows = session.query("reading the schema", PARTS, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// What came (`+`) and what went (`-`).
pub(super) fn difference(was: &[String], now: &[String]) -> Vec<String> {
    let [before, after]: [BTreeSet<&String>; 2] = [was, now].map(|lines| lines.iter().collect());
    let gone = before.difference(&after).map(|line| format!("- {line}"));
    let new = after.difference(&before).map(|line| format!("+ {line}"));
    gone.chain(new).collect()
}

/// A difference in one sentence.
pub(super) fn told(difference: &[String]) -> String {
    if difference.is_empty() {
        return "the schema is as it was before; whether data is, it does not say".to_owned();
    }
    let more = difference.len().saturating_sub(FEW);
    let shown = difference[..difference.len() - more].join("; ");
    let more = match more {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    format!("the schema differs from before: {shown}{more}")
}

const PARTS: &str = r#"
WITH mine AS (
  SELECT oid, nspname FROM pg_namespace
  WHERE nspname NOT IN ('pg_catalog', 'information_schema') AND nspname !~ '^pg_(toast|temp)'
), foreign_to_us AS (
  SELECT classid, objid FROM pg_depend WHERE deptype = 'e'
), relations AS (
  SELECT c.*, nspname FROM pg_class c JOIN mine ON relnamespace = mine.oid
  WHERE ('pg_class'::regclass, c.oid) NOT IN (SELECT classid, objid FROM foreign_to_us)
)
SELECT line FROM (
  SELECT format('schema %I', nspname) AS line FROM mine
  UNION ALL
  SELECT format('%s %I.%I', CASE relkind WHEN 'S' THEN 'sequence' ELSE 'table' END, nspname, relname)
  FROM relations WHERE relkind IN ('r', 'p', 'f', 'S')
  UNION ALL
  SELECT format('view %I.%I %s', nspname, relname, md5(pg_get_viewdef(oid)))
  FROM relations WHERE relkind IN ('v', 'm')
  UNION ALL
  SELECT format('column %I.%I.%I %s%s%s', nspname, relname, attname,
    format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END,
    coalesce(' DEFAULT ' || pg_get_expr(adbin, adrelid), ''))
  FROM relations JOIN pg_attribute ON attrelid = oid AND attnum > 0 AND NOT attisdropped
  LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
  WHERE relkind IN ('r', 'p', 'f', 'c')
  UNION ALL
  SELECT pg_get_indexdef(indexrelid) || CASE WHEN indisvalid THEN '' ELSE ' INVALID' END
  FROM pg_index JOIN relations ON oid = indexrelid
  UNION ALL
  SELECT format('constraint %I.%I.%I %s', nspname, relname, conname, pg_get_constraintdef(c.oid))
  FROM pg_constraint c JOIN relations ON conrelid = relations.oid
  UNION ALL
  SELECT pg_get_triggerdef(t.oid)
  FROM pg_trigger t JOIN relations ON tgrelid = relations.oid WHERE NOT tgisinternal
  UNION ALL
  SELECT format('function %I.%I(%s) %s', nspname, proname,
    pg_get_function_identity_arguments(p.oid), md5(concat(prosrc, pg_get_function_sqlbody(p.oid))))
  FROM pg_proc p JOIN mine ON pronamespace = mine.oid
  WHERE ('pg_proc'::regclass, p.oid) NOT IN (SELECT classid, objid FROM foreign_to_us)
  UNION ALL
  SELECT format('enum %I.%I %L', nspname, typname, enumlabel)
  FROM pg_enum JOIN pg_type t ON t.oid = enumtypid JOIN mine ON typnamespace = mine.oid
  UNION ALL
  SELECT format('policy %I.%I.%I', nspname, relname, polname)
  FROM pg_policy JOIN relations ON polrelid = relations.oid
  UNION ALL
  SELECT format('extension %I %s', extname, extversion) FROM pg_extension
) AS parts ORDER BY line COLLATE "C"
"#;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::cluster::Bench;

    #[test]
    fn differences_are_told_in_few_words() {
        let lines = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let found = difference(&lines("a b c"), &lines("b c d"));
        assert_eq!(found, ["- a", "+ d"]);
        assert_eq!(told(&found), "the schema differs from before: - a; + d");
        assert!(told(&[]).starts_with("the schema is as it was"));
        let many = vec!["+ x".to_owned(); 20];
        assert!(told(&many).ends_with("; + x; and 12 more"));
    }

    #[tokio::test]
    async fn every_part_of_a_schema_shows() {
        let bench = Bench::with_rows().await;
        let session = bench.session("as_owner").await;
        for (sql, line) in [
            ("CREATE TABLE hr.t (a int)", "+ column hr.t.a integer"),
            (
                "ALTER TABLE hr.t ALTER a SET DEFAULT 1",
                "+ column hr.t.a integer DEFAULT 1",
            ),
            (
                "CREATE INDEX i ON hr.t (a)",
                "+ CREATE INDEX i ON hr.t USING btree (a)",
            ),
            (
                "ALTER TABLE hr.t ADD CONSTRAINT k CHECK (a > 0) NOT VALID",
                "+ constraint hr.t.k CHECK ((a > 0)) NOT VALID",
            ),
            ("CREATE VIEW hr.v AS SELECT a FROM hr.t", "+ view hr.v "),
            (
                "CREATE FUNCTION hr.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
                "+ function hr.f() ",
            ),
            (
                "CREATE OR REPLACE FUNCTION hr.f() RETURNS int LANGUAGE sql AS 'SELECT 2'",
                "+ function hr.f() ",
            ),
            ("CREATE TYPE hr.e AS ENUM ('x')", "+ enum hr.e 'x'"),
            ("CREATE SEQUENCE hr.s", "+ sequence hr.s"),
            ("CREATE POLICY p ON hr.t USING (true)", "+ policy hr.t.p"),
            (
                "ALTER TABLE hr.t ALTER a SET NOT NULL",
                "+ column hr.t.a integer NOT NULL DEFAULT 1",
            ),
            (
                "ALTER TABLE hr.t VALIDATE CONSTRAINT k",
                "- constraint hr.t.k CHECK ((a > 0)) NOT VALID",
            ),
            (
                "CREATE OR REPLACE VIEW hr.v AS SELECT a FROM hr.t WHERE a > 1",
                "+ view hr.v ",
            ),
            (
                "CREATE MATERIALIZED VIEW hr.m AS SELECT 1 AS a",
                "+ view hr.m ",
            ),
            (
                "CREATE FUNCTION hr.g() RETURNS int LANGUAGE sql RETURN 1",
                "+ function hr.g() ",
            ),
            (
                "CREATE OR REPLACE FUNCTION hr.g() RETURNS int LANGUAGE sql RETURN 2",
                "+ function hr.g() ",
            ),
            (
                "CREATE FUNCTION hr.w() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'; \
                 CREATE TRIGGER w BEFORE INSERT ON hr.t FOR EACH ROW EXECUTE FUNCTION hr.w()",
                "+ CREATE TRIGGER w BEFORE INSERT ON hr.t ",
            ),
            (
                "CREATE TABLE hr.p (a int) PARTITION BY LIST (a)",
                "+ table hr.p",
            ),
            ("CREATE TYPE hr.c AS (a int)", "+ column hr.c.a integer"),
            (
                "CREATE EXTENSION citext VERSION '1.5'",
                "+ extension citext 1.5",
            ),
            ("ALTER EXTENSION citext UPDATE", "- extension citext 1.5"),
            ("DROP TABLE hr.t CASCADE", "- table hr.t"),
        ] {
            let was = lines(&session).await.unwrap();
            bench.sql(sql).await;
            let now = lines(&session).await.unwrap();
            let found = difference(&was, &now);
            assert!(
                found.iter().any(|it| it.starts_with(line)),
                "{sql}: {found:?}"
            );
        }
        // An index whose building failed is there, and nobody uses it.
        bench
            .sql("CREATE TABLE hr.d AS SELECT 1 AS a FROM generate_series(1, 2)")
            .await;
        let build = "CREATE UNIQUE INDEX CONCURRENTLY u ON hr.d (a)";
        session.run("", build).await.unwrap_err();
        let invalid = "CREATE UNIQUE INDEX u ON hr.d USING btree (a) INVALID";
        let now = lines(&session).await.unwrap();
        assert!(now.iter().any(|it| it == invalid), "{now:?}");
        let before = lines(&session).await.unwrap();
        bench
            .sql("INSERT INTO public.users VALUES (999, 'x')")
            .await;
        assert_eq!(lines(&session).await.unwrap(), before, "rows are no schema");
    }
}
