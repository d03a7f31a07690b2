use serde_json::Value;

use super::*;
use crate::sql::cluster::Bench;

const NULL: Value = Value::Null;

fn fence(bench: &Bench) -> Fence {
    Fence {
        database: "staff".into(),
        via: lockstep_proto::action::postgres::FenceVia::Connect,
        roles: vec![bench.app()],
    }
}

fn unfence(bench: &Bench) -> Unfence {
    let Fence {
        database,
        via,
        roles,
    } = fence(bench);
    Unfence {
        database,
        via,
        roles,
        left_by: None,
    }
}

/// The database's rights and settings, whatever their order.
async fn rights(bench: &Bench) -> String {
    let name = &bench.name;
    bench
        .ask(&format!(
            "SELECT array(SELECT unnest(coalesce(datacl, acldefault('d', datdba)))::text ORDER BY 1)::text \
             || coalesce((SELECT setconfig::text FROM pg_db_role_setting WHERE setdatabase = d.oid), '') \
             FROM pg_database d WHERE datname = '{name}'"
        ))
        .await
}

fn state(done: &Done) -> &Fact {
    let state = done
        .facts
        .iter()
        .find(|fact| matches!(fact, Fact::State { .. }));
    state.expect("the state is reported")
}

fn token(done: &Done) -> &str {
    let token = done.facts.iter().find_map(|fact| match fact {
        Fact::Fenced { fence, .. } => Some(fence.as_str()),
        _ => None,
    });
    token.expect("the fence is reported")
}

#[tokio::test]
async fn a_fence_ends_live_sessions_and_its_undo_gives_back_exactly_what_was() {
    let bench = Bench::with_rows().await;
    let (act, was) = (fence(&bench), rights(&bench).await);
    let app = bench.session("as_app").await;
    let cx = bench.cx(1, vec![]);
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    let before = act.before(&cx).await.unwrap();
    let raised = act.apply(&cx, &before).await.unwrap();
    assert_eq!(token(&raised), cx.key.to_string());
    let Fact::State { name, text, .. } = state(&raised) else {
        unreachable!("it is a state")
    };
    assert_eq!(
        (name.as_str(), text.as_str()),
        ("database staff", "2 tables, 300 rows")
    );
    // The application's session is gone, and it gets no other; owner and superuser do.
    assert!(app.run("test", "SELECT 1").await.is_err());
    let refused = bench.try_session("as_app").await.err().unwrap();
    assert!(refused.message.contains("permission denied"), "{refused:?}");
    bench.session("as_owner").await;
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Present(_)));
    // Another attempt finds it up, and keeps the token: it has held all the time.
    let again = act.apply(&bench.cx(1, vec![]), &before).await.unwrap();
    assert_eq!(token(&again), token(&raised));
    assert!(again.changed);
    // What the rollback leads to is measured before anybody gets in.
    let cx = bench.undo(1, vec![]);
    let undone = act.undo(&cx, &before).await.unwrap();
    assert_eq!(state(&undone), state(&raised));
    assert_eq!(rights(&bench).await, was);
    bench.session("as_app").await;
    // As if the first attempt had died before it could say what it measured.
    let undone = act.undo(&cx, &before).await.unwrap();
    assert!(!undone.changed);
    assert_eq!(state(&undone), state(&raised));
    assert_eq!(rights(&bench).await, was);
}

#[tokio::test]
async fn a_changed_row_changes_the_state() {
    let bench = Bench::with_rows().await;
    let act = fence(&bench);
    let raised = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    bench
        .sql("UPDATE public.users SET name = 'x' WHERE id = 7")
        .await;
    let undone = act.undo(&bench.undo(1, vec![]), &NULL).await.unwrap();
    let (
        Fact::State {
            digest: was,
            text: one,
            ..
        },
        Fact::State {
            digest: is,
            text: two,
            ..
        },
    ) = (state(&raised), state(&undone))
    else {
        unreachable!("they are states")
    };
    assert_ne!(was, is);
    assert_eq!(one, two);
}

