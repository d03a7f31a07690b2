//! What alembic's migrations do that their rendered SQL does not show: they are programs.

use std::io::Read as _;
use std::path::Path;

use rustix::fs::OFlags;

use crate::actions::files;

/// The largest program that is read, in bytes.
const MAX_SCRIPT: u64 = 1 << 20;

/// What a program says that talks to the database itself, or does something else when its SQL is
/// only rendered.
const MARKS: &[&str] = &[
    "is_offline_mode",
    "as_sql",
    "get_bind",
    "get_context().connection",
    "create_engine",
    "Session(",
    "sessionmaker",
];

/// The programs behind some rendered SQL that do more than it shows: a sentence for each.
/// `history` is what `alembic history --verbose` says.
pub(super) fn opaque(directory: &Path, history: &str, sql: &str) -> Vec<String> {
    let mut found = vec![];
    for revision in sql.lines().filter_map(running) {
        let Some(text) = path(history, revision).and_then(|path| read(&directory.join(path)))
        else {
            found.push(format!("the program of {revision} cannot be read"));
            continue;
        };
        if let Some(mark) = MARKS.iter().find(|mark| text.contains(*mark)) {
            found.push(format!("the program of {revision} has `{mark}`"));
        }
    }
    found
}

/// The revision whose program a line announces: `-- Running downgrade 2 -> 1`.
fn running(line: &str) -> Option<&str> {
    let ways = line.strip_prefix("-- Running ")?;
    let (way, revisions) = ways.split_once(' ')?;
    let (from, to) = revisions.split_once("-> ")?;
    let of = if way == "upgrade" { to } else { from };
    of.split([' ', ',']).find(|word| !word.is_empty())
}

/// Where the program of a revision is.
fn path<'a>(history: &'a str, revision: &str) -> Option<&'a str> {
    let is_it = |line: &&str| {
        let named = line.strip_prefix("Rev: ");
        named.and_then(|rest| rest.split_whitespace().next()) == Some(revision)
    };
    let mut lines = history.lines().skip_while(|line| !is_it(line));
    lines
        .find_map(|line| line.strip_prefix("Path: "))
        .map(str::trim)
}

fn read(path: &Path) -> Option<String> {
    let mut bytes = vec![];
    let file = files::open(path, OFlags::empty()).ok()?;
    file.take(MAX_SCRIPT).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_more_than_its_sql_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("a.py", "op.execute('x')"), ("b.py", "op.get_bind()")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let history =
            "Rev: b (head)\nParent: a\nPath: b.py\n\nRev: a\nParent: <base>\nPath: a.py\n";
        let opaque = |sql: &str| opaque(dir.path(), history, sql);
        assert!(opaque("-- Running upgrade  -> a\n").is_empty());
        assert!(opaque("-- Running downgrade a -> \n").is_empty());
        for sql in [
            "-- Running upgrade a -> b\n",
            "-- Running downgrade b -> a\n",
        ] {
            assert_eq!(opaque(sql), ["the program of b has `get_bind`"]);
        }
        assert_eq!(
            opaque("-- Running upgrade b -> c\n"),
            ["the program of c cannot be read"]
        );
    }
}
