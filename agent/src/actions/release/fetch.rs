//! Brings a release's sources from git into a directory of its own.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lockstep_proto::action::release::Fetch;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::{App, INDEX, NOTE, Note, PARTIAL, REMOVED, before, explained, remove_all};
use crate::actions::files::{self, OrFailed as _};
use crate::actions::{Act, Done, Probe};
use crate::faults::reached;
use crate::process::Program;
use crate::step::{Context, changed, failure};

/// What git may speak. Never `ext`, which runs commands.
const PROTOCOLS: &str = "https:ssh:file";

/// Where the mirror keeps tags: beside git's own place for them, which a fetch of another
/// repository's tags would overwrite.
const TAGS: &str = "refs/lockstep";

/// Refuses what git would take for an option, for another helper than its own, or for a pattern.
fn checked(fetch: &Fetch) -> Result<(), Failure> {
    let refused = |what: &str| Err(failure(Cause::Refused, what.to_owned()));
    let (url, tag) = (fetch.git.url.as_str(), fetch.git.tag.as_str());
    let is_path = url.starts_with('/');
    let scheme = url.split_once("://").map(|(scheme, _)| scheme);
    // `user@host:path` is ssh too; `helper::address` runs a program.
    let short = scheme.is_none() && !is_path && url.contains(':') && !url.contains("::");
    if url.starts_with('-')
        || !(is_path || short || matches!(scheme, Some("https" | "ssh" | "file")))
    {
        return refused("the repository must be an https or ssh URL or an absolute path");
    }
    let user = scheme
        .and_then(|_| url.split('/').nth(2)?.rsplit_once('@'))
        .map(|(user, _)| user);
    // A token often stands alone, as the user's name.
    if user.is_some_and(|user| scheme == Some("https") || user.contains(':')) {
        return refused("the repository's URL must hold no password: use a credential helper");
    }
    let odd = |c: char| c.is_control() || " ~^:?*[\\".contains(c);
    if tag.is_empty() || tag.starts_with(['-', '/']) || tag.contains(odd) || tag.contains("..") {
        return refused("the tag is no name of a tag");
    }
    let hex = |commit: &String| (7..=64).contains(&commit.len()) && is_hex(commit);
    if fetch.git.commit.as_ref().is_some_and(|commit| !hex(commit)) {
        return refused("the commit must be 7 to 64 hexadecimal digits");
    }
    Ok(())
}

fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// What git says of a mirror that a killed git left unusable.
const SPOILT: [&str; 4] = [
    ".lock': File exists",
    "not a git repository",
    "corrupt",
    "bad object",
];

/// A mirror and what to do with it.
struct Git<'a> {
    app: &'a App<'a>,
    dir: PathBuf,
}

