//! Services that systemd runs, over the system bus.
//!
//! A job is waited for by its `JobRemoved` signal. The subscription is made before the job, so
//! the signal cannot be missed.

use std::collections::HashMap;
use std::time::Duration;

use lockstep_proto::report::{Cause, Failure};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};
use tokio_stream::StreamExt as _;
use zbus::{
    Connection, DynamicType, MatchRule, Message, MessageStream, OwnedObjectPath, OwnedVariant,
};

use super::{Phase, State};
use crate::process::Program;
use crate::step::{Context, changed, failure};

const BUS_NAME: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// The longest time for one answer of systemd. A reload of all units blocks it for seconds.
const ANSWER: Duration = Duration::from_secs(25);

/// How many lines of the journal a failure shows.
const LINES: &str = "--lines=20";

/// Kinds of units that a plan may name with their suffix.
const SUFFIXES: [&str; 5] = [".service", ".socket", ".timer", ".target", ".path"];

type Properties = HashMap<String, OwnedVariant>;

/// A unit of systemd.
pub(super) struct Unit {
    bus: Connection,
    /// With its suffix.
    name: String,
    path: OwnedObjectPath,
}

impl Unit {
    pub(super) async fn open(cx: &Context, name: &str) -> Result<Self, Failure> {
        let suffixed = SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
        let name = if suffixed {
            name.to_owned()
        } else {
            format!("{name}.service")
        };
        let bus = connect().await?;
        // Unlike GetUnit, LoadUnit also knows units that have not been started yet.
        let reply = manager(&bus, "LoadUnit", &(name.as_str(),)).await;
        let reply = reply.map_err(|error| unanswered(&name, "ask for", &error))?;
        let path = read(&reply, &name)?;
        let unit = Self { bus, name, path };
        let properties = unit.properties(UNIT).await?;
        match text(&properties, "LoadState").as_str() {
            "loaded" => {}
            "not-found" => {
                return Err(Failure {
                    hint: Some(format!(
                        "install it, or correct the name; then `systemctl cat {}`",
                        unit.name
                    )),
                    ..failure(
                        Cause::Host,
                        format!("there is no unit {} on this host", unit.name),
                    )
                });
            }
            other => {
                return Err(Failure {
                    hint: Some(format!("`systemctl status {}` says why", unit.name)),
                    ..failure(
                        Cause::Host,
                        format!("unit {} cannot be used: it is {other}", unit.name),
                    )
                });
            }
        }
        if flag(&properties, "NeedDaemonReload") {
            cx.log.line(&format!(
                "the file of {} has changed since systemd read it: `systemctl daemon-reload`",
                unit.name
            ));
        }
        Ok(unit)
    }

    pub(super) async fn state(&self) -> Result<State, Failure> {
        let unit = self.properties(UNIT).await?;
        let service = if self.name.ends_with(".service") {
            self.properties(SERVICE).await?
        } else {
            Properties::new()
        };
        Ok(state(&unit, &service))
    }

    pub(super) async fn start(&self, until: Instant) -> Result<(), Failure> {
        self.job("StartUnit", "start", until).await
    }

    pub(super) async fn stop(&self, until: Instant) -> Result<(), Failure> {
        self.job("StopUnit", "stop", until).await
    }

    pub(super) async fn restart(&self, until: Instant) -> Result<(), Failure> {
        self.job("RestartUnit", "restart", until).await
    }

    pub(super) async fn reset_failed(&self) -> Result<(), Failure> {
        let reply = manager(&self.bus, "ResetFailedUnit", &(self.name.as_str(),)).await;
        reply
            .map(drop)
            .map_err(|error| unanswered(&self.name, "reset", &error))
    }

    /// The last lines of its journal; none if they cannot be read, for a failure is being told.
    pub(super) async fn last_lines(&self, cx: &Context) -> Vec<String> {
        let unit = format!("--unit={}", self.name);
        let argv = [
            "journalctl",
            unit.as_str(),
            LINES,
            "--no-pager",
            "--output=cat",
            "--quiet",
        ];
        let program = Program {
            argv: argv.map(str::to_owned).to_vec(),
            timeout: Some(Duration::from_secs(10)),
            ..Program::default()
        };
        let ended = program.run(cx).await;
        ended
            .map(|ended| ended.stdout.lines().map(str::to_owned).collect())
            .unwrap_or_default()
    }

