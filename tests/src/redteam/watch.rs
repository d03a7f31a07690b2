//! What has changed, seen from outside: the files of watched directories before and after.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lockstep_proto::ids::Digest;

/// One file, directory or link.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    mode: u32,
    owner: (u32, u32),
    /// Of the content, or of a link's target.
    digest: Digest,
}

/// Directories and what was in them when they were looked at last.
#[derive(Debug)]
pub(super) struct Watch {
    roots: Vec<PathBuf>,
    /// What the agent writes for itself.
    except: Vec<PathBuf>,
    seen: BTreeMap<PathBuf, Entry>,
}

impl Watch {
    pub(super) fn begin(roots: Vec<PathBuf>, except: Vec<PathBuf>) -> Self {
        let mut watch = Self {
            roots,
            except,
            seen: BTreeMap::new(),
        };
        watch.seen = watch.look();
        watch
    }

    /// What has changed since the last look: the paths, in order.
    pub(super) fn changes(&mut self) -> Vec<PathBuf> {
        let now = self.look();
        let paths = self.seen.keys().chain(now.keys());
        let mut changed: Vec<PathBuf> = paths
            .filter(|path| self.seen.get(*path) != now.get(*path))
            .cloned()
            .collect();
        changed.sort();
        changed.dedup();
        self.seen = now;
        changed
    }

    fn look(&self) -> BTreeMap<PathBuf, Entry> {
        let mut found = BTreeMap::new();
        for root in &self.roots {
            self.look_at(root, &mut found);
        }
        found
    }

    fn look_at(&self, path: &Path, found: &mut BTreeMap<PathBuf, Entry>) {
        if self.except.iter().any(|except| except == path) {
            return;
        }
        let Ok(metadata) = path.symlink_metadata() else {
            return;
        };
        let content = if metadata.is_symlink() {
            let target = fs::read_link(path).unwrap_or_default();
            target.to_string_lossy().into_owned().into_bytes()
        } else if metadata.is_file() {
            fs::read(path).unwrap_or_default()
        } else {
            vec![]
        };
        let entry = Entry {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            digest: Digest::of(&content),
        };
        found.insert(path.to_owned(), entry);
        if metadata.is_dir() {
            for inside in fs::read_dir(path).into_iter().flatten().flatten() {
                self.look_at(&inside.path(), found);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_changes_is_seen_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["same", "content", "mode", "gone", "own"] {
            fs::write(at(name), "a").unwrap();
        }
        fs::create_dir(at("dir")).unwrap();
        std::os::unix::fs::symlink("same", at("link")).unwrap();
        let mut watch = Watch::begin(vec![dir.path().to_owned()], vec![at("own")]);
        assert!(watch.changes().is_empty());
        for name in ["content", "own", "dir/new"] {
            fs::write(at(name), "b").unwrap();
        }
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(at("mode"), open).unwrap();
        fs::remove_file(at("gone")).unwrap();
        fs::remove_file(at("link")).unwrap();
        std::os::unix::fs::symlink("mode", at("link")).unwrap();
        let expected = ["content", "dir/new", "gone", "link", "mode"].map(at);
        assert_eq!(watch.changes(), expected);
        assert!(watch.changes().is_empty());
    }
}