impl Git<'_> {
    fn program(&self, argv: &[&str]) -> Program {
        let dir = self.dir.to_string_lossy();
        // Hooks and the mirror's own settings are the application user's, and none of ours.
        let git = [
            "git",
            "-c",
            "core.hooksPath=/dev/null",
            "-c",
            "advice.detachedHead=false",
        ];
        let git_dir = format!("--git-dir={dir}");
        let argv: Vec<&str> = git
            .into_iter()
            .chain([git_dir.as_str()])
            .chain(argv.iter().copied())
            .collect();
        let mut program = self.app.program(&argv);
        program.dir = Some(self.app.releases());
        let env = [
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_ALLOW_PROTOCOL", PROTOCOLS),
            ("GIT_LFS_SKIP_SMUDGE", "0"),
        ];
        program.env = env
            .map(|(name, value)| (name.to_owned(), value.into()))
            .into();
        program
    }

    async fn run(&self, cx: &Context, argv: &[&str]) -> Result<String, Failure> {
        let program = self
            .program(argv)
            .with_env(cx, &self.app.config.env)
            .await?;
        let ended = program.succeed(cx).await.map_err(explained)?;
        Ok(ended.stdout.trim().to_owned())
    }

    /// Brings the tag into the mirror and says which commit it stands for. A mirror that an
    /// interrupted attempt spoilt is made anew: nothing in it is needed.
    async fn fetch(&self, cx: &Context, url: &str, tag: &str) -> Result<String, Failure> {
        let failed = match self.try_fetch(cx, url, tag).await {
            Ok(commit) => return Ok(commit),
            Err(failed) => failed,
        };
        let spoilt = |line: &String| SPOILT.iter().any(|words| line.contains(words));
        if !failed.last_lines.iter().any(spoilt) {
            return Err(failed);
        }
        cx.log.line("the mirror is unusable and is made anew");
        remove_all(&self.dir).or_failed(|| format!("remove {}", self.dir.display()))?;
        self.try_fetch(cx, url, tag).await
    }

    async fn try_fetch(&self, cx: &Context, url: &str, tag: &str) -> Result<String, Failure> {
        if !self.dir.join("HEAD").exists() {
            self.app.make_dir(&self.dir)?;
            self.run(cx, &["init", "--quiet", "--bare"]).await?;
        }
        let kept = format!("{TAGS}/{tag}");
        let refspec = format!("+refs/tags/{tag}:{kept}");
        let fetch = [
            "fetch",
            "--no-tags",
            "--no-write-fetch-head",
            "--no-recurse-submodules",
            "--",
            url,
            &refspec,
        ];
        self.run(cx, &fetch).await.map_err(|failed| {
            let unknown = failed
                .last_lines
                .iter()
                .any(|line| line.contains("couldn't find remote ref"));
            let hint = if unknown {
                Some(format!(
                    "push the tag {tag} to {url}, or correct it in the plan"
                ))
            } else {
                failed.hint
            };
            Failure {
                message: format!("cannot fetch tag {tag} of {url}: {}", failed.message),
                hint,
                ..failed
            }
        })?;
        let commit = format!("{kept}^{{commit}}");
        self.run(
            cx,
            &[
                "rev-parse",
                "--verify",
                "--quiet",
                "--end-of-options",
                &commit,
            ],
        )
        .await
    }

    /// Writes a commit's files into a directory.
    async fn check_out(&self, cx: &Context, commit: &str, dir: &Path) -> Result<(), Failure> {
        // Not beside the files: git runs as the application's user, who owns the mirror.
        let index = self.dir.join(format!("{INDEX}{}", cx.key));
        let with_index = async |argv: &[&str]| {
            let mut program = self.program(argv);
            program.env.insert(
                "GIT_INDEX_FILE".into(),
                index.to_string_lossy().into_owned().into(),
            );
            program.env.insert(
                "GIT_WORK_TREE".into(),
                dir.to_string_lossy().into_owned().into(),
            );
            program.dir = Some(dir.to_owned());
            program.with_env(cx, &self.app.config.env).await
        };
        with_index(&["read-tree", commit])
            .await?
            .succeed(cx)
            .await
            .map_err(explained)?;
        with_index(&["checkout-index", "--all", "--force"])
            .await?
            .succeed(cx)
            .await
            .map_err(explained)?;
        files::remove(&index).or_failed(|| format!("remove {}", index.display()))
    }
}

/// Makes everything that was written to a file system durable: a release has many small files.
fn sync_file_system(dir: &Path) -> std::io::Result<()> {
    rustix::fs::syncfs(fs::File::open(dir)?)?;
    files::sync_dir(dir)
}

/// Whether a release that is there is the one that the plan means.
fn is_meant(fetch: &Fetch, note: &Note) -> bool {
    let commit = fetch.git.commit.as_ref();
    note.tag == fetch.git.tag && commit.is_none_or(|commit| note.commit.starts_with(commit))
}

/// Why a release that is there is not touched.
fn occupied(fetch: &Fetch, note: Option<&Note>) -> Failure {
    let holds = match note {
        Some(note) => format!("it holds tag {}, commit {}", note.tag, note.commit),
        None => "it was not fetched by Lockstep".to_owned(),
    };
    Failure {
        hint: Some("releases are immutable: take another name, or remove it by hand".into()),
        ..failure(
            Cause::Step,
            format!("release {} is there already: {holds}", fetch.release),
        )
    }
}

