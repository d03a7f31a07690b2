//! What a way down drops: by what it says, and by what the migration has brought.

use std::collections::{BTreeMap, BTreeSet};

use crate::actions::postgres::written::{Column, Columns, Which};

/// Statements that drop no value but those of the table or column that they name.
const PLAIN: &[&str] = &[
    "BEGIN",
    "COMMIT",
    "SET ",
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

/// What the tools write into tables of their own.
const LEDGERS: &[&str] = &[
    "UPDATE ALEMBIC_VERSION ",
    "DELETE FROM ALEMBIC_VERSION ",
    "INSERT INTO ALEMBIC_VERSION ",
    "DROP TABLE ALEMBIC_VERSION",
];

/// The rows that a way down takes values of: those of tables and columns that are not as they were
/// before the migration, and those that its SQL names. Where it does anything else, or nobody knows
/// what it does, all.
pub(super) fn dropped(was: &Columns, is: &Columns, sql: Option<&str>) -> Which {
    let mut of = changed(was, is);
    let Some(sql) = sql else { return Which::All };
    for statement in statements(sql) {
        let upper = statement.to_uppercase();
        let is_one_of = |starts: &[&str]| starts.iter().any(|start| upper.starts_with(start));
        if is_one_of(LEDGERS) {
            continue;
        }
        if !is_one_of(PLAIN) || upper.contains("CASCADE") {
            return Which::All;
        }
        let Some(table) = altered(statement) else {
            continue;
        };
        if !is.contains_key(&table) {
            return Which::All;
        }
        // One that the migration has left alone is counted as a whole.
        of.entry(table).or_default();
    }
    Which::Of(of)
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

/// The table that a statement drops, or takes something of.
fn altered(statement: &str) -> Option<String> {
    let mut words = statement.split_whitespace();
    let verb = words.next()?.to_uppercase();
    if words.next()?.to_uppercase() != "TABLE" || verb == "CREATE" {
        return None;
    }
    let takes = |word: &str| ["DROP", "TYPE"].contains(&word.to_uppercase().as_str());
    if verb == "ALTER" && !statement.split_whitespace().any(takes) {
        return None;
    }
    let name =
        words.find(|word| !["IF", "EXISTS", "ONLY"].contains(&word.to_uppercase().as_str()))?;
    Some(name.strip_prefix("public.").unwrap_or(name).to_owned())
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
