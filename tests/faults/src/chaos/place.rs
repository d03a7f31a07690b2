//! Controllers as processes: certificates from `lockstep pki`, a directory for each, and people at
//! the command line.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_proto::wire::control_v1 as wire;
use lockstep_proto::wire::control_v1::control_service_client::ControlServiceClient;
use lockstep_tests::daemon::{Daemon, Launch};
use lockstep_tests::operator::Operator;
use rustix::process::Signal;
use tonic::transport::Channel;

use super::net::{Identity, connect, identity};
use super::simulated::World;

/// A controller that does not take calls by then does not start.
const START_WITHIN: Duration = Duration::from_secs(30);

const DOMAIN: &str = "example.com";

/// What all controllers of a run share: the binary under test, certificates, the plan.
#[derive(Debug)]
pub struct Place {
    /// Everything that a run makes lies here.
    pub root: PathBuf,
    binary: PathBuf,
    /// The agents', by index.
    pub agents: Vec<Identity>,
    watcher: Identity,
    planted: Option<String>,
}

impl Place {
    /// Makes issuers and certificates for the hosts of a world in an empty directory. Controllers
    /// get the fault `planted`.
    pub fn make(root: &Path, world: &World, planted: Option<String>) -> Result<Self> {
        let pki = root.join("pki");
        let binary = root.join("lockstep");
        let built = lockstep_tests::binaries::directory()?.join("faulty-lockstep");
        // A copy: a build meanwhile must not change what is under test.
        fs::copy(&built, &binary).with_context(|| {
            let built = built.display();
            format!("{built} is missing: run `cargo build -p lockstep-faults` first")
        })?;
        let issue = |arguments: &[&str]| {
            let at = ["--dir".as_ref(), pki.as_os_str()];
            let mut command = Command::new(&binary);
            command.arg("pki").args(arguments).args(at);
            if arguments[0] != "init" {
                command.arg("--out").arg(&pki);
            }
            let output = command.output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.success(),
                "lockstep pki {arguments:?}: {said}"
            );
            anyhow::Ok(())
        };
        issue(&["init", "--domain", DOMAIN])?;
        let addresses = ["--address", "127.0.0.1", "--address", "localhost"];
        issue(&[&["controller", "main"][..], &addresses].concat())?;
        issue(&["operator", "rita"])?;
        issue(&["operator", "dora", "--group", "dba"])?;
        let issuer = pki.join("ca-controllers.crt");
        let of = |name: &str| {
            let file = |ending| pki.join(format!("{name}.{ending}"));
            identity(&issuer, &file("crt"), &file("key"))
        };
        let mut agents = vec![];
        for agent in &world.agents {
            issue(&["agent", agent.host.as_str()])?;
            agents.push(of(&format!("agent-{}", agent.host))?);
        }
        fs::write(root.join("plan.yaml"), include_str!("reference.yaml"))?;
        Ok(Self {
            root: root.to_owned(),
            binary,
            agents,
            watcher: of("operator-rita")?,
            planted,
        })
    }

    /// A directory for a controller, with a state directory in it that may be filled first.
    pub fn station(&self, name: &str) -> Result<Station> {
        let dir = self.root.join(name);
        fs::create_dir_all(dir.join("state"))?;
        let pki = self.root.join("pki");
        let file = |name: &str| pki.join(name).display().to_string();
        let config = format!(
            "listen = \"127.0.0.1:0\"\nstate_dir = \"state\"\ndomain = \"{DOMAIN}\"\n[tls]\n\
             cert = \"{}\"\nkey = \"{}\"\nagent_ca = \"{}\"\noperator_ca = \"{}\"\n",
            file("controller-main.crt"),
            file("controller-main.key"),
            file("ca-agents.crt"),
            file("ca-operators.crt"),
        );
        fs::write(dir.join("controller.toml"), config)?;
        Ok(Station {
            dir,
            words: Words::default(),
            binary: self.binary.clone(),
            planted: self.planted.clone(),
        })
    }

    /// A person at the command line.
    fn person(&self, name: &str, address: SocketAddr, dir: &Path) -> Result<Operator> {
        let pki = self.root.join("pki");
        let file = |name: String| pki.join(name).display().to_string();
        let profile = dir.join(format!("{name}.toml"));
        let text = format!(
            "controller = \"{address}\"\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n",
            file("ca-controllers.crt".into()),
            file(format!("operator-{name}.crt")),
            file(format!("operator-{name}.key")),
        );
        fs::write(&profile, text)?;
        Ok(Operator {
            name: name.to_owned(),
            groups: vec![],
            binary: self.binary.clone(),
            profile,
        })
    }

    /// What people have of a controller.
    pub async fn people(&self, station: &Station, address: SocketAddr) -> Result<People> {
        Ok(People {
            plan: self.root.join("plan.yaml"),
            rita: self.person("rita", address, &station.dir)?,
            dora: self.person("dora", address, &station.dir)?,
            words: station.words.clone(),
            api: ControlServiceClient::new(connect(address, &self.watcher).await?),
        })
    }
}

/// Commands that people have typed and got an answer to, with when it came.
#[derive(Debug, Clone, Default)]
pub struct Words(Arc<Mutex<Vec<(String, Instant)>>>);

impl Words {
    /// All of them, in their order.
    pub fn answered(&self) -> Vec<(String, Instant)> {
        let words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        words.clone()
    }

