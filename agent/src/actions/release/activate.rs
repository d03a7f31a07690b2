//! Points the application's `current` link at a release, and says which one it pointed at.

use std::path::{Path, PathBuf};

use lockstep_proto::action::release::{Activate, Previous};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::{App, before, release_of};
use crate::actions::files::{self, OrFailed as _};
use crate::actions::{Act, Done, Probe, bound};
use crate::step::{Context, failure};

/// The link's target for a release, relative, so that the application's directory can be moved.
fn target(release: &str) -> PathBuf {
    Path::new("releases").join(release)
}

impl Act for Activate {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let app = App::open(cx, &self.app)?;
        let active = app.active()?;
        if active == self.release {
            return Ok(Probe::Present(format!("release {active} is active")));
        }
        let from = if active.is_empty() {
            "none".to_owned()
        } else {
            active
        };
        let text = format!("activates release {} instead of {from}", self.release);
        Ok(match app.note(&self.release)? {
            None if cx.dry_run => Probe::Unmet(app.not_fetched(&self.release)),
            _ => Probe::Absent(text),
        })
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        let target = App::open(cx, &self.app)?.target()?;
        Ok(target.map_or(Value::Null, |target| {
            target.to_string_lossy().into_owned().into()
        }))
    }

    async fn is_as_before(&self, cx: &Context, before: &Value) -> Result<bool, Failure> {
        let current = App::open(cx, &self.app)?.current();
        Ok(!files::has_left_over(&current) && self.before(cx).await? == *before)
    }

    async fn apply(&self, cx: &Context, before_state: &Value) -> Result<Done, Failure> {
        let app = App::open(cx, &self.app)?;
        let note = app.fetched(&self.release)?;
        if note.build.is_some_and(|build| !build.done) {
            return Err(Failure {
                hint: Some("let its `release.build` step end first".into()),
                ..failure(
                    Cause::Refused,
                    format!("release {} is not built to its end", self.release),
                )
            });
        }
        let old: Option<PathBuf> = before(before_state)?;
        let previous = old.as_deref().map(release_of).unwrap_or_default();
        let facts = vec![Fact::PreviousRelease {
            app: self.app.clone(),
            release: previous,
        }];
        if app.active()? == self.release {
            let summary = format!("release {} was active", self.release);
            return Ok(Done {
                changed: false,
                summary,
                facts,
            });
        }
        files::link(&target(&self.release), &app.current())
            .or_failed(|| {
                format!(
                    "point {} at release {}",
                    app.current().display(),
                    self.release
                )
            })
            .map_err(|failure| Failure {
                // It may point there, and only not be durable.
                changed: app.active().map_or(true, |active| active == self.release),
                ..failure
            })?;
        let from = match old.as_deref().map(release_of) {
            Some(old) => format!(" instead of {old}"),
            None => String::new(),
        };
        Ok(Done {
            changed: true,
            summary: format!("release {} is active{from}", self.release),
            facts,
        })
    }

    async fn undo(&self, cx: &Context, before_state: &Value) -> Result<Done, Failure> {
        let app = App::open(cx, &self.app)?;
        let old: Option<PathBuf> = before(before_state)?;
        files::remove_left_over(&app.current())
            .or_failed(|| format!("tidy up beside {}", app.current().display()))?;
        let changed = app.target()? != old;
        let Some(old) = old else {
            files::remove(&app.current())
                .or_failed(|| format!("remove {}", app.current().display()))?;
            let summary = "no release is active again".to_owned();
            return Ok(Done {
                changed,
                summary,
                facts: vec![],
            });
        };
        let name = release_of(&old);
        if !app.config.root.join(&old).is_dir() {
            return Err(Failure {
                hint: Some(format!("bring {} back, then try again", old.display())),
                ..failure(
                    Cause::Host,
                    format!("release {name}, which was active before, is not there"),
                )
            });
        }
        if changed {
            files::link(&old, &app.current())
                .or_failed(|| format!("point {} back at {name}", app.current().display()))?;
        }
        Ok(Done {
            changed,
            summary: format!("release {name} is active again"),
            facts: vec![],
        })
    }

    fn describe(&self) -> String {
        format!("activate release {} of {}", self.release, self.app)
    }

    async fn state(&self, cx: &Context) -> Result<Vec<Fact>, Failure> {
        let target = App::open(cx, &self.app)?.target()?;
        let (digest, text) = match target {
            Some(target) => (
                Digest::of(target.to_string_lossy().as_bytes()),
                release_of(&target),
            ),
            None => (Digest::of(b""), "none".to_owned()),
        };
        Ok(vec![Fact::State {
            name: format!("release {}", self.app),
            digest,
            text,
        }])
    }
}

/// The release before this rollout: what its activation found, or, before that, the active one.
fn previous(act: &Previous, cx: &Context) -> Result<Done, Failure> {
    let noted = bound(&cx.bindings, |fact| match fact {
        Fact::PreviousRelease { app, release } if *app == act.app => Some(release.clone()),
        _ => None,
    });
    let release = match noted {
        Some(release) => release,
        None => App::open(cx, &act.app)?.active()?,
    };
    let summary = match release.as_str() {
        "" => format!("no release of {} was active before", act.app),
        release => format!("release {release} of {} was active before", act.app),
    };
    let facts = vec![Fact::PreviousRelease {
        app: act.app.clone(),
        release,
    }];
    Ok(Done {
        changed: false,
        summary,
        facts,
    })
}

impl Act for Previous {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        Ok(Probe::Present(previous(self, cx)?.summary))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        previous(self, cx)
    }

    fn describe(&self) -> String {
        format!("say which release of {} was active before", self.app)
    }
}
