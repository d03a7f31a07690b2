//! How often and when a rule allows: `per_hour`, counted from the journal, and `windows`, by the
//! host's clock in UTC.
//!
//! ```toml
//! [[allow]]
//! action = "migration.apply"
//! per_hour = 2
//! windows = [{ days = ["tue", "thu"], utc = "14:00-18:00" }, { utc = "22:00-02:00" }]
//! ```
//!
//! An attempt counts from its intent on, however it ends. Within a boot an hour is measured by the
//! kernel's clock, which nobody sets. Of attempts of an earlier boot it is known that they are at
//! least as old as this boot; the wall clock may show them to be older. So a clock that is set back
//! grants nothing.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use lockstep_proto::action::gate::Day;
use lockstep_proto::ids::{BootId, Digest};
use lockstep_proto::values::{Period, Timestamp};
use serde::{Deserialize, Serialize};

use super::rule::Rule;

/// The highest rate: more is no limit for a host that runs one step at a time.
pub(super) const MOST_PER_HOUR: u32 = 1000;

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// How often and when a rule allows. Empty: always.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Attempts that may begin within any hour.
    pub(super) per_hour: Option<u32>,
    /// When they may begin; empty for always.
    pub(super) windows: Vec<Window>,
}

impl Limits {
    /// When it next allows, as far as windows go: now, if one is open.
    pub(super) fn opens(&self, now: Timestamp) -> Option<Timestamp> {
        if self.windows.is_empty() {
            return Some(now);
        }
        self.windows
            .iter()
            .filter_map(|window| window.opens(now))
            .min()
    }

    /// In words, one text for each.
    pub(super) fn describe(&self) -> impl Iterator<Item = String> {
        let rate = self.per_hour.map(|rate| format!("{rate} in an hour"));
        rate.into_iter().chain(self.describe_windows())
    }

    pub(super) fn describe_windows(&self) -> Option<String> {
        let windows: Vec<String> = self.windows.iter().map(Window::to_string).collect();
        (!windows.is_empty()).then(|| windows.join(" and "))
    }
}

/// A window of time that comes again each week.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "WrittenWindow")]
pub(super) struct Window {
    /// The days on which it begins; empty for every day.
    days: Vec<Day>,
    /// When it begins, in minutes of the day.
    from: u64,
    /// How long it is open, in minutes: at most a day.
    minutes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenWindow {
    #[serde(default)]
    days: Vec<Day>,
    utc: Option<String>,
}

impl TryFrom<WrittenWindow> for Window {
    type Error = String;

    fn try_from(written: WrittenWindow) -> Result<Self, String> {
        let WrittenWindow { days, utc } = written;
        if days.is_empty() && utc.is_none() {
            return Err("a window has `days`, `utc` or both".into());
        }
        let text = utc.as_deref().unwrap_or("00:00-24:00");
        let unfit = || format!("`{text}` is no time of the day such as `14:00-18:00`");
        let (from, until) = text.split_once('-').ok_or_else(unfit)?;
        let (from, until) = (minutes(from), minutes(until));
        let (from, until) = from.zip(until).ok_or_else(unfit)?;
        if from == 24 * 60 || from == until {
            return Err(unfit());
        }
        // Past midnight it belongs to the day on which it began.
        let minutes = if until > from {
            until - from
        } else {
            until + 24 * 60 - from
        };
        Ok(Self {
            days,
            from,
            minutes,
        })
    }
}

/// `14:30` in minutes.
fn minutes(text: &str) -> Option<u64> {
    let (hour, minute) = text.split_once(':')?;
    let digits = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(hour) || !digits(minute) {
        return None;
    }
    let (hour, minute): (u64, u64) = (hour.parse().ok()?, minute.parse().ok()?);
    let minutes = hour * 60 + minute;
    (minute < 60 && minutes <= 24 * 60).then_some(minutes)
}

impl Window {
    /// When it next opens: now, if it is open.
    fn opens(&self, now: Timestamp) -> Option<Timestamp> {
        let today = now.0 / DAY;
        // It may have begun yesterday, and comes again within a week.
        let days = today.saturating_sub(1)..=today + 7;
        let mut begins = days
            .filter(|day| self.days.is_empty() || self.days.contains(&weekday(*day)))
            .map(|day| day * DAY + self.from * MINUTE);
        let begin = begins.find(|begin| now.0 < begin + self.minutes * MINUTE)?;
        Some(Timestamp(begin.max(now.0)))
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for day in &self.days {
            write!(f, "{} ", name(*day))?;
        }
        let clock = |minutes: u64| format!("{:02}:{:02}", minutes / 60, minutes % 60);
        let until = match self.from + self.minutes {
            until if until > 24 * 60 => until - 24 * 60,
            until => until,
        };
        write!(f, "{}-{} UTC", clock(self.from), clock(until))
    }
}

/// The day of the week of a day since 1970, which began on a Thursday.
fn weekday(day: u64) -> Day {
    const DAYS: [Day; 7] = [
        Day::Thu,
        Day::Fri,
        Day::Sat,
        Day::Sun,
        Day::Mon,
        Day::Tue,
        Day::Wed,
    ];
    DAYS[usize::try_from(day % 7).expect("below 7")]
}

fn name(day: Day) -> &'static str {
    match day {
        Day::Mon => "mon",
        Day::Tue => "tue",
        Day::Wed => "wed",
        Day::Thu => "thu",
        Day::Fri => "fri",
        Day::Sat => "sat",
        Day::Sun => "sun",
    }
}

