use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use lockstep_proto::action::postgres::{Fence, FenceVia, Format, Level};
use lockstep_proto::values::Timestamp;

use super::super::archive::{self, archive_in};
use super::super::tools::Tools;
use super::room::enough;
use super::*;
use crate::sql::cluster::{Bench, PASSWORD};

mod bench;
mod options;
mod sent;
mod stored;

const NULL: Value = Value::Null;

pub(in crate::actions::postgres) fn backup() -> Backup {
    let args = serde_json::json!({"database": "staff", "lock_wait": "1s"});
    serde_json::from_value(args).unwrap()
}

pub(in crate::actions::postgres) fn made(bench: &Bench) -> Vec<Manifest> {
    let cx = bench.cx(0, vec![]);
    let database = Database::find(&cx, "staff").unwrap();
    Store::of(&cx, &database).all()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[tokio::test]
async fn a_backup_is_complete_and_says_what_it_holds() {
    let bench = Bench::with_rows().await;
    let copies = bench.host.path().join("copies");
    fs::create_dir(&copies).unwrap();
    for format in [Format::Custom, Format::Directory] {
        let cx = bench.cx(
            match format {
                Format::Custom => 1,
                Format::Directory => 2,
            },
            vec![],
        );
        let act = Backup {
            format,
            copies: vec![CopyTo::Directory(copies.display().to_string())],
            ..backup()
        };
        assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
        let done = act.apply(&cx, &NULL).await.unwrap();
        assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Present(_)));
        let [
            Fact::Backup {
                id, digest, size, ..
            },
            Fact::Rows { tables, .. },
            Fact::Note { .. },
        ] = done.facts.as_slice()
        else {
            panic!("{:?}", done.facts)
        };
        assert!(id.ends_with(&cx.key.to_string()), "{id}");
        assert_eq!(tables, &[("hr.notes".into(), 100), ("users".into(), 200)]);
        let made = made(&bench)
            .into_iter()
            .find(|made| made.id == *id)
            .unwrap();
        assert_eq!(
            (made.digest, made.size, made.format),
            (*digest, *size, format)
        );
        let copy = archive::digest(&archive_in(&copies.join(id))).unwrap();
        assert_eq!(copy, (*digest, *size));
        let mode = fs::metadata(copies.join(id)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
    assert!(!names(&copies).iter().any(|name| name.ends_with(".partial")));
}

#[tokio::test]
async fn counts_are_those_of_the_dump_although_rows_come_in_meanwhile() {
    let bench = Bench::with_rows().await;
    let writer = bench.session("as_app").await;
    let stop = std::cell::Cell::new(false);
    let write = async {
        let mut id = 1000;
        while !stop.get() {
            let sql = format!("INSERT INTO public.users VALUES ({id}, 'late')");
            writer.run("test", &sql).await.unwrap();
            id += 1;
        }
        id - 1000
    };
    let (act, cx) = (backup(), bench.cx(1, vec![]));
    let take = async {
        let done = act.apply(&cx, &NULL).await;
        stop.set(true);
        done.unwrap();
    };
    let (written, ()) = tokio::join!(write, take);
    assert!(
        written > 10,
        "{written} rows were written during the backup"
    );
    let made = made(&bench).pop().unwrap();
    // What is in the archive, counted by reading it.
    let database = Database::find(&cx, "staff").unwrap();
    let tools = Tools::new(&cx, &database, 15).await.unwrap();
    let store = Store::of(&cx, &database);
    let archive = archive_in(&store.path(&made.id)).display().to_string();
    let sql = tools.file("data.sql").unwrap().display().to_string();
    let args = ["--data-only", "-t", "users", "-f", &sql, &archive];
    tools.run("pg_restore", None, &args).await.unwrap();
    let text = fs::read_to_string(&sql).unwrap();
    let rows = text
        .lines()
        .skip_while(|line| !line.starts_with("COPY "))
        .skip(1)
        .take_while(|line| *line != "\\.")
        .count();
    assert_eq!(made.contents["users"].rows, rows as u64);
    let live: usize = bench
        .session("staff")
        .await
        .value("", "SELECT count(*) FROM users")
        .await
        .unwrap()
        .unwrap()
        .parse()
        .unwrap();
    assert!(live > rows, "{live} rows now, {rows} in the dump");
}

#[tokio::test]
async fn no_password_stands_in_an_argument_or_a_log_and_none_is_left() {
    let bench = Bench::with_rows().await;
    // The dump waits for a lock, and so can be looked at. Only pg_dump wants one on a parent of
    // partitions.
    bench
        .sql("CREATE TABLE public.parent (id int) PARTITION BY RANGE (id)")
        .await;
    let holder = bench.session("as_owner").await;
    holder
        .run("", "BEGIN; LOCK public.parent IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let cx = bench.cx(1, vec![]);
    let act = backup();
    let look = async {
        let mut seen = 0;
        for _ in 0..40 {
            for entry in fs::read_dir("/proc").unwrap().flatten() {
                let argv = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let argv = String::from_utf8_lossy(&argv).into_owned();
                assert!(!argv.contains("canary-pa55"), "{argv}");
                let env = fs::read(entry.path().join("environ")).unwrap_or_default();
                if argv.contains("pg_dump") && argv.contains(&bench.name) {
                    seen += 1;
                    assert!(!String::from_utf8_lossy(&env).contains("canary-pa55"));
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        seen
    };
    let (failed, seen) = tokio::join!(act.apply(&cx, &NULL), look);
    assert!(seen > 0, "pg_dump was seen");
    let failed = failed.unwrap_err();
    assert_eq!(failed.cause, Cause::Step);
    assert!(failed.hint.unwrap().contains("lock"), "{}", failed.message);
    assert!(!failed.last_lines.join("").contains(PASSWORD));
    assert_eq!(names(&cx.dir), Vec::<String>::new());
    let store = bench.host.config.state_dir.join("backups");
    assert_eq!(names(&store), Vec::<String>::new(), "no partial is left");
}

#[tokio::test]
async fn what_a_crash_left_is_ended_and_removed() {
    let bench = Bench::with_rows().await;
    let old = bench.cx(1, vec![]);
    let database = Database::find(&old, "staff").unwrap();
    let left = database.connect(&old).await.unwrap();
    left.run("", "BEGIN; LOCK public.users IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let store = Store::of(&old, &database);
    let partial = store.path(&format!(
        "{}{}",
        manifest::id("staff", "20260101T000000Z", &old.key),
        manifest::PARTIAL
    ));
    fs::create_dir_all(&partial).unwrap();
    let act = backup();
    let cx = bench.cx(1, vec![]);
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    assert!(
        left.run("", "SELECT 1").await.is_err(),
        "the old session is ended"
    );
    act.apply(&cx, &NULL).await.unwrap();
    assert!(!partial.exists());
    assert_eq!(made(&bench).len(), 1);
}

#[tokio::test]
async fn behind_the_same_fence_an_earlier_attempts_backup_serves() {
    let bench = Bench::with_rows().await;
    let fence = Fence {
        database: "staff".into(),
        via: FenceVia::Connect,
        roles: vec![bench.app()],
    };
    fence.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    let act = backup();
    let first = act.apply(&bench.cx(2, vec![]), &NULL).await.unwrap();
    let again = act.apply(&bench.cx(2, vec![]), &NULL).await.unwrap();
    assert_eq!(first.facts[0], again.facts[0]);
    assert!(matches!(
        &first.facts[0],
        Fact::Backup { fence: Some(_), .. }
    ));
    fence.undo(&bench.undo(1, vec![]), &NULL).await.unwrap();
    let open = act.apply(&bench.cx(2, vec![]), &NULL).await.unwrap();
    assert_ne!(first.facts[0], open.facts[0]);
    assert!(matches!(&open.facts[0], Fact::Backup { fence: None, .. }));
}

#[tokio::test]
async fn a_step_keeps_one_backup_and_one_copy_of_it() {
    let bench = Bench::with_rows().await;
    let copies = bench.host.path().join("copies");
    fs::create_dir(&copies).unwrap();
    let act = Backup {
        copies: vec![CopyTo::Directory(copies.display().to_string())],
        ..backup()
    };
    // The first one was killed before it could say so: rows may have come since.
    act.apply(&bench.cx(2, vec![]), &NULL).await.unwrap();
    let first = made(&bench).pop().unwrap();
    fs::create_dir(copies.join(format!("{}.partial", first.id))).unwrap();
    act.apply(&bench.cx(2, vec![]), &NULL).await.unwrap();
    let second = made(&bench);
    assert_eq!(second.len(), 1);
    assert_ne!(second[0].id, first.id);
    assert_eq!(names(&copies), [second[0].id.clone()]);
    // Those of other steps stay, and what was proven.
    act.apply(&bench.cx(3, vec![]), &NULL).await.unwrap();
    let cx = bench.cx(2, vec![]);
    let store = Store::of(&cx, &Database::find(&cx, "staff").unwrap());
    let verified = manifest::Verified {
        key: cx.key.clone(),
        digest: second[0].digest,
        level: Level::Equal,
        taken_at: None,
        compared: vec![],
    };
    store.mark_verified(&second[0].id, &verified).unwrap();
    act.apply(&cx, &NULL).await.unwrap();
    assert_eq!(made(&bench).len(), 3);
}

#[tokio::test]
async fn old_backups_go_but_never_the_newest_that_was_verified() {
    let bench = Bench::with_rows().await;
    let cx = bench.cx(1, vec![]);
    backup().apply(&cx, &NULL).await.unwrap();
    let database = Database::find(&cx, "staff").unwrap();
    let store = Store::of(&cx, &database);
    let real = made(&bench).pop().unwrap();
    // Five of another rollout, each a second older than the one before; the third was verified.
    for age in 1..=5_u16 {
        let mut key = cx.key.clone();
        key.rollout = lockstep_proto::ids::RolloutId::from_random([7; 6]);
        key.attempt = age;
        let id = manifest::id("staff", "20250101T000000Z", &key);
        let taken_at = Timestamp(real.taken_at.0 - 1000 * u64::from(age));
        fs::create_dir(store.path(&id)).unwrap();
        let old = Manifest {
            id: id.clone(),
            key: key.clone(),
            taken_at,
            ..real.clone()
        };
        manifest::write_manifest(&store.path(&id), &old).unwrap();
        if age == 3 {
            let verified = manifest::Verified {
                key,
                digest: old.digest,
                level: Level::Equal,
                taken_at: None,
                compared: vec![],
            };
            store.mark_verified(&id, &verified).unwrap();
        }
    }
    // A manifest that somebody else wrote cannot have another directory removed.
    fs::create_dir(store.path("other")).unwrap();
    let other = Manifest {
        id: "other".into(),
        taken_at: Timestamp(0),
        ..real.clone()
    };
    manifest::write_manifest(&store.path("other"), &other).unwrap();
    store.retain(&cx, 2);
    assert!(store.path("other").exists());
    let left: Vec<u16> = made(&bench).iter().map(|made| made.key.attempt).collect();
    assert_eq!(left, [real.key.attempt, 1, 3]);
    store.retain(&cx, 0);
    let left: Vec<u16> = made(&bench).iter().map(|made| made.key.attempt).collect();
    assert_eq!(left, [real.key.attempt, 3]);
}

#[tokio::test]
async fn what_is_missing_is_said_before_anything_happens() {
    let mut bench = Bench::with_rows().await;
    let act = Backup {
        copies: vec![CopyTo::Directory("/no/such/volume".into())],
        ..backup()
    };
    let failed = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Host);
    assert!(
        failed.message.contains("/no/such/volume"),
        "{}",
        failed.message
    );
    let dry = |bench: &Bench| Context {
        dry_run: true,
        ..bench.cx(1, vec![])
    };
    let seen = act.probe(&dry(&bench)).await.unwrap();
    assert!(
        matches!(&seen, Probe::Unmet(unmet) if unmet.message.contains("/no/such/volume")),
        "{seen:?}"
    );
    let seen = backup().probe(&dry(&bench)).await.unwrap();
    assert!(matches!(seen, Probe::Absent(_)), "{seen:?}");
    let port = bench.host.config.postgres["staff"].port;
    bench.host.config.postgres.get_mut("staff").unwrap().port = 1;
    let down = backup().probe(&dry(&bench)).await.unwrap_err();
    assert_eq!(down.cause, Cause::Host, "{}", down.message);
    bench.host.config.postgres.get_mut("staff").unwrap().port = port;
    bench.host.config.postgres.get_mut("staff").unwrap().bin_dir = Some("/no/tools".into());
    let failed = backup()
        .apply(&bench.cx(1, vec![]), &NULL)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::Host);
    assert!(
        failed.message.contains("/no/tools/pg_dump does not exist"),
        "{}",
        failed.message
    );
    assert!(failed.hint.unwrap().contains("postgresql-client"));
    let store = bench.host.config.state_dir.join("backups");
    assert_eq!(names(&store), Vec::<String>::new());
    let failed = enough(Path::new("/var"), 1 << 20, 3 << 20).unwrap_err();
    assert_eq!(
        failed.message,
        "a backup may need 3.0 MiB in /var, and 1.0 MiB are free"
    );
}

#[tokio::test]
async fn tools_run_as_their_own_user_where_one_is_named() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut bench = Bench::with_rows().await;
    let open = tempfile::tempdir().unwrap();
    fs::set_permissions(open.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(bench.host.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let config = bench.host.config.postgres.get_mut("staff").unwrap();
    config.os_user = Some("postgres".into());
    bench.host.config.run_dir = open.path().join("run");
    let failed = backup()
        .apply(&bench.cx(1, vec![]), &NULL)
        .await
        .unwrap_err();
    assert!(
        failed.message.contains("postgres cannot get to"),
        "{}",
        failed.message
    );
    let config = bench.host.config.postgres.get_mut("staff").unwrap();
    config.backup_dir = Some(open.path().join("backups"));
    backup().apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    let made = made(&bench).pop().unwrap();
    let archive = archive_in(&open.path().join("backups").join(made.id));
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(archive).unwrap());
    assert_eq!(owner, User::find("postgres").unwrap().uid);
}

/// A volume that is really full: it needs a host that lets root mount one.
#[tokio::test]
async fn a_full_disk_is_named_and_leaves_nothing() {
    let mut bench = Bench::with_rows().await;
    let volume = bench.host.path().join("small");
    fs::create_dir(&volume).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "none"])
        .arg(&volume)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        return;
    }
    // Small enough for the estimate of an earlier backup, too large for the volume.
    bench.sql("INSERT INTO hr.notes SELECT n, 1, md5(n::text) || md5((n * 7)::text) FROM generate_series(1000, 9000) n").await;
    let config = bench.host.config.postgres.get_mut("staff").unwrap();
    config.backup_dir = Some(volume.clone());
    let preflight = backup()
        .apply(&bench.cx(1, vec![]), &NULL)
        .await
        .unwrap_err();
    let cx = bench.cx(1, vec![]);
    let database = Database::find(&cx, "staff").unwrap();
    let partial = volume.join("x.partial");
    make_directory(&partial, None).unwrap();
    let session = database.connect(&cx).await.unwrap();
    let full = dump(&backup(), &cx, &database, session, &partial, "x".into()).await;
    let unmounted = std::process::Command::new("umount")
        .arg("-l")
        .arg(&volume)
        .status();
    assert!(unmounted.unwrap().success());
    assert!(
        preflight.message.contains("are free"),
        "{}",
        preflight.message
    );
    let full = full.unwrap_err();
    assert_eq!(full.cause, Cause::Host, "{full:?}");
    assert!(full.message.contains("No space left"), "{}", full.message);
}
