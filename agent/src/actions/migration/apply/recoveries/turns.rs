//! What others do while a server is taken back, and who is cut off in the midst of it.

use std::path::PathBuf;

use super::super::roles::{migrator, section};
use super::*;

impl Server {
    /// Has the stop take its time: as long as a session of its own is there, the server lets nobody
    /// in and does not end. Returns what is there once it was told to stop.
    fn stops_slowly(&mut self) -> PathBuf {
        let told = self.cluster.conf().with_file_name("told");
        let sleep = self.cluster.psql("postgres", "SELECT pg_sleep(4)");
        let stop = self.service().stop.join(" ").replace("fast", "smart");
        let text = format!(
            "setsid {sleep} >/dev/null 2>&1 &\nsleep 1\n{stop} -W\ntouch {}\nexec {stop}",
            told.display()
        );
        self.service().stop = self.script("slow", &text);
        told
    }

    /// Has the start come back at once, and the server come later, as a supervisor does it.
    fn starts_later(&mut self) {
        let start = self.service().start.join(" ");
        let at = start.find(" -o ").unwrap() + 4;
        let (before, after) = start.split_at(at);
        let options = after.strip_suffix(" start").unwrap();
        let text =
            format!("setsid sh -c \"sleep 3; exec {before}'{options}' start\" >/dev/null 2>&1 &");
        self.service().start = self.script("later", &text);
    }

    async fn is_kept_once(&self) {
        assert_eq!(self.timeline().await, 2, "INV-1: once");
        let beside = self.beside();
        let is_kept = beside.len() == 1 && beside[0].starts_with("data__before_");
        assert!(is_kept, "{beside:?}");
        self.is_back().await;
    }
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_mins(1), "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_recovery_that_is_cut_off_while_the_server_stops_ends_with_the_next_attempt() {
    let mut server = Server::new().await;
    let told = server.stops_slowly();
    server.migrated(5).await;
    let undo = server.undo(5);
    tokio::select! {
        biased;
        () = until("it is told to stop", || told.exists()) => {}
        done = undo => panic!("{done:?}"),
    }
    assert!(server.cluster.data().join("postmaster.pid").exists());
    let probe = server.act().probe(&server.undo_cx(5)).await.unwrap();
    assert!(matches!(probe, Probe::Partial(_)), "{probe:?}");
    assert!(server.undo(5).await.unwrap().changed);
    server.is_kept_once().await;
}

#[tokio::test]
async fn a_recovery_that_is_cancelled_after_the_stop_leaves_the_copy_to_whoever_starts_it() {
    let mut server = Server::new().await;
    server.starts_later();
    server.migrated(5).await;
    let cx = server.undo_cx(5);
    let stop = cx.stop.clone();
    let before = json!({"revision": "001_base"});
    let act = server.act();
    let undo = act.undo(&cx, &before);
    let cancel = async {
        until("it is stopped", || {
            server.is(Cut::Stopped) || server.is(Cut::Exchanged)
        })
        .await;
        stop.cancel();
    };
    let (undone, ()) = tokio::join!(undo, cancel);
    let failed = undone.unwrap_err();
    assert_eq!(failed.cause, Cause::Cancelled, "{failed:?}");
    assert!(failed.changed);
    // Nothing is exchanged under a server that is about to start.
    assert!(
        server.is(Cut::Exchanged) || server.is(Cut::Started),
        "INV-6"
    );
    server.is_promoted().await;
    assert!(server.undo(5).await.unwrap().changed);
    server.is_kept_once().await;
}

#[tokio::test]
async fn a_transaction_that_is_prepared_meanwhile_keeps_a_server_from_being_recovered() {
    let server = Server::new().await;
    let session = server.bench().session("maintenance").await;
    let allow = "ALTER SYSTEM SET max_prepared_transactions = 5";
    session.run("", allow).await.unwrap();
    drop(session);
    server.cluster.stop();
    server.cluster.start_again();
    server.migrated(5).await;
    let prepare = async {
        until("it restores", || server.is(Cut::HalfRestored)).await;
        let sql = "BEGIN; INSERT INTO things VALUES (11); PREPARE TRANSACTION 'late'";
        server.other(sql).await;
        // Another one ends after it: the server's next transaction does not show the prepared one.
        server.other("SELECT pg_current_xact_id()").await;
    };
    let since = "SELECT pg_postmaster_start_time()::text";
    let started = server.bench().ask(since).await;
    tokio::join!(
        server.refused(5, "transactions are prepared (late)"),
        prepare
    );
    assert_eq!(
        server.bench().ask(since).await,
        started,
        "it was not stopped"
    );
    assert_eq!(server.beside(), Vec::<String>::new());
    let session = server.session_in_other().await;
    session.run("", "COMMIT PREPARED 'late'").await.unwrap();
    drop(session);
    server
        .refused(5, "other: things: 1 row written since")
        .await;
}

#[tokio::test]
async fn a_recovery_is_a_superusers_also_where_migrations_have_a_role_of_their_own() {
    let mut server = Server::new().await;
    let role = migrator(&mut server.stage.bench).await;
    let owner = format!("{}_owner", server.bench().name);
    let session = server.bench().session("staff").await;
    let own = format!("ALTER TABLE public.lockstep_schema_migrations OWNER TO {owner}");
    session.run("", &own).await.unwrap();
    drop(session);
    server.point(3).await;
    let cx = section(server.cx(5), "postgres", &role);
    assert!(server.act().apply(&cx, &NULL).await.unwrap().changed);
    let before = json!({"revision": "001_base"});
    let cx = section(server.undo_cx(5), "postgres", &role);
    let act = server.act();
    // What somebody sets while the copy is restored stays.
    let set = async {
        until("it restores", || server.is(Cut::HalfRestored)).await;
        let session = server.bench().session("maintenance").await;
        let sql = "ALTER SYSTEM SET work_mem = '5MB'";
        session.run("", sql).await.unwrap();
    };
    let (undone, ()) = tokio::join!(act.undo(&cx, &before), set);
    let undone = undone.unwrap();
    assert!(undone.changed, "{undone:?}");
    assert_eq!(server.timeline().await, 2);
    let work_mem = server
        .bench()
        .ask("SELECT current_setting('work_mem')")
        .await;
    assert_eq!(work_mem, "5MB");
}