    /// Has systemd do something with the unit and waits until it is done. A unit that fails while
    /// it starts is left to the caller, who asks for its state and shows its last lines.
    async fn job(&self, method: &str, verb: &str, until: Instant) -> Result<(), Failure> {
        let told = |error: zbus::Error| unanswered(&self.name, verb, &error);
        let mut removed = self.removed_jobs().await.map_err(told)?;
        let reply = manager(&self.bus, method, &(self.name.as_str(), "replace")).await;
        let reply = reply.map_err(|error| Failure {
            // Without an answer it may be at it all the same.
            changed: !is_refusal(&error),
            ..told(error)
        })?;
        let job: OwnedObjectPath = read(&reply, &self.name).map_err(changed)?;
        loop {
            let signal = match timeout_at(until, removed.next()).await {
                Ok(Some(signal)) => signal.map_err(told).map_err(changed)?,
                Ok(None) => {
                    let message = format!("the bus was closed while {} was to {verb}", self.name);
                    return Err(Failure {
                        changed: true,
                        ..failure(Cause::Step, message)
                    });
                }
                Err(_) => {
                    return Err(Failure {
                        hint: Some("raise `within`, or lower the unit's own timeout".into()),
                        changed: true,
                        ..failure(
                            Cause::TimedOut,
                            format!(
                                "systemd is still at it to {verb} {} when its time is over",
                                self.name
                            ),
                        )
                    });
                }
            };
            let (_, path, _, result): (u32, OwnedObjectPath, String, String) =
                read(&signal, &self.name).map_err(changed)?;
            if path != job {
                continue;
            }
            return match result.as_str() {
                // `failed`: the state says so, and more.
                "done" | "skipped" | "failed" => Ok(()),
                other => Err(Failure {
                    hint: Some(format!("`systemctl status {}` says why", self.name)),
                    changed: true,
                    ..failure(
                        if other == "timeout" {
                            Cause::TimedOut
                        } else {
                            Cause::Step
                        },
                        format!(
                            "systemd could not {verb} {}: the job ended as `{other}`",
                            self.name
                        ),
                    )
                }),
            };
        }
    }

    async fn removed_jobs(&self) -> zbus::Result<MessageStream> {
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender(BUS_NAME)
            .path(MANAGER_PATH)
            .interface(MANAGER)
            .member("JobRemoved")
            .build()?;
        let stream = MessageStream::for_match_rule(rule, &self.bus, None).await?;
        // systemd sends its signals only while somebody has asked for them.
        manager(&self.bus, "Subscribe", &()).await?;
        Ok(stream)
    }

    async fn properties(&self, interface: &str) -> Result<Properties, Failure> {
        let reply = self
            .bus
            .call_method(
                Some(BUS_NAME),
                &self.path,
                Some(PROPERTIES),
                "GetAll",
                &(interface,),
            )
            .await
            .map_err(|error| unanswered(&self.name, "ask for", &error))?;
        read(&reply, &self.name)
    }
}

/// Whether systemd is this host's first process.
pub(super) fn is_running() -> bool {
    std::path::Path::new("/run/systemd/system").is_dir()
}

