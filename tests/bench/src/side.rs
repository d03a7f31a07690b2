//! A controller with its agents: the real one, or the bare one.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use lockstep_tests::cluster::Cluster;

use crate::bare;
use crate::dial::Place;
use crate::load::{Load, Said};
use crate::process::{Part, Used, used};

/// What is measured of a fleet at rest is measured so long after its last change.
const SETTLES_IN: Duration = Duration::from_secs(1);

/// A controller with its agents.
pub(crate) struct Side<C> {
    pub(crate) controller: C,
    pub(crate) pid: u32,
    pub(crate) load: Part<Said>,
    /// Memory that each agent's session takes at the controller, in bytes.
    pub(crate) memory: f64,
    pub(crate) agents: usize,
    /// The controller's memory before anybody came.
    empty: u64,
}

impl<C> Side<C> {
    /// With every agent connected.
    pub(crate) fn connect(controller: C, pid: u32, load: &Load) -> Result<Self> {
        let empty = used(pid)?.memory;
        let mut side = Self {
            controller,
            pid,
            load: Part::start("load", load)?,
            memory: 0.0,
            agents: load.agents,
            empty,
        };
        side.join()?;
        side.memory = side.memory_each()?;
        Ok(side)
    }

    /// Every agent connects.
    pub(crate) fn join(&mut self) -> Result<()> {
        self.load.tell("connect")?;
        self.connected()
    }

    /// Waits until every agent has its session, past everything else that the load tells.
    pub(crate) fn connected(&mut self) -> Result<()> {
        connected(&mut self.load)
    }

    /// Every agent ends its session.
    pub(crate) fn leave(&mut self) -> Result<()> {
        self.load.tell("drop")?;
        while !matches!(self.load.next()?, Said::Dropped) {}
        Ok(())
    }

    /// What the controller has taken since it was empty, by agent, in bytes: once all is quiet.
    pub(crate) fn memory_each(&self) -> Result<f64> {
        thread::sleep(SETTLES_IN);
        let memory = used(self.pid)?.memory.saturating_sub(self.empty);
        Ok(memory as f64 / self.agents as f64)
    }
}

impl Side<Part<bare::Said>> {
    /// The bare one. What it shares with the real one are the issuers.
    pub(crate) fn bare(real: &Place, agents: usize) -> Result<Self> {
        let mut bare: Part<bare::Said> = Part::start("bare", real)?;
        let bare::Said::Listens(address) = bare.next()? else {
            bail!("the baseline does not listen");
        };
        let place = Place {
            address,
            ..real.clone()
        };
        let pid = bare.pid();
        Self::connect(bare, pid, &Load::of(&place, agents, true))
    }

    /// So many rounds; how long each took, in milliseconds.
    pub(crate) fn rounds(&mut self, rounds: usize) -> Result<Vec<f64>> {
        self.controller.tell(&format!("rounds {rounds}"))?;
        let mut took = vec![];
        for _ in 0..rounds {
            let bare::Said::Round { took: one, .. } = self.controller.next()? else {
                bail!("the baseline does not tell of a round");
            };
            took.push(ms(one));
        }
        Ok(took)
    }
}

impl Side<Cluster> {
    /// The real one.
    pub(crate) fn real(cluster: Cluster, agents: usize) -> Result<Self> {
        let pid = controller_pid(&cluster)?;
        let load = Load::of(&Place::of(&cluster), agents, false);
        Self::connect(cluster, pid, &load)
    }

    /// What the controller has used.
    pub(crate) fn used(&self) -> Result<Used> {
        used(controller_pid(&self.controller)?)
    }
}

/// The controller's process: another one after each start.
pub(crate) fn controller_pid(cluster: &Cluster) -> Result<u32> {
    let pid = cluster.controller_pid().context("the controller runs")?;
    Ok(pid.as_raw_nonzero().get().unsigned_abs())
}

/// Waits until every agent of a load has its session.
pub(crate) fn connected(load: &mut Part<Said>) -> Result<()> {
    loop {
        match load.next()? {
            Said::Connected { .. } => return Ok(()),
            Said::Round { .. } => {}
            Said::Dropped => bail!("the load has ended"),
        }
    }
}

pub(crate) fn ms(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}
