use std::fs;
use std::path::PathBuf;

use lockstep_proto::action::postgres::{Fence, FenceVia, RestoreInto};
use lockstep_proto::values::ByteSize;

use super::super::archive::archive_in;
use super::super::backup::tests::backup;
use super::*;
use crate::sql::cluster::{Bench, as_owner};

const NULL: Value = Value::Null;

pub(super) fn verify() -> VerifyBackup {
    VerifyBackup {
        database: "staff".into(),
        restore_into: RestoreInto::Scratch,
        from: None,
        level: Level::Equal,
        compare: vec![Aspect::Schema, Aspect::RowCounts, Aspect::Checksums],
        min_size: ByteSize(0),
    }
}

pub(super) async fn taken(bench: &Bench) -> (Vec<Fact>, PathBuf) {
    let cx = bench.cx(1, vec![]);
    let facts = backup().apply(&cx, &NULL).await.unwrap().facts;
    let Fact::Backup { id, .. } = &facts[0] else {
        panic!("{facts:?}")
    };
    let database = Database::find(&cx, "staff").unwrap();
    let archive = archive_in(&Store::of(&cx, &database).path(id));
    (facts, archive)
}

async fn scratch_databases(bench: &Bench) -> String {
    let cx = bench.cx(2, vec![]);
    let prefix = scratch_prefix(&cx);
    bench
        .ask(&format!(
            "SELECT count(*) FROM pg_database WHERE starts_with(datname, '{prefix}')"
        ))
        .await
}

#[tokio::test]
async fn a_backup_that_restores_to_its_source_is_verified() {
    let bench = Bench::with_rows().await;
    let (facts, _) = taken(&bench).await;
    // What a killed attempt has left.
    let cx = bench.cx(2, facts.clone());
    let left = scratch_name(&cx);
    bench
        .session("maintenance")
        .await
        .run("", &format!("CREATE DATABASE {left}"))
        .await
        .unwrap();
    let cx = bench.cx(2, facts);
    assert!(matches!(
        verify().probe(&cx).await.unwrap(),
        Probe::Absent(_)
    ));
    let done = verify().apply(&cx, &NULL).await.unwrap();
    assert!(done.summary.contains("level 4"), "{}", done.summary);
    assert!(matches!(
        done.facts.as_slice(),
        [Fact::BackupVerified {
            fence: None,
            level: Level::Equal,
            ..
        }]
    ));
    assert!(matches!(
        verify().probe(&cx).await.unwrap(),
        Probe::Present(_)
    ));
    assert_eq!(scratch_databases(&bench).await, "0");
    // Without the fact, as after a crash of the backup's step, the manifest serves.
    let alone = verify().apply(&bench.cx(2, vec![]), &NULL).await.unwrap();
    assert_eq!(alone.facts, done.facts);
}

#[tokio::test]
async fn damaged_archives_fail() {
    let bench = Bench::with_rows().await;
    let (facts, archive) = taken(&bench).await;
    let whole = fs::read(&archive).unwrap();
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for bytes in [
        &whole[..whole.len() / 2],
        &whole[..whole.len() - 1],
        flipped.as_slice(),
        b"",
    ] {
        fs::write(&archive, bytes).unwrap();
        let failed = verify()
            .apply(&bench.cx(2, facts.clone()), &NULL)
            .await
            .unwrap_err();
        assert_eq!(failed.cause, Cause::CheckUnmet);
        assert!(failed.message.contains("damaged"), "{}", failed.message);
        assert!(failed.hint.unwrap().contains("new backup"));
    }
    // A digest made to fit does not help a torn archive.
    let torn = &whole[..whole.len() / 2];
    fs::write(&archive, torn).unwrap();
    let cx = bench.cx(2, vec![]);
    let database = Database::find(&cx, "staff").unwrap();
    let store = Store::of(&cx, &database);
    let made = store.all().pop().unwrap();
    let forged = Manifest {
        digest: Digest::of(torn),
        size: torn.len() as u64,
        ..made
    };
    super::super::manifest::write_manifest(&store.path(&forged.id), &forged).unwrap();
    let failed = verify().apply(&cx, &NULL).await.unwrap_err();
    assert!(
        failed.message.contains("pg_restore: error"),
        "{}",
        failed.message
    );
    assert_eq!(scratch_databases(&bench).await, "0");
}

