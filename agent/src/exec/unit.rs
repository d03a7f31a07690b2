//! Transient units of systemd: what steps and looks run in where there is one, and what such a
//! process may do beside what its action is for.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use lockstep_proto::action::Action;
use lockstep_proto::action::service::Driver;
use lockstep_proto::ids::{HostId, StepKey};
use zbus::{OwnedObjectPath, Variant};

/// The bus answers at once or is not well.
const BUS_TIMEOUT: Duration = Duration::from_secs(10);

/// The unit of one process.
#[derive(Debug)]
pub(super) struct Unit(String);

/// How a unit's process is started. No secret is among these: everybody on the host can read a
/// unit's properties.
pub(super) struct Start {
    pub(super) description: String,
    pub(super) argv: Vec<String>,
    pub(super) environment: BTreeMap<String, String>,
    /// Where its output is appended.
    pub(super) output: PathBuf,
    /// systemd ends it after this time; never, if there is none.
    pub(super) longest: Option<Duration>,
    pub(super) sandbox: Sandbox,
}

/// What a unit's process may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sandbox {
    /// It asks, in whichever user's name, and writes nothing but its own files.
    Look {
        /// Directories with files of its own; those that are not there are left out.
        writable: Vec<PathBuf>,
    },
    /// The agent's own code, whose effects are files, requests and units: none of it needs the
    /// kernel, devices or more rights than it begins with. A secret's command runs here too.
    Own,
    /// Programs of the host's: builds, tools of databases, commands. What they need, nobody here
    /// knows; the host's policy says which there are.
    Programs,
}

impl Sandbox {
    /// That of a step.
    pub(super) fn of(action: &Action) -> Self {
        let driver = match action {
            Action::ServiceStop(act) => Some(act.driver),
            Action::ServiceStart(act) => Some(act.driver),
            Action::ServiceRestart(act) => Some(act.driver),
            Action::ServiceStatus(act) => Some(act.driver),
            _ => None,
        };
        let own = match action {
            Action::EnvDiff(_)
            | Action::EnvRender(_)
            | Action::ReleaseActivate(_)
            | Action::ReleasePrevious(_)
            | Action::CheckHttp(_)
            | Action::CheckTcp(_)
            | Action::CheckPort(_)
            | Action::CheckProcess(_)
            | Action::CheckDisk(_)
            | Action::CheckTls(_)
            | Action::CheckLog(_) => true,
            _ => driver == Some(Driver::Systemd),
        };
        if own { Self::Own } else { Self::Programs }
    }

    /// `MemoryDenyWriteExecute` is not among them: the status command of a service, or a secret's
    /// command, may be of Node or Java, which make code while they run.
    fn properties(&self) -> Vec<(&'static str, Variant<'static>)> {
        let yes = |name| (name, Variant::from(true));
        let mut properties = vec![];
        match self {
            Self::Programs => return vec![],
            Self::Own => {}
            Self::Look { writable } => {
                // A leading `-` leaves out what is not there.
                let writable = writable.iter().map(|path| format!("-{}", path.display()));
                let temporary = ["/tmp", "/var/tmp"].map(str::to_owned);
                let writable: Vec<String> = writable.chain(temporary).collect();
                properties.extend([
                    ("ProtectSystem", Variant::from("strict")),
                    ("ProtectHome", Variant::from("read-only")),
                    ("ReadWritePaths", Variant::from(writable)),
                    ("CapabilityBoundingSet", Variant::from(LOOKS)),
                    yes("PrivateDevices"),
                    yes("ProtectControlGroups"),
                    yes("RestrictSUIDSGID"),
                ]);
            }
        }
        properties.extend([
            yes("NoNewPrivileges"),
            yes("LockPersonality"),
            yes("ProtectClock"),
            yes("ProtectHostname"),
            yes("ProtectKernelLogs"),
            yes("ProtectKernelModules"),
            yes("ProtectKernelTunables"),
            yes("RestrictRealtime"),
            // None.
            ("RestrictNamespaces", Variant::from(0_u64)),
            ("SystemCallArchitectures", Variant::from(vec!["native"])),
        ]);
        properties
    }
}

/// What a look may do as root: read everything, ask as an application's user, give that user a
/// password file, and end what an attempt left. Numbers of capability(7).
const LOOKS: u64 = {
    let [chown, read_search, kill, setgid, setuid, ptrace] = [0, 2, 5, 6, 7, 19];
    1 << chown | 1 << read_search | 1 << kill | 1 << setgid | 1 << setuid | 1 << ptrace
};

impl Unit {
    /// `lockstep-step-<key>.service`. An `@` would make it an instance of a template.
    pub(super) fn of_step(key: &StepKey) -> Self {
        let name = key.to_string().replace('@', "\\x40");
        Self(format!("lockstep-step-{name}.service"))
    }

    /// `lockstep-look-<name>:<host>.service`. The host is in it, for a test's machine may have
    /// several agents.
    pub(super) fn of_look(name: &str, host: &HostId) -> Self {
        Self(format!("lockstep-look-{name}:{host}.service"))
    }

