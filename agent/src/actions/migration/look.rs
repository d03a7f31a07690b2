//! `migration.current`, `migration.plan` and `migration.verify`: they change nothing.

use lockstep_proto::action::migration::{Current, Plan, Verify};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::guard::{revision, shown};
use super::source::Source;
use super::tools::{Migrator, Way};
use crate::actions::{Act, Done, Probe};
use crate::step::{Context, hinted};

/// The most of SQL that a fact holds, in bytes.
const MAX_SHOWN: usize = 20 << 10;

/// The probe of an action that only looks: in a dry run the release may not be there yet.
async fn probe(act: &impl Act, source: Source<'_>, cx: &Context) -> Result<Probe, Failure> {
    if cx.dry_run && !source.is_there(cx)? {
        return Ok(Probe::Unmet(source.missing()));
    }
    match act.apply(cx, &Value::Null).await {
        Ok(done) => Ok(Probe::Present(done.summary)),
        Err(unmet) if unmet.cause == Cause::CheckUnmet => Ok(Probe::Unmet(unmet)),
        Err(failure) => Err(failure),
    }
}

impl Act for Current {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        probe(self, self.into(), cx).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let tool = Migrator::of(cx, self.into()).await?;
        let now = revision(&tool.database().connect(cx).await?).await?;
        let head = tool.head().await?;
        let state = if now == head {
            "the release's newest"
        } else {
            "behind"
        };
        let summary = format!(
            "`{}` is at {} ({state}: {head})",
            self.database,
            shown(&now)
        );
        let fact = Fact::Revision {
            database: self.database.clone(),
            before: now.clone(),
            after: now,
        };
        Ok(Done {
            changed: false,
            summary,
            facts: vec![fact],
        })
    }

    fn describe(&self) -> String {
        format!("asks for the revision of `{}`", self.database)
    }
}

impl Act for Plan {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        probe(self, self.into(), cx).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let tool = Migrator::of(cx, self.into()).await?;
        let from = revision(&tool.database().connect(cx).await?).await?;
        let to = tool.resolve(&self.to).await?;
        let sql = tool.render(Way::Up, &from, &to).await?.sql;
        let summary = match sql.lines().count() {
            0 => format!("`{}` is at {to} already", self.database),
            lines => format!(
                "`{}` goes from {} to {to} by {lines} lines of SQL",
                self.database,
                shown(&from)
            ),
        };
        let fact = Fact::SqlPlan {
            database: self.database.clone(),
            from,
            to,
            digest: Digest::of(sql.as_bytes()),
            sql: shorten(&sql).to_owned(),
        };
        Ok(Done {
            changed: false,
            summary,
            facts: vec![fact],
        })
    }

    fn describe(&self) -> String {
        format!("shows the SQL of {} for `{}`", self.release, self.database)
    }
}

impl Act for Verify {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        probe(self, self.into(), cx).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let tool = Migrator::of(cx, self.into()).await?;
        let now = revision(&tool.database().connect(cx).await?).await?;
        let expected = tool.resolve(&self.to).await?;
        if now != expected {
            return Err(hinted(
                Cause::CheckUnmet,
                format!(
                    "`{}` is at {}, and must be at {expected}",
                    self.database,
                    shown(&now)
                ),
                "see what migrated it, and with which release",
            ));
        }
        let summary = format!("`{}` is at {now}", self.database);
        let fact = Fact::Revision {
            database: self.database.clone(),
            before: now.clone(),
            after: now,
        };
        Ok(Done {
            changed: false,
            summary,
            facts: vec![fact],
        })
    }

    fn describe(&self) -> String {
        format!(
            "holds the revision of `{}` against {}",
            self.database, self.to
        )
    }
}

/// The beginning of SQL: so much that a report has room for it, with line breaks as JSON has them.
fn shorten(sql: &str) -> &str {
    let mut bytes = 0;
    let end = sql.char_indices().find_map(|(at, c)| {
        // A control character becomes `\u0000`; a quote, a backslash or a line break two bytes.
        bytes += match c {
            '\n' | '\r' | '\t' | '"' | '\\' => 2,
            c if c.is_control() => 6,
            c => c.len_utf8(),
        };
        (bytes > MAX_SHOWN).then_some(at)
    });
    &sql[..end.unwrap_or(sql.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_sql_fits_into_a_fact() {
        for sql in ["ä\n".repeat(40_000), "\"\u{1}".repeat(40_000), "x".into()] {
            let shown = shorten(&sql);
            let json = serde_json::to_string(shown).unwrap();
            assert!(json.len() <= MAX_SHOWN + 2 && sql.starts_with(shown));
            assert!(shown.len() == sql.len() || json.len() > MAX_SHOWN - 8);
        }
    }
}
