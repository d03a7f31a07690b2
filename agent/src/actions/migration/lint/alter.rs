//! `ALTER TABLE` and its kin.

use lockstep_proto::action::migration::Hazard;

use super::Linter;
use super::words::Words;

/// Functions whose value is the same for all rows of a statement: a default of theirs is written
/// down once. Others are asked for each row, and the table is written anew.
const STABLE: &[&str] = &[
    "now",
    "current_timestamp",
    "transaction_timestamp",
    "statement_timestamp",
    "current_date",
    "localtimestamp",
    "current_setting",
    "timezone",
    "date_trunc",
    "lower",
    "upper",
    "coalesce",
    "to_timestamp",
    "jsonb_build_object",
    "json_build_object",
    "jsonb_build_array",
    "make_interval",
    // Types with a length: `varchar(20)`.
    "varchar",
    "char",
    "character",
    "varying",
    "numeric",
    "decimal",
    "timestamp",
    "timestamptz",
    "time",
    "bit",
];

impl<'a> Linter<'a> {
    pub(super) fn alter(&mut self, words: &mut Words<'_, 'a>) {
        if words.skip("TYPE") {
            self.alter_type(words);
            return;
        }
        let is_table = words.skip("TABLE");
        if !is_table {
            if words.has("RENAME") && !words.begins(&["INDEX"]) && !words.begins(&["CONSTRAINT"]) {
                self.say(
                    Hazard::Breaks,
                    "a new name: code that runs now looks for the old one",
                );
            }
            return;
        }
        words.skip_all(&["IF", "EXISTS"]);
        words.skip("ONLY");
        let table = words.name();
        // `ALTER TABLE t * ...`
        if words.peek().is_some_and(|token| token.is_sign("*")) {
            words.next();
        }
        if !self.is_used(&table) {
            return;
        }
        for part in words.parts() {
            self.part(&table, part);
        }
    }

    fn alter_type(&mut self, words: &mut Words<'_, 'a>) {
        words.name();
        if words.begins(&["ADD", "VALUE"]) {
            let mut value = words.behind("VALUE").expect("it begins so");
            value.skip_all(&["IF", "NOT", "EXISTS"]);
            if let Some(value) = value.next().filter(|_| self.in_transaction) {
                self.added.push(value.text);
            }
        } else if words.begins(&["RENAME"]) {
            self.say(
                Hazard::Breaks,
                "a new name: code that runs now looks for the old one",
            );
        }
    }

    /// One of the things that are done to a table.
    fn part(&mut self, table: &str, mut words: Words<'_, 'a>) {
        if words.skip("ADD") {
            self.add(table, words);
        } else if words.skip("DROP") {
            if words.begins(&["CONSTRAINT"]) {
                return;
            }
            words.skip("COLUMN");
            words.skip_all(&["IF", "EXISTS"]);
            let column = words.name();
            self.say(
                Hazard::DataLoss,
                format!("DROP COLUMN: what {table}.{column} holds is gone, and code that runs now still asks for it"),
            );
        } else if words.skip("ALTER") {
            words.skip("COLUMN");
            let column = words.name();
            self.column(&format!("{table}.{column}"), words);
        } else if words.begins(&["RENAME", "CONSTRAINT"]) {
            // Nobody asks for constraints by name, or hardly anybody.
        } else if words.begins(&["RENAME"]) || words.begins(&["SET", "SCHEMA"]) {
            self.say(
                Hazard::Breaks,
                format!("{table} gets a new name, or a column of it: code that runs now looks for the old one"),
            );
        } else if words.skip("SET") {
            let moves = ["TABLESPACE", "LOGGED", "UNLOGGED", "ACCESS"];
            if moves.iter().any(|word| words.begins(&[word])) {
                self.say(
                    Hazard::Rewrite,
                    format!("{table} is written anew, and nobody can read it meanwhile"),
                );
            }
        } else if words.begins(&["ATTACH", "PARTITION"]) {
            self.say(
                Hazard::Lock,
                format!("ATTACH PARTITION reads the whole partition of {table} under a lock, unless a CHECK that was validated before says the same"),
            );
        } else if words.begins(&["DETACH", "PARTITION"]) && !words.has("CONCURRENTLY") {
            self.say(
                Hazard::Lock,
                format!("DETACH PARTITION keeps readers away from {table}; say CONCURRENTLY"),
            );
        }
    }

