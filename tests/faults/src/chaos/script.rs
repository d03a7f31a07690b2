//! The people of the reference rollout: what they type, and when. In a run that is resumed the same
//! people type what they would have typed and had no answer to; nobody types anything else.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use lockstep_proto::ids::Direction;
use lockstep_proto::wire::control_v1::Rollout;

use super::fleet::Fleet;
use super::place::People;
use super::simulated::{Nature, World};

/// A way in which the reference rollout goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// To its end.
    Forward,
    /// A host fails late in the last phase, and everything is undone by itself.
    Rollback,
    /// A person pauses it in the third phase, and resumes it.
    Pause,
    /// A person cancels it in the last phase.
    Cancel,
}

impl Variant {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Forward, Self::Rollback, Self::Pause, Self::Cancel];

    /// The name on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Rollback => "rollback",
            Self::Pause => "pause",
            Self::Cancel => "cancel",
        }
    }

    /// The variant of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|variant| variant.name() == name)
    }

    /// The fleet as it is before the rollout.
    pub fn world(self) -> World {
        let failing = (self == Self::Rollback).then_some((13, "service.start"));
        World::new(HOSTS, Nature { failing })
    }

    /// How the rollout ends.
    pub fn end(self) -> &'static str {
        match self {
            Self::Forward | Self::Pause => "succeeded",
            Self::Rollback => "rolled_back",
            Self::Cancel => "cancelled",
        }
    }
}

/// Hosts of the reference rollout: one for the database, the others for the application.
pub const HOSTS: usize = 20;

/// Between two looks at the rollout.
const LOOK_EVERY: Duration = Duration::from_millis(30);

/// How a rollout came to its end.
#[derive(Debug)]
pub struct Played {
    /// The rollout at its end.
    pub rollout: Rollout,
}

/// Plays the people's part until the rollout has ended and the fleet is at rest.
pub async fn play(
    variant: Variant,
    people: &mut People,
    fleet: &Fleet,
    within: Duration,
) -> Result<Played> {
    let begun = Instant::now();
    let mut paused = None;
    loop {
        let lost = fleet.look(|world| world.lost.first().cloned());
        if let Some(lost) = lost {
            bail!("there is nothing to wait for any more: {lost}");
        }
        let seen = people.rollout().await?;
        let at = seen.as_ref().map_or("", |seen| &seen.rollout).to_owned();
        let blocked = match &seen {
            None => match people.connected().await? {
                HOSTS => {
                    people.apply().await?;
                    continue;
                }
                connected => format!("{connected} hosts are connected"),
            },
            Some(seen) if seen.ended_ms != 0 => match fleet.look(World::is_at_rest) {
                Ok(()) => {
                    return Ok(Played {
                        rollout: seen.clone(),
                    });
                }
                Err(why) => format!("{} ended as {}: {}; {why}", at, seen.state, seen.reason),
            },
            Some(seen) if !seen.waits_for.is_empty() => {
                people.approve(&at).await?;
                continue;
            }
            Some(seen) if variant == Variant::Pause && seen.state == "paused" => {
                people.say(&["resume", &at]).await?;
                continue;
            }
            Some(seen) => {
                if variant == Variant::Pause && paused.is_none() {
                    paused = Some(people.happened(&at, "paused").await?);
                }
                let words: &[&str] = match variant {
                    Variant::Pause if paused == Some(false) && reached(fleet, 2) => &["pause", &at],
                    Variant::Cancel if reached(fleet, 3) => &["cancel", &at, "--reason", "chaos"],
                    _ => &[],
                };
                if !words.is_empty() {
                    paused = Some(true);
                    people.say(words).await?;
                    continue;
                }
                format!("{at} is {}", seen.state)
            }
        };
        if begun.elapsed() > within {
            bail!("after {} s: {blocked}", within.as_secs());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether something of a phase was done.
pub fn reached(fleet: &Fleet, phase: u16) -> bool {
    let of = |world: &World| {
        let mut effects = world.ledger.iter().map(|effect| &effect.key);
        effects.any(|key| key.at.phase == phase && key.direction == Direction::Do)
    };
    fleet.look(of)
}
