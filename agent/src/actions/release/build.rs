//! Runs a release's build commands in its directory, once.

use std::path::{Component, Path};
use std::time::Instant;

use lockstep_proto::action::release;
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::{App, Build, before, explained};
use crate::actions::{Act, Done, Probe};
use crate::process::Program;
use crate::step::{Context, changed, failure};

/// The commands' digest: a release that was built by others counts as not built.
fn digest(build: &release::Build) -> Digest {
    Digest::of(&serde_json::to_vec(&build.run).expect("commands have a JSON form"))
}

/// A directory within the release.
fn checked(within: &str) -> Result<&Path, Failure> {
    let path = Path::new(within);
    if path
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
    {
        return Ok(path);
    }
    Err(failure(
        Cause::Refused,
        format!("`{within}` does not lie within the release"),
    ))
}

impl Act for release::Build {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let app = App::open(cx, &self.app)?;
        let commands = self.run.len();
        let name = &self.release;
        Ok(match app.note(name)?.map(|note| note.build) {
            None if cx.dry_run => Probe::Unmet(app.not_fetched(name)),
            None => Probe::Absent(format!("release {name} is not even fetched")),
            Some(Some(built)) if built.done && built.digest == digest(self) => {
                Probe::Present(format!("release {name} is built"))
            }
            Some(Some(built)) if !built.done => {
                Probe::Partial(format!("a build of release {name} did not end"))
            }
            Some(_) => Probe::Absent(format!("runs {commands} commands in release {name}")),
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let note = App::open(cx, &self.app)?.note(&self.release)?;
        let built = note
            .and_then(|note| note.build)
            .is_some_and(|build| build.done);
        Ok(Value::Bool(built))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let app = App::open(cx, &self.app)?;
        let mut note = app.fetched(&self.release)?;
        let digest = digest(self);
        if note
            .build
            .as_ref()
            .is_some_and(|build| build.done && build.digest == digest)
        {
            let summary = format!("release {} was built", self.release);
            return Ok(Done {
                summary,
                ..Done::default()
            });
        }
        if app.active()? == self.release {
            return Err(Failure {
                hint: Some("give the release another name, or activate another one first".into()),
                ..failure(
                    Cause::Refused,
                    format!(
                        "release {} is active: it is not built in place",
                        self.release
                    ),
                )
            });
        }
        let dirs = self.run.iter().map(|command| checked(&command.within_dir));
        let dirs: Vec<&Path> = dirs.collect::<Result<_, _>>()?;
        let dir = app.release(&self.release)?;
        // Noted before the first command: whatever ends this attempt, nobody takes it for built.
        note.build = Some(Build {
            digest,
            by: cx.key.clone(),
            done: false,
        });
        app.write_note(&dir, &note).map_err(changed)?;
        let began = Instant::now();
        for (index, (command, within)) in self.run.iter().zip(dirs).enumerate() {
            #[expect(clippy::cast_precision_loss, reason = "a fraction for a progress bar")]
            cx.log.progress(
                index as f64 / self.run.len() as f64,
                &command.argv.join(" "),
            );
            let program = Program {
                argv: command.argv.clone(),
                dir: Some(dir.join(within)),
                user: app.config.user.clone(),
                ..Program::default()
            };
            let program = program
                .with_env(cx, &app.config.env)
                .await
                .map_err(changed)?;
            let ended = program.succeed(cx).await;
            ended.map_err(|failed| explained(changed(failed)))?;
        }
        note.build = Some(Build {
            digest,
            by: cx.key.clone(),
            done: true,
        });
        app.write_note(&dir, &note).map_err(changed)?;
        let took = format!("{:.1} s", began.elapsed().as_secs_f64());
        let summary = format!(
            "release {} is built: {} commands in {took}",
            self.release,
            self.run.len()
        );
        let fact = Fact::Note {
            name: format!("build of {}", self.release),
            value: took,
        };
        Ok(Done {
            changed: true,
            summary,
            facts: vec![fact],
        })
    }

    async fn undo(&self, cx: &Context, before_state: &Value) -> Result<Done, Failure> {
        let was_built: bool = before(before_state)?;
        let app = App::open(cx, &self.app)?;
        let ours = |build: &Build| build.by.rollout == cx.key.rollout;
        let Some(mut note) = app
            .note(&self.release)?
            .filter(|note| note.build.as_ref().is_some_and(ours))
        else {
            let summary = format!("this rollout did not build release {}", self.release);
            return Ok(Done {
                summary,
                ..Done::default()
            });
        };
        // What the commands wrote stays, for the fetch's undo removes it all; but nobody may take
        // it for a finished build of anything.
        if let Some(build) = &mut note.build {
            build.done = false;
        }
        app.write_note(&app.release(&self.release)?, &note)?;
        let again = if was_built {
            ", though it was before"
        } else {
            ""
        };
        let summary = format!("release {} counts as not built{again}", self.release);
        Ok(Done {
            changed: true,
            summary,
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        format!(
            "build release {} with {} commands",
            self.release,
            self.run.len()
        )
    }
}
