use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use proptest::prelude::*;

use super::*;
use crate::testing::Host;

fn map(rows: &[(&str, &str)]) -> BTreeMap<String, String> {
    rows.iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn render_to(host: &Host, set: &[(&str, &str)]) -> Render {
    Render {
        path: host.path().join("app.env").to_string_lossy().into_owned(),
        set: map(set),
        mode: "0600".into(),
        owner: None,
    }
}

#[test]
fn environment_files_are_read_as_systemd_reads_them() {
    let text = "# comment\n; comment too\n\nA=1\n B = two words  \n\
                C=\"a \\\"b\\\" \\$x \\n\"\nD='it is $raw \\'\nE=one\\\n two\nno assignment\n\
                1X=bad name\nF=\nG=a=b#c\nH=\"two\nlines\"\nI=x\\ \nJ=it's";
    let expected = map(&[
        ("A", "1"),
        ("B", "two words"),
        ("C", "a \"b\" $x \\n"),
        ("D", "it is $raw \\"),
        ("E", "one two"),
        ("F", ""),
        ("G", "a=b#c"),
        ("H", "two\nlines"),
        ("I", "x "),
        ("J", "it's"),
    ]);
    assert_eq!(parse_env(text), secrets(&expected));
}

fn secrets(set: &BTreeMap<String, String>) -> BTreeMap<String, Secret> {
    let set = set.iter();
    set.map(|(name, value)| (name.clone(), value.as_str().into()))
        .collect()
}

proptest! {
    #[test]
    fn what_is_rendered_is_read_back(
        set in proptest::collection::btree_map(
            "[A-Za-z_][A-Za-z0-9_]{0,8}", "[^\n\r\0]{0,24}", 0..6
        )
    ) {
        let set = secrets(&set);
        prop_assert_eq!(parse_env(&render(&set)), set);
    }
}

/// The shell's own reading of the file is the judge for what is quoted.
#[test]
fn a_shell_reads_the_same_values() {
    let set = map(&[
        ("A", "plain"),
        ("B", "a 'b' \"c\" $HOME `id` \\ ! # ;"),
        ("C", ""),
        ("D", "ä € \t."),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("env");
    fs::write(&file, &*render(&secrets(&set))).unwrap();
    for (name, value) in &set {
        let script = format!(". {} && printf %s \"${name}\"", file.display());
        let output = std::process::Command::new("/bin/sh")
            .arg("-c")
            .arg(script)
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), *value, "{name}");
    }
}

#[tokio::test]
async fn a_render_writes_once_and_an_undo_restores_the_old_file() {
    let host = Host::new();
    host.secret("db", "canary-pa55 word\n");
    let act = render_to(&host, &[("DB", "secret://db"), ("LEVEL", "info")]);
    fs::write(&act.path, "LEVEL=debug\nOLD=1\n").unwrap();
    fs::set_permissions(&act.path, fs::Permissions::from_mode(0o640)).unwrap();
    let cx = host.context();
    let state = act.state(&cx).await.unwrap();
    let before = act.before(&cx).await.unwrap();
    assert!(
        !before.to_string().contains("debug"),
        "the journal gets no content: {before}"
    );

    let Probe::Absent(text) = act.probe(&cx).await.unwrap() else {
        panic!("not written yet")
    };
    assert!(
        text.ends_with("adds DB; changes LEVEL; removes OLD"),
        "{text}"
    );
    let done = act.apply(&cx, &before).await.unwrap();
    assert!(done.changed);
    assert!(!format!("{done:?}").contains("canary"));
    let text = fs::read_to_string(&act.path).unwrap();
    assert_eq!(
        text,
        format!("{HEADER}DB=\"canary-pa55 word\"\nLEVEL=info\n")
    );
    assert_eq!(
        fs::metadata(&act.path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Present(_)));
    assert!(!act.apply(&cx, &before).await.unwrap().changed);
    assert_ne!(act.state(&cx).await.unwrap(), state);

    assert!(act.undo(&cx, &before).await.unwrap().changed);
    assert!(
        !act.undo(&cx, &before).await.unwrap().changed,
        "an undo may run again"
    );
    assert_eq!(
        fs::read_to_string(&act.path).unwrap(),
        "LEVEL=debug\nOLD=1\n"
    );
    assert_eq!(act.state(&cx).await.unwrap(), state);
}

#[tokio::test]
async fn an_undo_removes_a_file_that_was_not_there() {
    let host = Host::new();
    let act = render_to(&host, &[("A", "1")]);
    let cx = host.context();
    let before = act.before(&cx).await.unwrap();
    act.apply(&cx, &before).await.unwrap();
    assert!(act.undo(&cx, &before).await.unwrap().changed);
    assert!(!Path::new(&act.path).exists());
    assert!(!act.undo(&cx, &before).await.unwrap().changed);
}

#[tokio::test]
async fn a_tampered_copy_is_not_put_back() {
    let host = Host::new();
    let act = render_to(&host, &[("A", "1")]);
    fs::write(&act.path, "A=0\n").unwrap();
    let cx = host.context();
    let before = act.before(&cx).await.unwrap();
    act.apply(&cx, &before).await.unwrap();
    fs::write(cx.dir.join(COPY), "A=evil\n").unwrap();
    assert_eq!(act.undo(&cx, &before).await.unwrap_err().cause, Cause::Host);
    assert!(fs::read_to_string(&act.path).unwrap().ends_with("A=1\n"));
}

#[tokio::test]
async fn what_cannot_be_rendered_is_refused_with_the_reason() {
    let host = Host::new();
    host.secret("key", "line one\nline two");
    let cx = host.context();
    let refused = |act: Render| {
        let cx = cx.clone();
        async move { act.apply(&cx, &Value::Null).await.unwrap_err() }
    };
    let failed = refused(render_to(&host, &[("KEY", "secret://key")])).await;
    assert!(
        failed.message.contains("KEY has a line break"),
        "{failed:?}"
    );
    assert!(!failed.message.contains("line two"));
    let failed = refused(render_to(&host, &[("A B", "x")])).await;
    assert!(failed.message.contains("`A B` cannot name"), "{failed:?}");
    let failed = refused(render_to(&host, &[("A", "secret://none")])).await;
    assert_eq!(failed.cause, Cause::Host);
    let open = Render {
        mode: "0644".into(),
        ..render_to(&host, &[("A", "secret://key")])
    };
    assert!(refused(open).await.message.contains("everybody could read"));
    for path in ["relative", "/a/../b", "/dir/"] {
        let act = Render {
            path: path.into(),
            ..render_to(&host, &[])
        };
        assert_eq!(refused(act).await.cause, Cause::Refused, "{path}");
    }
    let act = render_to(&host, &[]);
    std::os::unix::fs::symlink("/etc/passwd", &act.path).unwrap();
    assert!(refused(act).await.message.contains("symbolic link"));
}

#[tokio::test]
async fn a_diff_shows_names_only() {
    let host = Host::new();
    host.secret("db", "canary-new");
    let path = host.path().join("app.env");
    fs::write(&path, "DB=canary-old\nSAME=1\nGONE=canary\n").unwrap();
    let act = Diff {
        path: path.to_string_lossy().into_owned(),
        set: map(&[("DB", "secret://db"), ("SAME", "1"), ("NEW", "canary")]),
    };
    let done = act.apply(&host.context(), &Value::Null).await.unwrap();
    assert!(
        done.summary.ends_with("adds NEW; changes DB; removes GONE"),
        "{}",
        done.summary
    );
    assert!(!format!("{done:?}").contains("canary"));
    assert!(!done.changed);
}

#[tokio::test]
async fn a_file_within_an_application_belongs_to_its_user() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut host = Host::new();
    let app = crate::config::App {
        root: host.path().to_owned(),
        user: Some("nobody".into()),
        env: BTreeMap::new(),
    };
    host.config.apps.insert("web".into(), app);
    let act = render_to(&host, &[("A", "1")]);
    let uid = |act: &Render| fs::metadata(&act.path).unwrap().uid();
    act.apply(&host.context(), &Value::Null).await.unwrap();
    assert_eq!(uid(&act), User::find("nobody").unwrap().uid);
    let owned = Render {
        owner: Some("root".into()),
        ..act
    };
    owned.apply(&host.context(), &Value::Null).await.unwrap();
    assert_eq!(uid(&owned), 0);
}

