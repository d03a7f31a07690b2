//! With the real pgBackRest on a server of the test's own: a migration is undone by taking the whole
//! server back to the rollout's restore point.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::action::migration::{Tool, UndoBy};
use lockstep_proto::action::postgres::{ExternalBackup, Fence, FenceVia, RestorePoint, Unfence};
use lockstep_proto::ids::LossId;
use tokio::time::Instant;

use super::stage::placed;
use super::*;
use crate::actions::migration::tools::files::Stage;
use crate::config;
use crate::sql::cluster::{Archive, Bench, Cluster, as_server};

mod turns;

const NULL: Value = Value::Null;

/// It destroys, and has no way down.
const FILES: &[(&str, &str)] = &[
    ("001_base.sql", "SELECT 1"),
    (
        "002_change.sql",
        "DROP TABLE hr.notes; UPDATE public.users SET name = 'x'; CREATE TABLE rooms (id int)",
    ),
    ("003_more.sql", "CREATE TABLE more_rooms (id int)"),
];

/// A server with a second database, `other`, whose table `things` has ten rows.
struct Server {
    stage: Stage,
    cluster: Arc<Cluster>,
    fence: Fence,
    /// What the database was when the fence was raised.
    state: Fact,
}

impl Server {
    async fn new() -> Self {
        let cluster = Cluster::archiving(Archive::Pgbackrest);
        let bench = Bench::with_rows_on(cluster.clone()).await;
        let stage = Stage::on(bench, Tool::Sql, FILES);
        let bench = &stage.bench;
        let fence = Fence {
            database: "staff".into(),
            via: FenceVia::Connect,
            roles: vec![bench.app()],
        };
        let session = bench.session("maintenance").await;
        session.run("", "CREATE DATABASE other").await.unwrap();
        drop(session);
        let cx = bench.cx(0, vec![]);
        let base = stage.act("001_base").apply(&cx, &NULL).await.unwrap();
        assert!(base.changed);
        let raised = fence.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
        let is_state = |fact: &&Fact| matches!(fact, Fact::State { .. });
        let state = raised.facts.iter().find(is_state).unwrap().clone();
        let server = Self {
            stage,
            cluster,
            fence,
            state,
        };
        server
            .other("CREATE TABLE things AS SELECT n FROM generate_series(1, 10) n")
            .await;
        server
    }

    fn bench(&self) -> &Bench {
        &self.stage.bench
    }

    /// The commands that stop and start the server.
    fn service(&mut self) -> &mut config::Service {
        let services = &mut self.stage.bench.host.config.services;
        services.get_mut("server").unwrap()
    }

    /// A command that is a script of the test's own.
    fn script(&self, name: &str, text: &str) -> Vec<String> {
        let path = self.bench().host.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        executable(&path);
        vec![path.display().to_string()]
    }

    /// What it says of the database that the plan names.
    fn staff(&mut self) -> &mut config::Postgres {
        let sections = &mut self.stage.bench.host.config.postgres;
        sections.get_mut("staff").unwrap()
    }

    fn cx(&self, step: u16) -> Context {
        with_time(placed(self.bench().cx(step, vec![])))
    }

    fn undo_cx(&self, step: u16) -> Context {
        with_time(placed(self.bench().undo(step, vec![])))
    }

    /// A session in the other database; it ends with the value.
    async fn session_in_other(&self) -> Session {
        let cx = self.bench().cx(999, vec![]);
        let database = Database::find(&cx, "maintenance").unwrap();
        database.connect_to(&cx, "other").await.unwrap()
    }

    async fn other(&self, sql: &str) {
        let session = self.session_in_other().await;
        session
            .run("", &format!("SET search_path = public; {sql}"))
            .await
            .unwrap();
    }

    /// A physical backup and a restore point, at the two steps from this one on.
    async fn point(&self, step: u16) {
        let backup: ExternalBackup = serde_json::from_value(json!({"database": "staff"})).unwrap();
        backup.apply(&self.cx(step), &NULL).await.unwrap();
        Self::restore_point()
            .apply(&self.cx(step + 1), &NULL)
            .await
            .unwrap();
    }

