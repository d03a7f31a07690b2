//! Environment files of services: what would change, by name; written as a whole, and put back.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use lockstep_proto::action::env::{Diff, Render};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

use super::exec::app_of;
use super::files::{self, OrFailed as _};
use super::places::Place;
use super::{Act, Done, Probe};
use crate::process::User;
use crate::secrets::{Secret, named};
use crate::step::{Context, failure};

/// The first line of a rendered file.
const HEADER: &str = "# Written by Lockstep. The next rollout writes it anew.\n";

/// The largest file that is read, in bytes: systemd's own bound for a line is a quarter of it.
const MAX_BYTES: u64 = 4 << 20;

/// The old file's copy in the attempt's directory.
const COPY: &str = "env-before";

/// What an undo must know: never the content itself, for this stands in the journal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Before {
    /// There was no file.
    Absent,
    /// There was this file.
    File {
        /// The private copy.
        copy: PathBuf,
        /// Of content and permissions, under the host's salt.
        digest: Digest,
        mode: u32,
        user: u32,
        group: u32,
    },
}

fn parse_before(before: &Value) -> Result<Before, Failure> {
    serde_json::from_value(before.clone()).map_err(|error| {
        failure(
            Cause::Step,
            format!("the before-state cannot be read: {error}"),
        )
    })
}

/// A file as it is.
struct Found {
    content: Zeroizing<Vec<u8>>,
    mode: u32,
    user: u32,
    group: u32,
}

/// A file as it should be.
struct Wanted {
    content: Zeroizing<String>,
    mode: u32,
    owner: files::Owner,
}

/// Reads an environment file as systemd does: `#` and `;` begin a comment line, values may be
/// quoted, lines that are no assignment are passed over.
pub(crate) fn parse_env(text: &str) -> BTreeMap<String, Secret> {
    let mut env = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        rest = rest.trim_start();
        let line_end = rest.find(['\n', '\r']).unwrap_or(rest.len());
        let comment = rest.starts_with(['#', ';']);
        match rest[..line_end].split_once('=').filter(|_| !comment) {
            Some((name, _)) => {
                let (value, after) = parse_value(&rest[name.len() + 1..]);
                let name = name.trim();
                if is_name(name) {
                    env.insert(name.to_owned(), value.into());
                }
                rest = after;
            }
            None => rest = &rest[line_end..],
        }
    }
    env
}

/// Reads a value to the end of its line, or of the lines that quotes and backslashes join.
fn parse_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    // As far as this it stays when white space at the end is cut off: quoted space counts.
    let mut keep = 0;
    let mut quote = None;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match (quote, c) {
            (None, '\n' | '\r') => {
                value.truncate(keep.max(value.trim_end().len()));
                return (value, &text[at..]);
            }
            (None, '"' | '\'') if value.len() == keep || value.trim().is_empty() => quote = Some(c),
            (None, ' ' | '\t') if value.is_empty() => {}
            (Some(open), _) if c == open => {
                quote = None;
                keep = value.len();
            }
            (Some('\''), _) => value.push(c),
            (open, '\\') => match chars.next() {
                // A backslash at a line's end joins it with the next one.
                Some((_, '\n')) | None => {}
                Some((_, next)) => {
                    if open.is_some() && !NEED_ESCAPE.contains(next) {
                        value.push('\\');
                    }
                    value.push(next);
                    keep = value.len();
                }
            },
            _ => value.push(c),
        }
    }
    if quote.is_none() {
        value.truncate(keep.max(value.trim_end().len()));
    }
    (value, "")
}

/// What a backslash takes its meaning from between double quotes.
const NEED_ESCAPE: &str = "\"\\`$";

fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    chars
        .next()
        .is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Writes a value so that systemd, a shell and [`parse_env`] read the same.
fn quote(value: &str, text: &mut String) {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:@%+=,".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        text.push_str(value);
        return;
    }
    text.push('"');
    for c in value.chars() {
        if NEED_ESCAPE.contains(c) {
            text.push('\\');
        }
        text.push(c);
    }
    text.push('"');
}

