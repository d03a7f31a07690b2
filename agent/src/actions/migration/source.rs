//! Where the migrations of an action are.

use std::path::{Component, Path, PathBuf};

use lockstep_proto::action::migration::{
    Apply, By, Current, Downgrade, Plan, Rehearse, Tool, Verify,
};
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
    /// Who runs them.
    pub(super) by: By,
}

macro_rules! sources {
    ($($act:ty: $by:expr;)*) => {
        $(impl<'a> From<&'a $act> for Source<'a> {
            fn from(act: &'a $act) -> Self {
                Self {
                    tool: act.tool,
                    database: &act.database,
                    app: &act.app,
                    release: &act.release,
                    dir: &act.dir,
                    program: &act.program,
                    by: $by(act),
                }
            }
        })*
    };
}

// Whoever only looks at files needs no program to do it.
sources! {
    Current: |_| By::Sql;
    Plan: |_| By::Sql;
    Verify: |_| By::Sql;
    // What the tool would run of files is what they hold.
    Rehearse: |act: &Rehearse| match act.tool {
        Tool::Alembic => By::Tool,
        _ => By::Sql,
    };
    Apply: |act: &Apply| act.apply;
    Downgrade: |act: &Downgrade| act.apply;
}

impl Source<'_> {
    /// The tool's directory in the release.
    fn directory(&self, cx: &Context) -> Result<PathBuf, Failure> {
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

    /// Whether the tool's program is needed: files of SQL can be read, and run, without it.
    fn needs_program(&self) -> bool {
        match self.tool {
            Tool::Alembic => true,
            Tool::Diesel | Tool::Sqlx => self.by == By::Tool,
            Tool::Prisma | Tool::Sql => false,
        }
    }

    /// The tool's directory, and its program where one is needed. Fails if they are not on this
    /// host.
    pub(super) fn find(&self, cx: &Context) -> Result<(PathBuf, Option<PathBuf>), Failure> {
        let directory = self.directory(cx)?;
        let program = self
            .tool
            .program(self.program)
            .filter(|_| self.needs_program());
        let program = program.map(|program| directory.join(program));
        let there = program.as_ref().unwrap_or(&directory);
        if there.exists() {
            return Ok((directory, program));
        }
        let Self { app, release, .. } = self;
        let (message, hint) = if let Some(program) = program.filter(|_| directory.is_dir()) {
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
        // Where it must not be looked for is an error; that it is not there is an answer.
        self.directory(cx)?;
        Ok(self.find(cx).is_ok())
    }
}
