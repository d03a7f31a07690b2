//! Memory over connections that come and go: every session ends, every agent connects again, and
//! that several times. Allocators that keep what they were given back show it here.

use anyhow::Result;

use crate::dial::Place;
use crate::report::Report;
use crate::side::Side;

/// How many times, and where time is short.
const CYCLES: [usize; 2] = [10, 5];

/// The controller's memory for each agent, in bytes.
struct Memory {
    /// With every agent connected, after the cycles.
    connected: f64,
    /// Once all have left.
    left: f64,
}

pub(crate) fn measure(report: &mut Report, agents: usize, quick: bool) -> Result<()> {
    let cycles = CYCLES[usize::from(quick)];
    let cluster = crate::controller()?;
    let place = Place::of(&cluster);
    // First, for the issuers go with the cluster.
    let bare = cycle(Side::bare(&place, agents)?, cycles)?;
    let real = cycle(Side::real(cluster, agents)?, cycles)?;

    let name = |what: &str| format!("{agents} agents: {what}");
    let kb = |bytes: f64| bytes / 1000.0;
    report.beside(
        name(&format!("memory of an idle one after {cycles} connects")),
        kb(real.connected),
        "kB",
        kb(bare.connected),
        (agents == 10_000).then_some(1.2),
    );
    report.beside(
        name("memory for each once all have left"),
        kb(real.left),
        "kB",
        kb(bare.left),
        None,
    );
    Ok(())
}

fn cycle<C>(mut side: Side<C>, cycles: usize) -> Result<Memory> {
    for _ in 0..cycles {
        side.leave()?;
        side.join()?;
    }
    let connected = side.memory_each()?;
    side.leave()?;
    let left = side.memory_each()?;
    Ok(Memory { connected, left })
}
