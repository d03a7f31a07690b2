//! Services that commands of the host's configuration start, stop and ask.

use lockstep_proto::report::{Cause, Failure};
use tokio::time::Instant;

use super::{Phase, State};
use crate::config;
use crate::process::Program;
use crate::step::{Context, failure};

/// What the status command exits with if the service does not run, as systemctl does.
const NOT_RUNNING: i32 = 3;

/// A service of the driver `command`.
pub(super) struct Commands<'a> {
    name: &'a str,
    config: &'a config::Service,
}

impl<'a> Commands<'a> {
    pub(super) fn open(cx: &'a Context, name: &'a str) -> Result<Self, Failure> {
        let config = super::process::configured(cx, name)?;
        let commands = [
            ("start", &config.start),
            ("stop", &config.stop),
            ("status", &config.status),
        ];
        for (what, argv) in commands {
            if argv.is_empty() {
                return Err(Failure {
                    hint: Some(format!(
                        "add `{what} = [...]` to [services.{name}] in agent.toml"
                    )),
                    ..failure(
                        Cause::Host,
                        format!("service {name} has no {what} command on this host"),
                    )
                });
            }
        }
        Ok(Self { name, config })
    }

    fn program(&self, argv: &[String], until: Option<Instant>) -> Program {
        Program {
            argv: argv.to_vec(),
            dir: self.config.dir.clone(),
            user: self.config.user.clone(),
            timeout: until.map(|until| until.saturating_duration_since(Instant::now())),
            ..Program::default()
        }
    }

    pub(super) async fn state(&self, cx: &Context) -> Result<State, Failure> {
        let ended = self.program(&self.config.status, None).run(cx).await?;
        let (phase, words) = match ended.code {
            0 => (Phase::Running, "running"),
            NOT_RUNNING => (Phase::Stopped, "stopped"),
            code => {
                return Err(Failure {
                    hint: Some("a status command exits with 0 or 3, as systemctl does".into()),
                    last_lines: cx.log.last_lines(),
                    ..failure(
                        Cause::Host,
                        format!(
                            "the status command of service {} exited with {code}",
                            self.name
                        ),
                    )
                });
            }
        };
        Ok(State {
            phase,
            words: words.into(),
            run: None,
            trouble: None,
        })
    }

    pub(super) async fn start(&self, cx: &Context, until: Instant) -> Result<(), Failure> {
        self.program(&self.config.start, Some(until))
            .succeed(cx)
            .await
            .map(drop)
    }

    pub(super) async fn stop(&self, cx: &Context, until: Instant) -> Result<(), Failure> {
        self.program(&self.config.stop, Some(until))
            .succeed(cx)
            .await
            .map(drop)
    }
}
