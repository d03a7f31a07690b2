//! What there is on a host, as text that is equal if and only if the host is: files, the service,
//! databases, and how often each thing was done.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::Result;
use lockstep_proto::ids::Digest;

use super::lab::Lab;

/// The parts of a host, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct World {
    /// What a person would compare.
    pub(super) state: BTreeMap<String, String>,
    /// How often things were done, counted by who suffered them.
    pub(super) counts: BTreeMap<String, u64>,
    /// What is another one when it is made again: numbers of files, tokens, databases' numbers.
    pub(super) identity: BTreeMap<String, String>,
    /// What should not be there: temporary files, private directories, sessions.
    pub(super) left_over: Vec<String>,
}

impl World {
    /// Looks at a host whose agent is idle.
    pub(super) fn look(lab: &Lab) -> Result<Self> {
        let mut world = Self::default();
        world.files(&lab.path("world"), "")?;
        world.backups(lab);
        world.private(lab);
        world.service(lab);
        world.ledgers(lab);
        world.databases(lab)?;
        let things = format!("{} left", lab.things.count());
        world.state.insert("things".into(), things);
        Ok(world)
    }

    fn files(&mut self, dir: &Path, name: &str) -> Result<()> {
        let mut entries: Vec<_> = fs::read_dir(dir)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let file = entry.file_name().to_string_lossy().into_owned();
            let (path, name) = (entry.path(), format!("{name}/{file}"));
            let meta = fs::symlink_metadata(&path)?;
            let mode = meta.permissions().mode() & 0o7777;
            if is_temporary(&file) {
                self.left_over.push(name.clone());
            }
            let what = if meta.is_symlink() {
                format!("-> {}", fs::read_link(&path)?.display())
            } else if meta.is_dir() {
                format!("directory {mode:o}")
            } else {
                let text = Lab::neutral(&String::from_utf8_lossy(&fs::read(&path)?));
                format!("{mode:o} {}", Digest::of(text.as_bytes()).short())
            };
            self.state.insert(format!("file {name}"), what);
            // A release and its parts, the link, a rendered file: each is put in place once. Notes
            // are written again as a build goes on.
            if !file.starts_with(".lockstep") && !name.starts_with("/ledger") {
                let identity = meta.ino().to_string();
                self.identity.insert(format!("file {name}"), identity);
            }
            // git's own files differ from fetch to fetch.
            if meta.is_dir() && file == ".mirror" {
                self.mirror(&path)?;
            } else if meta.is_dir() {
                self.files(&path, &name)?;
            }
        }
        Ok(())
    }

    fn mirror(&mut self, path: &Path) -> Result<()> {
        for entry in fs::read_dir(path)? {
            let file = entry?.file_name().to_string_lossy().into_owned();
            if file.starts_with("index-") {
                self.left_over.push(format!(".mirror/{file}"));
            }
        }
        Ok(())
    }

    fn backups(&mut self, lab: &Lab) {
        for root in ["backups", "copies"] {
            for entry in fs::read_dir(lab.path(root)).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if is_temporary(&name) {
                    self.left_over.push(format!("{root}/{name}"));
                    continue;
                }
                // `<database>-<time>-<step key>`; the time is the run's own.
                let mut parts = name.splitn(3, '-');
                let (database, key) = (parts.next(), parts.nth(1));
                let key = Lab::neutral(key.unwrap_or_default());
                let stable = format!("{root}/{}-{key}", database.unwrap_or_default());
                let mut files: Vec<_> = fs::read_dir(entry.path())
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|file| file.file_name().to_string_lossy().into_owned())
                    .collect();
                files.sort();
                self.left_over.extend(
                    files
                        .iter()
                        .filter(|file| is_temporary(file))
                        .map(|file| format!("{stable}/{file}")),
                );
                *self.counts.entry(stable.clone()).or_default() += 1;
                self.identity.insert(stable.clone(), name);
                self.state.insert(stable, files.join(" "));
            }
        }
    }

    /// What the agent keeps to itself while something runs.
    fn private(&mut self, lab: &Lab) {
        let any: fn(&str) -> bool = |_| true;
        let halves: fn(&str) -> bool = |name| is_temporary(name) || name.ends_with(".steps.json");
        let boots: fn(&str) -> bool = |name| name.starts_with("boot.");
        let places = [
            ("run/private", any),
            ("state/steps", any),
            ("state/plans", halves),
            ("run", boots),
        ];
        for (dir, is_left) in places {
            let entries = fs::read_dir(lab.path(dir)).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let left = names.filter(|name| is_left(name));
            self.left_over
                .extend(left.map(|name| format!("{dir}/{name}")));
        }
    }

    fn service(&mut self, lab: &Lab) {
        let runs = lab.processes();
        let service = |line: &&String| line.contains("/service.py");
        let count = runs.iter().filter(service).count();
        self.state.insert("service".into(), format!("runs {count}"));
        let note = fs::read_to_string(lab.path("run/services/web.json")).unwrap_or_default();
        // One that was ended on its way, with its step process, was not made.
        if count > 0 {
            self.identity.insert("service".into(), note);
        }
        let others = runs.iter().filter(|line| !service(line));
        self.left_over.extend(others.cloned());
    }

    /// The append-only files of the service, the application's server and the commands.
    fn ledgers(&mut self, lab: &Lab) {
        for name in ["service", "commands", "requests"] {
            let file = lab.path(&format!("ledger.{name}"));
            for line in fs::read_to_string(file).unwrap_or_default().lines() {
                *self.counts.entry(format!("{name}: {line}")).or_default() += 1;
            }
        }
    }

    fn databases(&mut self, lab: &Lab) -> Result<()> {
        if !lab.has_database {
            return Ok(());
        }
        for line in lab.look_at_databases()?.lines() {
            let mut parts = line.splitn(3, '|');
            let (kind, name) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
            let (name, value) = (Lab::neutral(name), parts.next().unwrap_or(""));
            match kind {
                "count" => {
                    self.counts.insert(name, value.parse().unwrap_or(u64::MAX));
                }
                "identity" => {
                    self.identity.insert(name, value.to_owned());
                }
                "left" => self.left_over.push(format!("{name} {value}")),
                _ => {
                    self.state.insert(name, Lab::neutral(value));
                }
            }
        }
        Ok(())
    }

    /// How this host differs from one where the same was done without any kill.
    pub(super) fn differences(&self, from: &Self) -> Vec<String> {
        let mut lines = vec![];
        let names: std::collections::BTreeSet<_> =
            self.state.keys().chain(from.state.keys()).collect();
        for name in names {
            let (is, should) = (self.state.get(name), from.state.get(name));
            if is != should {
                let none = "nothing".to_owned();
                let (is, should) = (is.unwrap_or(&none), should.unwrap_or(&none));
                lines.push(format!("{name}: {is}, should be {should}"));
            }
        }
        lines
    }

    /// What an attempt had made already, and a later one made anew: `before` is the host before
    /// both, `then` between them.
    pub(super) fn made_again(&self, before: &Self, then: &Self) -> Vec<String> {
        let mut lines = vec![];
        for (name, was) in &then.identity {
            if before.identity.get(name) != Some(was)
                && let Some(is) = self.identity.get(name)
                && is != was
            {
                lines.push(format!("{name} was made again ({was}, then {is})"));
            }
        }
        lines
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.state {
            let _ = writeln!(text, "{name}: {value}");
        }
        for (name, count) in &self.counts {
            let _ = writeln!(text, "{name}: {count} times");
        }
        text
    }
}

fn is_temporary(name: &str) -> bool {
    let random = |tail: &str| tail.len() == 16 && tail.bytes().all(|b| b.is_ascii_hexdigit());
    name.rsplit_once(".lockstep-")
        .is_some_and(|(_, tail)| random(tail))
        || name.starts_with(".partial-")
        || name.starts_with(".removed-")
        || Path::new(name)
            .extension()
            .is_some_and(|ending| ["partial", "tmp", "new"].iter().any(|it| ending == *it))
}
