//! Other names that things have on this host: aliases of units, and paths that lead to the same file
//! through symbolic links. Rules that deny hold for all of them; what `*` stands for in a rule that
//! allows leads nowhere else.
//!
//! It is what the host says at the moment of the question. A link that is made afterwards, a second
//! hard link, a mount, a copy, and a path that stands inside a longer word (`--file=/x`) are not
//! seen: what must never be done is better not allowed than denied.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::matching::{glob, pieces, plain};
use crate::process::base_env;

/// Where systemd looks for units, the first of a name winning.
const UNITS: [&str; 7] = [
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// A chain of links is not longer on any host, but by mistake or malice.
const LINKS: usize = 16;

/// Where other names are looked for.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) units: Vec<PathBuf>,
    pub(super) programs: Vec<PathBuf>,
}

impl Default for Names {
    fn default() -> Self {
        let path = base_env(None)
            .into_iter()
            .find_map(|(name, value)| (name == "PATH").then_some(value));
        Self {
            units: UNITS.map(PathBuf::from).into(),
            programs: std::env::split_paths(&path.unwrap_or_default()).collect(),
        }
    }
}

impl Names {
    /// All names that a unit has: the one that is asked for, and those of the links to it.
    pub(super) fn of_unit(&self, service: &str) -> BTreeSet<String> {
        let mut names = BTreeSet::from([service.to_owned()]);
        if service.contains('/') {
            return names;
        }
        let meant = self.unit_meant(&with_suffix(service));
        let linked = self.units.iter().flat_map(std::fs::read_dir).flatten();
        for entry in linked.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
                continue;
            }
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            // A link to a template is a name for each of its instances.
            let name = match (template(&name), instance(&meant)) {
                (Some((stem, suffix)), Some(instance)) => format!("{stem}@{instance}{suffix}"),
                _ => name,
            };
            if self.unit_meant(&name) == meant {
                names.insert(name);
            }
        }
        names.insert(meant);
        names
    }

    /// The unit that a name stands for, where the links of its name end.
    fn unit_meant(&self, name: &str) -> String {
        let mut name = name.to_owned();
        for _ in 0..LINKS {
            let Some(target) = self.linked_unit(&name) else {
                break;
            };
            name = target;
        }
        name
    }

    fn linked_unit(&self, name: &str) -> Option<String> {
        let read = |file: &str| {
            let found = self.units.iter().map(|units| units.join(file));
            let first = found
                .into_iter()
                .find(|path| path.symlink_metadata().is_ok())?;
            let target = std::fs::read_link(first).ok()?;
            let target = target.file_name()?.to_str()?.to_owned();
            // A link to a file of another name is an alias; one to /dev/null masks the unit.
            (target != file && target.contains('.')).then_some(target)
        };
        if let Some(target) = read(name) {
            return Some(target);
        }
        let instance = instance(name)?;
        let (stem, _) = name.split_once('@')?;
        let (_, suffix) = name.rsplit_once('.')?;
        let target = read(&format!("{stem}@.{suffix}"))?;
        let (stem, suffix) = template(&target)?;
        Some(format!("{stem}@{instance}{suffix}"))
    }

    /// Whether a text may stand for a file that a pattern names. A pattern is followed as far as it
    /// has no `*`; a bare name is that of a program.
    pub(super) fn are_same_file(&self, pattern: &str, text: &str) -> bool {
        if !pattern.starts_with('/') && !text.starts_with('/') {
            return false;
        }
        let of_pattern = self.places_of_pattern(pattern);
        let of_text = self.places(text);
        of_text.iter().any(|text| {
            let mut patterns = of_pattern.iter().map(String::as_str);
            glob(pattern, text) || patterns.any(|pattern| glob(pattern, text))
        })
    }

    /// Where a path leads, or where the program of that name is.
    fn places(&self, text: &str) -> Vec<String> {
        let paths: Vec<PathBuf> = match text {
            "" => vec![],
            text if text.starts_with('/') => vec![PathBuf::from(plain(text))],
            text if text.contains('/') => vec![],
            name => self.program(name).into_iter().collect(),
        };
        let both = paths.into_iter().flat_map(|path| [real(&path), path]);
        both.map(|path| path.to_string_lossy().into_owned())
            .collect()
    }

    fn places_of_pattern(&self, pattern: &str) -> Vec<String> {
        if let [literal] = &pieces(pattern)[..] {
            return self.places(literal);
        }
        let Some((head, _)) = pattern.split_once('*') else {
            return vec![];
        };
        // As far as the last directory before the first `*`.
        let Some(at) = head.rfind('/').filter(|_| head.starts_with('/')) else {
            return vec![];
        };
        let (directory, rest) = pattern.split_at(at);
        let directory = real(Path::new(if at == 0 { "/" } else { directory }));
        let directory = directory.to_string_lossy();
        vec![format!("{}{rest}", directory.trim_end_matches('/'))]
    }

    fn program(&self, name: &str) -> Option<PathBuf> {
        let mut places = self.programs.iter().map(|directory| directory.join(name));
        places.find(|path| path.is_file())
    }
}

/// Whether a path leads, through symbolic links, out of the directory that a pattern names before its
/// first `*`. What is named without one is meant, wherever it leads.
pub(super) fn leads_away(pattern: &str, text: &str) -> bool {
    let pieces = pieces(pattern);
    let [head, _, ..] = &pieces[..] else {
        return false;
    };
    let Some(at) = head.rfind('/').filter(|_| head.starts_with('/')) else {
        return false;
    };
    let directory = real(Path::new(&head[..at.max(1)]));
    text.starts_with('/') && !real(Path::new(&plain(text))).starts_with(directory)
}

/// Where a path leads, as far as it exists.
fn real(path: &Path) -> PathBuf {
    for parent in path.ancestors() {
        if let Ok(real) = parent.canonicalize() {
            let rest = path.strip_prefix(parent).expect("it is one of its parents");
            return if rest.as_os_str().is_empty() {
                real
            } else {
                real.join(rest)
            };
        }
    }
    path.to_owned()
}

fn with_suffix(service: &str) -> String {
    const TYPES: [&str; 11] = [
        ".service",
        ".socket",
        ".device",
        ".mount",
        ".automount",
        ".swap",
        ".target",
        ".path",
        ".timer",
        ".slice",
        ".scope",
    ];
    if TYPES.iter().any(|suffix| service.ends_with(suffix)) {
        return service.to_owned();
    }
    format!("{service}.service")
}

/// `x` of `name@x.service`; none if it is no instance.
fn instance(name: &str) -> Option<&str> {
    let (_, after) = name.split_once('@')?;
    let (instance, _) = after.rsplit_once('.')?;
    (!instance.is_empty()).then_some(instance)
}

/// `name` and `.service` of `name@.service`.
fn template(name: &str) -> Option<(&str, &str)> {
    let (stem, suffix) = name.split_once('@')?;
    suffix.starts_with('.').then_some((stem, suffix))
}

#[cfg(test)]
mod tests;
