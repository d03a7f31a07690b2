//! What a way down drops: by what it says, and by what the migration has brought.

use std::collections::{BTreeMap, BTreeSet};

use crate::actions::postgres::look::Tally;
use crate::actions::postgres::written::{Column, Columns, LEDGERS, Which};

/// Statements that drop no value but those of the table or column that they name.
const PLAIN: &[&str] = &[
    "BEGIN",
    "COMMIT",
    "COMMENT ON ",
    "ALTER TABLE ",
    "ALTER INDEX ",
    "ALTER SEQUENCE ",
    "CREATE TABLE ",
    "CREATE INDEX ",
    "CREATE UNIQUE INDEX ",
    "CREATE SEQUENCE ",
    "CREATE TYPE ",
    "CREATE VIEW ",
    "DROP TABLE ",
    "DROP INDEX ",
    "DROP SEQUENCE ",
    "DROP TYPE ",
    "DROP VIEW ",
];

/// The rows that a way down takes values of: those of tables and columns that are not as they were
/// before the migration, and those that its SQL names. Where it does anything else, or nobody knows
/// what it does, all.
pub(super) fn dropped(was: &Columns, is: &Columns, sql: Option<&str>) -> Which {
    let mut of = changed(was, is);
    let Some(sql) = sql else { return Which::All };
    let mut renamed = false;
    for statement in statements(sql) {
        let upper = statement.to_uppercase();
        let is_one_of = |starts: &[&str]| starts.iter().any(|start| upper.starts_with(start));
        if is_of_ledger(&upper) || is_limit(&upper) {
            continue;
        }
        let unread = ["CASCADE", "/*", "--"]
            .iter()
            .any(|part| upper.contains(part));
        if !is_one_of(PLAIN) || unread {
            return Which::All;
        }
        if let Some((table, takes)) = altered(statement) {
            // Behind a renaming the names are no longer those that there are now.
            if renamed || !is_the_only(is, &table) {
                return Which::All;
            }
            let counted = of.get(&table);
            let by_column = match &takes {
                Takes::All => false,
                Takes::Columns(columns) => {
                    counted.is_some_and(|counted| columns.iter().all(|name| counted.contains(name)))
                }
            };
            if !by_column {
                // Values go that were there before, too: all of its rows are meant.
                of.insert(table, BTreeSet::new());
            }
        }
        renamed |= words(&upper).any(|word| ["RENAME", "SCHEMA"].contains(&word));
    }
    Which::Of(of)
}

/// Whether a statement only changes, or drops, what a tool writes down.
fn is_of_ledger(upper: &str) -> bool {
    let is_ledger = |name: &str| {
        let name = name.strip_prefix("PUBLIC.").unwrap_or(name);
        LEDGERS
            .iter()
            .any(|ledger| ledger.eq_ignore_ascii_case(name))
    };
    if let Some(name) = upper.strip_prefix("DROP TABLE ") {
        return is_ledger(name.trim());
    }
    let written = ["UPDATE ", "DELETE FROM ", "INSERT INTO "];
    let rest = written.iter().find_map(|verb| upper.strip_prefix(verb));
    let name = rest.and_then(|rest| rest.split_whitespace().next());
    name.is_some_and(is_ledger)
}

/// Whether a statement only limits how long others may take. One that sets the search path, or the
/// role, changes what their names mean.
fn is_limit(upper: &str) -> bool {
    let mut words = upper.split_whitespace();
    let name = (words.next() == Some("SET"))
        .then(|| words.find(|word| !["LOCAL", "SESSION"].contains(word)));
    name.flatten()
        .is_some_and(|name| name.ends_with("_TIMEOUT"))
}

/// Whether a name means one table, whatever the search path is.
fn is_the_only(is: &Columns, table: &str) -> bool {
    let elsewhere = format!(".{table}");
    is.contains_key(table) && !is.keys().any(|other| other.ends_with(&elsewhere))
}

/// The tables and columns that there are now and were not, or otherwise. A new table has no
/// columns here: all of its rows are meant.
fn changed(was: &Columns, is: &Columns) -> BTreeMap<String, BTreeSet<String>> {
    let mut of = BTreeMap::new();
    for (table, columns) in is {
        let Some(old) = was.get(table) else {
            of.insert(table.clone(), BTreeSet::new());
            continue;
        };
        let other = |(name, column): &(&String, &Column)| {
            old.get(*name).is_none_or(|old| old.kind != column.kind)
        };
        let other: BTreeSet<String> = columns
            .iter()
            .filter(other)
            .map(|(name, _)| name.clone())
            .collect();
        if !other.is_empty() {
            of.insert(table.clone(), other);
        }
    }
    of
}

