//! `migration.current`, `migration.plan` and `migration.verify`: they change nothing.

use lockstep_proto::action::migration::{Current, Plan, Tool, Verify};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::guard::shown;
use super::lint::Finding;
use super::source::Source;
use super::tools::{Migrator, Way};
use crate::actions::{Act, Done, Probe};
use crate::step::{Context, hinted};

/// The most of SQL that a fact holds, in bytes.
const MAX_SHOWN: usize = 20 << 10;

/// The most sentences about hazards that a fact holds.
const MAX_SENTENCES: usize = 15;

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
        let now = tool.revision(&tool.database().connect(cx).await?).await?;
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
        let session = tool.database().connect(cx).await?;
        tool.check(&session).await?;
        let from = tool.revision(&session).await?;
        let to = tool.resolve(&self.to).await?;
        let rendered = tool.render(Way::Up, &from, &to).await?;
        let sql = rendered.shown();
        let mut summary = if from == to {
            format!("`{}` is at {to} already", self.database)
        } else {
            format!(
                "`{}` goes from {} to {to} by {} lines of SQL",
                self.database,
                shown(&from),
                sql.lines().count()
            )
        };
        if self.tool == Tool::Prisma && from != to {
            summary += ", which Lockstep runs itself: prisma's engine is not needed";
        }
        if !rendered.opaque.is_empty() {
            summary += ", and by code that cannot be shown";
        }
        let hazards = rendered.hazards.len();
        if hazards > 0 {
            summary += "; hazards: ";
            summary += &hazards.to_string();
        }
        // All of it, where a report has room for its beginning only.
        for line in sql.lines() {
            cx.log.line(line);
        }
        for finding in &rendered.hazards {
            cx.log.line(&finding.to_string());
        }
        let unwanted = |finding: &&Finding| self.fail_on.contains(&finding.hazard);
        let unwanted: Vec<&Finding> = rendered.hazards.iter().filter(unwanted).collect();
        if !unwanted.is_empty() {
            let words: Vec<String> = unwanted.iter().map(ToString::to_string).collect();
            return Err(hinted(
                Cause::CheckUnmet,
                format!(
                    "the SQL for `{}` has what the plan does not let pass: {}",
                    self.database,
                    few(words).join("; ")
                ),
                "write the migration otherwise, or take the hazard out of `fail_on` and let people \
                 decide",
            ));
        }
        let digest = rendered.digest(self.tool, (&from, &to));
        let hazards = rendered.hazards.iter().map(ToString::to_string).collect();
        let fact = Fact::SqlPlan {
            database: self.database.clone(),
            from,
            to,
            digest,
            sql: shorten(&sql).to_owned(),
            tool: Some(self.tool),
            files: Some(rendered.files),
            opaque: rendered.opaque,
            hazards: few(hazards),
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
        let now = tool.revision(&tool.database().connect(cx).await?).await?;
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

/// The first sentences of many: so many that a report has room for them.
fn few(mut sentences: Vec<String>) -> Vec<String> {
    let more = sentences.len().saturating_sub(MAX_SENTENCES);
    sentences.truncate(MAX_SENTENCES);
    if more > 0 {
        sentences.push(format!("and {more} more; the step's log has them all"));
    }
    sentences
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