    fn restore_point() -> RestorePoint {
        serde_json::from_value(json!({"database": "staff", "recoverable": true})).unwrap()
    }

    fn act(&self) -> Apply {
        Apply {
            undo_by: UndoBy::Recover,
            ..self.stage.act("002_change")
        }
    }

    /// The migration, behind a point of its own.
    async fn migrated(&self, step: u16) {
        self.point(step - 2).await;
        let done = self.act().apply(&self.cx(step), &NULL).await.unwrap();
        assert!(done.changed);
    }

    async fn undo(&self, step: u16) -> Result<Done, Failure> {
        self.undo_with(step, vec![]).await
    }

    async fn undo_with(&self, step: u16, facts: Vec<Fact>) -> Result<Done, Failure> {
        let before = json!({"revision": "001_base"});
        let cx = with_time(placed(self.bench().undo(step, facts)));
        self.act().undo(&cx, &before).await
    }

    async fn refused(&self, step: u16, why: &str) {
        let failed = self.undo(step).await.unwrap_err();
        assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
        assert!(!failed.changed, "{failed:?}");
        assert!(failed.message.contains(why), "INV-6: {}", failed.message);
        assert_eq!(self.timeline().await, 1);
        assert_eq!(self.rooms().await, "0");
    }

    /// What the migration has made.
    async fn rooms(&self) -> String {
        let session = self.bench().session("staff").await;
        let sql = "SELECT count(*)::text FROM public.rooms";
        session.value("", sql).await.unwrap().unwrap()
    }

    async fn timeline(&self) -> u32 {
        let sql = "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)";
        u32::from_str_radix(&self.bench().ask(sql).await, 16).unwrap()
    }

    /// Runs one of the service's commands, as a person does.
    fn ordered(&self, what: &str) {
        let service = &self.bench().host.config.services["server"];
        let argv = match what {
            "stop" => &service.stop,
            _ => &service.start,
        };
        let done = as_server(&argv[0]).args(&argv[1..]).status().unwrap();
        assert!(done.success(), "{argv:?}");
    }

