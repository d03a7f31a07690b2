//! The programs that alembic's migrations are: their digest, and what in them no SQL can show.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use lockstep_proto::ids::Digest;
use lockstep_proto::report::{Cause, Failure};
use rustix::fs::OFlags;

use super::super::cli::Cli;
use crate::actions::files;
use crate::step::failure;

/// The largest program that is read, in bytes.
const MAX_SCRIPT: u64 = 1 << 20;

/// What in a program does something that `--sql` does not show, or shows otherwise.
const MARKS: &[(&str, &str)] = &[
    ("get_bind", "it talks to the database itself"),
    ("create_engine", "it talks to the database itself"),
    (
        "get_context().connection",
        "it talks to the database itself",
    ),
    ("Session(", "it talks to the database itself"),
    ("sessionmaker", "it talks to the database itself"),
    (
        "is_offline_mode",
        "it does something else when its SQL is shown",
    ),
    ("as_sql", "it does something else when its SQL is shown"),
    ("subprocess", "it starts other programs"),
    ("os.system", "it starts other programs"),
    ("os.popen", "it starts other programs"),
    ("urlopen", "it talks to other hosts"),
    ("requests", "it talks to other hosts"),
    ("httpx", "it talks to other hosts"),
    ("open(", "it reads or writes files"),
];

/// The migrations of a release, by revision, with their texts.
pub(super) struct Scripts {
    directory: PathBuf,
    by_revision: BTreeMap<String, (PathBuf, String)>,
    /// `alembic.ini` and `env.py`, which run with each of them.
    around: Vec<(PathBuf, String)>,
}

impl Scripts {
    /// Asks the tool for them, and reads them.
    pub(super) async fn of(cli: &Cli<'_>) -> Result<Self, Failure> {
        let directory = cli.directory().to_owned();
        let history = cli
            .ask("alembic history", &["history", "--verbose"])
            .await?;
        let mut by_revision = BTreeMap::new();
        let mut around = vec![directory.join("alembic.ini")];
        for (revision, path) in paths(&history) {
            let path = directory.join(path);
            if let Some(home) = path.parent().and_then(Path::parent) {
                around.push(home.join("env.py"));
            }
            let text = read(&path)?;
            by_revision.insert(revision.to_owned(), (path, text));
        }
        around.sort();
        around.dedup();
        around.retain(|path| path.exists());
        let around = around
            .into_iter()
            .map(|path| Ok((path.clone(), read(&path)?)));
        Ok(Self {
            directory,
            by_revision,
            around: around.collect::<Result<_, Failure>>()?,
        })
    }

    /// Digest of all of them.
    pub(super) fn digest(&self) -> Digest {
        let lines = self.by_revision.values().chain(&self.around);
        let lines = lines.map(|(path, text)| {
            let path = path.strip_prefix(&self.directory).unwrap_or(path);
            format!("{} {}\n", Digest::of(text.as_bytes()).hex(), path.display())
        });
        Digest::of(lines.collect::<String>().as_bytes())
    }

    /// What the programs behind some SQL do beside it: a sentence for each.
    pub(super) fn opaque(&self, sql: &str) -> Vec<String> {
        let running = sql.lines().filter_map(|line| {
            let (_, way) = line
                .strip_prefix("-- Running upgrade ")
                .or_else(|| line.strip_prefix("-- Running downgrade "))?
                .split_once("-> ")
                .map(|(from, to)| (line, (from.trim(), to.trim())))?;
            // The new one of an upgrade, the old one of a downgrade.
            Some(if line.contains("upgrade ") {
                way.1
            } else {
                way.0
            })
        });
        let mut found = Vec::new();
        for revision in running {
            let revision = revision.split([' ', ',']).next().unwrap_or_default();
            let Some((path, text)) = self.by_revision.get(revision) else {
                found.push(format!("{revision}: its program was not found"));
                continue;
            };
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            if let Some((mark, what)) = marks(text).next() {
                found.push(format!("{file}: {what} (`{mark}`)"));
            }
        }
        found
    }
}

/// The marks in a program, but for those in its comments.
fn marks(text: &str) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    let code: String = text
        .lines()
        .map(|line| line.split(" #").next().unwrap_or_default())
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect::<Vec<_>>()
        .join("\n");
    MARKS.iter().filter(move |(mark, _)| code.contains(mark))
}

/// Revisions and paths, as `alembic history --verbose` tells them.
fn paths(history: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    let mut revision = None;
    for line in history.lines() {
        if let Some(rest) = line.strip_prefix("Rev: ") {
            revision = rest.split_whitespace().next();
        } else if let (Some(path), Some(of)) = (line.strip_prefix("Path: "), revision) {
            found.push((of, path.trim()));
            revision = None;
        }
    }
    found
}

fn read(path: &Path) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let done = files::open(path, OFlags::empty())
        .and_then(|opened| opened.take(MAX_SCRIPT).read_to_end(&mut bytes));
    done.map_err(|error| {
        failure(
            Cause::Step,
            format!("cannot read {}: {error}", path.display()),
        )
    })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_sql_shows_is_called_by_its_name() {
        let script = |text: &str| (PathBuf::from("/r/v/x.py"), text.to_owned());
        let scripts = Scripts {
            directory: "/r".into(),
            by_revision: [
                (
                    "a".to_owned(),
                    script("op.execute('x')  # get_bind is not used"),
                ),
                ("b".to_owned(), script("bind = op.get_bind()")),
                ("c".to_owned(), script("import subprocess")),
            ]
            .into(),
            around: vec![],
        };
        let up = "BEGIN;\n-- Running upgrade  -> a\n-- Running upgrade a -> b\nCOMMIT;\n";
        assert_eq!(
            scripts.opaque(up),
            ["x.py: it talks to the database itself (`get_bind`)"]
        );
        let down = "-- Running downgrade c -> b\n";
        assert_eq!(
            scripts.opaque(down),
            ["x.py: it starts other programs (`subprocess`)"]
        );
        assert_eq!(
            scripts.opaque("-- Running upgrade c -> d"),
            ["d: its program was not found"]
        );
    }

    #[test]
    fn every_file_is_in_the_digest() {
        let scripts = |text: &str, env: &str| Scripts {
            directory: "/r".into(),
            by_revision: [(
                "a".to_owned(),
                (PathBuf::from("/r/v/a.py"), text.to_owned()),
            )]
            .into(),
            around: vec![("/r/env.py".into(), env.to_owned())],
        };
        let one = scripts("x", "y").digest();
        assert_eq!(one, scripts("x", "y").digest());
        assert_ne!(one, scripts("z", "y").digest());
        assert_ne!(one, scripts("x", "z").digest());
    }

    #[test]
    fn a_history_is_read() {
        let history = "Rev: b (head)\nParent: a\nPath: /r/v/b.py\n\n    text\n\nRev: a\nParent: \
                       <base>\nPath: /r/v/a.py\n";
        assert_eq!(paths(history), [("b", "/r/v/b.py"), ("a", "/r/v/a.py")]);
    }
}
