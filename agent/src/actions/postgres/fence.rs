//! `postgres.fence` and `postgres.unfence`: nobody but the database's owner and superusers get in.
//!
//! The right to connect is taken from the applications' roles and from PUBLIC, and sessions
//! without that right are ended; where anybody else has it, the fence is not raised. In the same
//! transaction two settings are kept in the database itself, where every host sees them:
//! `lockstep.fence`, the token, and `lockstep.fence_acl`, the grants that were taken. A superuser
//! may set them; an owner may once a superuser has said `GRANT SET ON PARAMETER
//! "lockstep.fence", "lockstep.fence_acl" TO <owner>`.

use lockstep_proto::action::postgres::{Fence, Unfence};
use lockstep_proto::ids::{RolloutId, StepKey};
use lockstep_proto::json;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::who::{MAY_CONNECT, MAY_CONNECT_STILL, few, grants, open_to, strangers};
use super::measure;
use crate::actions::files::{self, OrFailed as _};
use crate::actions::{Act, Done, Probe};
use crate::sql::{Database, Session, ident, literal};
use crate::step::{Context, changed, hinted};

mod who;

/// What an attempt to lower a fence measured just before.
const MEASURED: &str = "measured-state.json";

/// The state that an earlier attempt measured before it lowered the fence, and then died.
fn measured_before(cx: &Context) -> Vec<Fact> {
    files::attempts(cx)
        .iter()
        .filter_map(|dir| std::fs::read(dir.join(MEASURED)).ok())
        .find_map(|text| json::read(&text).ok())
        .into_iter()
        .collect()
}

/// A fence that is up.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Raised {
    /// The key of the attempt that raised it.
    pub(crate) token: String,
    record: Record,
}

/// What lowering a fence gives back.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Record {
    /// The roles that are shut out.
    roles: Vec<String>,
    /// The grants that were taken.
    grants: Vec<Grant>,
}

/// A right to connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Grant {
    /// Whose; `None` is PUBLIC.
    role: Option<String>,
    /// Whether it may be passed on.
    #[serde(default)]
    grantable: bool,
}

impl Grant {
    fn to(&self) -> String {
        self.role
            .as_deref()
            .map_or_else(|| "PUBLIC".to_owned(), ident)
    }
}

impl Raised {
    /// Whether this rollout raised it.
    fn is_of(&self, cx: &Context) -> bool {
        self.is_by(&cx.key.rollout)
    }

    fn is_by(&self, rollout: &RolloutId) -> bool {
        let key = self.token.parse::<StepKey>();
        key.is_ok_and(|key| key.rollout == *rollout)
    }
}

/// Whether a step lowers a fence: its own rollout's, or one that an ended rollout left.
fn lowers(act: &Unfence, raised: &Raised, cx: &Context) -> bool {
    let left = act.left_by.as_ref().and_then(|id| id.parse().ok());
    raised.is_of(cx) || left.is_some_and(|left| raised.is_by(&left))
}

/// The fence of the session's database, if one is up.
pub(crate) async fn raised(session: &Session) -> Result<Option<Raised>, Failure> {
    let sql = "SELECT unnest(setconfig) FROM pg_db_role_setting WHERE setrole = 0 AND \
               setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let (mut token, mut record) = (None, Record::default());
    for row in session.query("asking for the fence", sql, &[]).await? {
        match row.get::<_, &str>(0).split_once('=') {
            Some(("lockstep.fence", value)) => token = Some(value.to_owned()),
            Some(("lockstep.fence_acl", value)) => {
                record = serde_json::from_str(value).map_err(|error| {
                    hinted(
                        Cause::Step,
                        format!("the setting lockstep.fence_acl cannot be read: {error}"),
                        "somebody changed it: GRANT CONNECT by hand, then ALTER DATABASE .. RESET \
                         lockstep.fence",
                    )
                })?;
            }
            _ => {}
        }
    }
    Ok(token.map(|token| Raised { token, record }))
}

