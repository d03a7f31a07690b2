//! Statements that answer another question than the one asked.

use lockstep_proto::action::Action;

use super::super::draft::DraftStep;
use super::super::finding::Code;
use super::super::reader::Reader;

/// Warns of what is misleading in a step's statements.
pub(super) fn check(reader: &Reader<'_>, step: &DraftStep) {
    if !matches!(
        step.action,
        Some(Action::CheckSql(_) | Action::PostgresAssert(_))
    ) {
        return;
    }
    reader.tree.each_scalar(step.args, &mut |id, scalar| {
        if reader.tree.key_of(id) == Some("sql")
            && let Some((message, hint)) = misleads(&scalar.text)
        {
            reader.warn(Code::MisleadingQuery, id, message, hint);
        }
    });
}

/// Why a statement misleads, and what to ask instead.
fn misleads(sql: &str) -> Option<(&'static str, &'static str)> {
    let lower = sql.to_lowercase();
    let words: Vec<&str> = lower
        .split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .filter(|word| !word.is_empty())
        .collect();
    let has = |word: &str| words.contains(&word);
    if words
        .windows(3)
        .any(|three| three == ["not", "in", "select"])
    {
        return Some((
            "`NOT IN (SELECT ...)` finds nothing as soon as the list holds one NULL",
            "ask `NOT EXISTS`, or `postgres.assert` with `foreign_keys: true`",
        ));
    }
    if ["n_tup_ins", "n_tup_del", "n_live_tup", "reltuples"]
        .into_iter()
        .any(has)
    {
        return Some((
            "these are statistics, which a crash or a reset sets to nothing: no row count",
            "ask `count(*)`, or use `postgres.counts`",
        ));
    }
    if has("pg_stat_user_tables") && has("tablename") {
        return Some((
            "`pg_stat_user_tables` has no `tablename`",
            "it is `relname` there; `tablename` is in `pg_tables`",
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_that_mislead_are_told_from_those_that_do_not() {
        for (sql, why) in [
            (
                "SELECT count(*) FROM a WHERE id NOT IN (SELECT id FROM b)",
                "NULL",
            ),
            (
                "select sum(n_tup_ins - n_tup_del) from pg_stat_user_tables",
                "statistics",
            ),
            (
                "SELECT tablename FROM pg_stat_user_tables",
                "no `tablename`",
            ),
        ] {
            let (message, _) = misleads(sql).unwrap_or_else(|| panic!("{sql}"));
            assert!(message.contains(why), "{message}");
        }
        for sql in [
            "SELECT count(*) FROM a WHERE id NOT IN (1, 2)",
            "SELECT count(*) FROM a WHERE NOT EXISTS (SELECT 1 FROM b WHERE b.id = a.id)",
            "SELECT count(*) FROM pg_tables WHERE tablename = 'a'",
        ] {
            assert_eq!(misleads(sql), None, "{sql}");
        }
    }
}