/// Takes a process out of the unit of the step that started it, into a scope of its own, so that
/// it outlives the step.
pub(super) async fn adopt(service: &str, pid: u32) -> Result<(), Failure> {
    let bus = connect().await?;
    // A scope ends with its last process, so the number keeps the names apart.
    let name = format!("lockstep-service-{}-{pid}.scope", escape(service));
    let properties = [
        (
            "Description",
            zbus::Variant::from(format!("Service {service}, started by Lockstep")),
        ),
        ("PIDs", zbus::Variant::from(vec![pid])),
        ("CollectMode", zbus::Variant::from("inactive-or-failed")),
    ];
    let none: [(&str, Vec<(&str, zbus::Variant<'_>)>); 0] = [];
    let body = (name.as_str(), "fail", &properties[..], &none[..]);
    let reply = manager(&bus, "StartTransientUnit", &body).await;
    reply
        .map(drop)
        .map_err(|error| unanswered(&name, "start", &error))?;
    // The call returns before the process has been moved.
    let until = Instant::now() + ANSWER;
    while Instant::now() < until {
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if cgroup.contains(&name) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(failure(
        Cause::Host,
        format!("systemd did not move service {service} into {name}"),
    ))
}

/// The text as a part of a unit's name: other bytes than these are written as `\xNN`.
fn escape(text: &str) -> String {
    use std::fmt::Write as _;
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' => escaped.push(byte.into()),
            _ => write!(escaped, "\\x{byte:02x}").expect("a string takes everything"),
        }
    }
    escaped
}

async fn connect() -> Result<Connection, Failure> {
    let bus = async {
        zbus::connection::Builder::system()
            .method_timeout(ANSWER)
            .build()
            .await
    };
    let error = match tokio::time::timeout(ANSWER, bus).await {
        Ok(Ok(bus)) => return Ok(bus),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer for {ANSWER:?}"),
    };
    let hint = if is_running() {
        "check that dbus runs: `systemctl status dbus`"
    } else {
        "systemd does not run here: use the driver `process` or `command`"
    };
    Err(Failure {
        hint: Some(hint.into()),
        ..failure(
            Cause::Host,
            format!("the system bus cannot be reached: {error}"),
        )
    })
}

async fn manager<B>(bus: &Connection, method: &str, body: &B) -> zbus::Result<Message>
where
    B: Serialize + DynamicType,
{
    bus.call_method(Some(BUS_NAME), MANAGER_PATH, Some(MANAGER), method, body)
        .await
}

fn read<T>(message: &Message, unit: &str) -> Result<T, Failure>
where
    T: for<'a> zbus::wire::DynamicDeserialize<'a>,
{
    let body = message.body();
    body.deserialize().map_err(|error| {
        failure(
            Cause::Step,
            format!("systemd's answer about {unit} cannot be read: {error}"),
        )
    })
}

fn unanswered(unit: &str, verb: &str, error: &zbus::Error) -> Failure {
    let text = error.to_string();
    let denied = ["AccessDenied", "InteractiveAuthorizationRequired"];
    let (cause, hint) = if denied.iter().any(|name| text.contains(name)) {
        (
            Cause::Host,
            Some("run the agent as root: systemd takes this from nobody else".to_owned()),
        )
    } else {
        (Cause::Step, None)
    };
    Failure {
        hint,
        ..failure(cause, format!("cannot {verb} {unit}: {text}"))
    }
}

/// Whether systemd itself has said no.
fn is_refusal(error: &zbus::Error) -> bool {
    /// What the bus says instead of an answer that did not come.
    const NO_ANSWER: [&str; 3] = [
        "org.freedesktop.DBus.Error.NoReply",
        "org.freedesktop.DBus.Error.Timeout",
        "org.freedesktop.DBus.Error.TimedOut",
    ];
    match error {
        zbus::Error::MethodError(name, ..) => !NO_ANSWER.contains(&name.as_str()),
        _ => false,
    }
}

fn text(properties: &Properties, name: &str) -> String {
    let value = properties.get(name);
    value
        .and_then(|value| <&str>::try_from(value).ok())
        .unwrap_or_default()
        .to_owned()
}

fn flag(properties: &Properties, name: &str) -> bool {
    properties
        .get(name)
        .and_then(|value| bool::try_from(value).ok())
        .unwrap_or_default()
}

fn number(properties: &Properties, name: &str) -> i64 {
    let Some(value) = properties.get(name) else {
        return 0;
    };
    let signed = i32::try_from(value).map(i64::from);
    signed
        .or_else(|_| u32::try_from(value).map(i64::from))
        .unwrap_or_default()
}

/// Whether systemd has something to do with the unit, at work or queued: job 0 is none.
fn has_job(unit: &Properties) -> bool {
    let Some(zbus::Variant::Structure(job)) = unit.get("Job").map(|job| &**job) else {
        return false;
    };
    job.fields().first() != Some(&zbus::Variant::from(0_u32))
}

fn bytes(properties: &Properties, name: &str) -> Vec<u8> {
    let value = properties
        .get(name)
        .and_then(|value| value.try_clone().ok());
    value
        .and_then(|value| Vec::<u8>::try_from(value).ok())
        .unwrap_or_default()
}

fn state(unit: &Properties, service: &Properties) -> State {
    let (active, sub) = (text(unit, "ActiveState"), text(unit, "SubState"));
    let phase = match active.as_str() {
        // It will not stay as it is: systemd has yet to start or stop it.
        "active" | "inactive" | "failed" if has_job(unit) => Phase::Changing,
        "active" | "reloading" | "refreshing" => Phase::Running,
        "inactive" => Phase::Stopped,
        "failed" => Phase::Failed,
        // activating, deactivating, maintenance
        _ => Phase::Changing,
    };
    let mut words = format!("{active} ({sub})");
    let enabled = text(unit, "UnitFileState");
    if !enabled.is_empty() {
        words = format!("{words}, {enabled}");
    }
    let result = text(service, "Result");
    // Waiting to be started again after a crash counts as trouble, a first start does not.
    let crashed = phase == Phase::Failed || sub.starts_with("auto-restart");
    let trouble = (crashed && !result.is_empty()).then(|| {
        let status = number(service, "ExecMainStatus");
        format!(
            "result {result}, exit status {status}, {} restarts",
            number(service, "NRestarts")
        )
    });
    let run = Some(hex::encode(bytes(unit, "InvocationID"))).filter(|run| !run.is_empty());
    State {
        phase,
        words,
        run,
        trouble,
    }
}

#[cfg(test)]
mod tests;