/// Why the fence with this token no longer holds; `None` if it has held all the time.
pub(crate) async fn broken(session: &Session, token: &str) -> Result<Option<String>, Failure> {
    let Some(raised) = raised(session).await? else {
        return Ok(Some("the fence has been lowered".into()));
    };
    if raised.token != token {
        return Ok(Some(
            "the fence was lowered and raised again in between".into(),
        ));
    }
    // A listed role counts even if it has become an owner or a superuser meanwhile.
    let mut open = open_to(session, &raised.record.roles).await?;
    open.extend(strangers(session, MAY_CONNECT, &[]).await?);
    if !open.is_empty() {
        open.sort();
        open.dedup();
        return Ok(Some(format!("{} may connect behind the fence", few(&open))));
    }
    let inside = "EXISTS (SELECT 1 FROM pg_stat_activity a WHERE a.datid = d.oid \
                  AND a.usesysid = r.oid)";
    let inside = strangers(session, inside, &[]).await?;
    Ok((!inside.is_empty()).then(|| format!("sessions of {} are open", few(&inside))))
}

/// The fence of this rollout that is up now, if it keeps everybody out.
pub(crate) async fn holding(cx: &Context, session: &Session) -> Result<Option<String>, Failure> {
    let Some(raised) = raised(session).await?.filter(|raised| raised.is_of(cx)) else {
        return Ok(None);
    };
    let broken = broken(session, &raised.token).await?;
    Ok(broken.is_none().then_some(raised.token))
}

/// Begins the transaction that raises or lowers; only one of them runs at a time.
async fn begin(session: &Session) -> Result<(), Failure> {
    let lock = "BEGIN; SELECT pg_advisory_xact_lock(hashtext('lockstep.fence'), \
                hashtext(current_database()))";
    session.run("reaching for the fence", lock).await
}

/// Ends it: commits what went well, else nothing has happened.
async fn end<T>(session: &Session, done: Result<T, Failure>) -> Result<T, Failure> {
    let what = "moving the fence";
    match done {
        Ok(done) => session
            .run(what, "COMMIT")
            .await
            .map_err(changed)
            .map(|()| done),
        Err(failure) => {
            let _ = session.run(what, "ROLLBACK").await;
            Err(failure)
        }
    }
}

/// Shuts the roles out and ends sessions without the right to connect.
async fn raise(
    cx: &Context,
    session: &Session,
    database: &Database,
    roles: &[String],
    token: &str,
) -> Result<(), Failure> {
    begin(session).await?;
    let raised = revoke(session, database, roles, token).await;
    end(session, raised).await?;
    shut_out(cx, session).await
}

/// Ends the sessions of those who may no longer connect, and waits until none is left.
async fn shut_out(cx: &Context, session: &Session) -> Result<(), Failure> {
    let condition = "datname = current_database() AND usesysid IS NOT NULL \
                     AND NOT has_database_privilege(usesysid, datid, 'CONNECT')";
    let ended = session
        .end_sessions(condition, &[])
        .await
        .map_err(changed)?;
    cx.log.line(&format!("ended {ended} sessions"));
    Ok(())
}

/// Roles that the fence does not shut out.
fn left_out(database: &Database, strangers: &[String]) -> Failure {
    hinted(
        Cause::Refused,
        format!(
            "{} may connect to `{}` too, and could write behind the fence",
            few(strangers),
            database.name
        ),
        format!(
            "name them, or the groups that give them the right, in the fence's `roles`; a role \
             that migrates must own the database instead (ALTER DATABASE {} OWNER TO ..)",
            ident(database.dbname())
        ),
    )
}

/// What keeps a fence from being raised, as far as it can be seen before.
async fn check_possible(
    session: &Session,
    database: &Database,
    roles: &[String],
) -> Result<(), Failure> {
    let what = "raising the fence";
    let known = "SELECT rolname::text FROM pg_roles WHERE rolname::text = ANY($1)";
    let known = session.query(what, known, &[&roles]).await?;
    let known: Vec<&str> = known.iter().map(|row| row.get(0)).collect();
    if let Some(missing) = roles.iter().find(|role| !known.contains(&role.as_str())) {
        return Err(hinted(
            Cause::Host,
            format!(
                "there is no role `{missing}` on the server of `{}`",
                database.name
            ),
            "correct `roles` of the fence in the plan",
        ));
    }
    let prepared = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()";
    if session.one(what, prepared, &[]).await?.get::<_, i64>(0) > 0 {
        return Err(hinted(
            Cause::Refused,
            format!(
                "`{}` has prepared transactions, which no fence keeps from writing",
                database.name
            ),
            "COMMIT PREPARED or ROLLBACK PREPARED each in pg_prepared_xacts",
        ));
    }
    Ok(())
}