    /// Waits until the server has come to its recovery's end.
    async fn is_promoted(&self) {
        let began = Instant::now();
        loop {
            if let Ok(session) = self.bench().try_session("maintenance").await {
                let sql = "SELECT pg_is_in_recovery()::text";
                if session.value("", sql).await.unwrap().as_deref() == Some("false") {
                    return;
                }
            }
            assert!(began.elapsed() < Duration::from_mins(1), "it does not run");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Names beside the server's files.
    fn beside(&self) -> Vec<String> {
        let directory = self.cluster.data();
        let entries = fs::read_dir(directory.parent().unwrap()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name.starts_with("data__")).collect();
        names.sort();
        names
    }

    fn auto(&self) -> Vec<String> {
        let text = fs::read_to_string(self.cluster.data().join("postgresql.auto.conf")).unwrap();
        let settings = text.lines().filter_map(|line| line.split_once('='));
        let mut lines: Vec<String> = settings
            .map(|(name, value)| format!("{}={}", name.trim(), value.trim().trim_matches('\'')))
            .collect();
        lines.sort();
        lines
    }

    /// Counts, checksums, fingerprint and fence equal the start.
    async fn is_back(&self) {
        let cx = self.bench().undo(1, vec![]);
        let lowered = self.fence.undo(&cx, &NULL).await.unwrap();
        assert!(lowered.facts.contains(&self.state), "INV-6: {lowered:?}");
        let session = self.session_in_other().await;
        let rows = session
            .value("", "SELECT count(*)::text FROM public.things")
            .await
            .unwrap();
        assert_eq!(rows.as_deref(), Some("10"));
        self.bench().session("as_app").await;
    }
}

fn executable(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    for dir in path
        .ancestors()
        .skip(1)
        .take_while(|dir| dir.starts_with("/tmp/"))
    {
        let _ = fs::set_permissions(dir, fs::Permissions::from_mode(0o755));
    }
}

/// It has time to stop and start a server.
fn with_time(mut cx: Context) -> Context {
    cx.deadline = Instant::now() + Duration::from_mins(10);
    cx
}

#[tokio::test]
async fn a_server_goes_back_to_its_point_if_nothing_is_lost_in_any_database() {
    let server = Server::new().await;
    let auto = server.auto();
    server.migrated(5).await;
    // What somebody has written elsewhere would be lost, and a session would end.
    server
        .other("INSERT INTO things VALUES (11), (12), (13)")
        .await;
    server
        .refused(5, "other: things: 3 rows written since")
        .await;
    server.other("DELETE FROM things WHERE n > 10").await;
    server.other("CREATE TABLE more (n int)").await;
    server
        .refused(5, "other: pg_catalog.pg_class: 1 row written since")
        .await;
    server
        .other("DROP TABLE more; CREATE UNLOGGED TABLE cache AS SELECT 1")
        .await;
    server
        .refused(5, "other: public.cache: 1 rows of an unlogged table")
        .await;
    server.other("DROP TABLE cache").await;
    let role = "CREATE ROLE reporting LOGIN";
    let session = server.bench().session("maintenance").await;
    session.run("", role).await.unwrap();
    drop(session);
    server.refused(5, "pg_authid: 1 row written since").await;
    let session = server.bench().session("maintenance").await;
    session.run("", "DROP ROLE reporting").await.unwrap();
    server.refused(5, "1 of postgres in postgres").await;
    drop(session);
    // A migration by hand goes through the fence, which lets the owner in.
    let by_hand = "CREATE TABLE public.alembic_version AS SELECT 1 AS version_num";
    server.bench().sql(by_hand).await;
    server
        .refused(5, "alembic_version: migrated since the step")
        .await;
    let drop = "DROP TABLE public.alembic_version";
    server.bench().sql(drop).await;
    assert_eq!(server.beside(), Vec::<String>::new());
    // A mark that another rollout has left says nothing of this one.
    let mark = server.cluster.data().join("lockstep.recovered_0123_0_5");
    fs::write(mark, "").unwrap();

    let undone = server.undo(5).await.unwrap();
    assert!(undone.changed, "{undone:?}");
    let notes: Vec<&String> = undone
        .facts
        .iter()
        .filter_map(|fact| match fact {
            Fact::Note { value, .. } => Some(value),
            _ => None,
        })
        .collect();
    let [forward, files] = notes.as_slice() else {
        panic!("{notes:?}")
    };
    assert!(
        forward.contains("--target-timeline=1 --target=lockstep_"),
        "{forward}"
    );
    let forward = forward.split('`').nth(1).unwrap().to_owned();
    let beside = server.beside();
    assert_eq!(beside.len(), 1, "{beside:?}");
    assert!(
        beside[0].starts_with("data__before_") && files.contains(&beside[0]),
        "{files}"
    );
    assert_eq!(server.auto(), auto, "settings are those of before");
    assert_eq!(server.timeline().await, 2);
    // Again, after a crash that left no outcome: nothing is done twice.
    let again = server.undo(5).await.unwrap();
    assert!(again.changed);
    assert_eq!(server.timeline().await, 2, "INV-1");
    assert_eq!(server.beside(), beside);
    server.is_back().await;
    // What the report says takes it forward again, to where it was stopped.
    server.ordered("stop");
    let mut words = forward.split(' ');
    let done = as_server(words.next().unwrap()).args(words).output();
    let done = done.unwrap();
    assert!(done.status.success(), "{forward}: {done:?}");
    server.ordered("start");
    server.is_promoted().await;
    assert_eq!(server.rooms().await, "0", "it is migrated");
    let session = server.session_in_other().await;
    let rows = session
        .value("", "SELECT count(*)::text FROM public.things")
        .await;
    assert_eq!(rows.unwrap().as_deref(), Some("10"));
    assert!(server.timeline().await > 2);
}

/// The instants at which an attempt is cut off.
#[derive(Debug, Clone, Copy)]
enum Cut {
    HalfRestored,
    Restored,
    Stopped,
    Exchanged,
    Started,
}

impl Server {
    fn is(&self, cut: Cut) -> bool {
        let data = self.cluster.data();
        let has = |part: &str| self.beside().iter().any(|name| name.contains(part));
        let names = fs::read_dir(&data).into_iter().flatten().flatten();
        let mut names = names.map(|entry| entry.file_name().into_string().unwrap());
        let mark = names.any(|name| name.starts_with("lockstep.recovered_"));
        let runs = data.join("postmaster.pid").exists();
        match cut {
            Cut::HalfRestored => {
                let name = self
                    .beside()
                    .into_iter()
                    .find(|name| name.contains("restoring"));
                name.is_some_and(|name| data.with_file_name(name).join("base").exists())
            }
            Cut::Restored => has("restored"),
            Cut::Stopped => !runs && !mark,
            Cut::Exchanged => mark && !runs,
            Cut::Started => mark && runs,
        }
    }

    /// Begins an undo, and cuts it off at an instant.
    async fn cut_off(&self, step: u16, cut: Cut) {
        let undo = self.undo(step);
        let reached = async {
            while !self.is(cut) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            biased;
            () = reached => {}
            done = undo => panic!("{cut:?} was not seen: {done:?}"),
        }
    }
}

/// An attempt is cut off at an instant, and another one ends what it has begun.
async fn cut_off_and_ended(cut: Cut) {
    let server = Server::new().await;
    server.migrated(5).await;
    server.cut_off(5, cut).await;
    let probe = server.act().probe(&server.undo_cx(5)).await.unwrap();
    let as_expected = match cut {
        Cut::HalfRestored | Cut::Restored => matches!(probe, Probe::Absent(_)),
        Cut::Stopped | Cut::Exchanged => matches!(probe, Probe::Partial(_)),
        Cut::Started => matches!(probe, Probe::Partial(_) | Probe::Present(_)),
    };
    assert!(as_expected, "{cut:?}: {probe:?}");
    let undone = server.undo(5).await.unwrap();
    assert!(undone.changed, "{cut:?}: {undone:?}");
    assert_eq!(server.timeline().await, 2, "INV-1: once: {cut:?}");
    let beside = server.beside();
    let is_kept = beside.len() == 1 && beside[0].starts_with("data__before_");
    assert!(is_kept, "{cut:?}: {beside:?}");
    server.is_back().await;
}

#[tokio::test]
async fn a_recovery_that_is_cut_off_while_it_restores_ends_with_the_next_attempt() {
    cut_off_and_ended(Cut::HalfRestored).await;
}

#[tokio::test]
async fn a_recovery_that_is_cut_off_before_the_stop_ends_with_the_next_attempt() {
    cut_off_and_ended(Cut::Restored).await;
}

#[tokio::test]
async fn a_recovery_that_is_cut_off_after_the_stop_ends_with_the_next_attempt() {
    cut_off_and_ended(Cut::Stopped).await;
}

#[tokio::test]
async fn a_recovery_that_is_cut_off_before_the_start_ends_with_the_next_attempt() {
    cut_off_and_ended(Cut::Exchanged).await;
}

#[tokio::test]
async fn a_recovery_that_is_cut_off_before_the_promotion_ends_with_the_next_attempt() {
    cut_off_and_ended(Cut::Started).await;
}

#[tokio::test]
async fn a_copy_that_does_not_recover_gives_the_place_back() {
    let server = Server::new().await;
    server.migrated(5).await;
    // The file of the log that holds the point is lost.
    let archive = server.cluster.repository().join("archive/main");
    let sql = "SELECT pg_walfile_name(pg_current_wal_lsn())";
    let now = server.bench().ask(sql).await;
    let mut left = vec![archive];
    let mut removed = 0;
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            } else if name.len() > 40 && name[..24] < now[..] && !name.contains(".backup") {
                fs::remove_file(entry.path()).unwrap();
                removed += 1;
            }
        }
    }
    assert!(removed > 0);
    let failed = server.undo(5).await.unwrap_err();
    assert!(
        failed.message.contains("did not recover to lockstep_")
            && failed.message.contains("runs as it did before"),
        "{}",
        failed.message
    );
    assert!(!failed.changed);
    assert_eq!(server.timeline().await, 1);
    assert_eq!(server.rooms().await, "0");
}