#[tokio::test]
async fn what_does_not_come_back_is_named() {
    let bench = Bench::with_rows().await;
    let (_, archive) = taken(&bench).await;
    let cx = bench.cx(2, vec![]);
    let database = Database::find(&cx, "staff").unwrap();
    let store = Store::of(&cx, &database);
    let mut made = store.all().pop().unwrap();
    made.contents.get_mut("users").unwrap().rows = 201;
    made.contents.get_mut("hr.notes").unwrap().checksum = "1".into();
    made.schema = Digest::of(b"another");
    super::super::manifest::write_manifest(archive.parent().unwrap(), &made).unwrap();
    let failed = verify().apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    for why in [
        "users has 200 rows, and had 201",
        "hr.notes has other values",
        "fingerprint",
    ] {
        assert!(failed.message.contains(why), "{}", failed.message);
    }
    assert_eq!(scratch_databases(&bench).await, "0");
    let small = VerifyBackup {
        min_size: ByteSize(1 << 30),
        ..verify()
    };
    let failed = small.apply(&cx, &NULL).await.unwrap_err();
    assert!(
        failed.message.contains("at least 1.0 GiB"),
        "{}",
        failed.message
    );
    let lost = bench.cx(
        3,
        vec![Fact::Backup {
            database: "staff".into(),
            id: "elsewhere".into(),
            digest: made.digest,
            size: 1,
            taken_at: made.taken_at,
            fence: None,
        }],
    );
    let failed = verify().apply(&lost, &NULL).await.unwrap_err();
    assert!(
        failed.hint.unwrap().contains("host that made"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn an_owner_without_other_rights_verifies_its_own_backup() {
    let bench = Bench::with_rows().await;
    let owner = format!("{}_owner", bench.name);
    let act = lockstep_proto::action::postgres::Backup {
        database: "as_owner".into(),
        ..backup()
    };
    let facts = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap().facts;
    let act = VerifyBackup {
        database: "as_owner".into(),
        ..verify()
    };
    let failed = act
        .apply(&bench.cx(2, facts.clone()), &NULL)
        .await
        .unwrap_err();
    assert!(
        failed.hint.unwrap().contains("CREATEDB"),
        "{}",
        failed.message
    );
    let session = bench.session("maintenance").await;
    session
        .run("", &format!("ALTER ROLE {owner} CREATEDB"))
        .await
        .unwrap();
    act.apply(&bench.cx(2, facts), &NULL).await.unwrap();
}

fn restore_act() -> lockstep_proto::action::postgres::Restore {
    lockstep_proto::action::postgres::Restore {
        database: "staff".into(),
    }
}

/// A fence, a backup behind it, and its proof.
async fn behind_a_fence(bench: &Bench) -> (Fence, Vec<Fact>) {
    let fence = Fence {
        database: "staff".into(),
        via: FenceVia::Connect,
        roles: vec![bench.app()],
    };
    fence.apply(&bench.cx(0, vec![]), &NULL).await.unwrap();
    let (mut facts, _) = taken(bench).await;
    facts.extend(
        verify()
            .apply(&bench.cx(2, facts.clone()), &NULL)
            .await
            .unwrap()
            .facts,
    );
    (fence, facts)
}

#[tokio::test]
async fn a_restore_swaps_the_database_and_its_undo_swaps_back() {
    let bench = Bench::with_rows().await;
    let name = &bench.name;
    let app = bench.app();
    bench
        .sql(&format!(
            "ALTER DATABASE {name} SET work_mem = '5MB'; \
             ALTER DATABASE {name} SET search_path = public, hr; \
             ALTER DATABASE {name} CONNECTION LIMIT 40"
        ))
        .await;
    let rights = format!(
        "SELECT datacl::text || datconnlimit || pg_get_userbyid(datdba) || \
         (SELECT setconfig::text FROM pg_db_role_setting WHERE setdatabase = d.oid) \
         FROM pg_database d WHERE datname = '{name}'"
    );
    let (fence, facts) = behind_a_fence(&bench).await;
    let was = bench.ask(&rights).await;
    bench
        .sql("DROP TABLE hr.notes; DELETE FROM public.users; CREATE TABLE public.added (a int)")
        .await;
    let cx = bench.cx(3, facts.clone());
    let act = restore_act();
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    let done = act.apply(&cx, &NULL).await.unwrap();
    assert!(
        done.summary.contains("2 tables, 300 rows"),
        "{}",
        done.summary
    );
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Present(_)));
    assert_eq!(bench.ask(&rights).await, was);
    assert!(
        bench.try_session("as_app").await.is_err(),
        "the fence is around the new one, too"
    );
    let count = "SELECT count(*) FROM hr.notes";
    let value = bench.session("staff").await.value("", count).await.unwrap();
    assert_eq!(value.as_deref(), Some("100"));
    // Again, after a crash that left no outcome.
    act.apply(&bench.cx(3, facts.clone()), &NULL).await.unwrap();
    let undone = act
        .undo(&bench.undo(3, facts.clone()), &NULL)
        .await
        .unwrap();
    assert!(undone.changed, "{}", undone.summary);
    assert!(bench.session("staff").await.value("", count).await.is_err());
    bench.sql("SELECT * FROM public.added").await;
    assert!(
        !act.undo(&bench.undo(3, facts), &NULL)
            .await
            .unwrap()
            .changed
    );
    fence.undo(&bench.undo(0, vec![]), &NULL).await.unwrap();
    let session = bench.session("as_app").await;
    assert!(
        session.run("", "SELECT 1").await.is_ok(),
        "{app} is in again"
    );
}

#[tokio::test]
async fn a_restore_is_refused_when_rows_could_have_come_in() {
    let bench = Bench::with_rows().await;
    let (fence, facts) = behind_a_fence(&bench).await;
    fence.undo(&bench.undo(0, vec![]), &NULL).await.unwrap();
    bench
        .sql("INSERT INTO public.users SELECT n, 'new' FROM generate_series(300, 311) n")
        .await;
    // Raised again, but not the same: somebody could write in between.
    fence.apply(&bench.cx(0, vec![]), &NULL).await.unwrap();
    let cx = bench.cx(3, facts);
    let failed = restore_act().apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("users: 12 rows written since"),
        "{}",
        failed.message
    );
    assert!(!failed.changed);
    let databases = format!(
        "SELECT count(*) FROM pg_database WHERE starts_with(datname, '{}__')",
        bench.name
    );
    assert_eq!(bench.ask(&databases).await, "0");
    assert!(matches!(
        restore_act().probe(&cx).await.unwrap(),
        Probe::Absent(_)
    ));
}

