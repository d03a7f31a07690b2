//! What a migration holds and runs, looked at from another session while it goes.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::sql::Session;

/// How often it is looked: small migrations are over in a moment.
const EVERY: Duration = Duration::from_millis(20);

/// Locks that keep others from writing or reading a table, the weakest first.
const BLOCKING: &[&str] = &[
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
];

/// How many statements are told, and how many characters of each.
const LONGEST: usize = 5;
const SHOWN: usize = 120;

/// Locks that kept others from tables, and statements.
#[derive(Debug, Default)]
pub(super) struct Watched {
    tables: BTreeMap<String, Lock>,
    /// By session and when it began.
    statements: BTreeMap<String, Statement>,
}

#[derive(Debug)]
struct Lock {
    /// The place of its name in [`BLOCKING`].
    strength: usize,
    first: Instant,
    last: Instant,
}

#[derive(Debug)]
struct Statement {
    text: String,
    /// How long it had run when it was seen last.
    ran: Duration,
}

impl Watched {
    /// Looks again and again who keeps others from which table and which statements run; until the
    /// session breaks, then no more.
    pub(super) async fn watch(&mut self, session: &Session) -> std::convert::Infallible {
        while self.look(session).await.is_some() {
            tokio::time::sleep(EVERY).await;
        }
        std::future::pending().await
    }

    async fn look(&mut self, session: &Session) -> Option<()> {
        let locks = "SELECT (CASE n.nspname WHEN 'public' THEN '' \
                   ELSE quote_ident(n.nspname) || '.' END || quote_ident(c.relname)), l.mode \
                   FROM pg_locks l JOIN pg_class c ON c.oid = l.relation \
                   JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE l.granted AND l.locktype = 'relation' AND c.relkind IN ('r', 'p') \
                   AND n.nspname <> 'pg_catalog' AND l.pid <> pg_backend_pid() AND l.database = \
                   (SELECT oid FROM pg_database WHERE datname = current_database())";
        for row in session.query("looking at locks", locks, &[]).await.ok()? {
            let mode: &str = row.get(1);
            if let Some(strength) = BLOCKING.iter().position(|name| *name == mode) {
                self.see(row.get(0), strength, Instant::now());
            }
        }
        let statements = "SELECT pid || ' ' || query_start, query, \
                   (extract(epoch FROM clock_timestamp() - query_start) * 1000000)::int8 \
                   FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' \
                   AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let rows = session.query("looking at statements", statements, &[]);
        for row in rows.await.ok()? {
            let ran = Duration::from_micros(u64::try_from(row.get::<_, i64>(2)).unwrap_or(0));
            let text = row.get(1);
            self.ran(row.get(0), Statement { text, ran });
        }
        Some(())
    }

    /// Keeps the longest only. One that runs still is seen again, and by then it may be among them.
    fn ran(&mut self, key: String, statement: Statement) {
        self.statements.insert(key, statement);
        if self.statements.len() > LONGEST {
            let shortest = self.statements.iter().min_by_key(|(_, of)| of.ran);
            let key = shortest.map(|(key, _)| key.clone());
            key.map(|key| self.statements.remove(&key));
        }
    }

    fn see(&mut self, table: String, strength: usize, now: Instant) {
        let lock = self.tables.entry(table).or_insert(Lock {
            strength,
            first: now,
            last: now,
        });
        lock.strength = lock.strength.max(strength);
        lock.last = now;
    }

    /// The strongest lock on each table that was there, and for how long it was held.
    pub(super) fn locks(&self) -> Vec<String> {
        let line = |(table, lock): (&String, &Lock)| {
            let held = (lock.last - lock.first + EVERY).as_millis();
            format!("{table}: {} for about {held} ms", BLOCKING[lock.strength])
        };
        self.tables.iter().map(line).collect()
    }

    /// The statements that ran longest, with about how long.
    pub(super) fn statements(&self) -> Vec<String> {
        let mut longest: Vec<&Statement> = self.statements.values().collect();
        longest.sort_by_key(|statement| std::cmp::Reverse(statement.ran));
        let line = |statement: &&Statement| {
            let ran = (statement.ran + EVERY).as_millis();
            let words: Vec<&str> = statement.text.split_whitespace().collect();
            let text = words.join(" ");
            let short: String = before_values(&text).chars().take(SHOWN).collect();
            let cut = if short.len() < text.len() { ".." } else { "" };
            format!("about {ran} ms: {short}{cut}")
        };
        longest.iter().map(line).collect()
    }
}

/// A statement up to its first text: that may be a customer's, or a password.
fn before_values(text: &str) -> &str {
    let begins = |(at, sign): &(usize, char)| match sign {
        '\'' => true,
        '$' => !text[at + 1..].starts_with(|next: char| next.is_ascii_digit()),
        _ => false,
    };
    let end = text.char_indices().find(begins);
    end.map_or(text, |(at, _)| &text[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_lock_of_a_table_is_told() {
        let mut watched = Watched::default();
        let now = Instant::now();
        watched.see("a".into(), 3, now);
        watched.see("a".into(), 0, now + EVERY * 4);
        watched.see("b".into(), 0, now);
        let lines = [
            "a: AccessExclusiveLock for about 100 ms",
            "b: ShareLock for about 20 ms",
        ];
        assert_eq!(watched.locks(), lines);
    }

    #[test]
    fn the_longest_statements_are_told_in_short() {
        let mut watched = Watched::default();
        let long = format!("UPDATE\n  t SET {} = 1", "x".repeat(SHOWN));
        for (at, text) in ["CREATE TABLE a ()", &long, "", "", "", ""]
            .iter()
            .enumerate()
        {
            let ran = Duration::from_millis([60, 480, 0, 0, 0, 0][at]);
            let text = (*text).to_owned();
            watched.ran(at.to_string(), Statement { text, ran });
        }
        let lines = watched.statements();
        assert_eq!(lines.len(), LONGEST);
        let first = lines[0].strip_prefix("about 500 ms: UPDATE t SET xxx");
        assert!(
            first.is_some_and(|rest| rest.ends_with("xxx..")),
            "{lines:?}"
        );
        assert_eq!(lines[1], "about 80 ms: CREATE TABLE a ()");
    }

    #[test]
    fn no_value_of_a_statement_is_told() {
        let told = [
            ("ALTER ROLE a PASSWORD 'secret'", "ALTER ROLE a PASSWORD "),
            ("SELECT $$secret$$", "SELECT "),
            (
                "UPDATE t SET a = $1 WHERE b = $2",
                "UPDATE t SET a = $1 WHERE b = $2",
            ),
            ("SELECT 1 $", "SELECT 1 "),
        ];
        for (text, shown) in told {
            assert_eq!(before_values(text), shown);
        }
    }
}
