use std::fs;

use lockstep_proto::order::Fact;
use serde_json::Value;

use super::super::super::manifest::{Store, write_manifest};
use super::super::tests::{taken, verify};
use super::*;
use crate::actions::Act as _;
use crate::sql::cluster::Bench;

const ALL: [Level; 5] = [
    Level::Digest,
    Level::Listed,
    Level::Read,
    Level::Restored,
    Level::Equal,
];

#[test]
fn a_table_of_contents_is_read_line_by_line() {
    let contents = "; Archive created at 2026-11-22\n;     dbname: TABLE DATA x\n;\n\
        215; 1259 16395 TABLE public users owner\n\
        3340; 0 16395 TABLE DATA public users owner\n\
        3341; 0 16396 TABLE DATA public TABLE DATA owner\n\
        217; 1259 16397 VIEW public TABLE DATA owner\n";
    assert_eq!(tables_listed(contents), 2);
    assert_eq!(tables_listed(""), 0);
}

/// The lowest level that fails, with its message, and the levels below it that pass.
async fn fails_at(bench: &Bench) -> (Level, String) {
    for level in ALL {
        let act = VerifyBackup { level, ..verify() };
        if let Err(failed) = act.apply(&bench.cx(2, vec![]), &Value::Null).await {
            return (level, failed.message);
        }
    }
    panic!("no level finds it");
}

#[tokio::test]
async fn each_level_finds_what_those_below_it_do_not() {
    let bench = Bench::with_rows().await;
    let (_, archive) = taken(&bench).await;
    let cx = bench.cx(2, vec![]);
    let database = Database::find(&cx, "staff").unwrap();
    let made = Store::of(&cx, &database).all().pop().unwrap();
    let whole = fs::read(&archive).unwrap();
    let (half, middle) = (whole.len() / 2, whole.len() * 3 / 4);
    let mut flipped = whole.clone();
    flipped[middle] ^= 1;
    // Whoever damages an archive may make its manifest fit; and a manifest may be another's.
    let put = |bytes: &[u8], manifest: Manifest| {
        fs::write(&archive, bytes).unwrap();
        let manifest = Manifest {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            ..manifest
        };
        write_manifest(archive.parent().unwrap(), &manifest).unwrap();
    };

    fs::write(&archive, &flipped).unwrap();
    assert_eq!(fails_at(&bench).await.0, Level::Digest);
    put(b"--\n-- PostgreSQL database dump\n--\n", made.clone());
    assert_eq!(fails_at(&bench).await.0, Level::Listed);
    let mut more = made.clone();
    for name in ["one", "another"] {
        more.contents
            .insert(name.into(), made.contents["users"].clone());
    }
    put(&whole, more);
    let (level, why) = fails_at(&bench).await;
    assert_eq!(level, Level::Listed);
    assert!(why.contains("data of 2 tables, and 4"), "{why}");
    for bytes in [&whole[..half], &flipped] {
        put(bytes, made.clone());
        assert_eq!(fails_at(&bench).await.0, Level::Read);
    }
    let mut other = made.clone();
    other.contents.get_mut("users").unwrap().checksum = "1".into();
    put(&whole, other);
    let (level, why) = fails_at(&bench).await;
    assert_eq!(level, Level::Equal);
    assert!(why.contains("users has other values"), "{why}");
    let mut other = made.clone();
    other.contents.get_mut("users").unwrap().rows += 1;
    put(&whole, other);
    let (level, why) = fails_at(&bench).await;
    assert_eq!(level, Level::Restored);
    assert!(why.contains("users has 200 rows, and had 201"), "{why}");
    // A role that its owner is to be is gone: it can be read, and not restored.
    put(&whole, made.clone());
    let maintenance = bench.session("maintenance").await;
    let owner = format!("{}_owner", bench.name);
    let rename = |from: &str, to: &str| format!("ALTER ROLE {from} RENAME TO {to}");
    let gone = format!("{owner}_gone");
    maintenance.run("", &rename(&owner, &gone)).await.unwrap();
    let (level, why) = fails_at(&bench).await;
    assert_eq!(level, Level::Restored);
    assert!(why.contains("does not exist"), "{why}");
}

#[tokio::test]
async fn the_level_that_was_reached_is_told_and_kept() {
    let bench = Bench::with_rows().await;
    let (facts, _) = taken(&bench).await;
    let Fact::Backup { taken_at, .. } = facts[0] else {
        panic!("{facts:?}")
    };
    let cx = bench.cx(2, facts);
    let database = Database::find(&cx, "staff").unwrap();
    let store = Store::of(&cx, &database);
    for level in [Level::Checked, Level::Equal, Level::Restored, Level::Digest] {
        let act = VerifyBackup { level, ..verify() };
        let done = act.apply(&cx, &Value::Null).await.unwrap();
        let Fact::BackupVerified {
            level: told,
            taken_at: at,
            ..
        } = done.facts[0]
        else {
            panic!("{:?}", done.facts)
        };
        assert_eq!((told, at), (level, Some(taken_at)));
        assert!(
            done.summary.contains(&level.to_string()),
            "{}",
            done.summary
        );
        let made = store.all().pop().unwrap();
        assert_eq!(store.verified(&made).unwrap().level, level);
        assert_eq!(store.was_restored(&made), level >= Level::Restored);
    }
    // Not all was compared.
    let part = VerifyBackup {
        compare: vec![Aspect::RowCounts],
        ..verify()
    };
    let done = part.apply(&cx, &Value::Null).await.unwrap();
    assert!(done.summary.contains("level 3"), "{}", done.summary);
}

#[tokio::test]
async fn amcheck_is_asked_for_with_what_it_needs() {
    let bench = Bench::with_rows().await;
    let owner = format!("{}_owner", bench.name);
    let session = bench.session("maintenance").await;
    let grant = format!("ALTER ROLE {owner} CREATEDB");
    session.run("", &grant).await.unwrap();
    taken(&bench).await;
    let act = VerifyBackup {
        level: Level::Checked,
        ..verify()
    };
    let cx = crate::sql::cluster::as_owner(bench.cx(2, vec![]));
    let failed = act.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(failed.message.contains("pg_amcheck"), "{}", failed.message);
    assert!(failed.hint.unwrap().contains("amcheck"));
}