async fn revoke(
    session: &Session,
    database: &Database,
    roles: &[String],
    token: &str,
) -> Result<(), Failure> {
    let what = "raising the fence";
    let (name, own) = (database.dbname(), &session.place().role);
    check_possible(session, database, roles).await?;
    let grants = grants(session, roles).await?;
    let takers: Vec<String> = std::iter::once("PUBLIC".to_owned())
        .chain(roles.iter().map(|role| ident(role)))
        .collect();
    let record = Record {
        roles: roles.to_vec(),
        grants,
    };
    let record = serde_json::to_string(&record).expect("names are JSON");
    let sql = format!(
        "REVOKE CONNECT ON DATABASE {db} FROM {}; \
         ALTER DATABASE {db} SET lockstep.fence = {}; \
         ALTER DATABASE {db} SET lockstep.fence_acl = {}",
        takers.join(", "),
        literal(token),
        literal(&record),
        db = ident(name)
    );
    session
        .run(what, &sql)
        .await
        .map_err(|failure| may_set(failure, own))?;
    let open = open_to(session, roles).await?;
    if !open.is_empty() {
        return Err(hinted(
            Cause::Host,
            format!(
                "the fence cannot keep {} out of `{}`",
                open.join(", "),
                database.name
            ),
            format!(
                "let applications log in as a role that is no superuser, does not own {name}, is \
                 no member of a role that does, and got the right to connect from the owner"
            ),
        ));
    }
    let strangers = strangers(session, MAY_CONNECT, &[]).await?;
    if !strangers.is_empty() {
        return Err(left_out(database, &strangers));
    }
    if open_to(session, std::slice::from_ref(own))
        .await?
        .is_empty()
    {
        return Err(hinted(
            Cause::Host,
            format!(
                "the fence would keep the agent's own role {own} out of `{}`",
                database.name
            ),
            format!(
                "GRANT CONNECT ON DATABASE {} TO {}",
                ident(name),
                ident(own)
            ),
        ));
    }
    let Some(migrates) = &database.config.migrate_as else {
        return Ok(());
    };
    if open_to(session, std::slice::from_ref(migrates))
        .await?
        .is_empty()
    {
        return Err(hinted(
            Cause::Host,
            format!(
                "the fence would keep {migrates}, as whom `{}` is migrated, out of it",
                database.name
            ),
            format!(
                "ALTER DATABASE {} OWNER TO {}, or GRANT its owner to it",
                ident(name),
                ident(migrates)
            ),
        ));
    }
    Ok(())
}

/// Gives the taken rights back and removes the token.
async fn lower(session: &Session, database: &Database) -> Result<(), Failure> {
    begin(session).await?;
    let lowered = give_back(session, database).await;
    end(session, lowered).await
}

async fn give_back(session: &Session, database: &Database) -> Result<(), Failure> {
    let what = "lowering the fence";
    let Some(raised) = raised(session).await? else {
        return Ok(());
    };
    let db = ident(database.dbname());
    let known = "SELECT rolname::text FROM pg_roles";
    let known = session.query(what, known, &[]).await?;
    let known: Vec<&str> = known.iter().map(|row| row.get(0)).collect();
    // A role that was dropped meanwhile needs no right.
    let is_there = |grant: &&Grant| match grant.role.as_deref() {
        Some(role) => known.contains(&role),
        None => true,
    };
    let grants = raised.record.grants.iter().filter(is_there);
    let mut statements: Vec<String> = grants
        .map(|grant| {
            let option = if grant.grantable {
                " WITH GRANT OPTION"
            } else {
                ""
            };
            format!("GRANT CONNECT ON DATABASE {db} TO {}{option}", grant.to())
        })
        .collect();
    for setting in ["lockstep.fence", "lockstep.fence_acl"] {
        statements.push(format!("ALTER DATABASE {db} RESET {setting}"));
    }
    let sql = statements.join("; ");
    session
        .run(what, &sql)
        .await
        .map_err(|failure| may_set(failure, &session.place().role))
}

