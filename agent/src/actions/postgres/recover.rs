//! The way back of a whole server: to a rollout's restore point, through pgBackRest.
//!
//! ```text
//! look      whether anything would be lost, in any database, while the server runs
//! restore   a copy beside the server's files
//! count     what was written since, once more; then the log is archived, up to a name of its own
//! stop      the server; its files say whether anybody has written since the count
//! exchange  the copy and the files: one operation, and the files of before are kept
//! start     the server recovers to the point, and goes on there on a timeline of its own
//! check     the timeline begins at the point; the database's fence is the one of then
//! ```
//!
//! An attempt that was cut off is settled by what is there: at every instant the server's place
//! holds either the files of before, and nothing has happened, or those of the copy, and the server
//! has only to be started. The history of a timeline names the point at which it began, so that no
//! server is recovered twice (INV-1). All databases go back, so nothing may have been written to
//! any since, but by the migration (INV-6).

use lockstep_proto::action::service::Driver;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};

use super::fence;
use super::pgbackrest::Pgbackrest;
use super::restore::Baseline;
use super::written;
use crate::actions::Probe;
use crate::actions::service::Switch;
use crate::config;
use crate::sql::{Database, Session};
use crate::step::{Context, changed, hinted};

use self::record::{Draft, Record};
use self::server::{Held, Server};
use self::target::{Target, There};

pub(super) use self::record::position;

mod place;
mod record;
mod server;
mod target;
mod turn;

/// A server that was brought back.
pub(crate) struct Recovered {
    /// In the database that the plan names.
    pub(crate) session: Session,
    /// What a report says about it.
    pub(crate) facts: Vec<Fact>,
    /// For people: the point.
    pub(crate) point: String,
}

/// What the host's configuration says of recoveries; refuses where it says nothing.
fn configured<'a>(
    cx: &'a Context,
    database: &Database,
) -> Result<(&'a config::Recover, Pgbackrest<'a>), Failure> {
    let name = &database.name;
    let section = cx
        .config
        .postgres
        .get(name)
        .and_then(|of| of.recover.as_ref());
    let settings = section.ok_or_else(|| {
        hinted(
            Cause::Host,
            format!("this host does not say how the server of `{name}` is stopped and started"),
            format!(
                "add a section [postgres.{name}.recover] with its `unit` to agent.toml, if a \
                 rollback may recover this server"
            ),
        )
    })?;
    let tool = Pgbackrest::of(cx, database).ok_or_else(|| {
        hinted(
            Cause::Host,
            format!("this host knows no pgBackRest of `{name}`, and recovers with nothing else"),
            format!("add a section [postgres.{name}.pgbackrest], or say `undo_by: restore`"),
        )
    })?;
    if !database.is_local() {
        return Err(hinted(
            Cause::Host,
            format!("the server of `{name}` is not on this host"),
            "run this step on the server's own host",
        ));
    }
    Ok((settings, tool))
}

/// The server's service.
async fn switch<'a>(
    cx: &'a Context,
    settings: &'a config::Recover,
    database: &Database,
) -> Result<Switch<'a>, Failure> {
    match (&settings.unit, &settings.service) {
        (Some(unit), None) => Switch::open(cx, unit, Driver::Systemd).await,
        (None, Some(service)) => Switch::open(cx, service, Driver::Command).await,
        _ => Err(hinted(
            Cause::Host,
            format!(
                "[postgres.{}.recover] does not say what the server is started by",
                database.name
            ),
            "give it either `unit`, one of systemd's, or `service`, one of [services]",
        )),
    }
}

/// Refuses a server that could not be recovered as it is, whatever was written.
async fn check_able(
    cx: &Context,
    session: &Session,
    database: &Database,
) -> Result<Server, Failure> {
    let (settings, _) = configured(cx, database)?;
    let switch = switch(cx, settings, database).await?;
    let server = server::ask(session).await?;
    let (runs, words) = switch.runs().await?;
    if !runs {
        return Err(hinted(
            Cause::Host,
            format!(
                "the server of `{}` runs, but its service {} is {words}",
                database.name,
                switch.name()
            ),
            format!(
                "correct [postgres.{}.recover]: it is another's",
                database.name
            ),
        ));
    }
    server::check_alone(session).await?;
    Ok(server)
}

