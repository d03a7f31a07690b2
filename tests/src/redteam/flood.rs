//! Hostile load: malformed frames in every state that a connection can be in, and connections that
//! are slow, while honest agents go on.
//!
//! ```text
//! quiet round, loud round, quiet round, ... : a loud one has one state, or the slow connections
//! honest agents (one runtime) | load (another one, of lower priority: it plays other machines)
//! ```

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Pid;
use serde_json::{Map, Value, json};

use super::honest::{Honest, median, p99, session};
use super::load::{Load, STATES, State};
use crate::cluster::Cluster;
use crate::memory::Memory;
use crate::operator::text;
use crate::played::Dial;
use crate::wait;

/// Agents that are played honestly.
const HONEST: [&str; 6] = ["h-1", "h-2", "h-3", "h-4", "h-5", "h-6"];

/// One that dials anew while the load is on.
const NEWCOMER: &str = "h-7";

/// Hosts in hostile hands.
const HOSTILE: [&str; 4] = ["evil-1", "evil-2", "evil-3", "evil-4"];

/// Real agents; the second one's socket between link and exec is attacked, too.
const REAL: [&str; 2] = ["app-1", "app-2"];

/// How much is played.
#[derive(Debug, Clone, Copy)]
pub struct Much {
    /// Malformed frames in each state.
    pub frames: u64,
    /// Slow connections at a time.
    pub slow: usize,
    /// A round without load, and the least one with it.
    pub round: Duration,
    /// Whether the waits of honest agents are judged: on a machine that does other things, too,
    /// they say little.
    pub judged: bool,
}

/// In full.
pub const WHOLE: Much = Much {
    frames: 10_000,
    slow: 1000,
    round: Duration::from_secs(5),
    judged: true,
};

/// For every test run.
pub const SAMPLE: Much = Much {
    frames: 150,
    slow: 60,
    round: Duration::from_millis(500),
    judged: false,
};

/// Memory that the load may cost the controller, in MiB.
const GROWTH: f64 = 64.0;

/// By how much the waits of honest agents may grow.
const RATIO: f64 = 2.0;

/// Hostile load on a real controller and on the socket of a real agent.
pub fn hostile_load(much: Much) -> Result<(Value, Result<()>)> {
    let quiet = tokio::runtime::Runtime::new()?;
    let (figures, judged) = quiet.block_on(async {
        let mut site = Site::start()?;
        let mut figures = Map::new();
        let played = site.play(much, &mut figures).await;
        let judged = played.and_then(|()| site.judge(much, &figures));
        let words = |error: anyhow::Error| error.context(site.cluster.last_words());
        Ok::<_, anyhow::Error>((Value::Object(figures), judged.map_err(words)))
    })?;
    Ok((figures, judged))
}

struct Site {
    cluster: Cluster,
    controller: Pid,
    exec: Pid,
}