    fn add(&self, word: &str) {
        let mut words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        words.push((word.to_owned(), Instant::now()));
    }
}

/// A controller's directory.
#[derive(Debug, Clone)]
pub struct Station {
    /// Configuration, log, and `state`.
    pub dir: PathBuf,
    /// What people type at its controllers.
    pub words: Words,
    binary: PathBuf,
    planted: Option<String>,
}

impl Station {
    /// The controller's state directory.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The controller's log.
    pub fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Starts a controller here. It listens once [`Self::address`] knows where.
    pub fn start(&self, points: Option<&str>, arguments: &[&str]) -> Result<Daemon> {
        let _ = fs::remove_file(self.dir.join("ready"));
        let mut argv = vec![self.binary.clone().into_os_string(), "serve".into()];
        argv.extend(["--config".into(), self.dir.join("controller.toml").into()]);
        argv.extend(["--ready-file".into(), self.dir.join("ready").into()]);
        argv.extend(arguments.iter().map(Into::into));
        let mut env = vec![];
        if let Some(points) = points {
            env.push(("LOCKSTEP_POINTS".to_owned(), points.into()));
        }
        if let Some(fault) = &self.planted {
            env.push(("LOCKSTEP_PLANTED".to_owned(), fault.into()));
        }
        Daemon::spawn(Launch {
            name: "the controller",
            argv,
            env,
            dir: &self.dir,
            log: &self.log(),
            user: None,
            stop: Signal::TERM,
        })
    }

    /// Waits until the controller takes calls, and says where.
    pub async fn address(&self, controller: &mut Daemon) -> Result<SocketAddr> {
        let begun = Instant::now();
        loop {
            if let Ok(text) = fs::read_to_string(self.dir.join("ready"))
                && let Ok(address) = text.trim().parse()
            {
                return Ok(address);
            }
            alive(controller)?;
            if begun.elapsed() > START_WITHIN {
                bail!("the controller takes no calls:\n{}", controller.tail(15));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// What `lockstep serve --help` says.
    pub fn help(&self) -> Result<String> {
        let output = Command::new(&self.binary)
            .args(["serve", "--help"])
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The journal of a controller that has ended, as its own tool exports it: verified, record by
    /// record.
    pub fn export(&self) -> Result<String> {
        let output = Command::new(&self.binary)
            .args(["journal", "export", "--dir"])
            .arg(self.state())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the journal is not whole: {said}");
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// Says how a controller ended, if it has, and its own word for why.
pub fn alive(controller: &mut Daemon) -> Result<()> {
    let Some(status) = controller.ended() else {
        return Ok(());
    };
    let tail = controller.tail(50);
    let why = tail.lines().rfind(|line| line.contains("ERROR"));
    bail!(
        "the controller ended with {status}: {}",
        why.unwrap_or("it did not say why")
    );
}

/// People at their command lines, and a look at rollouts that costs little.
#[derive(Debug, Clone)]
pub struct People {
    plan: PathBuf,
    rita: Operator,
    dora: Operator,
    words: Words,
    api: ControlServiceClient<Channel>,
}

impl People {
    /// The one rollout, without its document; none if there is none yet.
    pub async fn rollout(&mut self) -> Result<Option<wire::Rollout>> {
        let request = wire::ListRolloutsRequest {
            limit: 2,
            open: false,
        };
        let mut rollouts = self.api.list_rollouts(request).await?.into_inner().rollouts;
        ensure!(rollouts.len() < 2, "there are two rollouts: {rollouts:?}");
        Ok(rollouts.pop())
    }

    /// How many hosts are connected.
    pub async fn connected(&mut self) -> Result<usize> {
        let hosts = self.api.list_hosts(wire::ListHostsRequest {}).await?;
        let hosts = hosts.into_inner().hosts;
        Ok(hosts.iter().filter(|host| host.connected).count())
    }

    /// Whether something of a kind stands in the rollout's events.
    pub async fn happened(&mut self, rollout: &str, kind: &str) -> Result<bool> {
        let rollout = rollout.to_owned();
        let request = wire::GetRolloutRequest { rollout };
        let rollout = self.api.get_rollout(request).await?.into_inner();
        let document: serde_json::Value = serde_json::from_slice(&rollout.document_json)?;
        let mut events = lockstep_tests::operator::list(&document["events"]);
        Ok(events.any(|event| event["kind"] == kind))
    }

    /// `lockstep apply`.
    pub async fn apply(&self) -> Result<()> {
        let plan = self.plan.display().to_string();
        let words = ["apply", &plan, "--detach", "--yes"];
        self.type_in(&self.rita, &words).await
    }

    /// `lockstep approve`.
    pub async fn approve(&self, rollout: &str) -> Result<()> {
        let words = ["approve", rollout, "--yes"];
        self.type_in(&self.dora, &words).await
    }

    /// Another command about the rollout.
    pub async fn say(&self, arguments: &[&str]) -> Result<()> {
        self.type_in(&self.rita, arguments).await
    }

    /// Types a command, and waits for its end. The fleet goes on meanwhile.
    async fn type_in(&self, operator: &Operator, arguments: &[&str]) -> Result<()> {
        let operator = operator.clone();
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        let (words, first) = (arguments.join(" "), arguments[0].clone());
        let said = tokio::task::spawn_blocking(move || operator.run(&arguments)).await??;
        ensure!(said.code == 0, "lockstep {words}: {}", said.text());
        self.words.add(&first);
        Ok(())
    }
}