/// What a restore point has to know beforehand, so that the server can be recovered to it.
pub(super) async fn draft(
    cx: &Context,
    session: &Session,
    database: &Database,
) -> Result<Draft, Failure> {
    let server = check_able(cx, session, database).await?;
    cx.log
        .line("counting the rows of all databases of the server");
    let moment = written::moment_of_server(session).await?;
    let held = Held::count(cx, session, database, moment).await?;
    let fence = fence::raised(session).await?.map(|raised| raised.token);
    Ok(Draft {
        timeline: server.timeline,
        system: server.system,
        data: server.data,
        major: session.major(),
        fence,
        ledgers: written::ledgers(session).await?,
        moment,
        held,
    })
}

/// Refuses to begin what only a recovery could undo, unless there is a way to do it. What an earlier
/// attempt has `begun` may have moved the schema since the point.
pub(crate) async fn is_at_hand(cx: &Context, name: &str, begun: bool) -> Result<(), Failure> {
    let target = Target::find(cx, name)?;
    // A role of migrations does not see what others have on the server.
    let session = target.database.connect(cx).await?;
    let server = check_able(cx, &session, &target.database).await?;
    target.check_same(&server)?;
    if !begun {
        target.check_unmigrated(&session).await?;
    }
    target.base().await?;
    target.check_room(&session).await
}

/// Why data may have been written since the restore point; `None` if a fence has held all the time.
pub(crate) async fn open_since_point(
    cx: &Context,
    session: &Session,
    name: &str,
) -> Result<Option<String>, Failure> {
    match Record::required(cx, name)?.fence {
        None => Ok(Some("no fence was up at the restore point".into())),
        Some(token) => fence::broken(session, &token).await,
    }
}

/// Says what is there, after an attempt at a recovery that was cut off.
pub(crate) async fn probe(cx: &Context, name: &str) -> Result<Probe, Failure> {
    let Some(target) = Target::find_if_any(cx, name)? else {
        return Ok(Probe::Absent("no restore point was made".into()));
    };
    let data = target.place.data().display();
    Ok(match target.look().await? {
        There::Silent if target.place.is_copy() => Probe::Partial(format!(
            "the server of `{name}` does not answer, with the restored copy in {data}"
        )),
        There::Silent => Probe::Partial(format!(
            "the server of `{name}` does not answer, with its files of before in {data}"
        )),
        There::Before(..) => Probe::Absent(format!("the server of `{name}` was not taken back")),
        There::Recovering(_) => Probe::Partial(format!("the server of `{name}` is recovering")),
        There::Recovered(_) => Probe::Present(format!(
            "the server of `{name}` goes on from {}",
            target.record.name
        )),
        There::Elsewhere(why) => Probe::NoProof(why),
    })
}

/// Brings a server back, unless `stays` says of the one that was not taken back yet that nothing
/// has to be: then there is `None`.
pub(crate) async fn recover(
    cx: &Context,
    name: &str,
    since: Option<&Baseline>,
    stays: impl AsyncFn(&Session) -> Result<bool, Failure>,
) -> Result<Option<Recovered>, Failure> {
    let target = Target::find(cx, name)?;
    let mut stopped = 0;
    // What was done before this attempt counts, too.
    let mut touched = target.place.is_copy();
    loop {
        let in_it = |failure: Failure| Failure {
            changed: failure.changed || touched,
            ..failure
        };
        match target.look().await.map_err(in_it)? {
            There::Silent => target.bring_up().await?,
            There::Recovering(session) => target.wait(&session).await?,
            There::Before(session, server) => {
                session.end_left_over(cx).await?;
                if stays(&session).await? {
                    return Ok(None);
                }
                touched |= target
                    .take_back(session, &server, since, &mut stopped)
                    .await?;
            }
            There::Recovered(session) => return target.settle(session).await.map(Some),
            There::Elsewhere(why) => {
                return Err(changed(hinted(
                    Cause::Refused,
                    why,
                    "look what it is, and who did it; nothing was done here",
                )));
            }
        }
    }
}
