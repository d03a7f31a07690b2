//! Power losses: what a disk may hold if the power goes between two syncs.
//!
//! ```text
//! the code under test:  power::before_sync(path); file.sync_data()?;    every sync, in tests only
//! the test:             Watch::begin(dir) ... acknowledge(n) ... end() -> moments
//! each moment:          cut(random, to) writes one of the states that the disk may be in
//! ```
//!
//! What was synced is there: a file's bytes once the file was, a name once its directory was. Of
//! everything else any block, length and name may be there or be missing, in any combination. A
//! sync that is left out, or comes too late, therefore shows as a loss.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;

thread_local! {
    static WATCH: RefCell<Option<State>> = const { RefCell::new(None) };
}

/// A file or directory, whatever its name: inode numbers are used again, times of birth are not.
type Node = (u64, Option<SystemTime>);

/// Contents by node.
#[derive(Debug, Clone, Default)]
struct Tree {
    files: BTreeMap<Node, Arc<Vec<u8>>>,
    directories: BTreeMap<Node, Arc<BTreeMap<OsString, Node>>>,
}

#[derive(Debug)]
struct State {
    root: PathBuf,
    durable: Tree,
    moments: Vec<Moment>,
    acknowledged: usize,
    /// Files whose names begin so are synced by others, before they get these names.
    synced_before_named: Option<&'static str>,
    /// A planted fault: syncs of this name do nothing.
    skipped: Option<&'static str>,
}

/// An instant at which the power may go.
#[derive(Debug, Clone)]
pub struct Moment {
    root: Node,
    durable: Tree,
    current: Tree,
    /// What was acknowledged by then, as the test counts it.
    pub acknowledged: usize,
}

/// A directory that is watched, on this thread.
#[derive(Debug)]
pub struct Watch(());

impl Watch {
    /// Begins to watch; what is there now is durable.
    pub fn begin(root: &Path) -> Self {
        let state = State {
            root: root.to_owned(),
            durable: Tree::read(root),
            moments: vec![],
            acknowledged: 0,
            synced_before_named: None,
            skipped: None,
        };
        WATCH.set(Some(state));
        Self(())
    }

    /// Says that others sync the files whose names begin so, before they give them these names.
    #[must_use]
    pub fn trusting(self, prefix: &'static str) -> Self {
        with(|state| state.synced_before_named = Some(prefix));
        self
    }

    /// Plants a fault: syncs of files and directories of this name do nothing. What a test finds
    /// then shows that it would find a sync that is left out.
    #[must_use]
    pub fn skipping(self, name: Option<&'static str>) -> Self {
        with(|state| state.skipped = name);
        self
    }

    /// From here on so much is acknowledged.
    pub fn acknowledge(&mut self, acknowledged: usize) {
        with(|state| {
            state.acknowledged = acknowledged;
            state.take_moment();
        });
    }

    /// The moments since the beginning, or since they were taken last.
    pub fn take(&mut self) -> Vec<Moment> {
        let mut moments = vec![];
        with(|state| moments = std::mem::take(&mut state.moments));
        moments
    }

    /// Every moment from the beginning to now.
    pub fn end(self) -> Vec<Moment> {
        with(|state| _ = state.take_moment());
        let state = WATCH.take();
        state.map(|state| state.moments).unwrap_or_default()
    }
}

fn with(then: impl FnOnce(&mut State)) {
    WATCH.with_borrow_mut(|state| state.as_mut().map(then));
}

/// A directory whose power goes now and then, on the thread that made it.
#[derive(Debug)]
pub struct Disk {
    root: PathBuf,
}

thread_local! {
    static DISKS: RefCell<BTreeMap<PathBuf, Tree>> = const { RefCell::new(BTreeMap::new()) };
}

impl Disk {
    /// A disk that begins with what is in a directory.
    pub fn new(root: &Path) -> Self {
        let durable = Tree::read(root);
        DISKS.with_borrow_mut(|disks| disks.insert(root.to_owned(), durable));
        Self {
            root: root.to_owned(),
        }
    }