#[tokio::test]
async fn rights_of_public_and_rights_to_pass_on_come_back() {
    let bench = Bench::with_rows().await;
    let (app, name) = (bench.app(), &bench.name);
    bench
        .sql(&format!(
            "GRANT ALL ON DATABASE {name} TO PUBLIC; \
             GRANT CONNECT ON DATABASE {name} TO {app} WITH GRANT OPTION; \
             ALTER DATABASE {name} SET work_mem = '5MB'"
        ))
        .await;
    let was = rights(&bench).await;
    let act = fence(&bench);
    act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    assert!(bench.try_session("as_app").await.is_err());
    unfence(&bench)
        .apply(&bench.cx(2, vec![]), &NULL)
        .await
        .unwrap();
    assert_eq!(rights(&bench).await, was);
    // The default, where nothing was ever granted.
    bench
        .ask(&format!(
            "SELECT 1 FROM pg_database WHERE datname = '{name}'"
        ))
        .await;
}

#[tokio::test]
async fn an_undone_unfence_raises_another_fence() {
    let bench = Bench::with_rows().await;
    let raised = fence(&bench)
        .apply(&bench.cx(1, vec![]), &NULL)
        .await
        .unwrap();
    let session = bench.session("staff").await;
    assert_eq!(broken(&session, token(&raised)).await.unwrap(), None);
    let act = unfence(&bench);
    let cx = bench.cx(2, vec![]);
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    let before = act.before(&cx).await.unwrap();
    // An attempt that did nothing leaves the old fence, and its word.
    let kept = act.undo(&bench.undo(2, vec![]), &before).await.unwrap();
    assert_eq!((kept.changed, token(&kept)), (false, token(&raised)));
    assert!(act.apply(&cx, &before).await.unwrap().changed);
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Present(_)));
    let app = bench.session("as_app").await;
    let why = broken(&session, token(&raised)).await.unwrap().unwrap();
    assert_eq!(why, "the fence has been lowered");
    let up = act.undo(&bench.undo(2, vec![]), &before).await.unwrap();
    assert_ne!(token(&up), token(&raised));
    assert!(app.run("test", "SELECT 1").await.is_err());
    let why = broken(&session, token(&raised)).await.unwrap().unwrap();
    assert!(why.contains("raised again"), "{why}");
    assert_eq!(broken(&session, token(&up)).await.unwrap(), None);
    let again = act.undo(&bench.undo(2, vec![]), &before).await.unwrap();
    assert_eq!(token(&again), token(&up));
    fence(&bench)
        .undo(&bench.undo(1, vec![]), &NULL)
        .await
        .unwrap();
    bench.session("as_app").await;
}

#[tokio::test]
async fn a_fence_that_cannot_hold_is_not_raised() {
    let bench = Bench::with_rows().await;
    let was = rights(&bench).await;
    let roles = |role: &str| Fence {
        roles: vec![role.to_owned()],
        ..fence(&bench)
    };
    let owner = format!("{}_owner", bench.name);
    for (act, why) in [
        (roles("postgres"), "cannot keep postgres out"),
        (roles("nobody_here"), "no role `nobody_here`"),
    ] {
        let failed = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap_err();
        assert_eq!(failed.cause, Cause::Host);
        assert!(failed.message.contains(why), "{}", failed.message);
        assert!(!failed.changed);
    }
    // A member of the owner's role has the owner's rights.
    bench
        .session("maintenance")
        .await
        .run("", &format!("GRANT {owner} TO {}", bench.app()))
        .await
        .unwrap();
    let failed = fence(&bench)
        .apply(&bench.cx(1, vec![]), &NULL)
        .await
        .unwrap_err();
    assert!(failed.hint.unwrap().contains("no member of a role"));
    assert_eq!(rights(&bench).await, was);
}

#[tokio::test]
async fn the_fence_of_another_rollout_is_left_alone() {
    let bench = Bench::with_rows().await;
    let open = rights(&bench).await;
    let mut other = bench.cx(1, vec![]);
    other.key.rollout = RolloutId::from_random([9; 6]);
    fence(&bench).apply(&other, &NULL).await.unwrap();
    let was = rights(&bench).await;
    let cx = bench.cx(1, vec![]);
    let failed = fence(&bench).apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("ro_090909090909"),
        "{}",
        failed.message
    );
    assert!(unfence(&bench).apply(&cx, &NULL).await.is_err());
    assert!(!fence(&bench).undo(&cx, &NULL).await.unwrap().changed);
    assert_eq!(rights(&bench).await, was);
    // That rollout was cancelled, and somebody says so.
    for (left_by, lowered) in [("ro_080808080808", false), ("ro_090909090909", true)] {
        let act = Unfence {
            left_by: Some(left_by.into()),
            ..unfence(&bench)
        };
        assert_eq!(act.apply(&cx, &NULL).await.is_ok(), lowered, "{left_by}");
        assert_eq!(rights(&bench).await == open, lowered, "{left_by}");
    }
}

