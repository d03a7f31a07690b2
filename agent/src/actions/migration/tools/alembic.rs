//! alembic: how it is called, and what its answers mean.

use lockstep_proto::action::migration::By;
use lockstep_proto::report::{Cause, Failure};

use super::cli::{Cli, MAX_OUTPUT};
use super::own::{Limited, went};
use super::{Limits, Rendered, Way, Went};
use crate::actions::migration::lint::{Text, lint};
use crate::actions::migration::source::Source;
use crate::sql::Database;
use crate::step::{Context, failure, hinted};

mod scripts;

/// alembic of a release.
pub(in crate::actions::migration) struct Alembic<'a> {
    cx: &'a Context,
    cli: Cli<'a>,
    by: By,
}

impl<'a> Alembic<'a> {
    /// That of a source. Fails if the release is not on this host.
    pub(super) async fn of(cx: &'a Context, source: Source<'_>) -> Result<Self, Failure> {
        // Releases are immutable.
        let env = [("PYTHONDONTWRITEBYTECODE", "1"), ("PYTHONUNBUFFERED", "1")];
        let cli = Cli::of(cx, source, &env).await?;
        let by = source.by;
        Ok(Self { cx, cli, by })
    }

    /// The database that it works on.
    pub(super) fn database(&self) -> &Database {
        self.cli.database()
    }

    /// The one newest revision of the release.
    pub(super) async fn head(&self) -> Result<String, Failure> {
        let heads = self.cli.ask("alembic heads", &["heads"]).await?;
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
        let shown = self.cli.ask("alembic show", &["show", to]).await?;
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
        let scripts = scripts::Scripts::of(&self.cli).await?;
        let mut rendered = Rendered {
            sql: String::new(),
            whole: true,
            files: scripts.digest(),
            opaque: vec![],
            hazards: vec![],
        };
        if from == to {
            return Ok(rendered);
        }
        let range = if from.is_empty() {
            to.to_owned()
        } else {
            format!("{from}:{}", named(to))
        };
        let what = format!("{} --sql", command(way));
        let ended = self.cli.answer(&[verb(way), &range, "--sql"]).await?;
        match ended.code {
            0 => {}
            // A complaint of alembic's own; anything else comes from the application's code.
            255 => return Err(self.cli.unanswered(&what, &ended)),
            _ => {
                rendered.whole = false;
                rendered.opaque = vec![format!("`{what}` cannot say what would run")];
                return Ok(rendered);
            }
        }
        // What is that long may have been cut.
        if ended.stdout.len() + 4 >= MAX_OUTPUT {
            return Err(failure(
                Cause::Step,
                "the migration's SQL is larger than 1 MiB",
            ));
        }
        rendered.sql = ended.stdout;
        let shown = rendered.shown();
        rendered.opaque = scripts.opaque(&shown);
        rendered.whole = is_transactional(&shown) && rendered.opaque.is_empty();
        rendered.hazards = lint(&[Text {
            file: "",
            sql: &shown,
            whole: false,
        }]);
        Ok(rendered)
    }

    /// Goes to a revision. Says how the tool ended.
    pub(super) async fn go(
        &self,
        way: Way,
        (from, to): (&str, &str),
        limits: Limits,
        major: u32,
    ) -> Result<Went, Failure> {
        if self.by == By::Sql {
            let Rendered { sql, opaque, .. } = self.render(way, from, to).await?;
            if let Some(what) = opaque.first() {
                return Err(hinted(
                    Cause::Refused,
                    format!("the SQL is not all that the migration does: {what}"),
                    "let the tool run it: leave out `apply: sql`",
                ));
            }
            let session = Limited::connect(self.cx, self.database(), limits).await?;
            let done = session.run(command(way), &sql).await;
            return Ok(done.map_or_else(went, |()| Went::Well));
        }
        let args = [verb(way), named(to)];
        self.cli.change(command(way), &args, limits, major).await
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