#[tokio::test]
async fn an_interrupted_swap_goes_on_or_back() {
    let bench = Bench::with_rows().await;
    let (_, facts) = behind_a_fence(&bench).await;
    let name = &bench.name;
    let close = format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false");
    let session = bench.session("maintenance").await;
    session.run("", &close).await.unwrap();
    let cx = bench.cx(3, facts.clone());
    assert!(matches!(
        restore_act().probe(&cx).await.unwrap(),
        Probe::Partial(_)
    ));
    let undone = restore_act()
        .undo(&bench.undo(3, facts.clone()), &NULL)
        .await
        .unwrap();
    assert!(!undone.changed);
    bench.session("staff").await;
    session.run("", &close).await.unwrap();
    restore_act().apply(&cx, &NULL).await.unwrap();
    bench.session("staff").await;
}

/// Lets the database's owner raise fences and restore.
async fn let_owner_restore(bench: &Bench) {
    let (owner, app) = (format!("{}_owner", bench.name), bench.app());
    let grant = format!(
        "ALTER ROLE {owner} CREATEDB; GRANT {app} TO {owner}; \
         GRANT SET ON PARAMETER \"lockstep.fence\", \"lockstep.fence_acl\" TO {owner}"
    );
    let session = bench.session("maintenance").await;
    session.run("", &grant).await.unwrap();
}

/// Every owner and right in the database.
async fn owners_and_rights(bench: &Bench) -> Option<String> {
    let sql = "SELECT string_agg(x, E'\\n' ORDER BY x) FROM ( \
        SELECT concat_ws(' ', relname, relowner::regrole, relacl) FROM pg_class \
        WHERE relnamespace IN ('public'::regnamespace, 'hr'::regnamespace) \
        UNION ALL SELECT concat_ws(' ', attrelid::regclass, attname, attacl) FROM pg_attribute \
        WHERE attacl IS NOT NULL AND attrelid >= 16384 \
        UNION ALL SELECT concat_ws(' ', proname, proowner::regrole, proacl) FROM pg_proc \
        WHERE oid >= 16384 OR proname = 'pg_sleep' \
        UNION ALL SELECT concat_ws(' ', nspname, nspowner::regrole, nspacl) FROM pg_namespace \
        WHERE nspname IN ('public', 'hr') \
        UNION ALL SELECT concat_ws(' ', defaclrole::regrole, defaclacl) FROM pg_default_acl) y(x)";
    bench.session("staff").await.value("", sql).await.unwrap()
}

