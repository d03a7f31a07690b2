//! New databases that a backup is restored into, and how far a restore is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_proto::ids::Digest;
use lockstep_proto::report::{Cause, Failure};

use super::archive::{archive_in, digest, digest_beside};
use super::human;
use super::manifest::{GLOBALS, Manifest, blocking};
use super::measure::{Contents, Snapshot, TABLE_NAME, fingerprint};
use super::tools::Tools;
use crate::sql::{Database, Session, application_name, ident, literal};
use crate::step::{Context, failure, hinted};
use lockstep_proto::action::postgres::Aspect;

/// How many processes a dump or restore may use: half of the processors, at most four.
pub(super) fn jobs() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (processors / 2).clamp(1, 4)
}

/// An archive below this size is restored by one process: more only cost connections.
const SMALL: u64 = 16 << 20;

/// Tables with their rows and their share of the whole.
pub(super) type Shares = BTreeMap<String, (u64, u64)>;

/// Tells how far the COPYs of this attempt are, until the session breaks.
pub(super) async fn progress(cx: &Context, session: &Session, tables: &Shares, upto: f64) {
    let sql = format!(
        "SELECT {TABLE_NAME}, p.tuples_processed FROM pg_stat_progress_copy p \
         JOIN pg_stat_activity a USING (pid) JOIN pg_class c ON c.oid = p.relid \
         JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE a.application_name = $1 AND p.datname = current_database()"
    );
    let name = application_name(&cx.key);
    #[expect(clippy::cast_precision_loss, reason = "a fraction for people")]
    let part = |some: u64, whole: u64| some as f64 / whole.max(1) as f64;
    let whole: u64 = tables.values().map(|(_, share)| share).sum();
    let mut seen: BTreeMap<String, f64> = BTreeMap::new();
    let mut furthest: f64 = 0.0;
    while let Ok(rows) = session.query("asking for progress", &sql, &[&name]).await {
        // What was at work and is no longer has ended.
        for fraction in seen.values_mut() {
            *fraction = 1.0;
        }
        let mut at = String::new();
        for row in &rows {
            let (table, done): (String, i64) = (row.get(0), row.get(1));
            let count = tables.get(&table).map_or(1, |(rows, _)| *rows);
            seen.insert(table.clone(), part(done.unsigned_abs(), count).min(1.0));
            at = table;
        }
        let share = |table: &String| tables.get(table).map_or(0, |(_, share)| *share);
        let done: f64 = seen
            .iter()
            .map(|(table, done)| done * part(share(table), whole))
            .sum();
        furthest = furthest.max(done * upto);
        if !at.is_empty() {
            cx.log.progress(furthest, &at);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Whether a database of that name is on the server.
pub(super) async fn exists(session: &Session, dbname: &str) -> Result<bool, Failure> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_database WHERE datname = $1)";
    Ok(session
        .one("looking for a database", sql, &[&dbname])
        .await?
        .get(0))
}

/// Drops a database and ends its sessions.
pub(super) async fn drop(session: &Session, dbname: &str) -> Result<(), Failure> {
    let force = if session.major() >= 13 {
        " WITH (FORCE)"
    } else {
        ""
    };
    let what = format!("dropping {dbname}");
    session
        .run(
            &what,
            &format!("DROP DATABASE IF EXISTS {}{force}", ident(dbname)),
        )
        .await
}

/// Makes an empty database like the session's own, that only its owner may enter.
pub(super) async fn create(session: &Session, dbname: &str) -> Result<(), Failure> {
    let what = format!("creating {dbname}");
    let major = session.major();
    let icu = match major {
        ..15 => "NULL::text, NULL::text, NULL::text",
        15 => "datlocprovider::text, daticulocale, NULL::text",
        16 => "datlocprovider::text, daticulocale, daticurules",
        _ => "datlocprovider::text, datlocale, daticurules",
    };
    let sql = format!(
        "SELECT pg_encoding_to_char(encoding)::text, datcollate::text, datctype::text, \
         pg_get_userbyid(datdba)::text, \
         (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), \
         {icu} FROM pg_database WHERE datname = current_database()"
    );
    let like = session.one(&what, &sql, &[]).await?;
    let text = |at| literal(like.get::<_, &str>(at));
    let mut parts = vec![
        format!("CREATE DATABASE {} TEMPLATE template0", ident(dbname)),
        format!(
            "ENCODING {} LC_COLLATE {} LC_CTYPE {}",
            text(0),
            text(1),
            text(2)
        ),
    ];
    if like.get(4) {
        parts.push(format!("OWNER {}", ident(like.get(3))));
    }
    let provider: Option<&str> = like.get(5);
    let (locale, rules): (Option<&str>, Option<&str>) = (like.get(6), like.get(7));
    match (provider, locale.map(literal)) {
        (Some("i"), Some(locale)) => {
            parts.push(format!("LOCALE_PROVIDER icu ICU_LOCALE {locale}"));
            parts.extend(rules.map(|rules| format!("ICU_RULES {}", literal(rules))));
        }
        (Some("b"), Some(locale)) => {
            parts.push(format!("LOCALE_PROVIDER builtin BUILTIN_LOCALE {locale}"));
        }
        _ => {}
    }
    let sql = parts.join(" ");
    // What would end it in the middle is the step's own timeout, which drops it again.
    session
        .run(&what, &sql)
        .await
        .map_err(|failure| match failure.cause {
            Cause::Host if failure.message.contains("permission denied") => Failure {
                hint: Some(format!(
                    "ALTER ROLE {} CREATEDB",
                    ident(&session.place().role)
                )),
                ..failure
            },
            _ => failure,
        })?;
    // It holds what the other one holds: nobody is to read it there.
    session
        .run(
            &what,
            &format!("REVOKE ALL ON DATABASE {} FROM PUBLIC", ident(dbname)),
        )
        .await
}

/// Refuses a restore that would fill the server's disk, if the server is on this host and lets us
/// know where its data are.
pub(super) async fn check_room(session: &Session, database: &Database) -> Result<(), Failure> {
    if !database.is_local() {
        return Ok(());
    }
    let sql = "SELECT pg_database_size(current_database())::int8, \
               CASE WHEN pg_has_role('pg_read_all_settings', 'MEMBER') \
               THEN current_setting('data_directory') END";
    let row = session
        .one("asking for the database's size", sql, &[])
        .await?;
    let need = row.get::<_, i64>(0).unsigned_abs() / 5 * 6;
    let Some(directory) = row.get::<_, Option<String>>(1) else {
        return Ok(());
    };
    let Ok(free) = super::backup::free(directory.as_ref()) else {
        return Ok(());
    };
    if free >= need {
        return Ok(());
    }
    Err(hinted(
        Cause::Host,
        format!(
            "restoring may need {} in {directory}, and {} are free",
            human(need),
            human(free)
        ),
        "make room on the server's data volume",
    ))
}

/// Holds the archive, and what is beside it, against the digest that its manifest and the rollout name.
pub(super) async fn check_digest(
    directory: &std::path::Path,
    made: &Manifest,
    bound: Digest,
) -> Result<(), Failure> {
    let archive = archive_in(directory);
    let (found, size) =
        blocking("cannot read the backup's archive", move || digest(&archive)).await?;
    if found != bound || found != made.digest || size != made.size {
        return Err(damaged(
            &made.id,
            "archive",
            (found, size),
            (bound, made.size),
        ));
    }
    let Some(globals) = &made.globals else {
        return Ok(());
    };
    let directory = directory.to_owned();
    let found = blocking("cannot read the backup's globals", move || {
        digest_beside(&directory, GLOBALS)
    });
    let (found, was) = (found.await?, (globals.digest, globals.size));
    if found == was {
        return Ok(());
    }
    Err(damaged(&made.id, "globals", found, was))
}

fn damaged(id: &str, what: &str, is: (Digest, u64), was: (Digest, u64)) -> Failure {
    let words = |(digest, size): (Digest, u64)| format!("{} ({})", digest.short(), human(size));
    hinted(
        Cause::CheckUnmet,
        format!(
            "the {what} of {id} is damaged: its digest is {}, and was {} when it was made",
            words(is),
            words(was)
        ),
        "take a new backup, and check the volume that holds this one",
    )
}

/// What a restore brings beside tables and rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rights {
    /// Owners and rights as they were, or it fails.
    All,
    /// Those that the role can give: the database is only looked at.
    IfPossible,
    /// None: the server has roles of its own.
    None,
}

