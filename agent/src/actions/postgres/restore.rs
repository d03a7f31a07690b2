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

use lockstep_proto::action::postgres::{Aspect, Restore};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::archive::archive_in;
use super::manifest::{Manifest, Store};
use super::measure::summary;
use super::scratch::Rights;
use super::tools::Tools;
use super::written::{self, Which};
use super::{fence, scratch};
use crate::actions::{Act, Done, Probe, bound};
use crate::sql::{Database, Session, ident, literal};
use crate::step::{Context, changed, hinted};

/// The names of a restore's databases.
struct Names {
    live: String,
    new: String,
    failed: String,
    undone: String,
}

impl Names {
    fn of(cx: &Context, database: &Database) -> Self {
        let live = database.dbname().to_owned();
        let rollout = cx.key.rollout.as_str();
        let rollout = rollout.strip_prefix("ro_").unwrap_or(rollout);
        let id = format!("{rollout}_{}_{}", cx.key.at.phase, cx.key.at.step);
        let name = |what: &str| {
            let tail = format!("__{what}_{id}");
            // The server cuts names after 63 bytes; a digest keeps two long ones apart.
            let room = 63 - tail.len();
            if live.len() <= room {
                return format!("{live}{tail}");
            }
            let head = crate::process::head(&live, room.saturating_sub(9));
            format!("{head}_{}{tail}", &Digest::of(live.as_bytes()).hex()[..8])
        };
        let (new, failed, undone) = (name("restore"), name("failed"), name("restored"));
        Self {
            live,
            new,
            failed,
            undone,
        }
    }
}

/// Which of them there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct There {
    live: bool,
    failed: bool,
    undone: bool,
}

impl There {
    async fn look(session: &Session, names: &Names) -> Result<Self, Failure> {
        let exists = async |name: &String| scratch::exists(session, name).await;
        Ok(Self {
            live: exists(&names.live).await?,
            failed: exists(&names.failed).await?,
            undone: exists(&names.undone).await?,
        })
    }

    fn swapped(self) -> bool {
        self.live && self.failed
    }
}

/// A session in another database than the one that gets another name.
async fn aside(cx: &Context, database: &Database) -> Result<Session, Failure> {
    let elsewhere = if database.dbname() == "postgres" {
        "template1"
    } else {
        "postgres"
    };
    match database.connect_to(cx, elsewhere).await {
        Ok(session) => Ok(session),
        Err(_) => database.connect_to(cx, "template1").await,
    }
}

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
        let store = Store::of(cx, &database);
        let (made, digest) = verified(cx, &store, &self.database)?;
        allow(&aside, &names.live, true).await?;
        let session = database.connect(cx).await?;
        held(cx, &session, &made).await?;
        scratch::check_digest(&store.path(&made.id), &made, digest).await?;
        scratch::check_room(&session, &database).await?;
        scratch::drop(&aside, &names.new).await?;
        scratch::create(&session, &names.new).await?;
        let filled = fill(cx, &database, &session, &store, &made, &names).await;
        // A fence that fell while the restore ran has let rows in.
        let filled = match filled {
            Ok(()) => held(cx, &session, &made).await,
            Err(failure) => Err(failure),
        };
        drop(session);
        if let Err(failure) = filled {
            let dropped = scratch::drop(&aside, &names.new).await;
            // Only the new database was touched. One that could not be dropped is left to the undo.
            return Err(Failure {
                changed: dropped.is_err(),
                ..failure
            });
        }
        swap(&aside, &names.live, &names.new, &names.failed)
            .await
            .map_err(changed)?;
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

fn done(act: &Restore, names: &Names, made: Option<&Manifest>) -> Done {
    let (name, failed) = (&act.database, &names.failed);
    let what = made.map_or(String::new(), |made| {
        format!(" ({})", summary(&made.contents))
    });
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
            ..
        } if database == name => Some((id, *digest)),
        _ => None,
    });
    let of_fact = |made: Manifest| {
        let (id, digest) = named?;
        (made.id == *id).then_some((made, digest))
    };
    let of_rollout = |made: Manifest| {
        let digest = store.verified(&made)?.digest;
        (made.key.rollout == cx.key.rollout).then_some((made, digest))
    };
    let mut all = store.all().into_iter();
    let found = if named.is_some() {
        all.find_map(of_fact)
    } else {
        all.find_map(of_rollout)
    };
    found.ok_or_else(|| {
        let directory = store.directory.display();
        hinted(
            Cause::Refused,
            format!("there is no verified backup of `{name}` of this rollout in {directory}"),
            "put `postgres.backup` and `postgres.verify_backup` before this step, on the same host",
        )
    })
}

