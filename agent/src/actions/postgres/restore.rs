//! `postgres.restore`: the backup goes into a new database, which then takes the old one's name.
//!
//! ```text
//! <db>                  the live one, until the swap
//! <db>__restore_<id>    the new one, until the swap
//! <db>__failed_<id>     the old one, after the swap; it is kept
//! <db>__restored_<id>   what the swap brought, after an undo; it is kept
//! ```
//!
//! Where an attempt was interrupted can be read from the names that exist.

use lockstep_proto::action::postgres::{Aspect, Level, Restore};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::archive::archive_in;
use super::manifest::{Manifest, Store};
use super::scratch::Rights;
use super::tools::Tools;
use super::written::{self, Ledgers, Moment, Which};
use super::{fence, look::Tally, scratch};
use crate::actions::{Act, Done, Probe, bound, loss};
use crate::sql::{Database, Session, ident, literal};
use crate::step::{Context, changed, hinted};

use self::names::{Names, There};
use self::swap::{allow, aside, is_open, swap};

mod names;
mod swap;

impl Act for Restore {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        if cx.dry_run {
            aside(cx, &database).await?;
            return Ok(Probe::Unmet(super::look::no_backup(&self.database)));
        }
        let session = aside(cx, &database).await?;
        session.end_left_over(cx).await?;
        let names = Names::of(cx, &database);
        let there = There::look(&session, &names).await?;
        let kept = &names.failed;
        Ok(match there {
            There {
                live: true,
                failed: true,
                ..
            } => Probe::Present(format!(
                "`{}` was restored; the old one is {kept}",
                self.database
            )),
            There {
                live: true,
                failed: false,
                ..
            } if is_open(&session, &names.live).await? => {
                let new = &names.new;
                if scratch::exists(&session, new).await? {
                    Probe::Partial(format!("{new} is there, and may not be complete"))
                } else {
                    Probe::Absent(self.describe())
                }
            }
            _ => Probe::Partial(format!("the swap of `{}` was interrupted", self.database)),
        })
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let names = Names::of(cx, &database);
        let aside = aside(cx, &database).await?;
        aside.end_left_over(cx).await?;
        let there = There::look(&aside, &names).await?;
        if there.swapped() {
            allow(&aside, &names.live, true).await.map_err(changed)?;
            return Ok(done(self, &names, None));
        }
        if there.undone {
            return Err(hinted(
                Cause::Refused,
                format!(
                    "this restore of `{}` was undone: {} is its result",
                    self.database, names.undone
                ),
                "start another rollout to restore again",
            ));
        }
        allow(&aside, &names.live, true).await?;
        let (made, _) = bring(cx, &database, &names, &aside, None).await?;
        Ok(done(self, &names, Some(&made)))
    }

    async fn undo(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let names = Names::of(cx, &database);
        let aside = aside(cx, &database).await?;
        aside.end_left_over(cx).await?;
        let there = There::look(&aside, &names).await?;
        let swapped = there.swapped();
        if swapped {
            let swapped = swap(&aside, &names.live, &names.failed, &names.undone).await;
            swapped.map_err(changed)?;
        }
        let of_undo = |failure: Failure| Failure {
            changed: failure.changed || swapped,
            ..failure
        };
        let opened = allow(&aside, &names.live, true).await;
        opened.map_err(of_undo)?;
        let dropped = scratch::drop(&aside, &names.new).await;
        dropped.map_err(of_undo)?;
        let name = &self.database;
        let summary = match (swapped, there.undone) {
            (true, _) => format!(
                "`{name}` is the old one again; the restored one is {}",
                names.undone
            ),
            (false, true) => format!("`{name}` is the old one already"),
            (false, false) => format!("`{name}` was not replaced"),
        };
        Ok(Done {
            changed: swapped,
            summary,
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        format!(
            "restores `{}` from its verified backup into a new database",
            self.database
        )
    }
}

/// What there was when a migration was through, behind the fence that its backup was taken behind.
#[derive(Debug, Clone)]
pub(crate) struct Baseline {
    /// When.
    pub(crate) moment: Option<Moment>,
    /// The rows of all tables.
    pub(crate) rows: Tally,
    /// What migration tools had written down; only a recovery asks for it.
    pub(crate) ledgers: Option<Ledgers>,
}

/// Refuses unless a backup that could bring a database back is on this host.
pub(crate) fn is_at_hand(cx: &Context, name: &str) -> Result<(), Failure> {
    let database = Database::find(cx, name)?;
    verified(cx, &Store::of(cx, &database), name).map(|_| ())
}

/// Opens a database that an undo of this step has closed for its swap, and drops what such an undo
/// has left half filled. Returns the newest of the old databases that were kept.
pub(crate) async fn tidy(cx: &Context, name: &str) -> Result<Option<String>, Failure> {
    let database = Database::find(cx, name)?;
    let aside = aside(cx, &database).await?;
    aside.end_left_over(cx).await?;
    let mut kept = None;
    for number in 1..=cx.key.attempt {
        let names = Names::of_undo(cx, &database, number);
        let there = There::look(&aside, &names).await?;
        if there.failed || scratch::exists(&aside, &names.new).await? {
            allow(&aside, &names.live, true).await?;
            scratch::drop(&aside, &names.new).await?;
        }
        if there.failed {
            kept = Some(names.failed);
        }
    }
    Ok(kept)
}

/// The revisions in the backup that would bring a database back, as the backup's own tables say.
pub(crate) fn revisions_of_backup(cx: &Context, name: &str) -> Result<Vec<String>, Failure> {
    let database = Database::find(cx, name)?;
    let (made, _) = verified(cx, &Store::of(cx, &database), name)?;
    Ok(made.revisions)
}

/// Whether a database has the schema of the backup that would bring it back, and what it held, if
/// that is asked for.
pub(crate) async fn is_as_backup(
    cx: &Context,
    name: &str,
    session: &Session,
    contents: bool,
) -> Result<bool, Failure> {
    let database = Database::find(cx, name)?;
    let (made, _) = verified(cx, &Store::of(cx, &database), name)?;
    let tools = Tools::new(cx, &database, session.major()).await?;
    let mut aspects = vec![Aspect::Schema];
    aspects.extend(contents.then_some(Aspect::Checksums));
    let dbname = database.dbname();
    let differences = scratch::differences(cx, &database, &tools, &made, dbname, &aspects).await?;
    for line in &differences {
        cx.log.line(line);
    }
    Ok(differences.is_empty())
}

/// A migration's way back by the backup: it takes the database's place, and the migrated one is
/// kept. Returns its name, and what a person has accepted to lose.
pub(crate) async fn return_to_backup(
    cx: &Context,
    name: &str,
    since: Option<&Baseline>,
) -> Result<(String, Option<Fact>), Failure> {
    let database = Database::find(cx, name)?;
    let aside = aside(cx, &database).await?;
    let names = Names::of_undo(cx, &database, cx.key.attempt);
    let (_, accepted) = bring(cx, &database, &names, &aside, since).await?;
    Ok((names.failed, accepted))
}

/// Fills a new database with the verified backup and puts it in the place of the live one.
async fn bring(
    cx: &Context,
    database: &Database,
    names: &Names,
    aside: &Session,
    since: Option<&Baseline>,
) -> Result<(Manifest, Option<Fact>), Failure> {
    let store = Store::of(cx, database);
    let (made, digest) = verified(cx, &store, &database.name)?;
    let session = database.connect(cx).await?;
    held(cx, &session, &made, since).await?;
    scratch::check_digest(&store.path(&made.id), &made, digest).await?;
    scratch::check_room(&session, database).await?;
    scratch::drop(aside, &names.new).await?;
    scratch::create(&session, &names.new).await?;
    let filled = fill(cx, database, &session, &store, &made, names).await;
    // A fence that fell while the restore ran has let rows in.
    let filled = match filled {
        Ok(()) => held(cx, &session, &made, since).await,
        Err(failure) => Err(failure),
    };
    drop(session);
    let accepted = match filled {
        Ok(accepted) => accepted,
        Err(failure) => {
            let dropped = scratch::drop(aside, &names.new).await;
            // Only the new database was touched. One that could not be dropped is left to the undo.
            return Err(Failure {
                changed: dropped.is_err(),
                ..failure
            });
        }
    };
    swap(aside, &names.live, &names.new, &names.failed)
        .await
        .map_err(changed)?;
    Ok((made, accepted))
}

fn done(act: &Restore, names: &Names, made: Option<&Manifest>) -> Done {
    let (name, failed) = (&act.database, &names.failed);
    let what = made.map_or(String::new(), |made| format!(" ({})", made.summary()));
    let summary = format!("`{name}` is restored{what}; the old one is kept as {failed}");
    let note = Fact::Note {
        name: format!("old database of {name}"),
        value: failed.clone(),
    };
    Done {
        changed: true,
        summary,
        facts: vec![note],
    }
}

/// The rollout's newest verified backup that is on this host.
fn verified(cx: &Context, store: &Store, name: &str) -> Result<(Manifest, Digest), Failure> {
    let named = bound(&cx.bindings, |fact| match fact {
        Fact::BackupVerified {
            database,
            id,
            digest,
            level,
            ..
        } if database == name && *level >= Level::Restored => Some((id, *digest)),
        _ => None,
    });
    let of_fact = |made: Manifest| {
        let (id, digest) = named?;
        (made.id == *id).then_some((made, digest))
    };
    let of_rollout = |made: Manifest| {
        let digest = made.digest;
        store.was_restored(&made).then_some((made, digest))
    };
    let all = store.all().into_iter();
    let mut all = all.filter(|made| made.key.rollout == cx.key.rollout);
    let found = if named.is_some() {
        all.find_map(of_fact)
    } else {
        all.find_map(of_rollout)
    };
    let (made, digest) = found.ok_or_else(|| {
        let directory = store.directory.display();
        hinted(
            Cause::Refused,
            format!("there is no verified backup of `{name}` of this rollout in {directory}"),
            "put `postgres.backup` and `postgres.verify_backup` before this step, on the same host",
        )
    })?;
    if made.is_measured() {
        return Ok((made, digest));
    }
    // Nothing would say that what takes the database's place holds what was backed up.
    Err(hinted(
        Cause::Refused,
        format!(
            "the backup {} was not measured as a whole, so what it restores to cannot be compared",
            made.id
        ),
        "leave `measure` of `postgres.backup` out",
    ))
}

/// Refuses unless nobody could write since the backup, or a person has accepted what would be lost
/// (INV-6).
async fn held(
    cx: &Context,
    session: &Session,
    made: &Manifest,
    since: Option<&Baseline>,
) -> Result<Option<Fact>, Failure> {
    let why = match &made.fence {
        None => Some("no fence was up when the backup was taken".to_owned()),
        Some(token) => fence::broken(session, token).await?,
    };
    let Some(why) = why else { return Ok(None) };
    // What a migration itself has written is not lost: it was to go.
    let of_backup = || {
        let tables = made.contents.iter();
        let rows = tables.map(|(name, table)| (name.clone(), table.rows));
        (made.moment, rows.collect())
    };
    let (moment, was) = since.map_or_else(of_backup, |since| (since.moment, since.rows.clone()));
    let found = written::since(session, moment, &Which::All).await?;
    let mut lost = found.lines_and_gone(&was);
    if since.is_none() && !made.is_counted() {
        lost.push("rows that were deleted: the backup has not counted them".to_owned());
    }
    if fence::holding(cx, session).await?.is_none() {
        lost.push("what is still written until the swap: no fence is up".to_owned());
    }
    // One that was put back up has kept others out since; but they could write until then.
    if lost.is_empty() {
        lost.push("what else was written, if anything was".to_owned());
    }
    let accepted = loss::accepted(
        cx,
        &format!(
            "restoring `{}` may lose what was written since the backup: {why}",
            made.database
        ),
        &lost,
        &format!(
            "then go on with what there is; the old database would be kept, and the backup is {}",
            made.id
        ),
    )?;
    Ok(Some(accepted))
}

/// Fills the new database, holds it against the manifest, and gives it what a dump leaves out.
async fn fill(
    cx: &Context,
    database: &Database,
    live: &Session,
    store: &Store,
    made: &Manifest,
    names: &Names,
) -> Result<(), Failure> {
    let tools = Tools::new(cx, database, live.major()).await?;
    let archive = archive_in(&store.path(&made.id));
    scratch::restore(
        cx,
        database,
        &tools,
        &archive,
        made,
        &names.new,
        Rights::All,
    )
    .await?;
    let session = database.connect_to(cx, &names.new).await?;
    session
        .run("analysing the restored database", "ANALYZE")
        .await?;
    drop(session);
    let differences =
        scratch::differences(cx, database, &tools, made, &names.new, &made.measured).await?;
    if !differences.is_empty() {
        return Err(scratch::unequal(
            "the restored database is not what was backed up",
            &differences,
        ));
    }
    scratch::check_rights(&tools, &archive, &names.new).await?;
    properties(live, names).await
}

/// Gives the new database the live one's settings, rights and limits: the fence's among them.
async fn properties(live: &Session, names: &Names) -> Result<(), Failure> {
    let what = "copying the database's settings and rights";
    let new = ident(&names.new);
    let settings = "SELECT r.rolname::text, s.setconfig FROM pg_db_role_setting s \
                    LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = \
                    (SELECT oid FROM pg_database WHERE datname = current_database())";
    let mut statements = vec![];
    for row in live.query(what, settings, &[]).await? {
        let (role, values): (Option<&str>, Vec<&str>) = (row.get(0), row.get(1));
        let target = role.map_or_else(
            || format!("ALTER DATABASE {new}"),
            |role| format!("ALTER ROLE {} IN DATABASE {new}", ident(role)),
        );
        for (name, value) in values.iter().filter_map(|value| value.split_once('=')) {
            statements.push(format!(
                "{target} SET {} = {}",
                setting(name),
                value_of(name, value)
            ));
        }
    }
    let limit = "SELECT datconnlimit FROM pg_database WHERE datname = current_database()";
    let limit: i32 = live.one(what, limit, &[]).await?.get(0);
    statements.push(format!("ALTER DATABASE {new} CONNECTION LIMIT {limit}"));
    let rights = "SELECT a.privilege_type, CASE a.grantee WHEN 0 THEN NULL \
                  ELSE pg_get_userbyid(a.grantee)::text END, a.is_grantable FROM pg_database d, \
                  aclexplode(d.datacl) a WHERE d.datname = current_database() \
                  AND a.grantee <> d.datdba";
    let explicit = "SELECT datacl IS NULL FROM pg_database WHERE datname = current_database()";
    if live.one(what, explicit, &[]).await?.get(0) {
        // The default: everybody may connect and make temporary tables.
        statements.push(format!(
            "GRANT CONNECT, TEMPORARY ON DATABASE {new} TO PUBLIC"
        ));
    }
    for row in live.query(what, rights, &[]).await? {
        let (right, role, grantable): (&str, Option<&str>, bool) =
            (row.get(0), row.get(1), row.get(2));
        let role = role.map_or_else(|| "PUBLIC".to_owned(), ident);
        let option = if grantable { " WITH GRANT OPTION" } else { "" };
        statements.push(format!("GRANT {right} ON DATABASE {new} TO {role}{option}"));
    }
    live.run(what, &statements.join("; ")).await
}

/// The name of a setting: with a dot in it, it belongs to an extension.
fn setting(name: &str) -> String {
    name.split('.').map(ident).collect::<Vec<_>>().join(".")
}

/// The value of a setting. A list is kept as its elements, each quoted.
fn value_of(name: &str, value: &str) -> String {
    const LISTS: &[&str] = &[
        "search_path",
        "session_preload_libraries",
        "local_preload_libraries",
        "temp_tablespaces",
        "unix_socket_directories",
    ];
    if !LISTS.contains(&name.to_ascii_lowercase().as_str()) {
        return literal(value);
    }
    // The catalogue has the elements quoted already, as identifiers.
    if value.is_empty() {
        "''".to_owned()
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_keep_their_lists() {
        assert_eq!(setting("lockstep.fence"), "\"lockstep\".\"fence\"");
        assert_eq!(
            value_of("search_path", "\"$user\", public"),
            "\"$user\", public"
        );
        assert_eq!(value_of("work_mem", "4MB"), "E'4MB'");
    }
}
