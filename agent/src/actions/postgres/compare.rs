//! `postgres.compare`: a database beside its backup, or beside how it was before.

use lockstep_proto::action::postgres::{Baseline, Compare, Rows};
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::integrity::{self, Holdings, differences, unmet};
use super::look::{self, Tally, count, no_rows, of_backup};
use super::measure::rows_fact;
use super::scratch::unequal;
use crate::actions::{Act, Done, Probe};
use crate::sql::Database;
use crate::step::{Context, failure};

impl Act for Compare {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let name = &self.database;
        if self.with == Baseline::Integrity {
            return integrity::probe(self, cx, name).await;
        }
        if cx.dry_run && of_backup(cx, name).is_none() {
            Database::find(cx, name)?.connect(cx).await?;
            return Ok(Probe::Unmet(no_rows(cx, name)));
        }
        look::probe(self, cx).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        match self.with {
            Baseline::Backup => with_backup(self, cx).await,
            Baseline::Integrity => with_integrity(self, cx).await,
        }
    }

    fn describe(&self) -> String {
        match self.with {
            Baseline::Backup => format!("compares the rows of `{}` with its backup", self.database),
            Baseline::Integrity => {
                format!("compares all that `{}` holds with before", self.database)
            }
        }
    }
}

/// How the rows of a table may differ.
fn rule(act: &Compare, table: &str) -> Rows {
    let mut named = act.except.iter().filter(|(name, _)| is(name, table));
    named.next().map_or(act.rows, |(_, rows)| *rows)
}

/// Whether a name in a plan means this table.
fn is(name: &str, table: &str) -> bool {
    name == table || name.strip_prefix("public.") == Some(table)
}

/// Refuses exceptions for tables that nobody knows: one that is misspelt would be no exception.
fn check_names(act: &Compare, known: &[&String]) -> Result<(), Failure> {
    let is_known = |name: &&String| known.iter().any(|table| is(name, table));
    let unknown: Vec<&str> = act
        .except
        .keys()
        .filter(|name| !is_known(name))
        .map(String::as_str)
        .collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let message = format!("there was no table {}", unknown.join(", "));
    Err(failure(Cause::CheckUnmet, message))
}

async fn with_backup(act: &Compare, cx: &Context) -> Result<Done, Failure> {
    let name = &act.database;
    let backup = of_backup(cx, name).ok_or_else(|| no_rows(cx, name))?;
    check_names(act, &backup.keys().collect::<Vec<_>>())?;
    let session = Database::find(cx, name)?.connect(cx).await?;
    let now = count(&session, &act.tables).await?;
    let wanted: Vec<&String> = if act.tables.is_empty() {
        backup.keys().collect()
    } else {
        now.keys().collect()
    };
    let mut wrong = vec![];
    for table in &wanted {
        let rule = rule(act, table);
        match (backup.get(*table), now.get(*table)) {
            (Some(had), Some(rows)) => {
                wrong.extend(unmet(rule, *had, *rows).map(|why| format!("{table} {why}")));
            }
            (Some(_), None) if rule == Rows::Any => {}
            (Some(_), None) => wrong.push(format!("{table} is gone")),
            (None, _) => wrong.push(format!("{table} is not in the backup")),
        }
    }
    if !wrong.is_empty() {
        return Err(unequal(&format!("`{name}` and its backup differ"), &wrong));
    }
    let summary = format!("{} tables of `{name}` are as in the backup", wanted.len());
    Ok(done(name, summary, now))
}

async fn with_integrity(act: &Compare, cx: &Context) -> Result<Done, Failure> {
    let name = &act.database;
    let mut was = integrity::newest(cx, name)?;
    check_names(act, &was.tables.keys().collect::<Vec<_>>())?;
    let database = Database::find(cx, name)?;
    let mut now = Holdings::take(cx, &database, None, Some(&was)).await?;
    let rows = now.rows();
    if !act.tables.is_empty() {
        only(&act.tables, &mut was, &mut now)?;
    }
    let found = differences(&was, &now, |table| rule(act, table));
    for line in &found.said {
        cx.log.line(line);
    }
    for line in &found.wrong {
        cx.log.line(line);
    }
    if !found.wrong.is_empty() {
        return Err(unequal(&format!("`{name}` is not as before"), &found.wrong));
    }
    let said = match found.said.as_slice() {
        [] => String::new(),
        [one] => format!(", but that {one}"),
        more => format!(", but for {} things that may differ", more.len()),
    };
    let summary = format!(
        "{} tables of `{name}` are as before{said}",
        was.tables.len()
    );
    Ok(done(name, summary, rows))
}

/// Leaves these tables in both; whatever else was looked at counts as before.
fn only(tables: &[String], was: &mut Holdings, now: &mut Holdings) -> Result<(), Failure> {
    let missing: Vec<&str> = tables
        .iter()
        .filter(|name| {
            let there = |of: &Holdings| of.tables.keys().any(|table| is(name, table));
            !(there(was) && there(now))
        })
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        let message = format!("{} is not in both", missing.join(", "));
        return Err(failure(Cause::CheckUnmet, message));
    }
    for of in [was, now] {
        of.tables
            .retain(|table, _| tables.iter().any(|name| is(name, table)));
    }
    Ok(())
}

fn done(database: &str, summary: String, rows: Tally) -> Done {
    Done {
        changed: false,
        summary,
        facts: vec![rows_fact(database, rows.into_iter())],
    }
}

#[cfg(test)]
mod tests;
