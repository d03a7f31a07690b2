use super::*;
use crate::testing::Host;

fn run(argv: &[&str]) -> Run {
    Run {
        name: "greet".into(),
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        dir: None,
        env: BTreeMap::new(),
        exit: 0,
        matches: None,
    }
}

#[tokio::test]
async fn a_command_is_held_against_exit_code_and_output() {
    let host = Host::new();
    let cx = host.context();
    let done = run(&["printf", "one\nlast\n\n"])
        .apply(&cx, &Value::Null)
        .await
        .unwrap();
    assert!(done.changed);
    let note = Fact::Note {
        name: "greet".into(),
        value: "last".into(),
    };
    assert_eq!(done.facts, [note]);

    let failed = run(&["false"]).apply(&cx, &Value::Null).await.unwrap_err();
    assert_eq!(
        (failed.cause, failed.message.as_str()),
        (Cause::Step, "greet exited with 1, not 0")
    );
    assert!(failed.changed);
    Run {
        exit: 1,
        ..run(&["false"])
    }
    .apply(&cx, &Value::Null)
    .await
    .unwrap();

    let unmatched = Run {
        matches: Some("^two$".into()),
        ..run(&["printf", "one"])
    };
    let failed = unmatched.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(
        failed
            .message
            .ends_with(" has output that does not match `^two$`"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn a_bad_expression_is_refused_before_anything_is_run() {
    let host = Host::new();
    let marker = host.path().join("ran");
    let touch = Run {
        matches: Some("(".into()),
        ..run(&["touch", marker.to_str().unwrap()])
    };
    let failed = touch
        .apply(&host.context(), &Value::Null)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(!marker.exists());
}

#[tokio::test]
async fn after_a_crash_there_is_no_proof() {
    let host = Host::new();
    let probe = run(&["true"]).probe(&host.context()).await.unwrap();
    assert!(matches!(probe, Probe::NoProof(_)));
}

/// A host with an application whose user is `nobody`; its directory.
fn app_host() -> (Host, PathBuf) {
    use std::os::unix::fs::PermissionsExt;
    let mut host = Host::new();
    let root = host.path().join("srv/web");
    std::fs::create_dir_all(root.join("releases/v1/bin")).unwrap();
    std::os::unix::fs::symlink("/usr/bin/env", root.join("releases/v1/bin/show")).unwrap();
    std::fs::set_permissions(host.path(), PermissionsExt::from_mode(0o755)).unwrap();
    host.secret("token", "canary-of-the-app");
    let env = [
        ("COLOR", "app"),
        ("SHAPE", "app"),
        ("TOKEN", "secret://token"),
    ];
    let app = App {
        root: root.clone(),
        user: Some("nobody".into()),
        env: env.map(|(name, value)| (name.into(), value.into())).into(),
    };
    host.config.apps.insert("web".into(), app);
    (host, root)
}

/// What comes without waiting: no secret is fetched.
fn now<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(future)
}

fn place(host: &Host, argv: &[&str], dir: Option<&Path>, env: &[(&str, &str)]) -> Program {
    let argv: Vec<String> = argv.iter().map(|&argument| argument.to_owned()).collect();
    let env = env
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()));
    let dir = dir.map(|dir| dir.to_str().unwrap());
    let env = env.collect();
    now(program(&host.context(), &argv, dir, &env)).unwrap()
}

#[test]
fn what_belongs_to_an_application_runs_as_its_user() {
    let (host, root) = app_host();
    let release = root.join("releases/v1");
    let link = host.path().join("link");
    std::os::unix::fs::symlink(&release, &link).unwrap();
    let bin = release.join("bin");
    let show = bin.join("show");
    let nobody = Some("nobody".to_owned());
    let user =
        |argv: &[&str], dir: Option<&Path>, env: &[(&str, &str)]| place(&host, argv, dir, env).user;
    assert_eq!(user(&["env"], Some(&root), &[]), nobody);
    assert_eq!(user(&["bin/show"], Some(&release), &[]), nobody);
    assert_eq!(
        user(&["/usr/bin/env"], Some(&release.join("../v2")), &[]),
        nobody
    );
    // By where a link leads, and by where it stands.
    assert_eq!(user(&["env"], Some(&link), &[]), nobody);
    assert_eq!(user(&[show.to_str().unwrap()], None, &[]), nobody);
    let path = bin.to_str().unwrap();
    assert_eq!(user(&["show"], None, &[("PATH", path)]), nobody);

    assert_eq!(user(&["env"], None, &[]), None);
    assert_eq!(user(&["env"], Some(host.path()), &[]), None);
    assert_eq!(user(&["env"], Some(&root.join("../other")), &[]), None);
    let beside = root.with_file_name("web-2");
    assert_eq!(user(&["env"], Some(&beside), &[]), None);
    assert!(place(&host, &["env"], None, &[]).env.is_empty());
}

#[test]
fn a_program_of_one_application_does_not_run_within_another() {
    let (mut host, root) = app_host();
    let other = App {
        root: host.path().join("srv/other"),
        user: Some("root".into()),
        env: BTreeMap::new(),
    };
    host.config.apps.insert("other".into(), other);
    let argv = [host
        .path()
        .join("srv/other/tool")
        .to_str()
        .unwrap()
        .to_owned()];
    let dir = root.to_str();
    let failed = now(program(&host.context(), &argv, dir, &BTreeMap::new())).unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("different users"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn the_applications_variables_are_there_and_the_steps_own_win() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (host, root) = app_host();
    let cx = host.context();
    let own = [("SHAPE".to_owned(), "step".to_owned())];
    let act = Run {
        dir: Some(root.join("releases/v1").to_str().unwrap().to_owned()),
        env: own.into(),
        matches: Some("(?s)COLOR=app.*SHAPE=step".into()),
        ..run(&["bin/show"])
    };
    act.apply(&cx, &Value::Null).await.unwrap();
    let said = cx.log.last_lines().join("\n");
    assert!(said.contains("USER=nobody"), "{said}");
    assert!(!said.contains("canary"), "{said}");
    let act = Run {
        dir: act.dir,
        matches: Some("^nobody\n$".into()),
        ..run(&["id", "-un"])
    };
    act.apply(&host.context(), &Value::Null).await.unwrap();
}