#[tokio::test]
async fn an_owner_gives_all_rights_back() {
    let bench = Bench::with_rows().await;
    let_owner_restore(&bench).await;
    let app = bench.app();
    bench
        .sql(&format!(
            "GRANT USAGE ON SCHEMA hr TO {app}; GRANT SELECT (id) ON hr.notes TO {app}; \
             CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'; \
             REVOKE ALL ON FUNCTION public.f() FROM PUBLIC; \
             ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {app}"
        ))
        .await;
    let was = owners_and_rights(&bench).await;
    let (fence, facts) = behind_a_fence(&bench).await;
    let cx = as_owner(bench.cx(3, facts));
    restore_act().apply(&cx, &NULL).await.unwrap();
    assert_eq!(owners_and_rights(&bench).await, was, "INV-6");
    fence.undo(&bench.undo(0, vec![]), &NULL).await.unwrap();
    let read = "SELECT count(*) FROM public.users";
    let value = bench.session("as_app").await.value("", read).await.unwrap();
    assert_eq!(value.as_deref(), Some("200"));
}

#[tokio::test]
async fn an_owner_who_cannot_give_all_rights_back_does_not_restore() {
    // Giving the one fails, and of the other the server only warns.
    for (given, lost) in [
        (
            "ALTER TABLE hr.notes OWNER TO postgres",
            "must be member of role",
        ),
        (
            "GRANT EXECUTE ON FUNCTION pg_catalog.pg_sleep(float8) TO pg_monitor",
            "without `GRANT ALL ON FUNCTION pg_catalog.pg_sleep",
        ),
    ] {
        let bench = Bench::with_rows().await;
        let_owner_restore(&bench).await;
        let session = bench.session("staff").await;
        session.run("", given).await.unwrap();
        drop(session);
        let was = owners_and_rights(&bench).await;
        let (_, facts) = behind_a_fence(&bench).await;
        let cx = as_owner(bench.cx(3, facts.clone()));
        let failed = restore_act().apply(&cx, &NULL).await.unwrap_err();
        assert!(failed.message.contains(lost), "{}", failed.message);
        assert!(failed.hint.unwrap().contains("superuser"));
        assert!(!failed.changed);
        let databases = format!(
            "SELECT count(*) FROM pg_database WHERE starts_with(datname, '{}__')",
            bench.name
        );
        assert_eq!(bench.ask(&databases).await, "0");
        restore_act()
            .apply(&bench.cx(3, facts), &NULL)
            .await
            .unwrap();
        assert_eq!(owners_and_rights(&bench).await, was, "by a superuser");
    }
}

#[tokio::test]
async fn a_copy_that_was_not_filled_is_seen_and_undone() {
    let bench = Bench::with_rows().await;
    let (_, facts) = behind_a_fence(&bench).await;
    let copies = format!(
        "SELECT count(*) FROM pg_database WHERE starts_with(datname, '{}__restore_')",
        bench.name
    );
    let cx = bench.cx(3, facts.clone());
    let begun = async {
        while bench.ask(&copies).await == "0" {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    // As if the step process were killed.
    tokio::select! {
        done = async { restore_act().apply(&cx, &NULL).await } => panic!("too late: {done:?}"),
        () = begun => {}
    }
    let probe = restore_act().probe(&cx).await.unwrap();
    assert!(matches!(probe, Probe::Partial(_)), "{probe:?}");
    assert_eq!(bench.ask(&copies).await, "1");
    let undo = bench.undo(3, facts);
    assert!(!restore_act().undo(&undo, &NULL).await.unwrap().changed);
    assert_eq!(bench.ask(&copies).await, "0");
    let probe = restore_act().probe(&cx).await.unwrap();
    assert!(matches!(probe, Probe::Absent(_)), "{probe:?}");
}

#[tokio::test]
async fn a_database_is_open_again_when_a_swap_is_given_up() {
    let bench = Bench::with_rows().await;
    let_owner_restore(&bench).await;
    let see = format!("GRANT pg_read_all_stats TO {}_owner", bench.name);
    let session = bench.session("maintenance").await;
    session.run("", &see).await.unwrap();
    let (_, facts) = behind_a_fence(&bench).await;
    // A session that an owner sees and may not end: that of a superuser.
    let inside = bench.session("staff").await;
    let cx = as_owner(bench.cx(3, facts.clone()));
    let failed = restore_act().apply(&cx, &NULL).await.unwrap_err();
    assert!(failed.changed);
    assert!(failed.message.contains("ending sessions"), "{failed:?}");
    let count = "SELECT count(*) FROM public.users";
    let session = bench.try_session("staff").await;
    let value = session.unwrap().value("", count).await.unwrap();
    assert_eq!(value.as_deref(), Some("200"));
    // And the way on is free.
    drop(inside);
    let cx = as_owner(bench.cx(3, facts));
    restore_act().apply(&cx, &NULL).await.unwrap();
}