#[tokio::test]
async fn an_owner_raises_a_fence_once_it_may_set_the_token() {
    let bench = Bench::with_rows().await;
    let was = rights(&bench).await;
    let act = Fence {
        database: "as_owner".into(),
        ..fence(&bench)
    };
    let failed = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap_err();
    let hint = failed.hint.unwrap();
    assert!(hint.contains("GRANT SET ON PARAMETER"), "{hint}");
    assert_eq!(rights(&bench).await, was);
    let owner = format!("{}_owner", bench.name);
    let session = bench.session("maintenance").await;
    let grant = format!(
        "GRANT SET ON PARAMETER \"lockstep.fence\", \"lockstep.fence_acl\" TO {owner}; \
         GRANT {} TO {owner}",
        bench.app()
    );
    session.run("", &grant).await.unwrap();
    let app = bench.session("as_app").await;
    act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    assert!(app.run("test", "SELECT 1").await.is_err());
    act.undo(&bench.undo(1, vec![]), &NULL).await.unwrap();
    assert_eq!(rights(&bench).await, was);
}

/// A role of this name with a password, who may connect.
async fn let_in(bench: &Bench, role: &str) {
    let name = &bench.name;
    bench
        .session("maintenance")
        .await
        .run(
            "",
            &format!("CREATE ROLE {role} LOGIN; GRANT CONNECT ON DATABASE {name} TO {role}"),
        )
        .await
        .unwrap();
}

#[tokio::test]
async fn roles_that_the_plan_leaves_out_are_named_and_not_let_through() {
    let mut bench = Bench::with_rows().await;
    let (name, app) = (bench.name.clone(), bench.app());
    let [etl, group, member] = ["etl", "group", "member"].map(|role| format!("{name}_{role}"));
    let password = literal(crate::sql::cluster::PASSWORD);
    let admin = bench.session("maintenance").await;
    // One by itself, one by a group; the owner's members and those by PUBLIC are no concern.
    let_in(&bench, &etl).await;
    let setup = format!(
        "ALTER ROLE {etl} PASSWORD {password}; CREATE ROLE {group}; CREATE ROLE {member} LOGIN; \
         GRANT {group} TO {member}; GRANT CONNECT ON DATABASE {name} TO {group}, PUBLIC; \
         CREATE ROLE {name}_dba LOGIN; GRANT {name}_owner TO {name}_dba"
    );
    admin.run("", &setup).await.unwrap();
    let was = rights(&bench).await;
    let (act, cx) = (fence(&bench), bench.cx(1, vec![]));
    let dry = Context {
        dry_run: true,
        ..bench.cx(1, vec![])
    };
    let Probe::Unmet(would) = act.probe(&dry).await.unwrap() else {
        panic!("the fence cannot be raised")
    };
    let both = format!("{etl}, {member}");
    assert!(
        would.message.starts_with(&format!("{both} may connect")),
        "{}",
        would.message
    );
    let stranger = Fence {
        roles: vec!["nobody_at_all".into()],
        ..act.clone()
    };
    let would = stranger.probe(&dry).await.unwrap_err();
    assert!(
        would.message.contains("no role `nobody_at_all`"),
        "{}",
        would.message
    );
    let failed = act.apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused, "INV-6: they could write");
    assert!(
        failed.message.starts_with(&format!("{both} may connect")),
        "{}",
        failed.message
    );
    assert!(failed.hint.unwrap().contains("`roles`"));
    assert!(!failed.changed);
    assert_eq!(rights(&bench).await, was);
    // Named, they are shut out.
    let act = Fence {
        roles: vec![app, etl.clone(), group],
        ..act
    };
    assert_eq!(act.probe(&cx).await.unwrap(), Probe::Absent(act.describe()));
    let mut config = bench.host.config.postgres["as_app"].clone();
    config.user.clone_from(&etl);
    bench.host.config.postgres.insert("as_etl".into(), config);
    let inside = bench.session("as_etl").await;
    let raised = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    assert!(inside.run("", "SELECT 1").await.is_err());
    let session = bench.session("staff").await;
    assert_eq!(broken(&session, token(&raised)).await.unwrap(), None);
    // Somebody comes that nobody had thought of.
    let late = format!("{name}_late");
    let_in(&bench, &late).await;
    let why = broken(&session, token(&raised)).await.unwrap().unwrap();
    assert_eq!(why, format!("{late} may connect behind the fence"));
    let again = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap_err();
    assert!(again.message.contains(&late), "{}", again.message);
    let enter = format!("GRANT CONNECT ON DATABASE {name} TO {etl}");
    admin.run("", &enter).await.unwrap();
    let _inside = bench.session("as_etl").await;
    let leave = format!("REVOKE CONNECT ON DATABASE {name} FROM {etl}, {late}");
    admin.run("", &leave).await.unwrap();
    // An owner's agent sees no more of others' sessions than whose they are.
    for viewer in ["staff", "as_owner"] {
        let session = bench.session(viewer).await;
        let why = broken(&session, token(&raised)).await.unwrap().unwrap();
        assert_eq!(why, format!("sessions of {etl} are open"), "{viewer}");
    }
    act.undo(&bench.undo(1, vec![]), &NULL).await.unwrap();
    let restored = rights(&bench).await;
    assert_eq!(restored, was);
}