/// Restores a backup into an empty database; any error ends it.
pub(super) async fn restore(
    cx: &Context,
    database: &Database,
    tools: &Tools<'_>,
    archive: &std::path::Path,
    made: &Manifest,
    into: &str,
    rights: Rights,
) -> Result<(), Failure> {
    let session = database.connect_to(cx, into).await?;
    let sql = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user";
    let superuser: bool = session.one("asking for the role", sql, &[]).await?.get(0);
    let path = archive.display().to_string();
    let jobs = format!("-j{}", if made.size < SMALL { 1 } else { jobs() });
    let mut args = vec!["--exit-on-error", jobs.as_str()];
    if rights == Rights::None || (!superuser && rights == Rights::IfPossible) {
        // Only a superuser may give things to others, and only to roles that are there.
        args.extend(["--no-owner", "--no-privileges"]);
    }
    args.push(&path);
    let shares = made.contents.iter();
    let shares = shares.map(|(name, table)| (name.clone(), (table.rows, table.rows)));
    let shares = shares.collect();
    let watch = async {
        progress(cx, &session, &shares, 0.9).await;
        std::future::pending::<std::convert::Infallible>().await
    };
    tokio::select! {
        restored = tools.run("pg_restore", Some(into), &args) => match restored {
            Err(failure) if !superuser && failure.hint.is_none() => Err(Failure {
                hint: Some(BY_SUPERUSER.into()),
                ..failure
            }),
            restored => restored.map(|_| ()),
        },
        never = watch => match never {},
    }
}

const BY_SUPERUSER: &str = "if it is about an owner or a right: name a superuser in the host's \
     section of this database, for only a superuser can give everything back";

