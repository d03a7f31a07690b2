//! `lockstep-agent run`, `exec` and `link`: build the parts, run them on one thread, stop them in
//! order.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

use crate::bridge::{self, Listening};
use crate::config::{Config, ConfigError};
use crate::errors::chain;
use crate::exec::{Exec, ExecError, Policy};
use crate::identity::{IdentityError, StateLock, private_dir};
use crate::journal::JournalError;
use crate::link::Link;
use crate::notify::notify;
use crate::process::User;
use crate::tls::Identity;
use crate::watchdog::{Due, WELL};
use crate::{exit, runtime, say};

/// Messages of the controller that wait for exec. It answers each in the time of a disk write.
const INBOUND: usize = 64;

/// Pieces of output, 64 KiB each at most, that wait for the network. Beyond they are dropped.
const LOGS: usize = 32;

/// A quarantined agent says so again after this: the log of the first time may be gone.
const REMIND: Duration = Duration::from_hours(1);

/// Which half of the agent a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// Both: for development, and for hosts on which nothing else is wanted.
    Both,
    /// It decides, remembers and starts steps, and knows no controller but through the link.
    Exec,
    /// It has the network and the certificate, and no privilege.
    Link,
}

/// Runs until SIGTERM or SIGINT. Step processes go on without it.
pub(crate) fn run(config: Config, config_path: &Path, half: Half) -> u8 {
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error, exit::INTERNAL),
    };
    let local = LocalSet::new();
    let config = Arc::new(config);
    local.block_on(&runtime, async {
        let served = match half {
            Half::Both | Half::Exec => serve(config, config_path, half).await,
            Half::Link => link(config, config_path).await,
        };
        served.err().unwrap_or(exit::DONE)
    })
}

fn failed(error: &dyn std::error::Error, code: u8) -> u8 {
    let why = chain(error);
    say(&why);
    notify(&format!("STATUS={why}"));
    code
}

async fn serve(config: Arc<Config>, config_path: &Path, half: Half) -> Result<(), u8> {
    let code = |error: &IdentityError| match error {
        IdentityError::InUse(_) => exit::IN_USE,
        IdentityError::Io { .. } => exit::INTERNAL,
    };
    check_files(&config, config_path, half)?;
    let stop = stop_on_signals().map_err(|error| failed(&error, exit::INTERNAL))?;
    private_dir(&config.state_dir).map_err(|error| failed(&error, code(&error)))?;
    let _lock = StateLock::take(&config.state_dir).map_err(|error| failed(&error, code(&error)))?;
    // In its own process the link sees to the certificate, which is not exec's to change.
    if half == Half::Both {
        settle(&config)?;
    }
    let domain = domain(&config, half)?;
    // A policy that cannot be used allows nothing, and this is the time to say so.
    if let Err(error) = Policy::load(config.policy_path()) {
        return Err(failed(&error, exit::USAGE));
    }
    if let Err(error) = crate::secrets::hand_over(&config) {
        say("the environment's secrets cannot be handed to steps");
        return Err(failed(&error, exit::INTERNAL));
    }
    let (logs, pieces) = mpsc::channel(LOGS);
    let exec = match Exec::open(&config, config_path, &domain, logs) {
        Ok(exec) => exec,
        Err(ExecError::Journal(error @ JournalError::Quarantined { .. })) => {
            return quarantined(&config, &error, &stop).await;
        }
        // It stays so until people change one of the two.
        Err(error @ ExecError::OtherDomain { .. }) => return Err(failed(&error, exit::USAGE)),
        Err(error) => return Err(failed(&error, exit::INTERNAL)),
    };
    let (to_exec, inbound) = mpsc::channel(INBOUND);
    let link = if half == Half::Exec {
        let listening = listen(&config).map_err(|why| {
            say(&why);
            exit::INTERNAL
        })?;
        notify("READY=1\nSTATUS=waiting for the link");
        tokio::task::spawn_local(listening.serve(to_exec, pieces, stop.clone()))
    } else {
        notify("READY=1\nSTATUS=connecting to the controller");
        tokio::task::spawn_local(Link::new(config, to_exec, pieces).run(stop.clone()))
    };
    let ended = exec.run(inbound, stop.clone()).await;
    notify("STOPPING=1");
    stop.cancel();
    // It closes its stream; a panic in it has been printed already.
    let _ = link.await;
    ended.map_err(|error| failed(&error, exit::INTERNAL))
}