/// The variables with their secrets.
async fn resolve(
    cx: &Context,
    set: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Secret>, Failure> {
    let mut resolved = BTreeMap::new();
    for (name, text) in set {
        if !is_name(name) {
            return Err(failure(
                Cause::Refused,
                format!("`{name}` cannot name a variable"),
            ));
        }
        let value = cx.secret(text).await?;
        if value.expose().contains(['\n', '\r', '\0']) {
            return Err(Failure {
                hint: Some("an environment file has one line for each variable".into()),
                ..failure(
                    Cause::Refused,
                    format!("the value of {name} has a line break or NUL in it"),
                )
            });
        }
        resolved.insert(name.clone(), value);
    }
    Ok(resolved)
}

fn render(variables: &BTreeMap<String, Secret>) -> Zeroizing<String> {
    // With all its room from the start: a text that grows leaves its content behind.
    let lines = variables.iter();
    let room = lines.map(|(name, value)| name.len() + 2 * value.expose().len() + 4);
    let mut text = Zeroizing::new(String::with_capacity(HEADER.len() + room.sum::<usize>()));
    text.push_str(HEADER);
    for (name, value) in variables {
        text.push_str(name);
        text.push('=');
        quote(value.expose(), &mut text);
        text.push('\n');
    }
    text
}

/// A path that can only mean one file.
fn checked_path(path: &str) -> Result<&Path, Failure> {
    let checked = Path::new(path);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if path.contains('\0')
        || path.ends_with('/')
        || !checked.is_absolute()
        || !checked.components().all(plain)
    {
        return Err(failure(
            Cause::Refused,
            format!("`{path}` is not an absolute path of a file"),
        ));
    }
    Ok(checked)
}

/// Where a file is, or would be. Its directory is held, so that it stays the one that was found.
struct Spot<'a> {
    path: &'a str,
    /// None if it does not exist.
    directory: Option<Place>,
}

impl<'a> Spot<'a> {
    fn of(cx: &Context, path: &'a str) -> Result<Self, Failure> {
        let parent = files::parent(checked_path(path)?);
        let directory = match Place::find(&cx.config, parent) {
            Ok(directory) => Some(directory),
            Err(error) if error.is_missing() => None,
            Err(error) => return Err(error.failed(&format!("use {path}"))),
        };
        Ok(Self { path, directory })
    }

    /// The file's path, within the directory that is held.
    fn file(&self) -> Option<PathBuf> {
        let name = Path::new(self.path).file_name()?;
        Some(self.directory.as_ref()?.path().join(name))
    }

    /// The same, to write it.
    fn writable(&self) -> Result<PathBuf, Failure> {
        let file = self.file().filter(|file| files::parent(file).is_dir());
        file.ok_or_else(|| no_directory(files::parent(Path::new(self.path))))
    }

    fn has_left_over(&self) -> bool {
        self.file().is_some_and(|file| files::has_left_over(&file))
    }

    fn remove_left_over(&self) -> Result<(), Failure> {
        let removed = self
            .file()
            .map_or(Ok(()), |file| files::remove_left_over(&file));
        removed.or_failed(|| format!("tidy up beside {}", self.path))
    }

    /// The file as it is; `None` if there is none.
    fn find(&self) -> Result<Option<Found>, Failure> {
        match self.file() {
            Some(file) => find(&file, self.path),
            None => Ok(None),
        }
    }
}

/// The file as it is; `None` if there is none.
fn find(file: &Path, path: &str) -> Result<Option<Found>, Failure> {
    let file = match files::open(file, rustix::fs::OFlags::NOFOLLOW) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Err(Failure {
                hint: Some("name the file that the link points at".into()),
                ..failure(Cause::Refused, format!("{path} is a symbolic link"))
            });
        }
        Err(error) => return Err(files::failed(format!("read {path}"), &error)),
    };
    read_found(&file)
        .or_failed(|| format!("read {path}"))
        .map(Some)
}

fn read_found(file: &File) -> std::io::Result<Found> {
    let metadata = file.metadata()?;
    if metadata.len() > MAX_BYTES {
        return Err(std::io::Error::other("not a file of a reasonable size"));
    }
    let mut content = Zeroizing::new(vec![]);
    file.take(MAX_BYTES).read_to_end(&mut content)?;
    let (user, group) = (metadata.uid(), metadata.gid());
    Ok(Found {
        content,
        mode: metadata.mode() & 0o7777,
        user,
        group,
    })
}

impl Found {
    /// A digest that tells nothing about the content to those who do not have the host's salt:
    /// the values of an environment file could be guessed from a bare one.
    fn digest(&self, cx: &Context) -> Result<Digest, Failure> {
        let Self {
            content,
            mode,
            user,
            group,
        } = self;
        let mut bytes = Zeroizing::new(salt(&cx.config.state_dir)?);
        bytes.extend(format!("{mode:o} {user} {group}\n").bytes());
        bytes.extend_from_slice(content);
        Ok(Digest::of(&bytes))
    }
}

