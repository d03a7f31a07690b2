//! Checks of what the host itself can see: ports, processes, space, commands. Those with more to
//! them have files of their own.
//!
//! A check asks once when it is probed, and may wait when it is applied. In a dry run a step
//! before it may be what meets it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lockstep_proto::action::Address;
use lockstep_proto::action::check::{Command, Disk, Port, PortState, Process, ProcessState, Tcp};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::exec::{self, Expected};
use super::files::OrFailed as _;
use super::net::{self, Answer};
use super::{Act, Done, Probe};
use crate::step::{Context, failure};

mod http;
mod log;
mod tls;

/// Between two runs of a command that is awaited.
const COMMAND_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// What a check found.
struct Finding {
    met: bool,
    /// What was found, in words.
    words: String,
    /// What to do if it is not met.
    hint: Option<&'static str>,
    facts: Vec<Fact>,
}

impl Finding {
    fn new(met: bool, words: String) -> Self {
        Self {
            met,
            words,
            hint: None,
            facts: vec![],
        }
    }

    fn into_probe(self) -> Probe {
        match self.into_done() {
            Ok(done) => Probe::Present(done.summary),
            Err(unmet) => Probe::Unmet(unmet),
        }
    }

    fn into_done(self) -> Result<Done, Failure> {
        let Self {
            met,
            words,
            hint,
            facts,
        } = self;
        if met {
            return Ok(Done {
                changed: false,
                summary: words,
                facts,
            });
        }
        Err(Failure {
            hint: hint.map(str::to_owned),
            ..failure(Cause::CheckUnmet, words)
        })
    }
}

/// When a check that may wait has waited long enough.
fn until(cx: &Context, within: Option<lockstep_proto::values::Period>) -> Instant {
    let within = within.unwrap_or_default().to_std();
    Instant::now()
        .checked_add(within)
        .map_or(cx.deadline, |end| end.min(cx.deadline))
}

async fn tcp(check: &Tcp, until: Instant) -> Finding {
    let wanted = match check.expect {
        PortState::Open => Answer::Accepts,
        PortState::Refused => Answer::Refuses,
    };
    let answer = net::ask_until(&check.address, &wanted, until).await;
    let address = &check.address.0;
    let mut finding = Finding::new(answer == wanted, format!("{address} {answer}"));
    if answer == Answer::Refuses && finding.met {
        finding.facts.push(Fact::Refused {
            address: address.clone(),
        });
    }
    finding
}

impl Act for Tcp {
    async fn probe(&self, _cx: &Context) -> Result<Probe, Failure> {
        Ok(tcp(self, Instant::now()).await.into_probe())
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        tcp(self, until(cx, self.within)).await.into_done()
    }

    fn describe(&self) -> String {
        let verb = if self.expect == PortState::Open {
            "accepts"
        } else {
            "refuses"
        };
        format!("check that {} {verb} connections", self.address.0)
    }
}

/// A socket that listens.
#[derive(Debug, PartialEq, Eq)]
struct Listener {
    address: IpAddr,
    port: u16,
    inode: u64,
}

