//! Where the migrations of an action are.

use std::path::{Component, Path, PathBuf};

use lockstep_proto::action::migration::{Apply, Current, Downgrade, Plan, Rehearse, Tool, Verify};
use lockstep_proto::report::{Cause, Failure};

use crate::step::{Context, failure, hinted};

/// Which migrations an action means.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) tool: Tool,
    pub(super) database: &'a str,
    pub(super) app: &'a str,
    pub(super) release: &'a str,
    dir: &'a str,
    program: &'a str,
}

macro_rules! sources {
    ($($act:ty)*) => {
        $(impl<'a> From<&'a $act> for Source<'a> {
            fn from(act: &'a $act) -> Self {
                Self {
                    tool: act.tool,
                    database: &act.database,
                    app: &act.app,
                    release: &act.release,
                    dir: &act.dir,
                    program: &act.program,
                }
            }
        })*
    };
}

sources!(Current Plan Apply Verify Downgrade Rehearse);

impl Source<'_> {
    /// The tool's directory in the release.
    pub(super) fn directory(&self, cx: &Context) -> Result<PathBuf, Failure> {
        let Self {
            app, release, dir, ..
        } = self;
        let config = cx.config.apps.get(*app).ok_or_else(|| {
            hinted(
                Cause::Host,
                format!("this host knows no application `{app}`"),
                format!("add a section [apps.{app}] to its agent.toml"),
            )
        })?;
        let inside = |text: &str| {
            let path = Path::new(text);
            path.components()
                .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        };
        let one = Path::new(release).components().count() == 1;
        if !one || ![*release, *dir, self.program].into_iter().all(inside) {
            return Err(failure(
                Cause::Refused,
                format!(
                    "`{release}/{dir}/{}` leaves the release's directory",
                    self.program
                ),
            ));
        }
        Ok(config.root.join("releases").join(release).join(dir))
    }

    /// The tool's program in the release. Fails if it is not on this host.
    pub(super) fn program(&self, cx: &Context) -> Result<PathBuf, Failure> {
        let directory = self.directory(cx)?;
        let program = directory.join(self.program);
        if program.exists() {
            return Ok(program);
        }
        let Self { app, release, .. } = self;
        let (message, hint) = if directory.is_dir() {
            (
                format!("{} is not there", program.display()),
                format!("put `release.build` of {release} before this step"),
            )
        } else {
            (
                format!("release {release} of `{app}` is not on this host"),
                "put `release.fetch` and `release.build` before this step".to_owned(),
            )
        };
        Err(hinted(Cause::Host, message, hint))
    }

    /// The release is not on this host, or not built.
    pub(super) fn missing(&self) -> Failure {
        hinted(
            Cause::Refused,
            format!("release {} is not built on this host", self.release),
            "let `release.fetch` and `release.build` bring it first",
        )
    }

    /// Whether the release is on this host and built.
    pub(super) fn is_there(&self, cx: &Context) -> Result<bool, Failure> {
        Ok(self.directory(cx)?.join(self.program).exists())
    }
}