#[tokio::test]
async fn what_is_written_in_the_last_moment_is_not_lost() {
    let mut server = Server::new().await;
    // Whoever stops the server first writes to another database.
    let write = server
        .cluster
        .psql("other", "INSERT INTO things VALUES (99)");
    let stop = server.service().stop.join(" ");
    server.service().stop = server.script("late", &format!("{write}\nexec {stop}"));
    server.migrated(5).await;
    let failed = server.undo(5).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
    assert!(
        failed
            .message
            .contains("other: things: 1 row written since"),
        "INV-6: {}",
        failed.message
    );
    assert_eq!(server.timeline().await, 1);
    assert_eq!(server.beside(), Vec::<String>::new());
    let session = server.session_in_other().await;
    let rows = session
        .value("", "SELECT count(*)::text FROM public.things")
        .await
        .unwrap();
    assert_eq!(rows.as_deref(), Some("11"));
}

#[tokio::test]
async fn rows_that_applications_have_written_since_are_named_without_the_migrations_own() {
    let server = Server::new().await;
    server.migrated(5).await;
    let unfence = Unfence {
        database: "staff".into(),
        via: FenceVia::Connect,
        roles: vec![server.bench().app()],
        left_by: None,
    };
    // The fence is down for a while, and up again, as a rollback has it.
    let bake = async |step: u16, sql: &str| {
        let before = unfence.before(&server.cx(step)).await.unwrap();
        unfence.apply(&server.cx(step), &before).await.unwrap();
        server.bench().sql(sql).await;
        unfence.undo(&server.undo_cx(step), &before).await.unwrap();
    };
    bake(
        6,
        "INSERT INTO public.users VALUES (901, 'new'); DELETE FROM public.users WHERE id IN (7, 8)",
    )
    .await;
    server
        .refused(
            5,
            "users: 1 row written since, 2 rows of the 200 of before changed or deleted",
        )
        .await;
    // A person gives up just these, and not what is written after that word.
    bake(7, "DELETE FROM public.users WHERE id = 901").await;
    let failed = server.undo(5).await.unwrap_err();
    assert!(
        failed
            .message
            .contains("users: 2 rows of the 200 of before changed or deleted"),
        "INV-6: {}",
        failed.message
    );
    let loss = LossId::in_message(&failed.message).unwrap();
    let by = "olga".to_owned();
    let accepted = vec![Fact::LossAccepted { loss, by }];
    server.other("INSERT INTO things VALUES (11)").await;
    let failed = server.undo_with(5, accepted.clone()).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
    assert_eq!(server.timeline().await, 1);
    server.other("DELETE FROM things WHERE n = 11").await;
    let undone = server.undo_with(5, accepted).await.unwrap();
    let told = |fact: &Fact| matches!(fact, Fact::Note { name, .. } if name == "accepted loss");
    assert!(undone.facts.iter().any(told), "{undone:?}");
    assert_eq!(server.timeline().await, 2);
    server.is_back().await;
}

