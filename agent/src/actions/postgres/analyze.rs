//! `postgres.analyze`: the statistics that the planner goes by, table by table, so that no lock is
//! held longer than one table takes. Applications read and write meanwhile.

use lockstep_proto::action::postgres::Analyze;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::measure::TABLE_NAME;
use crate::actions::{Act, Done, Probe};
use crate::sql::{Database, Session, ident};
use crate::step::{Context, failure, hinted};

impl Act for Analyze {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let session = Database::find(cx, &self.database)?.connect(cx).await?;
        if cx.dry_run {
            // Tables that a migration makes are not there yet.
            if let Err(unmet) = tables(&session, &self.tables).await {
                return Ok(Probe::Unmet(unmet));
            }
        } else {
            session.end_left_over(cx).await?;
        }
        // Doing it again costs time and changes nothing.
        Ok(Probe::Absent(self.describe()))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let session = Database::find(cx, &self.database)?.connect(cx).await?;
        session.end_left_over(cx).await?;
        let tables = tables(&session, &self.tables).await?;
        check_rights(&self.database, &tables)?;
        let total: u64 = tables.iter().map(|table| table.bytes).sum::<u64>().max(1);
        let mut done = 0;
        for table in &tables {
            #[expect(clippy::cast_precision_loss, reason = "a share is not exact")]
            let share = done as f64 / total as f64;
            cx.log
                .progress(share, &format!("analyzing {}", table.shown));
            let sql = format!("ANALYZE {}", table.quoted);
            let what = format!("analyzing {}", table.shown);
            session.run(&what, &sql).await?;
            done += table.bytes;
        }
        let tables = match tables.len() {
            1 => "1 table".to_owned(),
            some => format!("{some} tables"),
        };
        Ok(Done {
            changed: true,
            summary: format!("{tables} of `{}` have new statistics", self.database),
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        let tables = match self.tables.as_slice() {
            [] => String::new(),
            tables => format!(": {}", tables.join(", ")),
        };
        format!("renews the statistics of `{}`{tables}", self.database)
    }
}

struct Table {
    shown: String,
    quoted: String,
    bytes: u64,
    /// Whether the role may. Otherwise PostgreSQL would leave the table out, with a warning.
    allowed: bool,
}

/// These tables, or all: of a partitioned one the whole, which has its partitions analyzed too.
async fn tables(session: &Session, only: &[String]) -> Result<Vec<Table>, Failure> {
    // From version 17 on there is a right of its own for it.
    let maintain = match session.major() {
        17.. => "OR has_table_privilege(c.oid, 'MAINTAIN')",
        _ => "",
    };
    let sql = format!(
        "SELECT {TABLE_NAME}, n.nspname::text, c.relname::text, coalesce(pg_table_size(c.oid), 0)::int8, \
         r.rolsuper OR pg_has_role(c.relowner, 'USAGE') OR pg_has_role(d.datdba, 'USAGE') {maintain}, \
         c.relispartition \
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, pg_roles r, pg_database d \
         WHERE c.relkind IN ('r', 'm', 'p') AND c.relpersistence <> 't' \
         AND r.rolname = current_user AND d.datname = current_database() \
         AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_toast' \
         ORDER BY 1"
    );
    let rows = session.query("asking for the tables", &sql, &[]).await?;
    let mut missing: Vec<&str> = only.iter().map(String::as_str).collect();
    let mut found = vec![];
    for row in &rows {
        let (shown, schema, table): (String, &str, &str) = (row.get(0), row.get(1), row.get(2));
        let full = format!("{schema}.{table}");
        let is_it =
            |name: &str| name == shown || name == full || (schema == "public" && name == table);
        let wanted = match only {
            [] => !row.get::<_, bool>(5),
            only => only.iter().any(|name| is_it(name)),
        };
        missing.retain(|name| !is_it(name));
        if wanted {
            found.push(Table {
                quoted: format!("{}.{}", ident(schema), ident(table)),
                bytes: row.get::<_, i64>(3).unsigned_abs(),
                allowed: row.get(4),
                shown,
            });
        }
    }
    if missing.is_empty() {
        return Ok(found);
    }
    let message = format!("there is no table {}", missing.join(", "));
    Err(failure(Cause::CheckUnmet, message))
}

fn check_rights(database: &str, tables: &[Table]) -> Result<(), Failure> {
    let refused = tables.iter().filter(|table| !table.allowed);
    let refused: Vec<&str> = refused.map(|table| table.shown.as_str()).collect();
    if refused.is_empty() {
        return Ok(());
    }
    let message = format!(
        "the role of `{database}` may not analyze {}",
        refused.join(", ")
    );
    let hint = "let it be a member of the tables' owner, or name the tables that it may";
    Err(hinted(Cause::Host, message, hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::cluster::{Bench, as_owner};

    fn analyze(tables: &[&str]) -> Analyze {
        Analyze {
            database: "staff".into(),
            tables: tables.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    /// The tables that have statistics.
    async fn known(bench: &Bench) -> String {
        let sql = "SELECT string_agg(DISTINCT relname, ' ' ORDER BY relname) \
                   FROM pg_stats s JOIN pg_class c ON c.relname = s.tablename \
                   WHERE s.schemaname NOT IN ('pg_catalog', 'information_schema')";
        let session = bench.session("staff").await;
        session.value("", sql).await.unwrap().unwrap_or_default()
    }

    #[tokio::test]
    async fn tables_get_statistics() {
        let bench = Bench::with_rows().await;
        bench
            .sql(
                "CREATE TABLE public.parts (id int, at date) PARTITION BY RANGE (at); \
                 CREATE TABLE public.parts_1 PARTITION OF public.parts DEFAULT; \
                 INSERT INTO public.parts SELECT n, now() FROM generate_series(1, 50) n",
            )
            .await;
        let run = async |act: Analyze| act.apply(&bench.cx(0, vec![]), &Value::Null).await;
        let done = run(analyze(&["users"])).await.unwrap();
        assert_eq!(done.summary, "1 table of `staff` have new statistics");
        assert_eq!(known(&bench).await, "users");
        let missing = run(analyze(&["users", "gone"])).await.unwrap_err();
        assert_eq!(missing.message, "there is no table gone");
        let done = run(analyze(&[])).await.unwrap();
        assert_eq!(done.summary, "3 tables of `staff` have new statistics");
        assert_eq!(known(&bench).await, "notes parts parts_1 users");
    }

    #[tokio::test]
    async fn what_the_role_may_not_analyze_is_refused_and_not_left_out() {
        let bench = Bench::with_rows().await;
        let mut cx = bench.cx(0, vec![]);
        let config = std::sync::Arc::make_mut(&mut cx.config);
        let app = config.postgres["as_app"].clone();
        config.postgres.insert("staff".into(), app);
        let refused = analyze(&["users"]).apply(&cx, &Value::Null).await;
        let refused = refused.unwrap_err().message;
        assert_eq!(refused, "the role of `staff` may not analyze users");
        let cx = as_owner(bench.cx(0, vec![]));
        analyze(&[]).apply(&cx, &Value::Null).await.unwrap();
    }

    #[tokio::test]
    async fn a_table_that_another_holds_fails_by_name_and_nothing_waits_behind() {
        let bench = Bench::with_rows().await;
        let other = bench.session("staff").await;
        other
            .run(
                "",
                "BEGIN; LOCK TABLE public.users IN SHARE UPDATE EXCLUSIVE MODE",
            )
            .await
            .unwrap();
        let failed = analyze(&["users"])
            .apply(&bench.cx(0, vec![]), &Value::Null)
            .await;
        let failed = failed.unwrap_err();
        assert!(failed.message.contains("analyzing users"), "{failed:?}");
        assert!(failed.message.contains("lock timeout"), "{failed:?}");
    }
}
