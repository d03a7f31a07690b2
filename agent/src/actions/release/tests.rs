use std::process::Command;

use lockstep_proto::action::release::{
    Activate, Build as BuildArgs, Command as BuildCommand, Fetch, Git, Previous,
};
use lockstep_proto::order::Fact;

use super::*;
use crate::actions::{Act, Probe};
use crate::testing::Host;

/// A host with an application `web`, and a real repository with two tags.
struct Site {
    host: Host,
    repository: PathBuf,
}

fn git(dir: &Path, argv: &[&str]) -> String {
    let output = Command::new("git")
        .arg("-C")
        .arg(dir)
        .args([
            "-c",
            "user.name=T",
            "-c",
            "user.email=t@example.org",
            "-c",
            "commit.gpgsign=false",
        ])
        .args(argv)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{argv:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl Site {
    fn new() -> Self {
        let mut host = Host::new();
        let repository = host.path().join("repository");
        fs::create_dir(&repository).unwrap();
        git(&repository, &["init", "--quiet"]);
        for version in ["v1", "v2"] {
            fs::write(repository.join("version"), version).unwrap();
            fs::create_dir_all(repository.join("deep/er")).unwrap();
            fs::write(repository.join("deep/er/file"), "x").unwrap();
            git(&repository, &["add", "."]);
            git(&repository, &["commit", "--quiet", "-m", version]);
            git(&repository, &["tag", "-a", version, "-m", version]);
        }
        let root = host.path().join("srv/web");
        let app = config::App {
            root,
            user: None,
            env: [].into(),
        };
        host.config.apps.insert("web".into(), app);
        Self { host, repository }
    }

    fn root(&self) -> PathBuf {
        self.host.config.apps["web"].root.clone()
    }

    fn fetch(&self, release: &str) -> Fetch {
        let url = self.repository.to_string_lossy().into_owned();
        let git = Git {
            url,
            tag: release.into(),
            commit: None,
        };
        Fetch {
            app: "web".into(),
            release: release.into(),
            git,
        }
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root().join("releases")).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn build(release: &str, argv: &[&str]) -> BuildArgs {
    let argv = argv.iter().map(|&argument| argument.to_owned()).collect();
    let run = vec![BuildCommand {
        argv,
        within_dir: "deep".into(),
    }];
    BuildArgs {
        app: "web".into(),
        release: release.into(),
        run,
    }
}

fn activate(release: &str) -> Activate {
    Activate {
        app: "web".into(),
        release: release.into(),
    }
}

#[test]
fn names_cannot_leave_their_directory() {
    for bad in [
        "", ".", "..", "a/b", "-v", ".hidden", "a..b", "a b", "a\n", "a\\b",
    ] {
        assert!(checked("a release", bad).is_err(), "{bad:?}");
    }
    assert!(checked("a release", "v1.0.0-rc.1+b").is_ok());
}

#[tokio::test]
async fn a_release_is_fetched_once_and_removed_by_its_own_rollout() {
    let site = Site::new();
    let (cx, fetch) = (site.host.context(), site.fetch("v1"));
    assert!(matches!(fetch.probe(&cx).await.unwrap(), Probe::Absent(_)));
    let before = fetch.before(&cx).await.unwrap();
    let done = fetch.apply(&cx, &before).await.unwrap();
    assert!(done.changed);
    let dir = site.root().join("releases/v1");
    assert_eq!(fs::read_to_string(dir.join("version")).unwrap(), "v1");
    assert!(dir.join("deep/er/file").exists());
    assert!(!dir.join(".git").exists());
    let commit = git(&site.repository, &["rev-parse", "v1^{commit}"]);
    assert_eq!(
        done.facts,
        [Fact::Note {
            name: "commit of v1".into(),
            value: commit.clone()
        }]
    );
    assert!(matches!(fetch.probe(&cx).await.unwrap(), Probe::Present(_)));
    assert!(!fetch.apply(&cx, &before).await.unwrap().changed);
    assert_eq!(site.names(), ["v1"]);

    // A pinned commit must be the tag's.
    let mut pinned = site.fetch("v2");
    pinned.git.commit = Some(commit);
    let failed = pinned.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(failed.message.contains("tag v2 is commit"), "{failed:?}");
    assert_eq!(site.names(), ["v1"]);

    let done = fetch.undo(&cx, &Value::Bool(true)).await.unwrap();
    assert!(!done.changed, "it was there before");
    assert!(fetch.undo(&cx, &before).await.unwrap().changed);
    assert!(
        !fetch.undo(&cx, &before).await.unwrap().changed,
        "an undo may run again"
    );
    assert_eq!(site.names(), Vec::<String>::new());
}

#[tokio::test]
async fn another_release_under_the_same_name_is_not_touched() {
    let site = Site::new();
    let (cx, fetch) = (site.host.context(), site.fetch("v1"));
    let dir = site.root().join("releases/v1");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("by-hand"), "").unwrap();
    let failed = fetch.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(
        failed.message.contains("not fetched by Lockstep"),
        "{failed:?}"
    );
    assert!(matches!(fetch.probe(&cx).await.unwrap(), Probe::Partial(_)));
    assert!(!fetch.undo(&cx, &Value::Bool(false)).await.unwrap().changed);
    assert!(dir.join("by-hand").exists());

    // A tag that moved after the fetch.
    let fetch = site.fetch("v2");
    fetch.apply(&cx, &Value::Null).await.unwrap();
    git(
        &site.repository,
        &["tag", "-f", "-a", "v2", "-m", "moved", "v1^{commit}"],
    );
    let failed = fetch.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(
        failed.message.contains("is there already: it holds tag v2"),
        "{failed:?}"
    );
}

#[tokio::test]
async fn leavings_of_a_killed_attempt_are_swept_and_a_spoilt_mirror_is_made_anew() {
    let site = Site::new();
    let cx = site.host.context();
    site.fetch("v1").apply(&cx, &Value::Null).await.unwrap();
    let releases = site.root().join("releases");
    fs::create_dir(releases.join(".partial-old")).unwrap();
    fs::create_dir(releases.join(".removed-old")).unwrap();
    fs::write(site.root().join(".mirror/refs/lockstep/v2.lock"), "").unwrap();
    let index = site.root().join(".mirror/index-old");
    fs::write(&index, "").unwrap();
    site.fetch("v2")
        .apply(&site.host.context(), &Value::Null)
        .await
        .unwrap();
    assert_eq!(site.names(), ["v1", "v2"]);
    assert!(!index.exists());
}

#[tokio::test]
async fn unfit_repositories_and_tags_are_refused_before_git_sees_them() {
    let site = Site::new();
    let cx = site.host.context();
    let apply = async |url: &str, tag: &str| {
        let mut fetch = site.fetch("v1");
        fetch.git = Git {
            url: url.into(),
            tag: tag.into(),
            commit: None,
        };
        fetch.apply(&cx, &Value::Null).await.unwrap_err()
    };
    let own = site.repository.to_string_lossy().into_owned();
    for url in [
        "--upload-pack=touch x",
        "ext::sh -c id",
        "http://x/y",
        "relative",
        "https://token@h/r",
        "ssh://u:p@h/r",
        "",
    ] {
        assert_eq!(apply(url, "v1").await.cause, Cause::Refused, "{url}");
    }
    for tag in ["--all", "v1:refs/heads/x", "v*", "a b", "", "a..b"] {
        assert_eq!(apply(&own, tag).await.cause, Cause::Refused, "{tag}");
    }
    let failed = apply(&own, "v9").await;
    assert!(
        failed.hint.unwrap().contains("push the tag v9"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn a_build_runs_once_and_an_unfinished_one_cannot_be_activated() {
    let site = Site::new();
    let cx = site.host.context();
    let count = ["python3", "-c", "open('built', 'a').write('x')"];
    let works = build("v1", &count);
    let failed = works.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(failed.message.contains("was not fetched"), "{failed:?}");
    site.fetch("v1").apply(&cx, &Value::Null).await.unwrap();

    let broken = build("v1", &["python3", "-c", "print('E42 no network'); exit(1)"]);
    let failed = broken.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(
        failed.changed && failed.last_lines.contains(&"E42 no network".to_owned()),
        "{failed:?}"
    );
    assert!(matches!(
        broken.probe(&cx).await.unwrap(),
        Probe::Partial(_)
    ));
    let failed = activate("v1").apply(&cx, &Value::Null).await.unwrap_err();
    assert!(
        failed.message.contains("not built to its end"),
        "{failed:?}"
    );

    let before = works.before(&cx).await.unwrap();
    assert!(works.apply(&cx, &before).await.unwrap().changed);
    assert!(!works.apply(&cx, &before).await.unwrap().changed);
    assert!(matches!(works.probe(&cx).await.unwrap(), Probe::Present(_)));
    let built = site.root().join("releases/v1/deep/built");
    assert_eq!(
        fs::read_to_string(&built).unwrap(),
        "x",
        "the commands ran once"
    );

    activate("v1").apply(&cx, &Value::Null).await.unwrap();
    let failed = broken.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(failed.message.contains("is active"), "{failed:?}");
    assert!(works.undo(&cx, &before).await.unwrap().changed);
    assert!(matches!(works.probe(&cx).await.unwrap(), Probe::Partial(_)));
    let outside = BuildArgs {
        run: vec![BuildCommand {
            argv: vec!["true".into()],
            within_dir: "../..".into(),
        }],
        ..works.clone()
    };
    site.fetch("v2").apply(&cx, &Value::Null).await.unwrap();
    let outside = BuildArgs {
        release: "v2".into(),
        ..outside
    };
    assert_eq!(
        outside.apply(&cx, &Value::Null).await.unwrap_err().cause,
        Cause::Refused
    );
}

#[tokio::test]
async fn activation_swaps_the_link_and_its_undo_swaps_it_back() {
    let site = Site::new();
    let cx = site.host.context();
    for release in ["v1", "v2"] {
        site.fetch(release).apply(&cx, &Value::Null).await.unwrap();
    }
    let current = site.root().join("current");
    let (first, second) = (activate("v1"), activate("v2"));
    let nothing = first.before(&cx).await.unwrap();
    let empty = first.state(&cx).await.unwrap();
    let done = first.apply(&cx, &nothing).await.unwrap();
    assert_eq!(
        done.facts,
        [Fact::PreviousRelease {
            app: "web".into(),
            release: String::new()
        }]
    );

    let state = second.state(&cx).await.unwrap();
    let before = second.before(&cx).await.unwrap();
    let done = second.apply(&cx, &before).await.unwrap();
    assert_eq!(done.summary, "release v2 is active instead of v1");
    assert_eq!(fs::read_link(&current).unwrap(), Path::new("releases/v2"));
    assert_eq!(fs::read_to_string(current.join("version")).unwrap(), "v2");
    assert!(!second.apply(&cx, &before).await.unwrap().changed);
    let fetched = site
        .fetch("v2")
        .undo(&cx, &Value::Bool(false))
        .await
        .unwrap_err();
    assert!(
        fetched.message.contains("is active and stays"),
        "{fetched:?}"
    );

    let previous = Previous { app: "web".into() };
    let noted = Fact::PreviousRelease {
        app: "web".into(),
        release: "v1".into(),
    };
    let with_fact = site.host.context_with(vec![noted.clone()]);
    assert_eq!(
        previous
            .apply(&with_fact, &Value::Null)
            .await
            .unwrap()
            .facts,
        [noted]
    );

    assert!(second.undo(&cx, &before).await.unwrap().changed);
    assert!(!second.undo(&cx, &before).await.unwrap().changed);
    assert_eq!(second.state(&cx).await.unwrap(), state);
    assert!(first.undo(&cx, &nothing).await.unwrap().changed);
    assert!(!current.exists());
    assert_eq!(first.state(&cx).await.unwrap(), empty);

    fs::create_dir(&current).unwrap();
    let failed = first.before(&cx).await.unwrap_err();
    assert!(failed.message.contains("is no symbolic link"), "{failed:?}");
}

#[tokio::test]
async fn an_unknown_application_says_what_to_configure() {
    let site = Site::new();
    let act = Activate {
        app: "other".into(),
        release: "v1".into(),
    };
    let failed = act.probe(&site.host.context()).await.unwrap_err();
    assert!(failed.hint.unwrap().contains("[apps.other]"));
}

#[tokio::test]
async fn a_full_disk_is_told_apart_from_a_broken_build() {
    let site = Site::new();
    let cx = site.host.context();
    site.fetch("v1").apply(&cx, &Value::Null).await.unwrap();
    let full = "import os, sys; sys.exit('npm ERR! ' + os.strerror(28))";
    let failed = build("v1", &["python3", "-c", full])
        .apply(&cx, &Value::Null)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::Host);
    assert!(failed.hint.unwrap().contains("free space"));
}

/// Only root can act as another user.
#[tokio::test]
async fn releases_belong_to_the_applications_user() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let nobody = User::find("nobody").unwrap();
    let mut site = Site::new();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(site.host.path(), mode).unwrap();
    let status = Command::new("chown")
        .args(["-R", "nobody"])
        .arg(&site.repository)
        .status();
    assert!(status.unwrap().success());
    site.host.config.apps.get_mut("web").unwrap().user = Some("nobody".into());
    let cx = site.host.context();
    let fetch = site.fetch("v1");
    fetch.apply(&cx, &Value::Null).await.unwrap();
    let write = ["python3", "-c", "open('built', 'w').write('x')"];
    build("v1", &write).apply(&cx, &Value::Null).await.unwrap();
    let dir = site.root().join("releases/v1");
    for path in [
        dir.clone(),
        dir.join("version"),
        dir.join("deep/built"),
        dir.join(NOTE),
    ] {
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&path).unwrap());
        assert_eq!(owner, nobody.uid, "{}", path.display());
    }
    assert!(fetch.undo(&cx, &Value::Bool(false)).await.unwrap().changed);
}

#[tokio::test]
async fn what_fails_after_the_effect_says_that_something_was_changed() {
    let mut site = Site::new();
    let cx = site.host.context();
    site.fetch("v1")
        .apply(&cx, &Value::Bool(false))
        .await
        .unwrap();
    // The build is noted as begun before its variables are looked for.
    let app = site.host.config.apps.get_mut("web").unwrap();
    app.env.insert("KEY".into(), "secret://none".into());
    let cx = site.host.context();
    let failed = build("v1", &["true"])
        .apply(&cx, &Value::Null)
        .await
        .unwrap_err();
    assert!(failed.message.contains("no secret `none`"), "{failed:?}");
    assert!(failed.changed);
    site.host.config.apps.get_mut("web").unwrap().env.clear();

    // A release that cannot be put in place leaves its parts to the undo.
    fs::write(site.repository.join(NOTE), "{}").unwrap();
    git(&site.repository, &["add", "."]);
    git(&site.repository, &["commit", "--quiet", "-m", "v3"]);
    git(&site.repository, &["tag", "v3"]);
    let cx = site.host.context();
    let fetch = site.fetch("v3");
    let failed = fetch.apply(&cx, &Value::Bool(false)).await.unwrap_err();
    assert!(failed.message.contains("itself has a file"), "{failed:?}");
    assert!(failed.changed);
    assert_eq!(site.names().len(), 2);
    fetch.undo(&cx, &Value::Bool(false)).await.unwrap();
    assert_eq!(site.names(), ["v1"]);

    // The link cannot be made: nothing was changed.
    fs::create_dir(site.root().join("current")).unwrap();
    let failed = activate("v1").apply(&cx, &Value::Null).await.unwrap_err();
    assert!(!failed.changed, "{failed:?}");
}