/// The host's salt. Exec makes it: looks have it from then on, and write nothing there.
pub(crate) fn salt(state_dir: &Path) -> Result<Vec<u8>, Failure> {
    let path = state_dir.join("digest-salt");
    match std::fs::read(&path) {
        Ok(salt) if salt.len() == 32 => return Ok(salt),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(files::failed(format!("read {}", path.display()), &error)),
    }
    let salt: [u8; 32] = rand::random();
    files::write(&path, &salt, 0o600, None).or_failed(|| format!("write {}", path.display()))?;
    Ok(salt.to_vec())
}

/// Names that a file would gain, lose, and get another value for.
#[derive(Debug, PartialEq, Eq)]
struct Changes {
    added: Vec<String>,
    changed: Vec<String>,
    removed: Vec<String>,
}

impl Changes {
    fn between(old: &BTreeMap<String, Secret>, new: &BTreeMap<String, Secret>) -> Self {
        let names = |from: &BTreeMap<String, Secret>, pick: &dyn Fn(&str, &Secret) -> bool| {
            let picked = from.iter().filter(|(name, value)| pick(name, value));
            picked.map(|(name, _)| name.clone()).collect()
        };
        Self {
            added: names(new, &|name, _| !old.contains_key(name)),
            changed: names(new, &|name, value| {
                old.get(name).is_some_and(|old| old != value)
            }),
            removed: names(old, &|name, _| !new.contains_key(name)),
        }
    }

    fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }
}

impl std::fmt::Display for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_empty() {
            return f.write_str("no variable changes");
        }
        let Self {
            added,
            changed,
            removed,
        } = self;
        let parts = [("adds", added), ("changes", changed), ("removes", removed)];
        let parts = parts.iter().filter(|(_, names)| !names.is_empty());
        let parts: Vec<_> = parts
            .map(|(verb, names)| format!("{verb} {}", names.join(", ")))
            .collect();
        f.write_str(&parts.join("; "))
    }
}

async fn changes(
    cx: &Context,
    spot: &Spot<'_>,
    set: &BTreeMap<String, String>,
) -> Result<Changes, Failure> {
    let old = spot
        .find()?
        .map(|found| parse_env(&String::from_utf8_lossy(&found.content)));
    Ok(Changes::between(
        &old.unwrap_or_default(),
        &resolve(cx, set).await?,
    ))
}

impl Act for Diff {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let changes = changes(cx, &Spot::of(cx, &self.path)?, &self.set).await?;
        Ok(Probe::Present(format!("{}: {changes}", self.path)))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let changes = changes(cx, &Spot::of(cx, &self.path)?, &self.set).await?;
        let fact = Fact::Note {
            name: format!("env {}", self.path),
            value: changes.to_string(),
        };
        Ok(Done {
            changed: false,
            summary: format!("{}: {changes}", self.path),
            facts: vec![fact],
        })
    }

    fn describe(&self) -> String {
        format!("show which variables would change in {}", self.path)
    }
}

impl Wanted {
    async fn of(cx: &Context, act: &Render) -> Result<Self, Failure> {
        let mode = u32::from_str_radix(&act.mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o777);
        let Some(mode) = mode else {
            let message = format!("`{}` is no file mode such as 0600 or 0640", act.mode);
            return Err(failure(Cause::Refused, message));
        };
        let secret = act.set.values().any(|value| named(value).is_some());
        if secret && mode & 0o007 != 0 {
            let message = format!("{} holds secrets and everybody could read it", act.path);
            return Err(Failure {
                hint: Some("give it mode 0600, or 0640 with a group of its own".into()),
                ..failure(Cause::Refused, message)
            });
        }
        // Commands of an application read its files as its user.
        let app = || app_of(&cx.config, Path::new(&act.path))?.user.as_deref();
        let owner = act.owner.as_deref().or_else(app);
        let owner = match owner.map(User::find).transpose()? {
            Some(user) => (user.uid, user.gid),
            None => (
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
            ),
        };
        Ok(Self {
            content: render(&resolve(cx, &act.set).await?),
            mode,
            owner,
        })
    }

    fn is(&self, found: &Found) -> bool {
        found.content.as_slice() == self.content.as_bytes()
            && found.mode == self.mode
            && (found.user, found.group) == self.owner
    }
}

fn no_directory(parent: &Path) -> Failure {
    Failure {
        hint: Some("make it, owned by the application's user".into()),
        ..failure(
            Cause::Host,
            format!("there is no directory {}", parent.display()),
        )
    }
}

