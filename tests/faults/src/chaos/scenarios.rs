//! What is not a kill at a point: two controllers of one rollout, networks that part or repeat.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_proto::ids::Epoch;
use lockstep_tests::daemon::Daemon;
use rustix::process::{Signal, kill_process};
use tokio::sync::watch;

use super::check::{Kind, Violation};
use super::fleet::{Delivery, Fleet};
use super::net::{Proxy, Weather};
use super::place::{People, Place, Station, alive};
use super::record::copy;
use super::resume::judge;
use super::script::{Variant, play, reached};
use super::simulated::World;

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// A controller is stopped, a successor takes over its rollout, and it wakes up.
    Woken,
    /// Two controllers are started from one copy.
    Twins,
    /// The network between agents and controller is cut and stalls, and heals.
    Partition,
    /// Orders and reports are repeated and reordered, across sessions and terms.
    Disorder,
    /// A controller is killed again and again while it starts, each time one write later.
    Restarts,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Woken,
        Self::Twins,
        Self::Partition,
        Self::Disorder,
        Self::Restarts,
    ];

    /// The name on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Woken => "woken",
            Self::Twins => "twins",
            Self::Partition => "partition",
            Self::Disorder => "disorder",
            Self::Restarts => "restarts",
        }
    }

    /// The scenario of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|scenario| scenario.name() == name)
    }
}

/// A rollout with its disturbances has ended by then.
const WITHIN: Duration = Duration::from_mins(2);

/// A controller that meets a newer term ends by then.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// The exit code of a controller whose term has ended.
const SUPERSEDED: i32 = 12;

/// Plays a scenario: what was seen, and what was wrong.
pub fn run(place: &Place, scenario: Scenario) -> (String, Vec<Violation>) {
    let mut found = vec![];
    let played = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| {
            runtime.block_on(async {
                match scenario {
                    Scenario::Woken => woken(place, &mut found).await,
                    Scenario::Twins => twins(place, &mut found).await,
                    Scenario::Partition => partition(place, &mut found).await,
                    Scenario::Disorder => disorder(place, &mut found).await,
                    Scenario::Restarts => restarts(place, &mut found).await,
                }
            })
        });
    let seen = played.unwrap_or_else(|error| {
        found.push(Violation::new(Kind::Stuck, format!("{error:#}")));
        "not played to its end".to_owned()
    });
    (seen, found)
}

/// A controller that takes calls.
struct Up {
    station: Station,
    daemon: Daemon,
    address: SocketAddr,
    people: People,
}

impl Up {
    async fn start(place: &Place, name: &str, arguments: &[&str]) -> Result<Self> {
        let station = place.station(name)?;
        let mut daemon = station.start(None, arguments)?;
        let address = station.address(&mut daemon).await?;
        let people = place.people(&station, address).await?;
        Ok(Self {
            station,
            daemon,
            address,
            people,
        })
    }

    /// One on a copy of this one's state.
    async fn beside(&self, place: &Place, name: &str, arguments: &[&str]) -> Result<Self> {
        let station = place.station(name)?;
        copy(&self.station.state(), &station.state(), None)?;
        Self::start(place, name, arguments).await
    }

    /// Plays the people's part until something is so.
    async fn play_until(
        &mut self,
        variant: Variant,
        fleet: &Fleet,
        so: impl Fn(&World) -> bool,
    ) -> Result<()> {
        let becomes_so = async {
            while !fleet.look(&so) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            played = play(variant, &mut self.people, fleet, WITHIN) => {
                bail!("the rollout ended too early: {played:?}")
            }
            () = becomes_so => Ok(()),
        }
    }

