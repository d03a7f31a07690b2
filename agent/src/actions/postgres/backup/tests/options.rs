//! What a plan chooses about a backup.

use lockstep_proto::action::postgres::{Aspect, Compress, Compression, VerifyBackup};

use lockstep_proto::values::Percent;

use super::*;
use crate::actions::postgres::manifest::GLOBALS;

fn verify(level: Level) -> VerifyBackup {
    let args = serde_json::json!({"database": "staff", "level": level});
    serde_json::from_value(args).unwrap()
}

fn directory(bench: &Bench, made: &Manifest) -> PathBuf {
    let cx = bench.cx(0, vec![]);
    Store::of(&cx, &Database::find(&cx, "staff").unwrap()).path(&made.id)
}

#[tokio::test]
async fn an_archive_is_compressed_as_the_plan_says_and_the_manifest_tells() {
    let bench = Bench::with_rows().await;
    bench
        .sql("INSERT INTO hr.notes SELECT n, 1, repeat('note', 200) FROM generate_series(1000, 3000) n")
        .await;
    let mut sizes = vec![];
    for (step, (method, level)) in (1..).zip([
        (Compression::Gzip, Some(9)),
        (Compression::Gzip, None),
        (Compression::None, None),
    ]) {
        let act = Backup {
            compress: Compress { method, level },
            ..backup()
        };
        act.apply(&bench.cx(step, vec![]), &NULL).await.unwrap();
        let made = made(&bench)
            .into_iter()
            .find(|made| made.key.at.step == step);
        let made = made.unwrap();
        assert_eq!(made.compress, act.compress);
        sizes.push(made.size);
        // The digest was taken of the bytes on their way: they have all arrived.
        let archive = archive_in(&directory(&bench, &made));
        assert_eq!(archive::digest(&archive).unwrap(), (made.digest, made.size));
        assert!(made.tool_version.starts_with(|c: char| c.is_ascii_digit()));
        assert!(made.lsn.unwrap().contains('/'));
        let cx = bench.cx(9, vec![]);
        verify(Level::Equal).apply(&cx, &NULL).await.unwrap();
    }
    assert!(sizes.is_sorted() && sizes[2] > 10 * sizes[1], "{sizes:?}");
}

#[tokio::test]
async fn what_was_not_measured_is_neither_told_nor_compared() {
    let bench = Bench::with_rows().await;
    let act = Backup {
        measure: vec![],
        ..backup()
    };
    let done = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    assert!(
        !done
            .facts
            .iter()
            .any(|fact| matches!(fact, Fact::Rows { .. }))
    );
    assert!(done.summary.contains("not counted"), "{}", done.summary);
    let cx = bench.cx(2, vec![]);
    let failed = verify(Level::Equal).apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("without counting its rows"),
        "{}",
        failed.message
    );
    let failed = verify(Level::Restored).apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    let done = verify(Level::Read).apply(&cx, &NULL).await.unwrap();
    assert!(done.summary.contains("level 2"), "{}", done.summary);

    let act = Backup {
        measure: vec![Aspect::RowCounts],
        ..backup()
    };
    act.apply(&bench.cx(3, vec![]), &NULL).await.unwrap();
    let failed = verify(Level::Equal).apply(&cx, &NULL).await.unwrap_err();
    let why = "without measuring its schema";
    assert!(failed.message.contains(why), "{}", failed.message);
    let act = VerifyBackup {
        compare: vec![Aspect::RowCounts],
        ..verify(Level::Equal)
    };
    act.apply(&cx, &NULL).await.unwrap();
    let newest = made(&bench).remove(0);
    assert_eq!(newest.contents["users"].rows, 200);
    assert_eq!(newest.contents["users"].checksum, "");
}

#[tokio::test]
async fn roles_are_kept_beside_the_archive_and_their_passwords_only_if_asked_for() {
    let bench = Bench::with_rows().await;
    let copies = bench.host.path().join("copies");
    fs::create_dir(&copies).unwrap();
    for role_passwords in [false, true] {
        let act = Backup {
            globals: true,
            role_passwords,
            copies: vec![CopyTo::Directory(copies.display().to_string())],
            ..backup()
        };
        let step = 1 + u16::from(role_passwords);
        act.apply(&bench.cx(step, vec![]), &NULL).await.unwrap();
        let made = made(&bench)
            .into_iter()
            .find(|made| made.key.at.step == step);
        let made = made.unwrap();
        for place in [directory(&bench, &made), copies.join(&made.id)] {
            let text = fs::read_to_string(place.join(GLOBALS)).unwrap();
            assert!(text.contains(&format!("CREATE ROLE {}", bench.app())));
            assert_eq!(text.contains("SCRAM-SHA-256"), role_passwords);
            assert!(!text.contains(PASSWORD));
            let mode = fs::metadata(place.join(GLOBALS))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }
    let made = made(&bench).remove(0);
    fs::write(directory(&bench, &made).join(GLOBALS), "-- nothing").unwrap();
    let cx = bench.cx(3, vec![]);
    let failed = verify(Level::Digest).apply(&cx, &NULL).await.unwrap_err();
    assert!(
        failed.message.contains("the globals of"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn an_archive_that_is_much_smaller_than_the_one_before_is_none() {
    let bench = Bench::with_rows().await;
    backup().apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    bench
        .sql("DELETE FROM hr.notes; DELETE FROM public.users")
        .await;
    let act = Backup {
        min_ratio_prev: Percent(95),
        ..backup()
    };
    let failed = act.apply(&bench.cx(2, vec![]), &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    assert!(
        failed.message.contains("less than 95% of"),
        "{}",
        failed.message
    );
    assert_eq!(made(&bench).len(), 1);
    // One that is compressed in another way cannot be compared.
    let act = Backup {
        compress: Compress {
            method: Compression::None,
            level: None,
        },
        ..act
    };
    act.apply(&bench.cx(2, vec![]), &NULL).await.unwrap();
}

#[tokio::test]
async fn a_copy_that_is_lost_or_differs_is_found_before_anything_relies_on_it() {
    let bench = Bench::with_rows().await;
    let copies = bench.host.path().join("copies");
    fs::create_dir(&copies).unwrap();
    let act = Backup {
        copies: vec![CopyTo::Directory(copies.display().to_string())],
        ..backup()
    };
    act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    let made = made(&bench).remove(0);
    let copied = archive_in(&copies.join(&made.id));
    let bytes = fs::read(&copied).unwrap();
    let cx = bench.cx(2, vec![]);
    let verify = verify(Level::Digest);
    verify.apply(&cx, &NULL).await.unwrap();
    fs::write(&copied, &bytes[1..]).unwrap();
    let failed = verify.apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    assert!(
        failed.message.ends_with("is not equal to it any more"),
        "{}",
        failed.message
    );
    fs::remove_dir_all(copies.join(&made.id)).unwrap();
    let failed = verify.apply(&cx, &NULL).await.unwrap_err();
    let lost = format!("in {} is lost", copies.display());
    assert!(failed.message.ends_with(&lost), "{}", failed.message);
}