#[tokio::test]
async fn an_open_bake_in_which_nothing_was_written_does_not_keep_a_server_from_going_back() {
    let server = Server::new().await;
    server.migrated(5).await;
    let unfence = Unfence {
        database: "staff".into(),
        via: FenceVia::Connect,
        roles: vec![server.bench().app()],
        left_by: None,
    };
    let before = unfence.before(&server.cx(6)).await.unwrap();
    unfence.apply(&server.cx(6), &before).await.unwrap();
    // Rows are not all that somebody may have made.
    let make = "CREATE VIEW public.seen AS SELECT 1 AS n; CREATE INDEX late ON public.users (name)";
    server.bench().sql(make).await;
    unfence.undo(&server.undo_cx(6), &before).await.unwrap();
    server
        .refused(5, "pg_catalog.pg_class: 2 rows written since")
        .await;
    let drop = "DROP VIEW public.seen; DROP INDEX public.late";
    server.bench().sql(drop).await;
    assert!(server.undo(5).await.unwrap().changed);
    assert_eq!(server.timeline().await, 2);
    server.is_back().await;
}

#[tokio::test]
async fn nothing_begins_that_only_a_recovery_could_undo_where_there_is_no_way() {
    let mut server = Server::new().await;
    let refused = async |server: &Server, why: &str| {
        let failed = server.act().apply(&server.cx(5), &NULL).await.unwrap_err();
        assert!(
            !failed.changed && failed.message.contains(why),
            "{failed:?}"
        );
        let session = server.bench().session("staff").await;
        let sql = "SELECT format('%s %s', to_regclass('hr.notes'), to_regclass('public.rooms'))";
        let tables = session.value("", sql).await.unwrap();
        assert_eq!(tables.as_deref(), Some("hr.notes "), "nothing has begun");
        let at = revision(&session, Tool::Sql).await.unwrap();
        assert_eq!(at, "001_base");
    };
    refused(&server, "no restore point of this rollout leads back").await;
    // One that has counted nothing leads nowhere.
    let backup: ExternalBackup = serde_json::from_value(json!({"database": "staff"})).unwrap();
    backup.apply(&server.cx(2), &NULL).await.unwrap();
    let plain = RestorePoint {
        recoverable: false,
        ..Server::restore_point()
    };
    plain.apply(&server.cx(3), &NULL).await.unwrap();
    refused(&server, "no restore point of this rollout leads back").await;
    server.point(3).await;
    let session = server.bench().session("maintenance").await;
    session
        .query(
            "",
            "SELECT pg_create_physical_replication_slot('standby')",
            &[],
        )
        .await
        .unwrap();
    refused(
        &server,
        "it has replication slots, which a recovery does not bring back (standby)",
    )
    .await;
    session
        .query("", "SELECT pg_drop_replication_slot('standby')", &[])
        .await
        .unwrap();
    let section = server.staff().recover.take();
    refused(&server, "does not say how the server of `staff` is stopped").await;
    server.staff().recover = section;
    let data = server.cluster.data();
    std::os::unix::fs::symlink("/tmp", data.join("pg_else")).unwrap();
    refused(&server, "have a link, pg_else").await;
    fs::remove_file(data.join("pg_else")).unwrap();
    let real = data.with_file_name("real");
    fs::rename(&data, &real).unwrap();
    std::os::unix::fs::symlink(&real, &data).unwrap();
    refused(&server, "are behind a link").await;
    fs::remove_file(&data).unwrap();
    // Another directory has its name: whoever answers does not work there.
    fs::create_dir(&data).unwrap();
    for entry in fs::read_dir(&real).unwrap().flatten() {
        std::os::unix::fs::symlink(entry.path(), data.join(entry.file_name())).unwrap();
    }
    refused(&server, "is not seen to work in").await;
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&real, &data).unwrap();
    drop(session);
    assert!(
        server
            .act()
            .apply(&server.cx(5), &NULL)
            .await
            .unwrap()
            .changed
    );
    // A second change has to have a point of its own.
    let next = Apply {
        undo_by: UndoBy::Recover,
        ..server.stage.act("003_more")
    };
    let failed = next.apply(&server.cx(6), &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused, "{failed:?}");
    assert!(
        failed
            .message
            .contains("was migrated since the restore point"),
        "{failed:?}"
    );
    assert!(failed.hint.unwrap().contains("directly before this step"));
    assert_eq!(server.rooms().await, "0");
}