    /// Plays on to the end, and judges it.
    async fn conclude(
        &mut self,
        variant: Variant,
        fleet: &Fleet,
        found: &mut Vec<Violation>,
    ) -> Result<()> {
        let played = play(variant, &mut self.people, fleet, WITHIN).await?;
        if let Err(why) = alive(&mut self.daemon) {
            found.push(Violation::new(Kind::Broken, why));
        }
        self.daemon.kill();
        found.extend(judge(variant, &self.station, &fleet.world(), &played)?);
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.daemon.pid(), signal)?)
    }

    /// A controller whose term has ended must end, and say so by its exit code.
    async fn must_end(&mut self, found: &mut Vec<Violation>) {
        let begun = Instant::now();
        while begun.elapsed() < ENDS_WITHIN {
            if let Some(status) = self.daemon.ended() {
                if status.code() != Some(SUPERSEDED) {
                    let what = format!("the old controller ended with {status}, not with 12");
                    found.push(Violation::new(Kind::Fenced, what));
                }
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let what = "the old controller goes on beside its successor";
        found.push(Violation::new(Kind::Fenced, what));
    }
}

/// Waits until something is so in the fleet.
async fn until(fleet: &Fleet, what: &str, so: impl Fn(&World) -> bool) -> Result<()> {
    let begun = Instant::now();
    while !fleet.look(&so) {
        ensure!(begun.elapsed() < WITHIN, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn done(world: &World, phase: u16) -> usize {
    let mine = world
        .ledger
        .iter()
        .filter(|effect| effect.key.at.phase == phase);
    mine.count()
}

/// The term that a whole fleet obeys.
fn term(fleet: &Fleet) -> Option<Epoch> {
    let of = |world: &World| {
        let first = world.agents.first()?.epoch;
        world
            .agents
            .iter()
            .all(|agent| agent.epoch == first)
            .then_some(first)
    };
    fleet.look(of)
}

/// How a successor is told that the other controller may be alive.
fn take_over(station: &Station) -> Result<&'static [&'static str]> {
    let help = station.help()?;
    Ok(if help.contains("--take-over") {
        &["--take-over"]
    } else {
        &["--epoch-above", "1000"]
    })
}

async fn woken(place: &Place, found: &mut Vec<Violation>) -> Result<String> {
    let mut old = Up::start(place, "woken-old", &[]).await?;
    let (address, dial) = watch::channel(Some(old.address));
    let world = Variant::Forward.world();
    let fleet = Fleet::start(world, &place.agents, dial, Delivery::Lingering);
    // The migration is done; its report opens a wait, and then the next phase.
    old.play_until(Variant::Forward, &fleet, |world| done(world, 1) >= 3)
        .await?;
    old.signal(Signal::STOP)?;
    let before = term(&fleet).context("the fleet obeys one controller")?;
    // What hosts report meanwhile waits in the kernel for the old controller to wake up.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let arguments = take_over(&old.station)?;
    let mut new = old.beside(place, "woken-new", arguments).await?;
    address.send_replace(Some(new.address));
    let moved = |world: &World| {
        let mut agents = world.agents.iter();
        agents.all(|agent| agent.epoch.counter > before.counter)
    };
    until(&fleet, "the successor's term", moved).await?;
    // Held, so that the old one is the first to order what comes next.
    new.signal(Signal::STOP)?;
    let awake = fleet.look(|world| world.ledger.len());
    old.signal(Signal::CONT)?;
    let silent = |world: &World| world.stale == 0 && world.fenced.is_empty();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) && fleet.look(silent) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let gave_none = fleet.look(silent);
    // What was obeyed, if anything was, has its effect.
    tokio::time::sleep(Duration::from_millis(200)).await;
    // Agents that find the old one again: their Hellos say which term they have seen. It ends at
    // the word of two, for one alone may lie.
    let (_address, dial) = watch::channel(Some(old.address));
    let astray = Fleet::start(fleet.world(), &place.agents[..2], dial, Delivery::Plain);
    old.must_end(found).await;
    drop(astray);
    new.signal(Signal::CONT)?;
    let late = fleet.look(|world| {
        let late = world.ledger[awake..].iter();
        late.filter(|effect| effect.epoch == before).count()
    });
    if late > 0 {
        let what = format!("{late} effects under {before} after its controller woke up");
        found.push(Violation::new(Kind::Fenced, what));
    }
    new.conclude(Variant::Forward, &fleet, found).await?;
    // The scenario proves nothing if the old one had nothing to say.
    ensure!(
        !gave_none,
        "the old controller gave no order after it woke up"
    );
    let (how, stale) = (arguments[0], fleet.look(|world| world.stale));
    Ok(format!(
        "successor with {how}; {stale} orders of the old term refused, {late} effects of them"
    ))
}

async fn twins(place: &Place, found: &mut Vec<Violation>) -> Result<String> {
    let mut first = Up::start(place, "twins-first", &[]).await?;
    let (address, dial) = watch::channel(Some(first.address));
    let world = Variant::Forward.world();
    let fleet = Fleet::start(world, &place.agents, dial, Delivery::Plain);
    first
        .play_until(Variant::Forward, &fleet, |world| done(world, 2) >= 1)
        .await?;
    first.daemon.kill();
    let begun = term(&fleet).context("the fleet obeys one controller")?;
    let mut one = first.beside(place, "twins-one", &[]).await?;
    let mut other = first.beside(place, "twins-other", &[]).await?;
    address.send_replace(Some(one.address));
    let obeyed = |world: &World| world.agents.iter().all(|agent| agent.epoch != begun);
    until(&fleet, "the first twin's term", obeyed).await?;
    let term = term(&fleet).context("the fleet obeys one twin")?;
    address.send_replace(Some(other.address));
    other.must_end(found).await;
    address.send_replace(Some(one.address));
    one.conclude(Variant::Forward, &fleet, found).await?;
    let strange = |world: &World| {
        let effects = world.ledger.iter();
        let strange = effects.filter(|effect| ![begun, term].contains(&effect.epoch));
        strange.count()
    };
    let strange = fleet.look(strange);
    if strange > 0 {
        let what = format!("{strange} effects under the term of the second twin");
        found.push(Violation::new(Kind::Fenced, what));
    }
    Ok(format!(
        "the second twin ended, {strange} effects under its term"
    ))
}

async fn partition(place: &Place, found: &mut Vec<Violation>) -> Result<String> {
    let mut weathers = 0;
    for variant in [Variant::Forward, Variant::Rollback] {
        let name = format!("partition-{}", variant.name());
        let mut up = Up::start(place, &name, &[]).await?;
        let proxy = Proxy::start(up.address).await?;
        let (_address, dial) = watch::channel(Some(proxy.address));
        let fleet = Fleet::start(variant.world(), &place.agents, dial, Delivery::Plain);
        // A short cut while hosts consent, a stall that both sides notice by their pings, one
        // that nobody notices, and a longer cut.
        let storms = [
            (0, Weather::Cut, 500),
            (1, Weather::Stalled, 12_000),
            (2, Weather::Stalled, 2_000),
            (3, Weather::Cut, 1_500),
        ];
        let storm = async {
            for (phase, weather, ms) in storms {
                while !reached(&fleet, phase) {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                proxy.set(weather);
                tokio::time::sleep(Duration::from_millis(ms)).await;
                proxy.set(Weather::Fine);
                weathers += 1;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            concluded = up.conclude(variant, &fleet, found) => concluded?,
            () = storm => {}
        }
    }
    ensure!(
        weathers == 8,
        "the rollouts ended after {weathers} of 8 disturbances"
    );
    Ok(format!("{weathers} cuts and stalls, healed"))
}

async fn disorder(place: &Place, found: &mut Vec<Violation>) -> Result<String> {
    let variant = Variant::Rollback;
    let mut up = Up::start(place, "disorder", &[]).await?;
    let proxy = Proxy::start(up.address).await?;
    let (_address, dial) = watch::channel(Some(proxy.address));
    let fleet = Fleet::start(variant.world(), &place.agents, dial, Delivery::Disorderly);
    for phase in [1, 2, 3] {
        up.play_until(variant, &fleet, |world| done(world, phase) >= 1)
            .await?;
        // Sessions end, and what was sent in them comes again.
        proxy.set(Weather::Cut);
        if phase == 2 {
            // And so does what a term sent that has ended.
            up.daemon.kill();
            let station = up.station.clone();
            fs::remove_file(station.dir.join("ready"))?;
            up = Up::start(place, "disorder", &[]).await?;
            proxy.lead_to(up.address);
        }
        proxy.set(Weather::Fine);
    }
    up.conclude(variant, &fleet, found).await?;
    let (repeated, stale) = fleet.look(|world| (world.repeated, world.stale));
    ensure!(repeated > 0 && stale > 0, "nothing was repeated");
    Ok(format!(
        "{repeated} orders repeated, {stale} of them from an ended term"
    ))
}

/// Points of a start: what was written beyond the head, the record of the new term, and the first
/// reports of hosts that come back.
const RESTARTS: u32 = 20;

async fn restarts(place: &Place, found: &mut Vec<Violation>) -> Result<String> {
    let variant = Variant::Rollback;
    let mut up = Up::start(place, "restarts", &[]).await?;
    let (address, dial) = watch::channel(Some(up.address));
    let fleet = Fleet::start(variant.world(), &place.agents, dial, Delivery::Plain);
    up.play_until(variant, &fleet, |world| done(world, 3) >= 1)
        .await?;
    up.daemon.kill();
    let station = up.station.clone();
    for point in 1..=RESTARTS {
        let mut daemon = station.start(Some(&format!("kill:{point}")), &[])?;
        let begun = Instant::now();
        while daemon.ended().is_none() {
            // Hosts find it as soon as it listens; what they report brings it to later points.
            let ready = fs::read_to_string(station.dir.join("ready")).unwrap_or_default();
            if let Ok(at) = ready.trim().parse() {
                address.send_replace(Some(at));
            }
            if begun.elapsed() > ENDS_WITHIN {
                // The rollout waits for nobody, and so it writes nothing.
                daemon.kill();
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }
    let mut up = Up::start(place, "restarts", &[]).await?;
    address.send_replace(Some(up.address));
    up.conclude(variant, &fleet, found).await?;
    let terms = fleet.look(|world| world.agents[0].epoch.counter);
    Ok(format!(
        "{RESTARTS} starts killed, each one write later; term {terms} in the end"
    ))
}
