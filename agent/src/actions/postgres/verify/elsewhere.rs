//! Another host's backup, by its copy in a directory that this host has too.
//!
//! Whoever can write there could change archive and manifest together. So both are held against
//! what the rollout says of the backup, and a proof never says more of it than that: which bytes,
//! when, behind which fence.

use std::path::{Path, PathBuf};

use lockstep_proto::action::postgres::{Aspect, Level, VerifyBackup};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};

use super::super::backup::copies::find_copy_directory;
use super::super::manifest::Manifest;
use crate::actions::bound;
use crate::process::User;
use crate::sql::{Database, Session, can_enter};
use crate::step::{Context, hinted};

/// The copy of the rollout's newest backup: its manifest, the digest that it must have, and where it
/// is.
pub(super) fn find(
    cx: &Context,
    database: &Database,
    from: &Path,
) -> Result<(Manifest, Digest, PathBuf), Failure> {
    let named = bound(&cx.bindings, |fact| match fact {
        Fact::Backup {
            database: of,
            id,
            digest,
            size,
            taken_at,
            fence,
        } if *of == database.name => Some((id, *digest, *size, *taken_at, fence)),
        _ => None,
    });
    let Some((id, digest, size, taken_at, fence)) = named else {
        return Err(hinted(
            Cause::Refused,
            format!(
                "nobody has told this host which backup of `{}` this rollout has made",
                database.name
            ),
            "put `postgres.backup` before this step",
        ));
    };
    let place = find_copy_directory(cx, from)?;
    let (held, at) = (place.path().join("."), from.join(id));
    if !held.join(id).is_dir() {
        return Err(hinted(
            Cause::CheckUnmet,
            format!("there is no copy of {id} in {}", from.display()),
            "let `copies` of `postgres.backup` name the volume that this host has there",
        ));
    }
    let of_this = |made: &Manifest| {
        let is = (made.digest, made.size, made.taken_at, &made.fence);
        made.id == *id && is == (digest, size, taken_at, fence)
    };
    let made = Manifest::read(&held.join(id), &database.name).filter(of_this);
    let made = made.filter(|made| made.key.rollout == cx.key.rollout);
    let made = made.ok_or_else(|| {
        hinted(
            Cause::CheckUnmet,
            format!(
                "the manifest in {} is missing, or not that of the backup that this rollout has \
                 made",
                at.display()
            ),
            "take a new backup, and see who writes there",
        )
    })?;
    let user = database.config.os_user.as_deref().map(User::find);
    let user = user.transpose()?.filter(|user| !user.is_self());
    if let Some(user) = user.filter(|user| !can_enter(user, &at)) {
        return Err(hinted(
            Cause::Host,
            format!("{} cannot get to the copy in {}", user.name, at.display()),
            "leave `os_user` out here, so that the agent itself restores, or mount the volume so \
             that this user may read it",
        ));
    }
    Ok((made, digest, at))
}

/// Schemas and checksums are as a server of one major version prints them.
pub(super) fn check_version(
    act: &VerifyBackup,
    session: &Session,
    made: &Manifest,
) -> Result<(), Failure> {
    let (here, there) = (session.major(), made.server_version / 10_000);
    let alike = [Aspect::Schema, Aspect::Checksums];
    let compares = act.level >= Level::Equal && alike.iter().any(|it| act.compare.contains(it));
    if here == there || !compares {
        return Ok(());
    }
    Err(hinted(
        Cause::Refused,
        format!(
            "the backup is of a server of version {there}, and the one here is of version {here}: \
             they print schemas differently"
        ),
        "restore on a server of the same version, or ask for level 3",
    ))
}

#[cfg(test)]
mod tests;
