//! alembic: how it is called, and what its answers mean.

use lockstep_proto::order::normal_sql;
use lockstep_proto::report::{Cause, Failure};

use super::cli::{Cli, MAX_OUTPUT};
use super::{Limits, Rendered, Way, Went};
use crate::actions::migration::source::Source;
use crate::sql::Database;
use crate::step::{Context, failure, hinted};

mod opaque;

/// alembic of a release.
pub(in crate::actions::migration) struct Alembic<'a>(Cli<'a>);

impl<'a> Alembic<'a> {
    /// That of a source. Fails if the release is not on this host.
    pub(super) async fn of(cx: &'a Context, source: Source<'_>) -> Result<Self, Failure> {
        // Releases are immutable.
        let env = [("PYTHONDONTWRITEBYTECODE", "1"), ("PYTHONUNBUFFERED", "1")];
        Cli::of(cx, source, &env).await.map(Self)
    }

    /// The database that it works on.
    pub(super) fn database(&self) -> &Database {
        self.0.database()
    }

    /// The one newest revision of the release.
    pub(super) async fn head(&self) -> Result<String, Failure> {
        let heads = self.0.ask("alembic heads", &["heads"]).await?;
        let heads: Vec<&str> = heads
            .lines()
            .filter(|line| line.contains("(head)"))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        match heads.as_slice() {
            [head] => Ok((*head).to_owned()),
            [] => Err(failure(Cause::Step, "the release has no migrations")),
            heads => Err(hinted(
                Cause::Step,
                format!(
                    "the release has {} heads: {}",
                    heads.len(),
                    heads.join(", ")
                ),
                "join them with `alembic merge` in the application, and release that",
            )),
        }
    }

    /// The full name of a revision that a plan names: `head`, `base` (which is none, and so
    /// empty), or a revision, never a relative one.
    pub(super) async fn resolve(&self, to: &str) -> Result<String, Failure> {
        match to {
            "head" => return self.head().await,
            "base" => return Ok(String::new()),
            _ => {}
        }
        let fit = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if to.is_empty() || to.starts_with(['-', '.']) || !to.chars().all(fit) || to == "heads" {
            return Err(hinted(
                Cause::Refused,
                format!("`{to}` names no revision"),
                "name one by its id: relative ones mean something else each time",
            ));
        }
        let shown = self.0.ask("alembic show", &["show", to]).await?;
        let revision = shown.lines().find_map(|line| line.strip_prefix("Rev: "));
        let revision = revision.and_then(|line| line.split_whitespace().next());
        revision.map(str::to_owned).ok_or_else(|| {
            failure(
                Cause::Step,
                format!("alembic does not say what the revision `{to}` is"),
            )
        })
    }

    /// The SQL that leads from one revision to another; empty if there is none. It is rendered
    /// without limits for locks and statements, so that it is the same whoever asks.
    pub(super) async fn render(&self, way: Way, from: &str, to: &str) -> Result<Rendered, Failure> {
        if from == to {
            return Ok(Rendered {
                sql: String::new(),
                whole: true,
                opaque: vec![],
            });
        }
        let range = if from.is_empty() {
            to.to_owned()
        } else {
            format!("{from}:{}", named(to))
        };
        let what = format!("{} --sql", command(way));
        let sql = self.0.ask(&what, &[verb(way), &range, "--sql"]).await?;
        // What is that long may have been cut.
        if sql.len() + 4 >= MAX_OUTPUT {
            return Err(failure(
                Cause::Step,
                "the migration's SQL is larger than 1 MiB",
            ));
        }
        let sql = normal_sql(&sql);
        let history = self
            .0
            .ask("alembic history", &["history", "--verbose"])
            .await?;
        let opaque = opaque::opaque(self.0.directory(), &history, &sql);
        Ok(Rendered {
            whole: is_transactional(&sql) && opaque.is_empty(),
            sql,
            opaque,
        })
    }

    /// Goes to a revision. Says how the tool ended.
    pub(super) async fn go(
        &self,
        way: Way,
        to: &str,
        limits: Limits,
        major: u32,
    ) -> Result<Went, Failure> {
        let args = [verb(way), named(to)];
        self.0.change(command(way), &args, limits, major).await
    }
}

fn verb(way: Way) -> &'static str {
    match way {
        Way::Up => "upgrade",
        Way::Down => "downgrade",
    }
}

fn command(way: Way) -> &'static str {
    match way {
        Way::Up => "alembic upgrade",
        Way::Down => "alembic downgrade",
    }
}

/// Alembic's word for a revision; for none it has one, too.
fn named(revision: &str) -> &str {
    if revision.is_empty() {
        "base"
    } else {
        revision
    }
}

/// Whether all of the SQL happens in one transaction, or not at all.
fn is_transactional(sql: &str) -> bool {
    let begins = sql.lines().filter(|line| line.trim() == "COMMIT;").count();
    begins <= 1 && !sql.to_uppercase().contains("CONCURRENTLY")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sql_is_compared_without_blanks() {
        assert_eq!(
            normal_sql("BEGIN;\n\n\nALTER x;  \nCOMMIT;\n\n"),
            "BEGIN;\nALTER x;\nCOMMIT;\n"
        );
        assert_ne!(normal_sql("ALTER x;"), normal_sql("ALTER  x;"));
    }

    #[test]
    fn work_outside_of_the_transaction_is_seen() {
        assert!(is_transactional(
            "BEGIN;\nALTER TABLE t ADD a int;\nCOMMIT;\n"
        ));
        assert!(!is_transactional(
            "BEGIN;\nCOMMIT;\nCREATE INDEX;\nBEGIN;\nCOMMIT;\n"
        ));
        assert!(!is_transactional("create index concurrently i on t (a);"));
    }
}
