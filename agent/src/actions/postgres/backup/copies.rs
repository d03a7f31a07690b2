//! Copies of a backup, and whether they are still there.

use std::fs;
use std::path::Path;

use lockstep_proto::action::postgres::CopyTo;
use lockstep_proto::ids::Digest;
use lockstep_proto::report::{Cause, Failure};

use super::super::archive::{self, ARCHIVE, Dir, archive_in};
use super::super::human;
use super::super::manifest::{self, MANIFEST, Manifest, Store, blocking};
use super::{sent, stored};
use crate::actions::places::Place;
use crate::faults::reached;
use crate::step::{Context, hinted};

/// A directory for copies is made by people: one that is missing may be a volume that is not
/// mounted.
pub(in crate::actions::postgres) fn find_copy_directory(
    cx: &Context,
    directory: &Path,
) -> Result<Place, Failure> {
    let what = || format!("keep copies in {}", directory.display());
    match Place::find(&cx.config, directory) {
        Ok(place) if place.path().is_dir() => Ok(place),
        Err(error) if !error.is_missing() => Err(error.failed(&what())),
        _ => Err(hinted(
            Cause::Host,
            format!(
                "the directory for copies {} is not there",
                directory.display()
            ),
            "create it, or mount its volume",
        )),
    }
}

/// Copies a backup into a directory, and reads the copy to see that it is equal.
pub(super) async fn copy(
    cx: &Context,
    store: &Store,
    made: &Manifest,
    to: &Path,
) -> Result<(), Failure> {
    let place = find_copy_directory(cx, to)?;
    let to = to.display().to_string();
    let (id, from, expected) = (made.id.clone(), store.path(&made.id), made.digest);
    let beside = made.beside();
    let what = format!("cannot copy the backup to {to}");
    let copied = blocking(&what, move || {
        // The path itself is a link, of the kernel's.
        let within = Dir::open(&place.path().join("."))?;
        let partial = format!("{id}{}", manifest::PARTIAL);
        let has = |name: &str| Ok(archive::digest(&archive_in(&within.path(name)))?.0 == expected);
        if within.path(&id).is_dir() && has(&id)? {
            return Ok(true);
        }
        for stale in [within.path(&partial), within.path(&id)] {
            if stale.symlink_metadata().is_ok() {
                fs::remove_dir_all(stale)?;
            }
        }
        reached("copy: to be made");
        let equal = archive::copy(&from, &within, &partial, &beside)
            .inspect(|()| reached("copy: made"))
            .and_then(|()| has(&partial))
            .and_then(|equal| {
                if equal {
                    fs::rename(within.path(&partial), within.path(&id))?;
                    reached("copy: named");
                    within.sync()?;
                }
                Ok(equal)
            });
        if !matches!(equal, Ok(true)) {
            let _ = fs::remove_dir_all(within.path(&partial));
        }
        equal
    });
    if copied.await? {
        cx.log.line(&format!("copied to {to}, digest equal"));
        return Ok(());
    }
    Err(hinted(
        Cause::Host,
        format!("the copy of the backup in {to} is not equal to it"),
        "check that volume: it does not give back what was written",
    ))
}

/// Reads the copies of a backup, which is in the directory `at`, again: what was equal once may be gone, or be another by now.
pub(in crate::actions::postgres) async fn check(
    cx: &Context,
    at: &Path,
    made: &Manifest,
) -> Result<(), Failure> {
    for to in &made.copies {
        let directory = match to {
            CopyTo::Directory(directory) => directory,
            CopyTo::Command(command) => {
                check_owned(made)?;
                sent::check(cx, at, made, command).await?;
                continue;
            }
            CopyTo::Store(store) => {
                check_owned(made)?;
                Box::pin(stored::check(cx, at, made, store)).await?;
                continue;
            }
        };
        let place = find_copy_directory(cx, Path::new(directory))?;
        let (id, expected) = (made.id.clone(), (made.digest, made.size));
        let is_equal = move || {
            let within = Dir::open(&place.path().join("."))?;
            match archive::digest(&archive_in(&within.path(&id))) {
                Ok(found) => Ok(Some(found == expected)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        };
        let what = format!("cannot read the copy of the backup in {directory}");
        let why = match blocking(&what, is_equal).await? {
            Some(true) => continue,
            Some(false) => "is not equal to it any more",
            None => "is lost",
        };
        return Err(hinted(
            Cause::CheckUnmet,
            format!("the copy of {} in {directory} {why}", made.id),
            "take a new backup, and see what has happened to that volume",
        ));
    }
    Ok(())
}

/// What runs as the agent, or with its secrets, is taken from a manifest that the agent has written:
/// the backup's directory is `os_user`'s, who could put another one there.
fn check_owned(made: &Manifest) -> Result<(), Failure> {
    if made.is_own {
        return Ok(());
    }
    Err(hinted(
        Cause::Host,
        format!(
            "the {MANIFEST} of {} belongs to another user than the agent, so the commands and \
             requests for its copies are not believed",
            made.id
        ),
        "see who has changed it; take a new backup, or give it back to the agent with chown",
    ))
}

/// The files of a backup, in the order in which they are sent.
pub(super) fn files(made: &Manifest) -> Vec<&'static str> {
    let mut beside = made.beside();
    beside.reverse();
    std::iter::once(ARCHIVE).chain(beside).collect()
}

/// The digest and size that a file of a backup has.
pub(super) async fn expected(
    directory: &Path,
    made: &Manifest,
    name: &'static str,
) -> Result<(Digest, u64), Failure> {
    if name == ARCHIVE {
        return Ok((made.digest, made.size));
    }
    let directory = directory.to_owned();
    blocking("cannot read the backup", move || {
        archive::digest_beside(&directory, name)
    })
    .await
}

/// How what came back differs from what was sent, in words.
pub(super) fn differs(found: (Digest, u64), sent: (Digest, u64)) -> Option<String> {
    let words = || {
        let ((found, of), (sent, size)) = (found, sent);
        let (of, size) = (human(of), human(size));
        let (found, sent) = (found.short(), sent.short());
        format!("comes back as {found} ({of}), and is {sent} ({size})")
    };
    (found != sent).then(words)
}
