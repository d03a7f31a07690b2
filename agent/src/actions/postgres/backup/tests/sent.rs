//! Copies by commands.

use lockstep_proto::action::postgres::{CopyCommand, VerifyBackup};

use super::*;

fn by(command: &[&str], read_back: &[&str]) -> CopyTo {
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    CopyTo::Command(CopyCommand {
        command: words(command),
        read_back: words(read_back),
    })
}

#[tokio::test]
async fn a_copy_by_a_command_is_read_back_and_hashed() {
    let bench = Bench::with_rows().await;
    let there = bench.host.path().join("there");
    fs::create_dir(&there).unwrap();
    let there = there.display();
    // By its standard input, and by its path.
    let (one, other) = (
        format!("{there}/1-{{id}}-{{name}}"),
        format!("{there}/2-{{id}}-{{name}}"),
    );
    let into = format!("of={one}");
    let act = Backup {
        globals: true,
        copies: vec![
            by(&["dd", &into, "status=none"], &["cat", &one]),
            by(&["cp", "{file}", &other], &["cat", &other]),
        ],
        ..backup()
    };
    act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    let made = made(&bench).remove(0);
    let cx = bench.cx(2, vec![]);
    let store = Store::of(&cx, &Database::find(&cx, "staff").unwrap());
    let copied =
        |number: u8, name: &str| PathBuf::from(format!("{there}/{number}-{}-{name}", made.id));
    for name in ["archive", "globals.sql", "manifest.json"] {
        let own = fs::read(store.path(&made.id).join(name)).unwrap();
        for number in [1, 2] {
            assert_eq!(
                fs::read(copied(number, name)).unwrap(),
                own,
                "{number} {name}"
            );
        }
    }
    let args = serde_json::json!({"database": "staff", "level": 0});
    let verify: VerifyBackup = serde_json::from_value(args).unwrap();
    verify.apply(&cx, &NULL).await.unwrap();
    let mut bytes = fs::read(copied(2, "archive")).unwrap();
    bytes[9] ^= 1;
    fs::write(copied(2, "archive"), bytes).unwrap();
    let failed = verify.apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    assert!(failed.message.contains("by `cp "), "{}", failed.message);
    assert!(
        failed.message.contains("archive comes back as"),
        "{}",
        failed.message
    );
    fs::remove_file(copied(1, "globals.sql")).unwrap();
    let failed = verify.apply(&cx, &NULL).await.unwrap_err();
    assert!(failed.message.contains("by `dd "), "{}", failed.message);
    assert!(
        failed.message.contains("globals.sql does not come back"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn a_command_that_says_it_has_copied_is_not_believed() {
    let bench = Bench::with_rows().await;
    let act = Backup {
        copies: vec![by(&["true"], &["true"])],
        ..backup()
    };
    let failed = act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    assert!(
        failed.message.contains("archive comes back as"),
        "{}",
        failed.message
    );
    assert!(failed.message.contains("(0 bytes)"), "{}", failed.message);
    let act = Backup {
        copies: vec![by(&["no-such-program"], &["true"])],
        ..backup()
    };
    let cx = bench.cx(2, vec![]);
    let failed = act.apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Host);
    assert!(
        !made(&bench).iter().any(|made| made.key.at.step == 2),
        "nothing was made"
    );
}