#[tokio::test]
async fn a_replication_connection_to_the_database_ends_too() {
    let bench = Bench::with_rows().await;
    let (name, role) = (&bench.name, format!("{}_cdc", bench.name));
    let password = literal(crate::sql::cluster::PASSWORD);
    let setup = format!(
        "CREATE ROLE {role} LOGIN REPLICATION PASSWORD {password}; \
         GRANT CONNECT ON DATABASE {name} TO PUBLIC"
    );
    let admin = bench.session("maintenance").await;
    admin.run("", &setup).await.unwrap();
    let config = &bench.host.config.postgres["staff"];
    let place = format!(
        "host={} port={} dbname={name} user={role} replication=database",
        config.host, config.port
    );
    // It can write, unlike one of a standby.
    let mut psql = tokio::process::Command::new("psql")
        .args(["-X", &place])
        .env("PGPASSWORD", crate::sql::cluster::PASSWORD)
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let inside = format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{role}'");
    for tries in 0.. {
        if bench.ask(&inside).await == "1" {
            break;
        }
        assert!(tries < 500, "psql does not get in");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let act = fence(&bench);
    act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    assert_eq!(bench.ask(&inside).await, "0");
    act.undo(&bench.undo(1, vec![]), &NULL).await.unwrap();
    psql.kill().await.unwrap();
}

#[tokio::test]
async fn a_fence_that_would_keep_the_role_of_migrations_out_is_not_raised() {
    let bench = Bench::new().await;
    let name = &bench.name;
    let role = format!("{name}_migrator");
    let admin = bench.session("staff").await;
    let create = format!("CREATE ROLE {role} LOGIN; GRANT CONNECT ON DATABASE {name} TO PUBLIC");
    admin.run("", &create).await.unwrap();
    let was = rights(&bench).await;
    let act = fence(&bench);
    let migrated = || {
        let mut cx = bench.cx(1, vec![]);
        let config = std::sync::Arc::make_mut(&mut cx.config);
        let section = config.postgres.get_mut("staff").unwrap();
        section.migrate_as = Some(role.clone());
        cx
    };
    let refused = act.apply(&migrated(), &NULL).await.unwrap_err();
    let why = format!("the fence would keep {role}, as whom `staff` is migrated, out of it");
    assert_eq!(refused.message, why);
    let hint = refused.hint.unwrap();
    assert!(hint.contains(&format!("OWNER TO \"{role}\"")), "{hint}");
    assert_eq!(rights(&bench).await, was);
    let member = format!("GRANT {name}_owner TO {role}");
    admin.run("", &member).await.unwrap();
    act.apply(&migrated(), &NULL).await.unwrap();
    act.undo(&bench.undo(1, vec![]), &NULL).await.unwrap();
    assert_eq!(rights(&bench).await, was);
}