/// Refuses unless nobody could write since the backup; names what would be lost (INV-6).
async fn held(cx: &Context, session: &Session, made: &Manifest) -> Result<(), Failure> {
    let why = match &made.fence {
        None => Some("no fence was up when the backup was taken".to_owned()),
        Some(token) => fence::broken(session, token).await?,
    };
    let Some(why) = why else { return Ok(()) };
    let was = made
        .contents
        .iter()
        .map(|(name, table)| (name.clone(), table.rows))
        .collect();
    let lost = written::since(session, made.moment, &Which::All).await?;
    let lost = lost.lines_and_gone(&was);
    for line in &lost {
        cx.log.line(line);
    }
    let lost = match lost.as_slice() {
        [] => "Nothing was written until now".to_owned(),
        lost => written::few(lost),
    };
    Err(hinted(
        Cause::Refused,
        format!(
            "restoring `{}` may lose what was written since the backup: {why}. {lost}",
            made.database
        ),
        format!(
            "look at these tables; to give them up, restore the backup {} by hand",
            made.id
        ),
    ))
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
    let aspects = [Aspect::Schema, Aspect::RowCounts, Aspect::Checksums];
    let differences =
        scratch::differences(cx, database, &tools, made, &names.new, &aspects).await?;
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

/// Whether connections to a database are allowed at all.
async fn is_open(session: &Session, dbname: &str) -> Result<bool, Failure> {
    let sql = "SELECT datallowconn FROM pg_database WHERE datname = $1";
    let rows = session
        .query("looking at the database", sql, &[&dbname])
        .await?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

async fn allow(session: &Session, dbname: &str, allowed: bool) -> Result<(), Failure> {
    if is_open(session, dbname).await? == allowed {
        return Ok(());
    }
    let what = "opening or closing the database";
    session
        .run(
            what,
            &format!(
                "ALTER DATABASE {} ALLOW_CONNECTIONS {allowed}",
                ident(dbname)
            ),
        )
        .await
}

/// Puts `new` in the place of `live`, which becomes `aside`. Nobody can connect meanwhile, not
/// even a superuser.
async fn swap(session: &Session, live: &str, new: &str, aside: &str) -> Result<(), Failure> {
    let swapped = close_and_rename(session, live, new, aside).await;
    // Either way the name is open again, with the new one behind it or the old.
    let opened = allow(session, live, true).await;
    swapped?;
    opened
}

/// Closes both and waits for the ends of their sessions; the names change in one transaction.
async fn close_and_rename(
    session: &Session,
    live: &str,
    new: &str,
    aside: &str,
) -> Result<(), Failure> {
    for name in [live, new] {
        allow(session, name, false).await?;
        session.end_sessions("datname = $1", &[&name]).await?;
    }
    let renamed = session
        .run(
            "swapping the databases",
            &format!(
                "BEGIN; ALTER DATABASE {} RENAME TO {}; ALTER DATABASE {} RENAME TO {}; COMMIT",
                ident(live),
                ident(aside),
                ident(new),
                ident(live)
            ),
        )
        .await;
    if renamed.is_err() {
        let _ = session.run("giving up the swap", "ROLLBACK").await;
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_their_tails_and_stay_apart() {
        let config = |dbname: String| {
            let text = format!("host = '/x'\nuser = 'u'\ndbname = '{dbname}'");
            Database {
                name: "db".into(),
                config: toml::from_str(&text).unwrap(),
            }
        };
        let cx = crate::testing::Host::new().context();
        let short = Names::of(&cx, &config("staff".into()));
        assert_eq!(short.failed, "staff__failed_010101010101_0_0");
        let one = Names::of(&cx, &config(format!("{}a", "ä".repeat(30))));
        let two = Names::of(&cx, &config(format!("{}b", "ä".repeat(30))));
        assert!(one.new.len() <= 63 && one.new.ends_with("__restore_010101010101_0_0"));
        assert_ne!(one.failed, two.failed);
    }

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