    /// The power goes, and comes back: the directory holds one of the states that are possible.
    pub fn lose_power(&mut self, random: &mut StdRng) {
        let durable = DISKS.with_borrow_mut(|disks| disks.remove(&self.root));
        let moment = Moment {
            root: node(&self.root),
            durable: durable.expect("the disk is there as long as this"),
            current: Tree::read(&self.root),
            acknowledged: 0,
        };
        fs::remove_dir_all(&self.root).expect("a directory can be removed");
        fs::create_dir(&self.root).expect("a directory can be made");
        moment.cut(random, &self.root);
        let durable = Tree::read(&self.root);
        DISKS.with_borrow_mut(|disks| disks.insert(self.root.clone(), durable));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        DISKS.with_borrow_mut(|disks| disks.remove(&self.root));
    }
}

fn sync_on_disk(path: &Path) {
    DISKS.with_borrow_mut(|disks| {
        let mut disks = disks.iter_mut();
        let Some((_, durable)) = disks.find(|(root, _)| path.starts_with(root)) else {
            return;
        };
        let node = node(path);
        if path.is_dir() {
            let entries = fs::read_dir(path)
                .expect("a directory can be read")
                .flatten();
            let names = entries.map(|entry| (entry.file_name(), self::node(&entry.path())));
            durable.directories.insert(node, Arc::new(names.collect()));
        } else {
            let bytes = fs::read(path).expect("a file can be read");
            durable.files.insert(node, Arc::new(bytes));
        }
    });
}

/// A file or directory is about to be synced. Does nothing on threads that watch nothing.
pub fn before_sync(path: &Path) {
    sync_on_disk(path);
    with(|state| {
        if !path.starts_with(&state.root) {
            return;
        }
        let current = state.take_moment();
        let name = path.file_name();
        if name.is_some_and(|name| state.skipped.is_some_and(|skipped| name == skipped)) {
            return;
        }
        let node = node(path);
        if let Some(bytes) = current.files.get(&node) {
            state.durable.files.insert(node, Arc::clone(bytes));
        }
        if let Some(names) = current.directories.get(&node) {
            state.durable.directories.insert(node, Arc::clone(names));
        }
    });
}

impl State {
    /// The power may go now.
    fn take_moment(&mut self) -> Tree {
        let current = Tree::read(&self.root);
        if let Some(prefix) = self.synced_before_named {
            let names = current.directories.values().flat_map(|names| names.iter());
            for (name, node) in names {
                if name.to_string_lossy().starts_with(prefix)
                    && let Some(bytes) = current.files.get(node)
                {
                    self.durable.files.insert(*node, Arc::clone(bytes));
                }
            }
        }
        self.moments.push(Moment {
            root: node(&self.root),
            durable: self.durable.clone(),
            current: current.clone(),
            acknowledged: self.acknowledged,
        });
        current
    }
}

fn node(path: &Path) -> Node {
    let metadata = fs::symlink_metadata(path).expect("what is synced is there");
    (metadata.ino(), metadata.created().ok())
}

impl Tree {
    fn read(root: &Path) -> Self {
        let mut tree = Self::default();
        tree.add(root);
        tree
    }

    fn add(&mut self, path: &Path) -> Node {
        let node = node(path);
        if path.is_dir() {
            let mut names = BTreeMap::new();
            for entry in fs::read_dir(path).expect("a directory can be read") {
                let entry = entry.expect("a directory can be read");
                names.insert(entry.file_name(), self.add(&entry.path()));
            }
            self.directories.insert(node, Arc::new(names));
        } else {
            let bytes = fs::read(path).expect("a file can be read");
            self.files.insert(node, Arc::new(bytes));
        }
        node
    }
}

impl Moment {
    /// Writes one of the states that the disk may be in into an empty directory.
    pub fn cut(&self, random: &mut StdRng, to: &Path) {
        self.write(random, self.root, to);
    }

