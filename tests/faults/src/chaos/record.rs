//! The recorded run: the controller stops at each of its points, and what is on its disk and on its
//! agents' disks at that instant is kept.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use lockstep_tests::power::Watch;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::sync::watch;

use super::check::Violation;
use super::fleet::{Delivery, Fleet};
use super::place::{Place, Words};
use super::resume::judge;
use super::script::{Variant, play};
use super::simulated::World;

/// A recorded run takes longer than others: it stops for each copy.
const WITHIN: Duration = Duration::from_mins(4);

/// What was sent before the point has this long to arrive: what was promised too early shows.
const ARRIVES: Duration = Duration::from_millis(8);

/// What there is if the controller is killed at a point.
#[derive(Debug)]
pub struct Copy {
    /// Which way the rollout went.
    pub variant: Variant,
    /// The number of the point, from 1.
    pub point: usize,
    /// Its name; for a power cut, that too.
    pub name: String,
    /// The controller's state directory.
    pub state: PathBuf,
    /// The fleet and its ledger.
    pub world: World,
    /// What people had typed and got an answer to: nobody has to type it again.
    pub answered: Vec<String>,
}

/// A run from its beginning to its end.
#[derive(Debug)]
pub struct Recording {
    /// Which way.
    pub variant: Variant,
    /// One copy for each point, and one more where unsynced bytes could be lost.
    pub copies: Vec<Copy>,
    /// How many points the run came to.
    pub points: usize,
    /// What was wrong with the run itself.
    pub violations: Vec<Violation>,
}

/// Runs the reference rollout once, and keeps a copy at every `nth` point.
pub fn record(place: &Place, variant: Variant, nth: usize) -> Result<Recording> {
    let station = place.station(&format!("{}-recorded", variant.name()))?;
    let socket = station.dir.join("points");
    let listener = UnixListener::bind(&socket)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (address, agents_dial) = watch::channel(None);
        let fleet = Fleet::start(variant.world(), &place.agents, agents_dial, Delivery::Plain);
        let fleet = Arc::new(fleet);
        let keeper = Keeper {
            variant,
            nth,
            state: station.state(),
            copies: place.root.join(format!("{}-copies", variant.name())),
            fleet: fleet.clone(),
            words: station.words.clone(),
            kept: Kept::default(),
            power: None,
            random: StdRng::seed_from_u64(1),
        };
        fs::create_dir_all(&keeper.copies)?;
        let mut controller = station.start(Some(&format!("ask:{}", socket.display())), &[])?;
        let keeper = thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            keeper.keep(&stream)
        });
        let at = station.address(&mut controller).await?;
        address.send_replace(Some(at));
        let mut people = place.people(&station, at).await?;
        let played = play(variant, &mut people, &fleet, WITHIN).await?;
        controller.kill();
        // Its controller is gone: it has nothing more to keep.
        let kept = keeper.join();
        let kept = kept.map_err(|_| anyhow!("copies are not kept: see above"))??;
        ensure!(
            kept.head == head(&station.state()),
            "the controller wrote something after the last of its {} points",
            kept.points
        );
        let words = station.words.answered();
        let once: BTreeSet<&String> = words.iter().map(|(word, _)| word).collect();
        ensure!(
            once.len() == words.len(),
            "people had to type something again: {words:?}"
        );
        let world = fleet.world();
        let violations = judge(variant, &station, &world, &played)?;
        Ok(Recording {
            variant,
            points: kept.points,
            copies: kept.copies,
            violations,
        })
    })
}

/// The compiled plan that a controller keeps.
pub(super) fn plan_of(state: &Path, digest: &str) -> Result<lockstep_proto::seal::SealedPlan> {
    let name = digest.rsplit(':').next().unwrap_or(digest);
    let path = state.join("blobs").join(name);
    let bytes = fs::read(&path).with_context(|| format!("no plan at {}", path.display()))?;
    Ok(lockstep_proto::seal::open(&bytes)?)
}

/// What a controller's journal has reached.
fn head(state: &Path) -> Option<Vec<u8>> {
    fs::read(state.join("journal/head")).ok()
}

#[derive(Debug, Default)]
struct Kept {
    points: usize,
    copies: Vec<Copy>,
    /// The journal's head at the last point.
    head: Option<Vec<u8>>,
}

/// Keeps copies while the controller waits.
struct Keeper {
    variant: Variant,
    nth: usize,
    state: PathBuf,
    copies: PathBuf,
    fleet: Arc<Fleet>,
    words: Words,
    kept: Kept,
    power: Option<Watch>,
    random: StdRng,
}

impl Keeper {
    /// Keeps copies until the controller is gone.
    fn keep(mut self, stream: &UnixStream) -> Result<Kept> {
        let mut point = String::new();
        let mut lines = BufReader::new(stream);
        loop {
            point.clear();
            match lines.read_line(&mut point) {
                Ok(0) => return Ok(self.kept),
                // It was killed with an answer unread.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(self.kept),
                read => read?,
            };
            self.kept.points += 1;
            self.kept.head = head(&self.state);
            let copies = self.take(self.kept.points, point.trim())?;
            self.kept.copies.extend(copies);
            let mut answer = stream;
            match answer.write_all(b"\n") {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(self.kept),
                written => written?,
            }
        }
    }

    /// Everything that is there at a point.
    fn take(&mut self, number: usize, point: &str) -> Result<Vec<Copy>> {
        let journal = self.state.join("journal");
        if self.power.is_none() && point == "append: begins" {
            self.power = Some(Watch::begin(&journal));
        }
        // The next thing that the controller does is to sync this file.
        let unsynced = match point {
            "append: flushed" => Some(journal.join("store/db")),
            "head: written" => Some(journal.join("head")),
            _ => None,
        };
        let moment = self.power.as_mut().zip(unsynced).and_then(|(power, path)| {
            lockstep_tests::power::before_sync(&path);
            power.take().pop()
        });
        // An append has six points: a sample is to hold each of them.
        if !(number + number / 6).is_multiple_of(self.nth) {
            return Ok(vec![]);
        }
        let state = self.copies.join(format!("{number}"));
        copy(&self.state, &state, None)?;
        let cut = moment.map(|moment| {
            let cut = self.copies.join(format!("{number}-cut"));
            copy(&self.state, &cut, Some("journal"))?;
            fs::create_dir(cut.join("journal"))?;
            moment.cut(&mut self.random, &cut.join("journal"));
            anyhow::Ok(cut)
        });
        thread::sleep(ARRIVES);
        let world = self.fleet.world();
        let answered = self.words.answered().into_iter();
        let answered: Vec<String> = answered.map(|(word, _)| word).collect();
        let copy = |name: String, state| Copy {
            variant: self.variant,
            point: number,
            name,
            state,
            world: world.clone(),
            answered: answered.clone(),
        };
        let mut copies = vec![copy(point.to_owned(), state)];
        if let Some(cut) = cut {
            copies.push(copy(format!("{point}; power cut"), cut?));
        }
        Ok(copies)
    }
}

/// Copies a directory, but for one name in it.
pub(super) fn copy(from: &Path, to: &Path, but: Option<&str>) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if but.is_some_and(|but| name == but) {
            continue;
        }
        let (path, target) = (entry.path(), to.join(&name));
        // What is removed meanwhile was never needed: logs and looks at copies come and go.
        let copied = if path.is_dir() {
            copy(&path, &target, None)
        } else {
            fs::copy(&path, &target).map(drop).map_err(Into::into)
        };
        if copied.is_err() && path.exists() {
            copied.with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

/// How long something took, in milliseconds.
pub(super) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