/// A moment on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Moment {
    /// By the wall clock, which can be set.
    pub(crate) wall: Timestamp,
    /// Since the boot, which cannot.
    pub(crate) uptime: Period,
    /// The boot.
    pub(crate) boot: BootId,
}

/// What an attempt that begins is counted under; stands in its intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counted {
    /// The rules.
    pub(crate) rules: Vec<Digest>,
    /// Since the boot.
    pub(crate) uptime: Period,
}

/// Attempts that began within the last hour, by the rules that limit them.
#[derive(Debug, Default)]
pub(crate) struct Begun {
    by_rule: BTreeMap<Digest, VecDeque<Moment>>,
}

impl Begun {
    /// Notes an attempt of which the journal says that it began then.
    pub(crate) fn note(&mut self, rules: &[Digest], at: &Moment) {
        for rule in rules {
            let moments = self.by_rule.entry(*rule).or_default();
            moments.push_back(at.clone());
        }
        // What is older than an hour has had its time, whatever the clock says later.
        self.by_rule.retain(|_, moments| {
            moments.retain(|moment| age(moment, at) < HOUR);
            !moments.is_empty()
        });
    }

    /// What has to be waited for until a rule allows an attempt to begin; none if it does now.
    pub(super) fn wait(&self, rule: &Rule, now: &Moment) -> Option<Wait> {
        let limits = &rule.limits;
        let window = limits.opens(now.wall).filter(|opens| *opens > now.wall);
        let window = window.map(|until| Wait {
            until,
            why: format!(
                "its time is {}",
                limits.describe_windows().unwrap_or_default()
            ),
        });
        let rate = limits.per_hour.and_then(|most| {
            let mut ages: Vec<u64> = self
                .by_rule
                .get(&rule.id())?
                .iter()
                .map(|m| age(m, now))
                .collect();
            ages.retain(|age| *age < HOUR);
            ages.sort_unstable();
            // As many as are allowed must be left when the oldest of them turns one hour old.
            let oldest = ages.get(usize::try_from(most).ok()?.checked_sub(1)?)?;
            let until = now.wall.plus(Period(HOUR - oldest));
            Some(Wait {
                // The rate may be free again while the window is not.
                until: limits.opens(until).unwrap_or(until),
                why: format!("{} have begun within the hour, {most} may", ages.len()),
            })
        });
        window.into_iter().chain(rate).max_by_key(|wait| wait.until)
    }
}

/// How old a moment surely is, in milliseconds.
fn age(moment: &Moment, now: &Moment) -> u64 {
    if moment.boot == now.boot {
        return now.uptime.0.saturating_sub(moment.uptime.0);
    }
    now.uptime.0.max(now.wall.0.saturating_sub(moment.wall.0))
}

/// What has to be waited for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wait {
    pub(super) until: Timestamp,
    why: String,
}

impl Wait {
    pub(super) fn words(&self, now: Timestamp) -> String {
        let minutes = self.until.since(now).0.div_ceil(MINUTE);
        let left = if minutes < 120 {
            format!("{minutes} min")
        } else {
            format!("{} h", minutes.div_ceil(60))
        };
        format!("{}; again from {}, in {left}", self.why, utc(self.until))
    }
}

/// A moment for people: `tue 2026-11-24 14:00 UTC`.
pub(crate) fn utc(at: Timestamp) -> String {
    let (days, minutes) = (at.0 / DAY, at.0 % DAY / MINUTE);
    let (year, month, day) = civil(days);
    let name = name(weekday(days));
    format!(
        "{name} {year:04}-{month:02}-{day:02} {:02}:{:02} UTC",
        minutes / 60,
        minutes % 60
    )
}

/// Reads `2026-11-24T14:00Z`, with or without seconds.
pub(crate) fn parse_utc(text: &str) -> Result<Timestamp, String> {
    let unfit = || format!("`{text}` is no time such as 2026-11-24T14:00Z");
    let parse = || {
        let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
        let mut date = date.split('-').map(|part| part.parse::<u64>().ok());
        let (year, month, day) = (date.next()??, date.next()??, date.next()??);
        let mut time = time.split(':').map(|part| part.parse::<u64>().ok());
        let (hour, minute) = (time.next()??, time.next()??);
        let second = time.next().unwrap_or(Some(0))?;
        let fit = (1970..=9999).contains(&year) && hour < 24 && minute < 60 && second < 60;
        if !fit || date.next().is_some() || time.next().is_some() {
            return None;
        }
        // Found by looking: there is one way between days and dates, and it is the one below.
        let first = (year - 1970) * 365;
        let days =
            (first..first + 366 + (year - 1970)).find(|at| civil(*at) == (year, month, day))?;
        Some(Timestamp(
            days * DAY + hour * HOUR + minute * MINUTE + second * 1000,
        ))
    };
    parse().ok_or_else(unfit)
}

/// Year, month and day of a day since 1970, in the calendar of Gregory: years begin in March here,
/// so that the leap day is the last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests;