/// The statements of a script, without comments. A semicolon in a text makes two of one: the second
/// is none that is known.
fn statements(sql: &str) -> Vec<&str> {
    let without_comments = |statement| {
        let mut rest = str::trim(statement);
        while rest.starts_with("--") {
            rest = rest.split_once('\n').map_or("", |(_, rest)| rest).trim();
        }
        rest
    };
    let statements = sql.split(';').map(without_comments);
    statements.filter(|rest| !rest.is_empty()).collect()
}

/// What a statement takes of a table.
enum Takes {
    All,
    /// These columns.
    Columns(Vec<String>),
}

/// The table that a statement drops, or takes something of.
fn altered(statement: &str) -> Option<(String, Takes)> {
    let mut rest = statement.split_whitespace();
    let verb = rest.next()?.to_uppercase();
    if rest.next()?.to_uppercase() != "TABLE" || verb == "CREATE" {
        return None;
    }
    let takes = if verb == "DROP" {
        Takes::All
    } else {
        let columns = taken_columns(statement);
        if columns.is_empty() {
            return None;
        }
        Takes::Columns(columns)
    };
    let is_name = |word: &&str| !["IF", "EXISTS", "ONLY"].contains(&word.to_uppercase().as_str());
    let name = rest.find(is_name)?;
    let name = name.strip_prefix("public.").unwrap_or(name);
    // Of several tables, or with a word after it that is not known, it is none that there is.
    let more = rest.filter(|word| word.to_uppercase() != "RESTRICT");
    let name = match (verb.as_str(), more.count()) {
        ("DROP", 1..) => String::new(),
        _ => name.to_owned(),
    };
    Some((name, takes))
}

/// The columns that an `ALTER TABLE` drops or gives another type. What is none, like the default in
/// `ALTER COLUMN a DROP DEFAULT`, is left out where no column can have that name.
fn taken_columns(statement: &str) -> Vec<String> {
    let words: Vec<&str> = words(statement).collect();
    let upper: Vec<String> = words.iter().map(|word| word.to_uppercase()).collect();
    let mut columns = vec![];
    for (at, word) in upper.iter().enumerate() {
        let skip = |from: usize, some: &[&str]| {
            let known = upper[from..].iter();
            from + known
                .take_while(|word| some.contains(&word.as_str()))
                .count()
        };
        let name = match word.as_str() {
            "DROP" => {
                let next = skip(at + 1, &["COLUMN", "IF", "EXISTS"]);
                let no_column = ["CONSTRAINT", "DEFAULT", "NOT"];
                if upper
                    .get(next)
                    .is_some_and(|word| no_column.contains(&word.as_str()))
                {
                    continue;
                }
                words.get(next)
            }
            // `ALTER [COLUMN] a [SET DATA] TYPE ..`
            "TYPE" => {
                let before = upper[..at].strip_suffix(&["SET".to_owned(), "DATA".to_owned()]);
                let before = before.map_or(at, <[String]>::len);
                before.checked_sub(1).map(|at| &words[at])
            }
            _ => continue,
        };
        columns.push(name.map_or_else(String::new, |name| plain_name(name)));
    }
    columns
}

/// The words of a statement, quoted ones with their quotes.
fn words(statement: &str) -> impl Iterator<Item = &str> {
    let parts = statement.split(|c: char| !(c.is_alphanumeric() || "_$\"".contains(c)));
    parts.filter(|word| !word.is_empty())
}

/// A name as the catalogue has it.
fn plain_name(word: &str) -> String {
    let quoted = word
        .strip_prefix('"')
        .and_then(|word| word.strip_suffix('"'));
    quoted.map_or_else(|| word.to_lowercase(), str::to_owned)
}

/// What the release of before would miss, or could not give, in words: it can go on only with a
/// schema to which things were added.
pub(super) fn in_the_way(was: &Columns, is: &Columns) -> Vec<String> {
    let mut found = vec![];
    for (table, old) in was {
        let Some(new) = is.get(table) else {
            found.push(format!("{table} is gone"));
            continue;
        };
        for (name, column) in old {
            match new.get(name) {
                None => found.push(format!("{table}.{name} is gone")),
                Some(now) if now.kind != column.kind => found.push(format!(
                    "{table}.{name} is {}, and was {}",
                    now.kind, column.kind
                )),
                Some(now) if now.required && !column.required => {
                    found.push(format!("{table}.{name} must be given now"));
                }
                Some(_) => {}
            }
        }
        let new = new.iter().filter(|(name, _)| !old.contains_key(*name));
        let required = new.filter(|(_, column)| column.required);
        found.extend(required.map(|(name, _)| format!("{table}.{name} must be given")));
    }
    found
}