    /// All looks of a host that systemd knows.
    pub(super) async fn all_looks(host: &HostId) -> io::Result<Vec<Self>> {
        // Name, description, load state, active state, sub state, followed unit, path, and a job.
        type Listed = (
            String,
            String,
            String,
            String,
            String,
            String,
            OwnedObjectPath,
            u32,
            String,
            OwnedObjectPath,
        );
        let states: &[&str] = &[];
        let patterns = [Self::of_look("*", host).0];
        let listed = call("ListUnitsByPatterns", &(states, &patterns[..])).await;
        let listed = listed.and_then(|reply| reply.body().deserialize::<Vec<Listed>>());
        let listed = listed.map_err(|error| {
            io::Error::other(format!("systemd does not list its units: {error}"))
        })?;
        Ok(listed.into_iter().map(|unit| Self(unit.0)).collect())
    }

    /// Starts it; fails if there is such a unit already.
    pub(super) async fn start(&self, start: Start) -> io::Result<()> {
        let Start {
            description,
            argv,
            environment,
            output,
            longest,
            sandbox,
        } = start;
        let program = argv[0].clone();
        let environment = environment.into_iter();
        let environment: Vec<String> = environment
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let output = output.to_string_lossy().into_owned();
        let mut properties: Vec<(&str, Variant<'_>)> = vec![
            ("Description", Variant::from(description)),
            ("Type", Variant::from("exec")),
            ("Slice", Variant::from("lockstep-steps.slice")),
            ("ExecStart", Variant::from(vec![(program, argv, false)])),
            ("Environment", Variant::from(environment)),
            ("StandardOutputFileToAppend", Variant::from(output.clone())),
            ("StandardErrorFileToAppend", Variant::from(output)),
            ("KillMode", Variant::from("control-group")),
            ("CollectMode", Variant::from("inactive-or-failed")),
            ("LimitCORE", Variant::from(0_u64)),
            ("UMask", Variant::from(0o077_u32)),
        ];
        properties.extend(sandbox.properties());
        if let Some(longest) = longest {
            let micros = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX);
            properties.push(("RuntimeMaxUSec", Variant::from(micros)));
        }
        let auxiliary: Vec<(&str, Vec<(&str, Variant<'_>)>)> = vec![];
        call(
            "StartTransientUnit",
            &(&*self.0, "fail", properties, auxiliary),
        )
        .await
        .map(|_| ())
        .map_err(|error| io::Error::other(format!("systemd does not start {}: {error}", self.0)))
    }

    /// Asks systemd to end all of it. No such unit means that the end of its last process was seen.
    pub(super) async fn stop(&self) {
        let _ = call("StopUnit", &(&*self.0, "replace")).await;
    }

    /// Kills all of it.
    pub(super) async fn kill(&self) {
        const SIGKILL: i32 = 9;
        let _ = call("KillUnit", &(&*self.0, "all", SIGKILL)).await;
    }

    /// Whether systemd still knows it. A bus that does not answer proves nothing.
    pub(super) async fn exists(&self) -> bool {
        match call("GetUnit", &&*self.0).await {
            Err(zbus::Error::MethodError(name, ..)) => {
                name.as_str() != "org.freedesktop.systemd1.NoSuchUnit"
            }
            _ => true,
        }
    }
}

/// A call to systemd. A connection of its own: steps are rare, and the bus may be restarted.
async fn call<B>(method: &str, body: &B) -> zbus::Result<zbus::Message>
where
    B: serde::ser::Serialize + zbus::zvariant::DynamicType,
{
    let call = async {
        let connection = zbus::Connection::system().await?;
        connection
            .call_method(
                Some("org.freedesktop.systemd1"),
                "/org/freedesktop/systemd1",
                Some("org.freedesktop.systemd1.Manager"),
                method,
                body,
            )
            .await
    };
    tokio::time::timeout(BUS_TIMEOUT, call)
        .await
        .unwrap_or_else(|_| Err(zbus::Error::Failure("the bus does not answer".into())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::StepRunner;
    use crate::exec::Runner;

    #[tokio::test]
    #[ignore = "needs a systemd that this user may command: `make fleet` runs it"]
    async fn looks_of_this_host_s_earlier_daemon_are_ended() {
        let host = |name: &str| name.parse::<HostId>().unwrap();
        let id = std::process::id().to_string();
        let look = Unit::of_look(&id, &host("left"));
        let other = Unit::of_look(&id, &host("also-left"));
        let start = || Start {
            description: "left over".into(),
            // It does not end when it is asked to.
            argv: ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
                .map(str::to_owned)
                .to_vec(),
            environment: BTreeMap::new(),
            output: "/dev/null".into(),
            longest: None,
            sandbox: Sandbox::Own,
        };
        for unit in [&look, &other] {
            unit.start(start()).await.unwrap();
        }
        let config = std::path::Path::new("agent.toml");
        let runner = Runner::new(StepRunner::Systemd, config).unwrap();
        runner.end_looks(&host("left")).await.unwrap();
        assert!(!look.exists().await);
        assert!(other.exists().await);
        other.kill().await;
    }
}