impl Site {
    fn start() -> Result<Self> {
        let mut hosts: Vec<(&str, &str)> = REAL.iter().map(|name| (*name, "app")).collect();
        let played = || HONEST.iter().chain(&HOSTILE).chain([&NEWCOMER]).copied();
        hosts.extend(played().map(|name| (name, "other")));
        let mut builder = Cluster::builder()
            .without_database()
            .enrolling("24h")
            .hosts(&hosts);
        for name in hosts.iter().map(|(name, _)| *name) {
            builder = builder.policy(name, Some("[[allow]]\naction = \"exec.run\"\n"));
        }
        let mut cluster = builder.start()?;
        for name in played() {
            cluster.host_mut(name).stop_agent();
        }
        for name in REAL {
            let host = cluster.host_mut(name);
            host.stop_agent();
            host.split();
            host.start_agent()?;
        }
        cluster.wait_connected(&REAL.map(str::to_owned))?;
        let controller = cluster.controller_pid().context("the controller runs")?;
        let exec = cluster.host(REAL[1]).agent_pid().context("exec runs")?;
        Ok(Self {
            cluster,
            controller,
            exec,
        })
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.cluster.pki().join(name);
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// As somebody of the pki, or as nobody.
    fn dial(&self, who: Option<&str>) -> Result<Dial> {
        let address = self.cluster.address().parse()?;
        let controllers = self.read("ca-controllers.crt")?;
        let Some(who) = who else {
            return Dial::new(address, None, &controllers);
        };
        let certificate = self.read(&format!("{who}.crt"))?;
        let key = self.read(&format!("{who}.key"))?;
        Dial::new(address, Some((&certificate, &key)), &controllers)
    }

    fn load(&self) -> Result<Load> {
        let hostile = HOSTILE.iter().map(|host| {
            let dial = self.dial(Some(&format!("agent-{host}")))?;
            Ok(((*host).to_owned(), dial))
        });
        Ok(Load {
            agents: hostile.collect::<Result<_>>()?,
            operator: self.dial(Some("operator-erin"))?,
            stranger: self.dial(None)?,
            socket: self.socket()?,
        })
    }

    /// Where exec waits for its link.
    fn socket(&self) -> Result<PathBuf> {
        let root = &self.cluster.host(REAL[1]).root;
        let mut found = vec![];
        for place in ["run", "state"] {
            for entry in fs::read_dir(root.join(place)).into_iter().flatten() {
                let path = entry?.path();
                if path.extension().is_some_and(|end| end == "sock") {
                    found.push(path);
                }
            }
        }
        found.pop().context("exec's socket")
    }

    async fn play(&mut self, much: Much, figures: &mut Map<String, Value>) -> Result<()> {
        let honest = HONEST.iter().map(|host| {
            let dial = self.dial(Some(&format!("agent-{host}")))?;
            Ok(((*host).to_owned(), dial))
        });
        let honest = Honest::begin(honest.collect::<Result<_>>()?).await?;
        let newcomer = self
            .dial(Some(&format!("agent-{NEWCOMER}")))?
            .from([127, 0, 0, 77]);
        let load = Arc::new(self.load()?);
        // It plays other machines: what it takes of this one's processors is not the controller's.
        let other = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_start(|| _ = rustix::process::nice(10))
            .enable_all()
            .build()?;
        // The first reports open files and fill caches.
        tokio::time::sleep(much.round).await;
        honest.take();
        let memory = Memory::begin(&[self.controller, self.exec]);
        let (mut quiet, mut loud) = (vec![], vec![]);
        let (mut frames, mut connects) = (0, vec![]);
        let mut timeouts = 0;
        let mut lost = vec![];
        for state in STATES {
            for is_loud in [false, true] {
                let stop = Arc::new(AtomicBool::new(false));
                let begun = Instant::now();
                let storm = is_loud.then(|| {
                    let (load, stop) = (load.clone(), stop.clone());
                    other.spawn(async move { load.play(state, much, &stop).await })
                });
                if is_loud {
                    let dialled = Instant::now();
                    session(NEWCOMER, &newcomer).await.context("the newcomer")?;
                    connects.push(dialled.elapsed().as_secs_f64() * 1000.0);
                }
                tokio::time::sleep(much.round).await;
                let mut sent = 0;
                if let Some(storm) = storm {
                    if state == State::Slow {
                        tokio::time::sleep(much.round).await;
                    }
                    stop.store(true, Ordering::Relaxed);
                    sent = storm.await??;
                    frames += if state == State::Slow { 0 } else { sent };
                }
                let seen = honest.take();
                timeouts += seen.timeouts;
                lost.extend(seen.lost);
                let worst = p99(&seen.waits);
                if is_loud {
                    let name = format!("{state:?}").to_lowercase();
                    let before = quiet.last().copied().unwrap_or(f64::INFINITY);
                    figures.insert(
                        format!("load_{name}"),
                        json!({
                            "sent": sent,
                            "seconds": round(begun.elapsed().as_secs_f64()),
                            "p99_ms": round(worst),
                            "quiet_p99_ms": round(before),
                            "reports": seen.waits.len(),
                        }),
                    );
                    tell(&format!(
                        "{name}: {sent} in {:.0} s",
                        begun.elapsed().as_secs_f64()
                    ));
                    loud.push(worst);
                } else {
                    quiet.push(worst);
                }
            }
        }
        honest.end().await;
        let grown = memory.end();
        let [growth, of_exec] = grown[..] else {
            bail!("two processes are watched");
        };
        other.shutdown_background();
        for (name, value) in [
            ("frames", json!(frames)),
            ("slow", json!(much.slow)),
            ("growth_mib", json!(round(growth))),
            ("exec_growth_mib", json!(round(of_exec))),
            ("quiet_p99_ms", json!(round(median(&quiet)))),
            ("p99_ms", json!(round(median(&loud)))),
            ("p99_ratio", json!(round(median(&loud) / median(&quiet)))),
            ("newcomer_ms", json!(round(median(&connects)))),
            ("newcomer_worst_ms", json!(round(p99(&connects)))),
            ("timeouts", json!(timeouts)),
            ("lost", json!(lost)),
        ] {
            figures.insert(name.to_owned(), value);
        }
        Ok(())
    }

    fn judge(&mut self, much: Much, figures: &Map<String, Value>) -> Result<()> {
        let number = |name: &str| figures[name].as_f64().unwrap_or(f64::INFINITY);
        let lost = &figures["lost"];
        ensure!(lost == &json!([]), "honest sessions were lost: {lost}");
        ensure!(figures["timeouts"] == 0, "honest agents waited in vain");
        for name in ["growth_mib", "exec_growth_mib"] {
            let growth = number(name);
            ensure!(growth <= GROWTH, "{name} is {growth}");
        }
        for (name, figures) in figures.iter().filter(|(name, _)| name.starts_with("load_")) {
            let sent = figures["sent"].as_u64().unwrap_or(0);
            let wanted = if name == "load_slow" {
                much.slow as u64
            } else {
                much.frames
            };
            ensure!(sent >= wanted, "{name}: {sent} of {wanted} were sent");
        }
        if much.judged {
            let (loud, quiet) = (number("p99_ms"), number("quiet_p99_ms"));
            ensure!(
                loud <= RATIO * quiet,
                "p99 is {loud} ms, and {quiet} ms in quiet"
            );
        }
        // Neither has crashed, and both still do what they are for.
        ensure!(
            self.cluster.controller_pid() == Some(self.controller),
            "another controller"
        );
        for name in REAL {
            let running = self.cluster.host_mut(name).check();
            running.map_err(anyhow::Error::msg)?;
        }
        self.cluster.wait_connected(&REAL.map(str::to_owned))?;
        let plan = self.cluster.root().join("after.yaml");
        let step = crate::story::effect("after", 0);
        fs::write(
            &plan,
            format!(
                "version: 1\nplan: after\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n  - \
                 name: one\n    on: app\n    steps:\n{step}"
            ),
        )?;
        let rollout = self.cluster.requester().submit(&plan, &[])?;
        let ended = self.cluster.requester().wait(&rollout, wait::ROLLOUT)?;
        let state = text(&ended["state"]);
        ensure!(state == "succeeded", "{}", self.cluster.explain(&ended));
        Ok(())
    }
}

#[expect(
    clippy::print_stdout,
    reason = "it takes minutes, and says what it is at"
)]
fn tell(line: &str) {
    println!("  {line}");
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
