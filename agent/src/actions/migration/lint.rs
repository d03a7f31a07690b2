//! What SQL would do to a database that is in use: how it locks, rewrites, loses or breaks things.
//! Only the text is read. Of a table that the same migration makes nobody can be in the way, so it
//! is passed by; code in quotes (`DO`, functions) is not looked into.

use std::collections::BTreeSet;
use std::fmt;

use lockstep_proto::action::migration::Hazard;

use crate::sql::{Statement, Token, statements};

mod alter;
mod words;

use words::Words;

/// A text of SQL.
#[derive(Debug, Clone, Copy)]
pub(super) struct Text<'a> {
    /// The file that it is; empty for what a tool has rendered.
    pub(super) file: &'a str,
    pub(super) sql: &'a str,
    /// Whether it runs in one transaction that somebody else begins and ends.
    pub(super) whole: bool,
}

/// A hazard with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) hazard: Hazard,
    /// `0002_size.sql:3`, or `line 3`.
    pub(super) place: String,
    /// What happens, and what to write instead.
    pub(super) words: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            hazard,
            place,
            words,
        } = self;
        write!(f, "{hazard} at {place}: {words}")
    }
}

/// What there is to say about the texts of one migration, in their order.
pub(super) fn lint(texts: &[Text<'_>]) -> Vec<Finding> {
    let mut linter = Linter::default();
    for text in texts {
        linter.read(text);
    }
    linter.found
}

#[derive(Default)]
struct Linter<'a> {
    found: Vec<Finding>,
    /// Tables that the migration itself made.
    made: BTreeSet<String>,
    /// Values that the transaction has added to enumerations.
    added: Vec<&'a str>,
    in_transaction: bool,
    file: &'a str,
    /// The statement's line.
    line: usize,
}

impl<'a> Linter<'a> {
    fn read(&mut self, text: &Text<'a>) {
        self.file = text.file;
        self.in_transaction = text.whole;
        self.added.clear();
        for statement in statements(text.sql) {
            self.line = statement.line;
            if statement.is_transaction_control() {
                self.in_transaction = statement.begins(&["BEGIN"]) || statement.begins(&["START"]);
                self.added.clear();
            } else {
                self.statement(&statement);
            }
        }
    }

    fn say(&mut self, hazard: Hazard, words: impl Into<String>) {
        let place = if self.file.is_empty() {
            format!("line {}", self.line)
        } else {
            format!("{}:{}", self.file, self.line)
        };
        let finding = Finding {
            hazard,
            place,
            words: words.into(),
        };
        if !self.found.contains(&finding) {
            self.found.push(finding);
        }
    }

    /// Whether somebody may be using a table.
    fn is_used(&self, table: &str) -> bool {
        !self.made.contains(table)
    }

    fn statement(&mut self, statement: &Statement<'a>) {
        self.use_of_new_values(&statement.tokens);
        let mut words = Words::of(&statement.tokens);
        let Some(verb) = words.next() else { return };
        match verb.text.to_ascii_uppercase().as_str() {
            "CREATE" => self.create(&mut words),
            "ALTER" => self.alter(&mut words),
            "DROP" => self.drop(&mut words),
            "TRUNCATE" => {
                words.skip("TABLE");
                words.skip("ONLY");
                let table = words.name();
                if self.is_used(&table) {
                    self.say(Hazard::DataLoss, format!("TRUNCATE empties {table}"));
                }
            }
            "DELETE" | "UPDATE" => self.rows(verb, &mut words),
            "WITH" => self.rows_behind_with(&statement.tokens),
            "LOCK" => {
                words.skip("TABLE");
                let table = words.name();
                self.say(
                    Hazard::Lock,
                    format!("LOCK keeps others away from {table} until the end of the transaction"),
                );
            }
            "VACUUM" => self.vacuum(&words),
            "CLUSTER" => self.say(
                Hazard::Rewrite,
                "CLUSTER writes the table anew, and nobody can read it meanwhile",
            ),
            "REINDEX" if !words.has("CONCURRENTLY") => self.say(
                Hazard::Lock,
                "REINDEX keeps writers away while it runs; say REINDEX ... CONCURRENTLY",
            ),
            "REFRESH" if !words.has("CONCURRENTLY") => self.say(
                Hazard::Lock,
                "REFRESH MATERIALIZED VIEW keeps readers away while it runs; say CONCURRENTLY, \
                 which wants a unique index",
            ),
            _ => {}
        }
        let all = Words::of(&statement.tokens);
        if self.in_transaction && is_concurrent(&all) {
            self.say(
                Hazard::Fails,
                "CONCURRENTLY does not work in a transaction; let this file, or this part, run \
                 outside of one",
            );
        }
    }