/// How the columns differ from those of before, in words.
pub(super) fn differs(was: &Columns, is: &Columns) -> Vec<String> {
    let mut found = in_the_way(was, is);
    let new = changed(was, is).into_iter().map(|(table, columns)| {
        let columns: Vec<String> = columns.into_iter().collect();
        match columns.as_slice() {
            [] => format!("{table} is new"),
            columns => format!("{table} has other columns ({})", columns.join(", ")),
        }
    });
    found.extend(new);
    found
}

/// The tables that have fewer rows, in words. Of those that are gone, or could not be counted,
/// nothing is said.
pub(super) fn fewer(was: &Tally, is: &Tally) -> Vec<String> {
    let fell = |(table, was): (&String, &u64)| {
        let is = is.get(table).filter(|is| *is < was)?;
        Some(format!("{table} has {is} rows, and had {was}"))
    };
    was.iter().filter_map(fell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `users.id:int users.name:text!`, where `!` marks what must be given.
    fn schema(text: &str) -> Columns {
        let mut columns = Columns::new();
        for word in text.split_whitespace() {
            let (place, kind) = word.rsplit_once(':').unwrap();
            let (table, name) = place.rsplit_once('.').unwrap();
            let column = Column {
                kind: kind.trim_end_matches('!').to_owned(),
                required: kind.ends_with('!'),
            };
            let table = columns.entry(table.to_owned()).or_default();
            table.insert(name.to_owned(), column);
        }
        columns
    }

    fn of(text: &str) -> Which {
        let mut of: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for word in text.split_whitespace() {
            let (table, columns) = word.split_once(':').unwrap();
            let columns = columns.split(',').filter(|name| !name.is_empty());
            of.insert(table.to_owned(), columns.map(str::to_owned).collect());
        }
        Which::Of(of)
    }

    const WAS: &str = "users.id:int users.name:text notes.id:int";
    const IS: &str = "users.id:bigint users.name:text users.born:date notes.id:int tags.id:int";

    fn drops(sql: &str) -> Which {
        dropped(&schema(WAS), &schema(IS), Some(sql))
    }

    #[test]
    fn a_plain_way_down_takes_what_the_migration_brought() {
        let sql = "BEGIN;\n-- Running downgrade 2 -> 1\nDROP TABLE tags;\nDROP INDEX i;\n\
                   ALTER TABLE users DROP COLUMN born;\n\
                   UPDATE alembic_version SET version_num='1' WHERE alembic_version.version_num = '2';\n\
                   COMMIT;\n";
        assert_eq!(drops(sql), of("tags: users:born,id"));
        assert_eq!(drops("BEGIN;\nCOMMIT;"), of("tags: users:born,id"));
    }

    #[test]
    fn what_else_it_takes_is_counted_too() {
        for sql in [
            "ALTER TABLE notes DROP COLUMN id;",
            "ALTER TABLE IF EXISTS ONLY public.notes ALTER COLUMN id TYPE int;",
            "DROP TABLE notes;",
        ] {
            assert_eq!(drops(sql), of("notes: tags: users:born,id"), "{sql}");
        }
        // It adds something.
        let sql = "ALTER TABLE notes ADD COLUMN x int; CREATE TABLE y (a int);";
        assert_eq!(drops(sql), of("tags: users:born,id"));
    }

    #[test]
    fn what_was_there_before_and_goes_with_what_is_new_is_counted_too() {
        let was = schema("users.id:int users.a:text");
        // The table was put aside, and made again with one column more.
        let is = schema("users.id:int users.a:text users.note:text users_old.id:int");
        let drops = |is: &Columns, sql: &str| dropped(&was, is, Some(sql));
        let swap = "DROP TABLE users; ALTER TABLE users_old RENAME TO users;";
        assert_eq!(drops(&is, swap), of("users: users_old:"), "INV-6");
        // A column was put aside, and made again with the same type.
        let is = schema("users.id:int users.a:text users.b:text users.Note:text");
        for (sql, expected) in [
            ("ALTER TABLE users DROP COLUMN a;", "users:"),
            (
                "ALTER TABLE users DROP COLUMN IF EXISTS b, DROP a;",
                "users:",
            ),
            (
                "ALTER TABLE users ADD x numeric(1,0),DROP COLUMN a;",
                "users:",
            ),
            ("ALTER TABLE users ALTER a SET DATA TYPE int;", "users:"),
            ("ALTER TABLE users DROP COLUMN \"B\";", "users:"),
            (
                "ALTER TABLE users DROP COLUMN B, DROP \"Note\";",
                "users:b,Note",
            ),
            ("ALTER TABLE users ALTER COLUMN b TYPE int;", "users:b,Note"),
            ("ALTER TABLE users ALTER b DROP NOT NULL;", "users:b,Note"),
            (
                "ALTER TABLE users DROP CONSTRAINT c, DROP b;",
                "users:b,Note",
            ),
        ] {
            assert_eq!(drops(&is, sql), of(expected), "INV-6: {sql}");
        }
        // What is dropped is called otherwise now.
        let sql = "ALTER TABLE users RENAME b TO c; ALTER TABLE users RENAME a TO b; \
                   ALTER TABLE users DROP COLUMN b;";
        assert_eq!(drops(&is, sql), Which::All);
    }

    #[test]
    fn a_name_that_may_mean_another_table_is_everything() {
        let is = schema("users.id:int hr.users.id:int notes.id:int");
        let drops = |sql: &str| dropped(&Columns::new(), &is, Some(sql));
        let all = of("users: hr.users: notes:");
        let limits = "SET lock_timeout = 5; SET LOCAL statement_timeout = '1min';";
        assert_eq!(drops(limits), all);
        assert_eq!(
            drops("DROP TABLE notes RESTRICT; DROP TABLE hr.users;"),
            all
        );
        for sql in [
            "SET search_path TO hr; DROP TABLE notes;",
            "SET LOCAL search_path = hr;",
            "SET ROLE other;",
            "DROP TABLE users;",
            "DROP TABLE notes, hr.users;",
            "DROP TABLE notes ,hr.users;",
            "ALTER TABLE notes DROP /* x */ COLUMN id;",
        ] {
            assert_eq!(drops(sql), Which::All, "INV-6: {sql}");
        }
    }

    #[test]
    fn what_the_tools_write_down_is_nobodys_row() {
        let (was, is) = (schema(WAS), schema(IS));
        let new = dropped(&was, &is, Some(""));
        for sql in [
            "UPDATE alembic_version SET version_num = 'a';",
            "DROP TABLE alembic_version;",
            "-- migrations/1_a.down.sql\nDELETE FROM public._sqlx_migrations WHERE version = 1;",
            "DELETE FROM public.__diesel_schema_migrations WHERE version = '1';",
            "DELETE FROM public.lockstep_schema_migrations WHERE name = '1';\n\
             DROP TABLE public.lockstep_schema_migrations;",
        ] {
            assert_eq!(dropped(&was, &is, Some(sql)), new, "{sql}");
        }
        assert_ne!(new, Which::All);
        for sql in [
            "DROP TABLE alembic_version, notes;",
            "DELETE FROM other._sqlx_migrations;",
            "DELETE FROM _sqlx_migrations_of_mine;",
        ] {
            assert_eq!(dropped(&was, &is, Some(sql)), Which::All, "INV-6: {sql}");
        }
    }

    #[test]
    fn what_nobody_can_tell_is_everything() {
        for sql in [
            "DELETE FROM notes WHERE id > 3;",
            "TRUNCATE notes;",
            "DROP SCHEMA hr;",
            "DROP TYPE mood CASCADE;",
            "DO $$ BEGIN; END $$;",
            "DROP TABLE measurements;",
            "ALTER TABLE notes ADD CHECK (a <> ';DELETE');",
        ] {
            assert_eq!(drops(sql), Which::All, "{sql}");
        }
        assert_eq!(dropped(&schema(WAS), &schema(IS), None), Which::All);
    }

    #[test]
    fn a_schema_is_kept_only_if_things_were_added() {
        let was = schema("users.id:int users.name:text old.id:int");
        let kept = schema("users.id:int users.name:text users.born:date old.id:int new.id:int!");
        assert_eq!(in_the_way(&was, &kept), Vec::<String>::new());
        let other = schema("users.id:bigint users.name:text! users.born:date!");
        let expected = [
            "old is gone",
            "users.id is bigint, and was int",
            "users.name must be given now",
            "users.born must be given",
        ];
        assert_eq!(in_the_way(&was, &other), expected);
        let less = schema("users.id:int old.id:int");
        assert_eq!(in_the_way(&was, &less), ["users.name is gone"]);
    }
}
