//! One database takes another one's name.

use lockstep_proto::report::Failure;

use crate::sql::{Database, Session, ident};
use crate::step::Context;

/// A session in another database than the one that gets another name.
pub(super) async fn aside(cx: &Context, database: &Database) -> Result<Session, Failure> {
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

/// Whether connections to a database are allowed at all.
pub(super) async fn is_open(session: &Session, dbname: &str) -> Result<bool, Failure> {
    let sql = "SELECT datallowconn FROM pg_database WHERE datname = $1";
    let rows = session
        .query("looking at the database", sql, &[&dbname])
        .await?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

pub(super) async fn allow(session: &Session, dbname: &str, allowed: bool) -> Result<(), Failure> {
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
pub(super) async fn swap(
    session: &Session,
    live: &str,
    new: &str,
    aside: &str,
) -> Result<(), Failure> {
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