    fn create(&mut self, words: &mut Words<'_, 'a>) {
        while [
            "OR",
            "REPLACE",
            "TEMP",
            "TEMPORARY",
            "UNLOGGED",
            "GLOBAL",
            "LOCAL",
        ]
        .iter()
        .any(|word| words.skip(word))
        {}
        if words.skip("TABLE") {
            words.skip_all(&["IF", "NOT", "EXISTS"]);
            let table = words.name();
            self.made.insert(table);
        } else if words.skip("MATERIALIZED") {
            words.skip("VIEW");
            words.skip_all(&["IF", "NOT", "EXISTS"]);
            let view = words.name();
            self.made.insert(view);
        } else {
            words.skip("UNIQUE");
            if words.skip("INDEX") {
                self.create_index(words);
            }
        }
    }

    fn create_index(&mut self, words: &mut Words<'_, 'a>) {
        let concurrently = words.skip("CONCURRENTLY");
        while words.peek().is_some_and(|word| !word.is("ON")) {
            words.next();
        }
        words.skip("ON");
        words.skip("ONLY");
        let table = words.name();
        if !concurrently && self.is_used(&table) {
            self.say(
                Hazard::Lock,
                format!(
                    "CREATE INDEX keeps writers away from {table} while it builds; say CREATE \
                     INDEX CONCURRENTLY, outside of a transaction"
                ),
            );
        }
    }

    fn drop(&mut self, words: &mut Words<'_, 'a>) {
        let Some(kind) = words.next() else { return };
        let concurrently = words.skip("CONCURRENTLY");
        words.skip_all(&["IF", "EXISTS"]);
        let name = words.name();
        match kind.text.to_ascii_uppercase().as_str() {
            "TABLE" if self.is_used(&name) => {
                self.say(Hazard::DataLoss, format!("DROP TABLE: what {name} holds is gone"));
            }
            "SCHEMA" | "DATABASE" => {
                let kind = kind.text.to_ascii_uppercase();
                self.say(Hazard::DataLoss, format!("DROP {kind}: what {name} holds is gone"));
            }
            "OWNED" => self.say(Hazard::DataLoss, "DROP OWNED: all that the role owns is gone"),
            "INDEX" if !concurrently => self.say(
                Hazard::Lock,
                format!("DROP INDEX {name} waits for everybody who uses its table, and all others wait for it; say DROP INDEX CONCURRENTLY"),
            ),
            _ => {}
        }
    }

    /// DELETE or UPDATE.
    fn rows(&mut self, verb: Token<'_>, words: &mut Words<'_, 'a>) {
        let all = !words.has_outside("WHERE");
        words.skip("FROM");
        words.skip("ONLY");
        let table = words.name();
        if all && self.is_used(&table) {
            let does = if verb.is("DELETE") {
                "DELETE without WHERE empties"
            } else {
                "UPDATE without WHERE overwrites a value in every row of"
            };
            self.say(
                Hazard::DataLoss,
                format!("{does} {table}; on a large table it also locks the rows for long: go in batches"),
            );
        }
    }

    /// `WITH a AS (DELETE ...) UPDATE ...`: a verb begins what is in parentheses, or stands behind
    /// the last of them.
    fn rows_behind_with(&mut self, tokens: &[Token<'a>]) {
        let mut depth = 0_usize;
        for (at, token) in tokens.iter().enumerate() {
            if (token.is("DELETE") || token.is("UPDATE")) && at > 0 {
                let (before, behind) = (&tokens[at - 1], &tokens[at + 1..]);
                if before.is_sign("(") {
                    self.rows(*token, &mut Words::of(behind).inside());
                } else if before.is_sign(")") && depth == 0 {
                    self.rows(*token, &mut Words::of(behind));
                }
            }
            if token.is_sign("(") {
                depth += 1;
            } else if token.is_sign(")") {
                depth = depth.saturating_sub(1);
            }
        }
    }

    fn vacuum(&mut self, words: &Words<'_, 'a>) {
        if words.has("FULL") {
            self.say(
                Hazard::Rewrite,
                "VACUUM FULL writes the table anew, and nobody can read it meanwhile",
            );
        }
        if self.in_transaction {
            self.say(Hazard::Fails, "VACUUM does not work in a transaction");
        }
    }

    /// A value that was added to an enumeration cannot be used before its transaction has ended.
    fn use_of_new_values(&mut self, tokens: &[Token<'a>]) {
        let used = self
            .added
            .iter()
            .find(|value| tokens.iter().any(|token| token.text == **value));
        if let Some(value) = used.copied() {
            self.say(
                Hazard::Fails,
                format!("{value} was added to its type in this transaction, and can be used only after it"),
            );
        }
    }
}

/// Whether it works concurrently, and so in no transaction: REFRESH may do both.
fn is_concurrent(words: &Words<'_, '_>) -> bool {
    let verbs = ["CREATE", "DROP", "REINDEX", "ALTER"];
    words.has("CONCURRENTLY") && verbs.iter().any(|verb| words.begins(&[verb]))
}

#[cfg(test)]
mod tests;