impl Act for Render {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let spot = Spot::of(cx, &self.path)?;
        let wanted = Wanted::of(cx, self).await?;
        Ok(match spot.find()? {
            None if cx.dry_run
                && let Err(no_directory) = spot.writable() =>
            {
                Probe::Unmet(no_directory)
            }
            None => Probe::Absent(format!(
                "creates {} with {} variables",
                self.path,
                self.set.len()
            )),
            Some(found) if wanted.is(&found) => {
                Probe::Present(format!("{} is as it should be", self.path))
            }
            Some(_) => Probe::Absent(format!(
                "{}: {}",
                self.path,
                changes(cx, &spot, &self.set).await?
            )),
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let before = match Spot::of(cx, &self.path)?.find()? {
            None => Before::Absent,
            Some(found) => {
                let copy = cx.dir.join(COPY);
                files::private_dir(&cx.dir)
                    .and_then(|()| files::write(&copy, &found.content, 0o600, None))
                    .or_failed(|| format!("keep a copy of {}", self.path))?;
                let digest = found.digest(cx)?;
                Before::File {
                    copy,
                    digest,
                    mode: found.mode,
                    user: found.user,
                    group: found.group,
                }
            }
        };
        Ok(serde_json::to_value(before).expect("a before-state has a JSON form"))
    }

    /// Without another copy: the one that was made is what an undo needs.
    async fn is_as_before(&self, cx: &Context, before: &Value) -> Result<bool, Failure> {
        let spot = Spot::of(cx, &self.path)?;
        if spot.has_left_over() {
            return Ok(false);
        }
        let now = spot.find()?;
        let now = now.map(|found| found.digest(cx)).transpose()?;
        Ok(match parse_before(before)? {
            Before::Absent => now.is_none(),
            Before::File { digest, .. } => now == Some(digest),
        })
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let spot = Spot::of(cx, &self.path)?;
        let wanted = Wanted::of(cx, self).await?;
        spot.remove_left_over()?;
        if spot.find()?.is_some_and(|found| wanted.is(&found)) {
            return Ok(Done {
                summary: format!("{} was as it should be", self.path),
                ..Done::default()
            });
        }
        let changes = changes(cx, &spot, &self.set).await?;
        files::write(
            &spot.writable()?,
            wanted.content.as_bytes(),
            wanted.mode,
            Some(wanted.owner),
        )
        .or_failed(|| format!("write {}", self.path))
        .map_err(|failure| Failure {
            // It may be in place, and only not be durable.
            changed: spot
                .find()
                .map_or(true, |found| found.is_some_and(|is| wanted.is(&is))),
            ..failure
        })?;
        let fact = Fact::Note {
            name: format!("env {}", self.path),
            value: changes.to_string(),
        };
        Ok(Done {
            changed: true,
            summary: format!("{} written: {changes}", self.path),
            facts: vec![fact],
        })
    }

    async fn undo(&self, cx: &Context, before: &Value) -> Result<Done, Failure> {
        let spot = Spot::of(cx, &self.path)?;
        spot.remove_left_over()?;
        match parse_before(before)? {
            Before::Absent => {
                let changed = spot.find()?.is_some();
                let removed = spot.file().map_or(Ok(()), |file| files::remove(&file));
                removed.or_failed(|| format!("remove {}", self.path))?;
                Ok(Done {
                    changed,
                    summary: format!("{} is gone again", self.path),
                    facts: vec![],
                })
            }
            Before::File {
                copy,
                digest,
                mode,
                user,
                group,
            } => {
                let content =
                    std::fs::read(&copy).or_failed(|| format!("read {}", copy.display()))?;
                let content = Zeroizing::new(content);
                let old = Found {
                    content,
                    mode,
                    user,
                    group,
                };
                if old.digest(cx)? != digest {
                    return Err(Failure {
                        hint: Some(format!("put {} back by hand", self.path)),
                        ..failure(
                            Cause::Host,
                            format!("{} is not the copy that was made", copy.display()),
                        )
                    });
                }
                let now = spot.find()?.map(|found| found.digest(cx)).transpose()?;
                let changed = now != Some(digest);
                if changed {
                    files::write(&spot.writable()?, &old.content, mode, Some((user, group)))
                        .or_failed(|| format!("write {}", self.path))?;
                }
                Ok(Done {
                    changed,
                    summary: format!("{} is as before", self.path),
                    facts: vec![],
                })
            }
        }
    }

    fn describe(&self) -> String {
        format!("write {} variables to {}", self.set.len(), self.path)
    }

    async fn state(&self, cx: &Context) -> Result<Vec<Fact>, Failure> {
        let (digest, text) = match Spot::of(cx, &self.path)?.find()? {
            None => (Digest::of(b"absent"), "absent".to_owned()),
            Some(found) => {
                let text = format!("mode {:04o}, {} bytes", found.mode, found.content.len());
                (found.digest(cx)?, text)
            }
        };
        Ok(vec![Fact::State {
            name: format!("file {}", self.path),
            digest,
            text,
        }])
    }
}

#[cfg(test)]
mod tests;