fn may_set(failure: Failure, role: &str) -> Failure {
    if !failure
        .message
        .contains("permission denied to set parameter")
    {
        return failure;
    }
    let hint = format!(
        "as a superuser, once: GRANT SET ON PARAMETER \"lockstep.fence\", \
         \"lockstep.fence_acl\" TO {}",
        ident(role)
    );
    Failure {
        hint: Some(hint),
        ..failure
    }
}

/// A fence that another rollout has left.
fn foreign(database: &Database, raised: &Raised) -> Failure {
    hinted(
        Cause::Refused,
        format!("`{}` is behind a fence of {}", database.name, raised.token),
        "finish that rollout first: its rollback or its `unfence` lowers the fence; if it was \
         cancelled or closed, a plan with `postgres.unfence` and `left_by: ROLLOUT` does",
    )
}

fn fenced(name: &str, token: &str) -> Fact {
    Fact::Fenced {
        database: name.to_owned(),
        fence: token.to_owned(),
    }
}

impl Act for Fence {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        if !cx.dry_run {
            session.end_left_over(cx).await?;
        }
        let name = &self.database;
        Ok(match raised(&session).await? {
            None if cx.dry_run => {
                check_possible(&session, &database, &self.roles).await?;
                let strangers = strangers(&session, MAY_CONNECT_STILL, &[&self.roles]).await?;
                if strangers.is_empty() {
                    Probe::Absent(self.describe())
                } else {
                    Probe::Unmet(left_out(&database, &strangers))
                }
            }
            None => Probe::Absent(self.describe()),
            Some(raised) if !raised.is_of(cx) && cx.dry_run => {
                Probe::Unmet(foreign(&database, &raised))
            }
            Some(raised) if !raised.is_of(cx) => {
                Probe::Absent(format!("`{name}` is behind a fence of {}", raised.token))
            }
            Some(raised) => match broken(&session, &raised.token).await? {
                None => Probe::Present(format!("the fence of `{name}` is up")),
                Some(why) => Probe::Partial(format!("the fence of `{name}` does not hold: {why}")),
            },
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        // What undo needs is in the database itself; this is for people.
        Ok(json!({"grants": grants(&session, &self.roles).await?}))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        let token = match raised(&session).await? {
            Some(raised) if !raised.is_of(cx) => return Err(foreign(&database, &raised)),
            // It has been up since an earlier attempt.
            Some(raised) => {
                shut_out(cx, &session).await?;
                raised.token
            }
            None => {
                let token = cx.key.to_string();
                raise(cx, &session, &database, &self.roles, &token).await?;
                token
            }
        };
        if let Some(why) = broken(&session, &token).await.map_err(changed)? {
            return Err(changed(hinted(
                Cause::Step,
                format!("the fence of `{}` does not hold: {why}", self.database),
                "see who connects, and name its role in the fence's `roles`",
            )));
        }
        let state = measure::state(cx, &database).await.map_err(changed)?;
        let summary = match &state {
            Fact::State { text, .. } => format!("`{}` is shut: {text}", self.database),
            _ => unreachable!("the state of a database is a state"),
        };
        let facts = vec![fenced(&self.database, &token), state];
        Ok(Done {
            changed: true,
            summary,
            facts,
        })
    }

    async fn undo(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        if !raised(&session)
            .await?
            .is_some_and(|raised| raised.is_of(cx))
        {
            let summary = format!("no fence of this rollout is around `{}`", self.database);
            return Ok(Done {
                summary,
                facts: measured_before(cx),
                ..Done::default()
            });
        }
        // While nobody can write: the state that the rollback has led to. It is kept first, for an
        // attempt that finds the fence lowered cannot measure it any more.
        let state = measure::state(cx, &database).await?;
        let text = serde_json::to_vec(&state).expect("a fact is JSON");
        files::write(&cx.dir.join(MEASURED), &text, 0o600, None)
            .or_failed(|| "keep the state of the database")?;
        lower(&session, &database).await?;
        let summary = format!("`{}` is open again", self.database);
        Ok(Done {
            changed: true,
            summary,
            facts: vec![state],
        })
    }

    fn describe(&self) -> String {
        format!("shuts {} out of `{}`", self.roles.join(", "), self.database)
    }
}

impl Act for Unfence {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        if !cx.dry_run {
            session.end_left_over(cx).await?;
        }
        let name = &self.database;
        Ok(match raised(&session).await? {
            None if cx.dry_run => Probe::NotYet(format!("no fence of `{name}` is up now")),
            None => Probe::Present(format!("`{name}` is open")),
            Some(raised) if lowers(self, &raised, cx) => Probe::Absent(self.describe()),
            Some(raised) if cx.dry_run => Probe::Unmet(foreign(&database, &raised)),
            Some(raised) => {
                Probe::Absent(format!("`{name}` is behind a fence of {}", raised.token))
            }
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let database = Database::find(cx, &self.database)?;
        let raised = raised(&database.connect(cx).await?).await?;
        Ok(json!({
            "token": raised.as_ref().map(|raised| &raised.token),
            "roles": raised.as_ref().map(|raised| &raised.record.roles),
        }))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        let name = &self.database;
        let was = raised(&session).await?;
        match &was {
            None => {}
            Some(raised) if !lowers(self, raised, cx) => return Err(foreign(&database, raised)),
            Some(_) => lower(&session, &database).await?,
        }
        let open = open_to(&session, &self.roles).await;
        let open = open.map_err(|failure| Failure {
            changed: was.is_some(),
            ..failure
        })?;
        let shut: Vec<&str> = self
            .roles
            .iter()
            .filter(|role| !open.contains(role))
            .map(String::as_str)
            .collect();
        let mut facts = vec![];
        if !shut.is_empty() {
            // It gives back what was taken, and nothing that was not there.
            let value = format!(
                "{} had no right to connect before the fence",
                shut.join(", ")
            );
            facts.push(Fact::Note {
                name: format!("database {name}"),
                value,
            });
        }
        let summary = match was {
            Some(_) => format!("`{name}` is open to {}", open.join(", ")),
            None => format!("`{name}` was open"),
        };
        Ok(Done {
            changed: was.is_some(),
            summary,
            facts,
        })
    }

    async fn undo(&self, cx: &Context, before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        let name = &self.database;
        let token = before["token"].as_str();
        if token.is_none() {
            let summary = format!("`{name}` was open before");
            return Ok(Done {
                summary,
                ..Done::default()
            });
        }
        match raised(&session).await? {
            Some(raised) if Some(raised.token.as_str()) == token => {
                let summary = format!("the fence of `{name}` was never lowered");
                let facts = vec![fenced(name, &raised.token)];
                return Ok(Done {
                    changed: false,
                    summary,
                    facts,
                });
            }
            Some(raised) if raised.is_of(cx) => {
                shut_out(cx, &session).await?;
                let summary = format!("the fence of `{name}` is up again");
                let facts = vec![fenced(name, &raised.token)];
                return Ok(Done {
                    changed: true,
                    summary,
                    facts,
                });
            }
            Some(raised) => return Err(foreign(&database, &raised)),
            None => {}
        }
        let roles = serde_json::from_value(before["roles"].clone()).unwrap_or_default();
        let roles: Vec<String> = Some(roles)
            .filter(|roles: &Vec<_>| !roles.is_empty())
            .unwrap_or_else(|| self.roles.clone());
        // A new token: applications could write in between.
        let token = cx.key.to_string();
        raise(cx, &session, &database, &roles, &token).await?;
        let summary = format!("the fence of `{name}` is up again");
        Ok(Done {
            changed: true,
            summary,
            facts: vec![fenced(name, &token)],
        })
    }

    fn describe(&self) -> String {
        format!(
            "lets {} into `{}` again",
            self.roles.join(", "),
            self.database
        )
    }
}

#[cfg(test)]
mod tests;