/// The application's user has the directory that the policy's pattern goes through.
#[tokio::test]
async fn nothing_is_written_where_somebodys_link_leads() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let host = Host::new();
    let (shared, units) = (host.path().join("shared"), host.path().join("system"));
    fs::create_dir(&shared).unwrap();
    fs::create_dir(&units).unwrap();
    std::os::unix::fs::symlink(&units, shared.join("x")).unwrap();
    let act = Render {
        path: shared.join("x/app.env").to_string_lossy().into_owned(),
        ..render_to(&host, &[("A", "1")])
    };
    let cx = host.context();
    let owner = |owner| std::os::unix::fs::lchown(shared.join("x"), Some(owner), None).unwrap();
    owner(65534);
    let refused = act.apply(&cx, &Value::Null).await.unwrap_err();
    assert_eq!(refused.cause, Cause::Refused, "{refused:?}");
    assert!(act.before(&cx).await.is_err());
    assert_eq!(fs::read_dir(&units).unwrap().count(), 0);
    // One that an administrator has made is a directory like any other.
    owner(0);
    let before = act.before(&cx).await.unwrap();
    assert!(act.apply(&cx, &before).await.unwrap().changed);
    assert!(units.join("app.env").exists());
    assert!(act.undo(&cx, &before).await.unwrap().changed);
    assert_eq!(fs::read_dir(&units).unwrap().count(), 0);
}