/// Refuses a restored database that lacks an owner or a right of its archive, or has one more:
/// where the role has no right to give something, the server only warns.
pub(super) async fn check_rights(
    tools: &Tools<'_>,
    archive: &std::path::Path,
    restored: &str,
) -> Result<(), Failure> {
    let file = |name| tools.file(name).map(|path| path.display().to_string());
    let (was, is) = (file("was.sql")?, file("is.sql")?);
    let archive = archive.display().to_string();
    tools
        .run("pg_restore", None, &["-s", "-f", &was, &archive])
        .await?;
    let args = ["-s", "--lock-wait-timeout=5s", "-f", &is];
    tools.run("pg_dump", Some(restored), &args).await?;
    let read = |path: &str| {
        std::fs::read(path)
            .map(|text| rights(&String::from_utf8_lossy(&text)))
            .map_err(|error| failure(Cause::Host, format!("cannot read {path}: {error}")))
    };
    let (was, is) = (read(&was)?, read(&is)?);
    let missing = was.difference(&is).map(|line| format!("without `{line}`"));
    let new = is.difference(&was).map(|line| format!("with `{line}`"));
    let differences: Vec<String> = missing.chain(new).collect();
    if differences.is_empty() {
        return Ok(());
    }
    let what = "the restored database has other owners or rights than what was backed up";
    Err(Failure {
        hint: Some(BY_SUPERUSER.into()),
        ..unequal(what, &differences)
    })
}

/// The statements of a schema dump that set owners and rights.
fn rights(sql: &str) -> BTreeSet<String> {
    let is_one = |line: &&str| {
        ["GRANT ", "REVOKE ", "ALTER DEFAULT PRIVILEGES "]
            .iter()
            .any(|verb| line.starts_with(verb))
            || (line.starts_with("ALTER ") && line.contains(" OWNER TO "))
    };
    sql.lines().filter(is_one).map(str::to_owned).collect()
}

/// Compares a restored database with what its backup held. Returns what differs.
pub(super) async fn differences(
    cx: &Context,
    database: &Database,
    tools: &Tools<'_>,
    made: &Manifest,
    restored: &str,
    aspects: &[Aspect],
) -> Result<Vec<String>, Failure> {
    let mut found = vec![];
    if aspects.contains(&Aspect::Schema) {
        let schema = fingerprint(tools, restored, None).await?;
        if schema != made.schema {
            found.push(format!(
                "the schema's fingerprint is {}, and was {}",
                schema.short(),
                made.schema.short()
            ));
        }
    }
    let (rows, checksums) = (
        aspects.contains(&Aspect::RowCounts),
        aspects.contains(&Aspect::Checksums),
    );
    if rows || checksums {
        let session = database.connect_to(cx, restored).await?;
        let snapshot = Snapshot::take(session).await?;
        let contents = if checksums {
            snapshot.contents().await?
        } else {
            snapshot.counts().await?
        };
        found.extend(compare(&made.contents, &contents, checksums));
    }
    Ok(found)
}

/// How two contents differ, table by table.
fn compare(was: &Contents, is: &Contents, checksums: bool) -> Vec<String> {
    let mut found = vec![];
    for (name, was) in was {
        match is.get(name) {
            None => found.push(format!("{name} is missing")),
            Some(is) if is.rows != was.rows => {
                found.push(format!("{name} has {} rows, and had {}", is.rows, was.rows));
            }
            Some(is) if checksums && is != was => {
                found.push(format!("{name} has other values in its {} rows", is.rows));
            }
            Some(_) => {}
        }
    }
    let new = is.keys().filter(|name| !was.contains_key(*name));
    found.extend(new.map(|name| format!("{name} is new")));
    found
}

/// A failed comparison.
pub(super) fn unequal(what: &str, differences: &[String]) -> Failure {
    // A few tables tell what is wrong; the log has them all.
    let shown: Vec<&str> = differences.iter().take(10).map(String::as_str).collect();
    let more = match differences.len().saturating_sub(shown.len()) {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    failure(
        Cause::CheckUnmet,
        format!("{what}: {}{more}", shown.join("; ")),
    )
}

#[cfg(test)]
mod tests {
    use super::super::measure::Table;
    use super::*;

    #[test]
    fn contents_differ_by_table_row_and_value() {
        let table = |rows, checksum: &str| Table {
            columns: vec![],
            rows,
            checksum: checksum.into(),
        };
        let was = Contents::from([
            ("a".into(), table(1, "x")),
            ("b".into(), table(2, "y")),
            ("c".into(), table(3, "z")),
        ]);
        let is = Contents::from([("a".into(), table(1, "w")), ("b".into(), table(1, "y"))]);
        let rows = ["b has 1 rows, and had 2", "c is missing"];
        assert_eq!(compare(&was, &is, false), rows);
        assert_eq!(
            compare(&was, &is, true)[0],
            "a has other values in its 1 rows"
        );
        assert_eq!(
            compare(&is, &was, false),
            ["b has 2 rows, and had 1", "c is new"]
        );
        assert_eq!(compare(&was, &was, true), Vec::<String>::new());
    }
}
