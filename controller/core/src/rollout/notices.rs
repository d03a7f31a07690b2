//! Notices: when one is due, and what it says. Their outcome never changes a rollout's.

use lockstep_proto::action::Action;
use lockstep_proto::plan::{Notice, NoticeWhen};
use lockstep_proto::shown;
use lockstep_proto::values::{Period, Timestamp};

use super::{Mode, Rollout};
use crate::record::{End, NoticeRef, Record};

impl Rollout {
    pub(super) fn due_notices(&self, now: Timestamp) -> Vec<Record> {
        if self.dry_run || matches!(self.mode, Mode::Consenting) {
            return vec![];
        }
        let due = self
            .compiled()
            .notices
            .iter()
            .zip(0_u16..)
            .filter_map(|(notice, index)| {
                let time = self.times_due(notice, now);
                let which = NoticeRef::Plan { index, time };
                (time > 0 && !self.notices.contains_key(&which)).then(|| Record::NoticeOrdered {
                    rollout: self.id.clone(),
                    which,
                })
            });
        due.collect()
    }

    /// How often a notice should have been sent by now. Times that were missed are not made up
    /// for: only the newest one is sent.
    fn times_due(&self, notice: &Notice, now: Timestamp) -> u32 {
        let ended = |ends: &[End]| {
            u32::from(
                self.ended
                    .as_ref()
                    .is_some_and(|ending| ends.contains(&ending.end)),
            )
        };
        match notice.when {
            NoticeWhen::Started => 1,
            NoticeWhen::Every(period) if self.ended.is_none() && period.0 > 0 => {
                u32::try_from(now.since(self.submitted).0 / period.0).unwrap_or(u32::MAX)
            }
            NoticeWhen::Every(_) => 0,
            // People hear of each word that breaks a glass, too.
            NoticeWhen::Waiting => {
                let gates = self.gates.iter();
                let times = gates.map(|(at, gate)| {
                    let asks = is_for_people(&self.placed(*at).step.action);
                    usize::from(asks) + gate.glass.len()
                });
                u32::try_from(times.sum::<usize>()).unwrap_or(u32::MAX)
            }
            NoticeWhen::RollingBack => u32::from(matches!(self.mode, Mode::Backward(_))),
            NoticeWhen::Succeeded => ended(&[End::Succeeded, End::Partial]),
            NoticeWhen::RolledBack => ended(&[End::RolledBack]),
            NoticeWhen::Halted => ended(&[End::Halted, End::Cancelled]),
        }
    }

    pub(super) fn next_notice(&self) -> Option<Timestamp> {
        if self.dry_run || matches!(self.mode, Mode::Consenting) {
            return None;
        }
        let sent = |index: u16| {
            let of_index = self.notices.keys().filter_map(move |which| match which {
                NoticeRef::Plan { index: other, time } if *other == index => Some(*time),
                _ => None,
            });
            of_index.max().unwrap_or(0)
        };
        let notices = self.compiled().notices.iter().zip(0_u16..);
        notices
            .filter_map(|(notice, index)| match notice.when {
                NoticeWhen::Every(period) if period.0 > 0 => {
                    let next = (u64::from(sent(index)) + 1).saturating_mul(period.0);
                    Some(self.submitted.plus(Period(next)))
                }
                _ => None,
            })
            .min()
    }

    /// A `notify` action with its texts filled in. What hosts and people wrote is words there, and
    /// nothing else.
    pub(crate) fn notice(&self, which: NoticeRef, now: Timestamp) -> Option<Action> {
        let action = match which {
            NoticeRef::Step(at) => &self.compiled().step(at)?.step.action,
            NoticeRef::Plan { index, .. } => {
                &self.compiled().notices.get(usize::from(index))?.action
            }
        };
        let reason = match (&self.ended, &self.mode) {
            (Some(ending), _) => ending.reason.as_str(),
            (None, Mode::Backward(backward)) => backward.reason.as_str(),
            _ => "",
        };
        let end = self.ended.as_ref().map_or(now, |ending| ending.at);
        let elapsed = Period(end.since(self.submitted).0 / 1000 * 1000).to_string();
        let inputs = &self.compiled().inputs;
        let value = |name: &str| match name {
            "rollout.id" => Some(self.id.as_str()),
            "rollout.plan" => Some(self.compiled().plan.as_str()),
            "rollout.state" => Some(self.state()),
            "rollout.reason" => Some(reason),
            "rollout.elapsed" => Some(elapsed.as_str()),
            "rollout.phase" => Some(self.phase_name()),
            input => inputs.get(input).map(String::as_str),
        };
        let fill = |text: &str, clean: Clean| {
            filled(text, |name| value(name).map(clean)) + &self.glass_in_notices(clean)
        };
        let mut action = action.clone();
        match &mut action {
            Action::NotifyWebhook(webhook) => webhook.text = fill(&webhook.text, shown::lines),
            Action::NotifySlack(slack) => slack.text = fill(&slack.text, no_markup),
            Action::NotifyEmail(email) => {
                let subject = filled(&email.subject, |name| value(name).map(shown::line));
                // A header is one line, whoever wrote it.
                email.subject = shown::line(&subject);
                email.text = fill(&email.text, shown::lines);
            }
            _ => return None,
        }
        Some(action)
    }
}

/// What becomes of a text that hosts or people wrote, before it stands in a message.
pub(super) type Clean = fn(&str) -> String;

/// A text with values put in where it names them: `${name}`. Values are not read again, and what
/// names none stays.
fn filled(text: &str, value: impl Fn(&str) -> Option<String>) -> String {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, from)) = rest.split_once("${") {
        filled.push_str(before);
        let named = from.split_once('}');
        let found = named.and_then(|(name, after)| Some((value(name)?, after)));
        rest = if let Some((value, after)) = found {
            filled.push_str(&value);
            after
        } else {
            filled.push_str("${");
            from
        };
    }
    filled + rest
}

/// Text without Slack's markup: it calls nobody, and no link says that it is another.
fn no_markup(text: &str) -> String {
    let text = shown::lines(text).replace('&', "&amp;");
    text.replace('<', "&lt;").replace('>', "&gt;")
}

/// Whether a gate waits for people, not for time.
pub(super) fn is_for_people(action: &Action) -> bool {
    matches!(action, Action::GateApproval(_) | Action::GateChecklist(_))
}