impl Act for Fetch {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        checked(self)?;
        let app = App::open(cx, &self.app)?;
        let dir = app.release(&self.release)?;
        let note = app.note(&self.release)?;
        Ok(match note {
            Some(note) if is_meant(self, &note) => Probe::Present(format!(
                "release {} is there: commit {}",
                self.release, note.commit
            )),
            None if !dir.exists() => Probe::Absent(format!(
                "fetches tag {} as release {}",
                self.git.tag, self.release
            )),
            other if cx.dry_run => Probe::Unmet(occupied(self, other.as_ref())),
            other => Probe::Partial(occupied(self, other.as_ref()).message),
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let dir = App::open(cx, &self.app)?.release(&self.release)?;
        Ok(Value::Bool(dir.exists()))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        checked(self)?;
        let app = App::open(cx, &self.app)?;
        let (dir, releases) = (app.release(&self.release)?, app.releases());
        fs::create_dir_all(&app.config.root)
            .or_failed(|| format!("make the directory {}", app.config.root.display()))?;
        for dir in [&releases, &app.config.root.join("shared")] {
            app.make_dir(dir)?;
        }
        app.sweep()?;
        let git = Git {
            app: &app,
            dir: app.mirror(),
        };
        let commit = git.fetch(cx, &self.git.url, &self.git.tag).await?;
        if let Some(wanted) = self
            .git
            .commit
            .as_ref()
            .filter(|wanted| !commit.starts_with(*wanted))
        {
            return Err(Failure {
                hint: Some(
                    "the tag was moved: find out by whom before anything is deployed".into(),
                ),
                ..failure(
                    Cause::Step,
                    format!("tag {} is commit {commit}, not {wanted}", self.git.tag),
                )
            });
        }
        let fact = Fact::Note {
            name: format!("commit of {}", self.release),
            value: commit.clone(),
        };
        if dir.exists() {
            return match app.note(&self.release)? {
                Some(note) if note.commit == commit => Ok(Done {
                    changed: false,
                    summary: format!("release {} was there: commit {commit}", self.release),
                    facts: vec![fact],
                }),
                other => Err(occupied(self, other.as_ref())),
            };
        }
        put_in_place(self, cx, &git, &commit)
            .await
            .map_err(changed)?;
        let summary = format!("release {} is commit {commit}", self.release);
        Ok(Done {
            changed: true,
            summary,
            facts: vec![fact],
        })
    }

    async fn undo(&self, cx: &Context, before_state: &Value) -> Result<Done, Failure> {
        let was_there: bool = before(before_state)?;
        let app = App::open(cx, &self.app)?;
        app.sweep()?;
        let dir = app.release(&self.release)?;
        let ours = |note: &Note| note.fetched_by.rollout == cx.key.rollout;
        if was_there || !app.note(&self.release)?.as_ref().is_some_and(ours) {
            let summary = format!("release {} is not of this rollout", self.release);
            return Ok(Done {
                summary,
                ..Done::default()
            });
        }
        if is_same_dir(&app.current(), &dir) {
            return Err(Failure {
                hint: Some("activate another release, then remove this one".into()),
                ..failure(
                    Cause::Step,
                    format!("release {} is active and stays", self.release),
                )
            });
        }
        // Out of sight at once: a release that is half removed must not look like one.
        let removed = app.releases().join(format!("{REMOVED}{}", cx.key));
        reached("release: to be put aside");
        fs::rename(&dir, &removed)
            .inspect(|()| reached("release: put aside"))
            .and_then(|()| files::sync_dir(&app.releases()))
            .and_then(|()| fs::remove_dir_all(&removed))
            .inspect(|()| reached("release: removed"))
            .or_failed(|| format!("remove release {}", self.release))
            .map_err(changed)?;
        Ok(Done {
            changed: true,
            summary: format!("release {} is gone again", self.release),
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        format!(
            "fetch tag {} of {} as release {}",
            self.git.tag, self.git.url, self.release
        )
    }
}

/// Makes the release of a commit that the mirror has.
async fn put_in_place(
    fetch: &Fetch,
    cx: &Context,
    git: &Git<'_>,
    commit: &str,
) -> Result<(), Failure> {
    let app = git.app;
    let (dir, releases) = (app.release(&fetch.release)?, app.releases());
    let partial = releases.join(format!("{PARTIAL}{}", cx.key));
    app.make_dir(&partial)?;
    git.check_out(cx, commit, &partial).await?;
    if partial.join(".gitmodules").exists() {
        cx.log
            .line("this release has submodules: they are not fetched");
    }
    if fs::symlink_metadata(partial.join(NOTE)).is_ok() {
        return Err(failure(
            Cause::Step,
            format!("the repository itself has a file {NOTE}"),
        ));
    }
    let note = Note {
        app: fetch.app.clone(),
        release: fetch.release.clone(),
        url: fetch.git.url.clone(),
        tag: fetch.git.tag.clone(),
        commit: commit.to_owned(),
        fetched_by: cx.key.clone(),
        build: None,
    };
    app.write_note(&partial, &note)?;
    sync_file_system(&partial)
        .inspect(|()| reached("release: synchronised"))
        .and_then(|()| fs::rename(&partial, &dir))
        .inspect(|()| reached("release: renamed"))
        .and_then(|()| files::sync_dir(&releases))
        .inspect(|()| reached("release: there"))
        .or_failed(|| format!("put release {} in place", fetch.release))
}

/// Whether two paths lead to the same directory.
fn is_same_dir(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}