/// What listens on a port of this host, as the kernel tells it. Its table has a line for each
/// connection too: nothing is read beyond the line that answers.
fn listener(port: u16) -> Result<Option<Listener>, Failure> {
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let found = match File::open(path) {
            Ok(table) => find_listener(BufReader::new(table), port),
            // A kernel without IPv6 has no such file.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => Err(error),
        };
        let found = found.map_err(|error| super::files::failed(format!("read {path}"), &error))?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn find_listener(mut table: impl BufRead, port: u16) -> std::io::Result<Option<Listener>> {
    let mut line = String::new();
    while table.read_line(&mut line)? > 0 {
        let found = parse_listener(&line).filter(|listener| listener.port == port);
        if found.is_some() {
            return Ok(found);
        }
        line.clear();
    }
    Ok(None)
}

/// `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...`
fn parse_listener(line: &str) -> Option<Listener> {
    /// TCP_LISTEN
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace();
    let local = fields.nth(1)?;
    // Most lines end here: they are connections, or the table's heading.
    if fields.nth(1)? != LISTEN {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    let inode = fields.nth(5)?.parse().ok()?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of 32 bits in the machine's own order of bytes.
    let words = address.as_bytes().chunks(8).map(|word| {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        Some(word.to_ne_bytes())
    });
    let bytes: Vec<u8> = words.collect::<Option<Vec<_>>>()?.concat();
    let address = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    };
    Some(Listener {
        address,
        port,
        inode,
    })
}

/// Who holds a socket: `python3, process 4711`. Others' sockets are seen by root only. It asks for
/// every open file of every process, so that only what went wrong is worth it.
fn holder(inode: u64) -> Option<String> {
    let socket = format!("socket:[{inode}]");
    for pid in pids() {
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        let links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
        if links
            .into_iter()
            .any(|link| link.as_os_str() == socket.as_str())
        {
            return Some(format!("{}, process {pid}", name_of(pid)?));
        }
    }
    None
}

/// Who on this host holds a local address, if that can be seen.
pub(super) fn holder_of(address: &Address) -> Option<String> {
    let (host, port) = address.0.rsplit_once(':')?;
    let local = host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<IpAddr>()
            .ok()?
            .is_loopback();
    let port: u16 = port.parse().ok().filter(|_| local)?;
    holder(listener(port).ok()??.inode)
}

fn pids() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return vec![];
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

fn name_of(pid: i32) -> Option<String> {
    Some(
        fs::read_to_string(format!("/proc/{pid}/comm"))
            .ok()?
            .trim_end()
            .to_owned(),
    )
}

fn port(check: &Port) -> Result<Finding, Failure> {
    let listening = listener(check.port)?;
    let met = listening.is_some() == (check.expect == PortState::Open);
    let words = match listening {
        None => format!("nothing listens on port {}", check.port),
        Some(Listener {
            address,
            port,
            inode,
        }) => {
            // Of a port that is open as it should be nobody asks who has it.
            let holder = if met { None } else { holder(inode) };
            let by = holder.map_or_else(String::new, |holder| format!(" ({holder})"));
            format!("port {port} is open on {address}{by}")
        }
    };
    Ok(Finding::new(met, words))
}

impl Act for Port {
    async fn probe(&self, _cx: &Context) -> Result<Probe, Failure> {
        Ok(port(self)?.into_probe())
    }

    async fn apply(&self, _cx: &Context, _before: &Value) -> Result<Done, Failure> {
        port(self)?.into_done()
    }

    fn describe(&self) -> String {
        let state = if self.expect == PortState::Open {
            "open"
        } else {
            "free"
        };
        format!("check that port {} is {state}", self.port)
    }
}

/// Whether a process has this name: as the kernel knows it, or by its program's file.
fn is_named(pid: i32, name: &str) -> bool {
    /// The kernel keeps so many bytes of a name.
    const COMM: usize = 15;
    let comm = name_of(pid).is_some_and(|comm| {
        comm == name || (name.len() > COMM && comm.as_bytes() == &name.as_bytes()[..COMM])
    });
    let exe = || {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let file = exe.file_name()?.to_string_lossy().into_owned();
        // The file may have been replaced since.
        Some(file.strip_suffix(" (deleted)").unwrap_or(&file) == name)
    };
    comm || exe().unwrap_or(false)
}

fn is_zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

fn process(check: &Process) -> Finding {
    let running: Vec<_> = pids()
        .into_iter()
        .filter(|pid| is_named(*pid, &check.name) && !is_zombie(*pid))
        .collect();
    let met = running.is_empty() == (check.expect == ProcessState::Absent);
    let words = match running.as_slice() {
        [] => format!("no process is called {}", check.name),
        [pid] => format!("{} runs as process {pid}", check.name),
        [pid, ..] => format!(
            "{} processes are called {}, such as {pid}",
            running.len(),
            check.name
        ),
    };
    Finding::new(met, words)
}

impl Act for Process {
    async fn probe(&self, _cx: &Context) -> Result<Probe, Failure> {
        Ok(process(self).into_probe())
    }

    async fn apply(&self, _cx: &Context, _before: &Value) -> Result<Done, Failure> {
        process(self).into_done()
    }

    fn describe(&self) -> String {
        let verb = if self.expect == ProcessState::Running {
            "runs"
        } else {
            "does not run"
        };
        format!("check that {} {verb}", self.name)
    }
}

/// A size for people: `12.3 GiB`.
#[expect(
    clippy::cast_precision_loss,
    reason = "one digit after the point is shown"
)]
fn human(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >= 1 << shift) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

fn disk(check: &Disk) -> Result<Finding, Failure> {
    let stat = rustix::fs::statvfs(check.path.as_str())
        .map_err(std::io::Error::from)
        .or_failed(|| format!("look at the file system of {}", check.path))?;
    // What others than root may use.
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let words = format!(
        "{} free at {}, {} wanted",
        human(free),
        check.path,
        human(check.free.0)
    );
    let hint = Some("free space there, then try again");
    Ok(Finding {
        hint,
        ..Finding::new(free >= check.free.0, words)
    })
}

impl Act for Disk {
    async fn probe(&self, _cx: &Context) -> Result<Probe, Failure> {
        Ok(disk(self)?.into_probe())
    }

    async fn apply(&self, _cx: &Context, _before: &Value) -> Result<Done, Failure> {
        disk(self)?.into_done()
    }

    fn describe(&self) -> String {
        format!("check that {} is free at {}", self.free, self.path)
    }
}

async fn command(check: &Command, cx: &Context, until: Instant) -> Result<Done, Failure> {
    let expected = Expected {
        exit: check.exit,
        matches: check.matches.as_deref(),
    };
    let pattern = expected.pattern()?;
    let program = exec::program(cx, &check.argv, check.dir.as_deref(), &check.env).await?;
    let name = check.argv.first().map_or("", String::as_str);
    loop {
        let ran = expected.hold(pattern.as_ref(), &program.run(cx).await?);
        let summary = format!("{name} {}", ran.words);
        if ran.met {
            let note = Fact::Note {
                name: name.to_owned(),
                value: ran.last_line,
            };
            return Ok(Done {
                changed: false,
                summary,
                facts: vec![note],
            });
        }
        if Instant::now() + COMMAND_PAUSE >= until {
            let last_lines = cx.log.last_lines();
            return Err(Failure {
                last_lines,
                ..failure(Cause::CheckUnmet, summary)
            });
        }
        sleep(COMMAND_PAUSE).await;
    }
}

impl Act for Command {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        match command(self, cx, Instant::now()).await {
            Ok(done) => Ok(Probe::Present(done.summary)),
            Err(unmet) if unmet.cause == Cause::CheckUnmet => Ok(Probe::Unmet(unmet)),
            Err(failure) => Err(failure),
        }
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        command(self, cx, until(cx, self.within)).await
    }

    fn describe(&self) -> String {
        format!("check with {:?}", self.argv)
    }
}

#[cfg(test)]
mod tests;