/// The network side alone. It has nothing to remember, and begins anew whenever it is started.
async fn link(config: Arc<Config>, config_path: &Path) -> Result<(), u8> {
    check_files(&config, config_path, Half::Link)?;
    settle(&config)?;
    let stop = stop_on_signals().map_err(|error| failed(&error, exit::INTERNAL))?;
    let (to_exec, said) = mpsc::channel(INBOUND);
    let (logs, pieces) = mpsc::channel(LOGS);
    let (socket, stopped) = (config.socket(), stop.clone());
    let relay = tokio::task::spawn_local(async move {
        bridge::relay(&socket, said, logs, stopped).await;
    });
    Link::new(config, to_exec, pieces).run(stop.clone()).await;
    notify("STOPPING=1");
    stop.cancel();
    let _ = relay.await;
    Ok(())
}

/// A process before this one may have been about to put the next certificate in its place.
fn settle(config: &Config) -> Result<(), u8> {
    crate::enroll::settle(&config.tls).map_err(|error| failed(&error, exit::INTERNAL))
}

/// Which domain the agent belongs to: what its certificate says, which in two processes is the
/// link's to write. So exec asks it once, and its own journal from then on: whatever the link does
/// to certificate and key costs it the connection, and not the host its exec.
fn domain(config: &Config, half: Half) -> Result<String, u8> {
    if half == Half::Exec
        && let Some(domain) = crate::journal::domain(&config.state_dir)
    {
        return Ok(domain);
    }
    let identity = Identity::load(&config.tls).map_err(|error| {
        say("run `lockstep-agent check` for everything that is wrong");
        failed(&error, exit::USAGE)
    })?;
    Ok(identity.domain)
}

/// What others can change or read is not relied on, and people see it at once.
fn check_files(config: &Config, config_path: &Path, half: Half) -> Result<(), u8> {
    let mut found = crate::check::unsafe_files(config, config_path);
    if half != Half::Exec {
        found.extend(crate::check::unsafe_key(config));
    }
    if found.is_empty() {
        return Ok(());
    }
    let error = ConfigError::Unsafe(found.join("; "));
    Err(failed(&error, exit::USAGE))
}

fn listen(config: &Config) -> Result<Listening, String> {
    let user = match &config.link_user {
        Some(name) => User::find(name).map_err(|failure| failure.message)?.uid,
        None => rustix::process::geteuid().as_raw(),
    };
    let socket = config.socket();
    Listening::bind(&socket, user, config.host.clone())
        .map_err(|error| format!("cannot listen on {}: {error}", socket.display()))
}

/// The journal has lost something: nothing can be done safely, and nothing is repaired. The agent
/// stays, so that the service is not started again and again, and says why it does nothing.
async fn quarantined(
    config: &Config,
    error: &JournalError,
    stop: &CancellationToken,
) -> Result<(), u8> {
    let why = chain(error);
    notify(&format!("READY=1\nSTATUS=quarantined: {why}"));
    let mut due = Due::new();
    let mut remind = tokio::time::interval(REMIND);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = due.come() => {
                notify(WELL);
                continue;
            }
            _ = remind.tick() => {}
        }
        tracing::error!(
            why,
            hint = format!(
                "no order is taken, and nothing is changed; what ran on this host is in the \
                 controller's journal. Keep {0} for the inquiry: stop the agent, move {0} aside, \
                 and start it with a new one",
                config.state_dir.display()
            ),
            "quarantined"
        );
    }
}

/// Cancelled by the first SIGTERM or SIGINT.
fn stop_on_signals() -> std::io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = stop.clone();
    tokio::task::spawn_local(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; steps that are running go on");
        token.cancel();
    });
    Ok(stop)
}