    fn write(&self, random: &mut StdRng, node: Node, to: &Path) {
        let nothing = Arc::default();
        let old = self.durable.directories.get(&node).unwrap_or(&nothing);
        let new = self.current.directories.get(&node).unwrap_or(old);
        let names: BTreeSet<&OsString> = old.keys().chain(new.keys()).collect();
        let mut left = vec![];
        for name in names {
            let (before, after) = (old.get(name), new.get(name));
            let chosen = if random.random_bool(0.5) {
                before
            } else {
                after
            };
            if let Some(chosen) = chosen {
                left.push((name, *chosen));
            }
        }
        for (name, node) in left {
            let path = to.join(name);
            let is_directory = self.current.directories.contains_key(&node)
                || self.durable.directories.contains_key(&node);
            if is_directory {
                fs::create_dir(&path).expect("a directory can be made");
                self.write(random, node, &path);
            } else {
                let durable = self.durable.files.get(&node).map_or(&[][..], |bytes| bytes);
                let current = self.current.files.get(&node).map_or(durable, |bytes| bytes);
                let bytes = between(random, durable, current);
                fs::write(&path, bytes).expect("a file can be written");
            }
        }
    }
}

/// A file between two syncs: any of its new blocks may be there, and any may be missing.
fn between(random: &mut StdRng, old: &[u8], new: &[u8]) -> Vec<u8> {
    if old == new {
        return old.to_vec();
    }
    // Disks write sectors; what they make of one when the power goes may be less.
    let block = *[16, 512, 4096].choose(random).expect("there are some");
    let longest = old.len().max(new.len());
    let length = match random.random_range(0..3) {
        0 => old.len(),
        1 => new.len(),
        _ => random.random_range(old.len().min(new.len())..=longest),
    };
    let mostly = random.random_range(0.0..=1.0);
    let mut bytes = vec![0; longest];
    let pieces = old.chunks(4096).zip(new.chunks(4096));
    let same = pieces.take_while(|(old, new)| old == new && old.len() == 4096);
    let changed = same.count() * 4096;
    bytes[..changed].copy_from_slice(&new[..changed]);
    for at in (changed..longest).step_by(block) {
        let from = if random.random_bool(mostly) { new } else { old };
        let end = from.len().min(at + block);
        if at < end {
            bytes[at..end].copy_from_slice(&from[at..end]);
        }
    }
    bytes.truncate(length);
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rand::SeedableRng as _;

    use super::*;

    /// All the states in which the disk may be at the end of `act`: names with contents.
    fn states(act: impl FnOnce(&Path)) -> BTreeSet<BTreeMap<String, String>> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("old"), "old").unwrap();
        let watch = Watch::begin(dir.path());
        act(dir.path());
        let moments = watch.end();
        let mut random = StdRng::seed_from_u64(1);
        let state = |_| {
            let to = tempfile::tempdir().unwrap();
            moments.last().unwrap().cut(&mut random, to.path());
            let files = fs::read_dir(to.path()).unwrap().map(|entry| {
                let entry = entry.unwrap();
                let text = fs::read_to_string(entry.path()).unwrap();
                (entry.file_name().into_string().unwrap(), text)
            });
            files.collect()
        };
        (0..200).map(state).collect()
    }

    fn files(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        files.iter().map(owned).collect()
    }

    fn sync(path: &Path) {
        before_sync(path);
        File::open(path).unwrap().sync_all().unwrap();
    }

    #[test]
    fn what_was_synced_is_there_and_the_rest_may_be() {
        let found = states(|dir| fs::write(dir.join("old"), "new").unwrap());
        assert!(found.contains(&files(&[("old", "old")])), "{found:?}");
        assert!(found.contains(&files(&[("old", "new")])), "{found:?}");
        let found = states(|dir| {
            fs::write(dir.join("old"), "new").unwrap();
            sync(&dir.join("old"));
        });
        assert_eq!(found, BTreeSet::from([files(&[("old", "new")])]));
    }

    #[test]
    fn a_name_is_there_once_its_directory_was_synced() {
        let found = states(|dir| {
            fs::write(dir.join("new"), "new").unwrap();
            sync(&dir.join("new"));
            fs::rename(dir.join("new"), dir.join("old")).unwrap();
        });
        let (before, after) = (files(&[("old", "old")]), files(&[("old", "new")]));
        assert_eq!(found, BTreeSet::from([before, after.clone()]));
        let found = states(|dir| {
            fs::write(dir.join("new"), "new").unwrap();
            sync(&dir.join("new"));
            fs::rename(dir.join("new"), dir.join("old")).unwrap();
            sync(dir);
        });
        assert_eq!(found, BTreeSet::from([after]));
    }
}