    fn column(&mut self, column: &str, words: Words<'_, 'a>) {
        if words.begins(&["TYPE"]) || words.begins(&["SET", "DATA", "TYPE"]) {
            self.say(
                Hazard::Rewrite,
                format!("a new type of {column} may have the whole table written anew, and nobody can read it meanwhile; add a column, fill it in batches, and switch"),
            );
        } else if words.begins(&["SET", "NOT", "NULL"]) {
            self.say(
                Hazard::Lock,
                format!("SET NOT NULL reads the whole table under an exclusive lock; add CHECK ({column} IS NOT NULL) NOT VALID and validate it first"),
            );
        }
    }

    fn add(&mut self, table: &str, mut words: Words<'_, 'a>) {
        let constraint = words.skip("CONSTRAINT");
        if constraint {
            words.name();
        }
        let kinds = ["FOREIGN", "CHECK", "UNIQUE", "PRIMARY", "EXCLUDE"];
        if constraint || kinds.iter().any(|kind| words.begins(&[kind])) {
            self.constraint(table, words);
            return;
        }
        words.skip("COLUMN");
        words.skip_all(&["IF", "NOT", "EXISTS"]);
        let column = format!("{table}.{}", words.name());
        self.new_column(&column, words);
    }

    fn constraint(&mut self, table: &str, words: Words<'_, 'a>) {
        let not_valid = words.has_all(&["NOT", "VALID"]);
        let what = if words.begins(&["FOREIGN"]) && !not_valid {
            "FOREIGN KEY holds up writers of both tables while all rows are checked; add it NOT VALID, \
             and VALIDATE CONSTRAINT in a later transaction"
        } else if words.begins(&["CHECK"]) && !not_valid {
            "CHECK reads all rows under an exclusive lock; add it NOT VALID, and VALIDATE CONSTRAINT \
             in a later transaction"
        } else if (words.begins(&["UNIQUE"]) || words.begins(&["PRIMARY"]))
            && !words.has_all(&["USING", "INDEX"])
        {
            "its index is built under an exclusive lock; CREATE UNIQUE INDEX CONCURRENTLY first, and \
             add the constraint USING INDEX"
        } else if words.begins(&["EXCLUDE"]) {
            "its index is built under an exclusive lock"
        } else {
            return;
        };
        self.say(Hazard::Lock, format!("{table}: {what}"));
    }

    fn new_column(&mut self, column: &str, words: Words<'_, 'a>) {
        let kind = words.peek().map(|token| token.text.to_lowercase());
        let serial = kind.is_some_and(|kind| {
            [
                "serial",
                "bigserial",
                "smallserial",
                "serial4",
                "serial8",
                "serial2",
            ]
            .contains(&kind.as_str())
        });
        let default = words.behind("DEFAULT");
        let called = default.and_then(|default| {
            let end = default.calls().find(|name| {
                !STABLE
                    .iter()
                    .any(|stable| stable.eq_ignore_ascii_case(name))
                    && !["CHECK", "REFERENCES", "KEY", "UNIQUE"]
                        .iter()
                        .any(|word| word.eq_ignore_ascii_case(name))
            });
            end.map(str::to_lowercase)
        });
        let stored = words.has("GENERATED");
        if let Some(function) = called {
            self.say(
                Hazard::Rewrite,
                format!("{column} gets the value of {function}() row by row: the table is written anew, and nobody can read it meanwhile; add it without, set the default, and fill it in batches"),
            );
        } else if serial || stored {
            self.say(
                Hazard::Rewrite,
                format!("{column} is computed for every row: the table is written anew, and nobody can read it meanwhile"),
            );
        } else if words.has_all(&["NOT", "NULL"]) && default.is_none() {
            self.say(
                Hazard::Fails,
                format!(
                    "{column} is NOT NULL without a DEFAULT: that fails if the table has a row"
                ),
            );
        }
        let checks = [
            (
                "REFERENCES",
                "holds up writers of both tables while the rows are checked; add the key NOT VALID in a step of its own",
            ),
            (
                "UNIQUE",
                "has its index built under an exclusive lock; build it CONCURRENTLY first",
            ),
            (
                "PRIMARY",
                "has its index built under an exclusive lock; build it CONCURRENTLY first",
            ),
            (
                "CHECK",
                "has all rows read under an exclusive lock; add the CHECK NOT VALID in a step of its own",
            ),
        ];
        for (word, what) in checks {
            if words.has_outside(word) {
                self.say(Hazard::Lock, format!("{column} {what}"));
            }
        }
    }
}
