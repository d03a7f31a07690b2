//! Reports that fit: a journal's value has 32 KiB, a report 30.

use lockstep_proto::evidence::SIGNATURE_DIGITS;
use lockstep_proto::ids::Digest;
use lockstep_proto::order::{Fact, MAX_FACTS};
use lockstep_proto::report::{Failure, MAX_REPORT_BYTES, Refusal, ReportBody, StepOutcome};

use crate::process::head;

/// The longest sentence in a report that had to be shortened, in bytes.
const SENTENCE: usize = 1000;

/// Shortens what is for people until the report fits: last lines first, then words, and in the
/// end facts, from the last; what is left out is said.
pub(crate) fn fit(mut body: ReportBody) -> ReportBody {
    if let Some(facts) = facts_mut(&mut body) {
        limit_number(facts);
    }
    while size(&body) + room_to_sign(&mut body) > MAX_REPORT_BYTES {
        if !shorten(&mut body) {
            break;
        }
    }
    body
}

fn size(body: &ReportBody) -> usize {
    serde_json::to_vec(body).map_or(usize::MAX, |json| json.len())
}

/// What the signatures of its facts will take: each its digits, quotes and a comma.
fn room_to_sign(body: &mut ReportBody) -> usize {
    let facts = facts_mut(body).map(|facts| &facts[..]).unwrap_or_default();
    let signed = facts.iter().filter(|fact| fact.may_be_bound()).count();
    let name = r#","signatures":[]"#.len();
    facts.len() * "\"\",".len() + signed * SIGNATURE_DIGITS + name
}

fn facts_mut(body: &mut ReportBody) -> Option<&mut Vec<Fact>> {
    match body {
        ReportBody::Finished { facts, .. } => Some(facts),
        ReportBody::Consented { state, .. } | ReportBody::Surveyed { state, .. } => Some(state),
        ReportBody::Declined { .. } | ReportBody::Started { .. } => None,
    }
}

/// More facts than a report carries become one: the digest of all that did not fit, so that two
/// states are still equal only if all their parts are.
fn limit_number(facts: &mut Vec<Fact>) {
    if facts.len() <= MAX_FACTS {
        return;
    }
    let rest = facts.split_off(MAX_FACTS - 1);
    let json = serde_json::to_vec(&rest).expect("a fact has no map with other keys than text");
    facts.push(Fact::State {
        name: format!("{} more", rest.len()),
        digest: Digest::of(&json),
        text: String::new(),
    });
}

/// One step of shortening; false if there is nothing left to shorten.
fn shorten(body: &mut ReportBody) -> bool {
    if let ReportBody::Declined { refusals, .. } = body {
        return shorten_refusals(refusals);
    }
    if let ReportBody::Finished { outcome, .. } = body
        && shorten_outcome(outcome)
    {
        return true;
    }
    facts_mut(body).is_some_and(shorten_facts)
}

fn shorten_outcome(outcome: &mut StepOutcome) -> bool {
    match outcome {
        StepOutcome::Failed(Failure {
            last_lines,
            message,
            hint,
            ..
        }) => {
            if !last_lines.is_empty() {
                last_lines.drain(..last_lines.len().div_ceil(2));
                return true;
            }
            cut(message, SENTENCE) || hint.as_mut().is_some_and(|hint| cut(hint, SENTENCE))
        }
        StepOutcome::Ok { summary, .. } => cut(summary, SENTENCE),
        StepOutcome::Unknown { why } => cut(why, SENTENCE),
    }
}

fn shorten_facts(facts: &mut Vec<Fact>) -> bool {
    let longest = |limit: usize, facts: &mut Vec<Fact>| {
        facts.iter_mut().any(|fact| match fact {
            Fact::Note { value, .. } => cut(value, limit),
            Fact::State { text, .. } => cut(text, limit),
            _ => false,
        })
    };
    if longest(SENTENCE, facts) || longest(100, facts) {
        return true;
    }
    let sql = facts.iter_mut().any(|fact| match fact {
        Fact::SqlPlan { sql, .. } => cut(sql, sql.len() / 2),
        _ => false,
    });
    if sql {
        return true;
    }
    let dropped = |fact: &Fact| matches!(fact, Fact::Note { name, .. } if name == DROPPED);
    let had = facts.len();
    let noted = facts.iter().any(dropped);
    facts.retain(|fact| !dropped(fact));
    if facts.pop().is_none() {
        return false;
    }
    if !noted {
        tracing::warn!(
            facts = had,
            "a report is too large; its last facts are left out"
        );
    }
    facts.push(Fact::Note {
        name: DROPPED.into(),
        value: "the last facts did not fit into the report".into(),
    });
    facts.len() > 1 || !noted
}

const DROPPED: &str = "left out";

fn shorten_refusals(refusals: &mut Vec<Refusal>) -> bool {
    let cuts = refusals
        .iter_mut()
        .map(|refusal| cut(&mut refusal.reason, SENTENCE));
    if cuts.fold(false, |any, one| any | one) {
        return true;
    }
    if refusals.len() < 3 {
        return false;
    }
    // The last one says that there are more.
    refusals.truncate((refusals.len() - 1) * 3 / 4);
    refusals.push(Refusal {
        at: None,
        reason: "and more steps, which did not fit into the report".into(),
    });
    true
}

fn cut(text: &mut String, limit: usize) -> bool {
    if text.len() <= limit {
        return false;
    }
    // Each cut makes the text shorter, so that shortening ends.
    text.truncate(head(text, limit.saturating_sub(4)).len());
    text.push('…');
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_proto::ids::{Direction, RolloutId, StepKey, StepRef};
    use lockstep_proto::report::Cause;
    use lockstep_proto::values::Period;

    fn finished(outcome: StepOutcome, facts: Vec<Fact>) -> ReportBody {
        ReportBody::Finished {
            key: StepKey {
                rollout: RolloutId::from_random([1; 6]),
                host: "a".parse().unwrap(),
                at: StepRef { phase: 0, step: 0 },
                direction: Direction::Do,
                attempt: 1,
            },
            outcome,
            facts,
            signatures: vec![],
            took: Period(1),
        }
    }

    fn note(length: usize) -> Fact {
        Fact::Note {
            name: "n".into(),
            value: "x".repeat(length),
        }
    }

    fn state(name: usize, length: usize) -> Fact {
        Fact::State {
            name: name.to_string(),
            digest: Digest::of(&name.to_le_bytes()),
            text: "\n".repeat(length),
        }
    }

    #[test]
    fn what_fits_is_not_touched() {
        let body = finished(
            StepOutcome::Unknown { why: "w".into() },
            vec![note(2000), state(1, 2000)],
        );
        assert_eq!(fit(body.clone()), body);
    }

    #[test]
    fn last_lines_go_before_everything_else() {
        let failure = Failure {
            cause: Cause::Step,
            message: "m".repeat(2000),
            hint: None,
            last_lines: vec!["\u{1}".repeat(400); 20],
            changed: true,
        };
        let body = fit(finished(StepOutcome::Failed(failure), vec![note(5000)]));
        assert!(size(&body) <= MAX_REPORT_BYTES);
        let ReportBody::Finished {
            outcome: StepOutcome::Failed(failure),
            facts,
            ..
        } = body
        else {
            panic!();
        };
        assert!(!failure.last_lines.is_empty() && failure.last_lines.len() < 20);
        assert_eq!((failure.message.len(), facts), (2000, vec![note(5000)]));
    }

    #[test]
    fn facts_that_matter_are_kept_and_states_stay_comparable() {
        let many = |changed: usize| {
            let mut facts: Vec<Fact> = (0..100).map(|n| state(n, 3000)).collect();
            facts[90] = state(changed, 0);
            ReportBody::Surveyed {
                rollout: RolloutId::from_random([1; 6]),
                state: facts,
            }
        };
        let one = fit(many(90));
        assert!(size(&one) <= MAX_REPORT_BYTES);
        let ReportBody::Surveyed { state, .. } = &one else {
            panic!()
        };
        assert_eq!(state.len(), MAX_FACTS);
        assert_ne!(fit(many(91)), one, "a change in what did not fit shows");
    }

    #[test]
    fn anything_fits_in_the_end() {
        let rows = Fact::Rows {
            database: "d".into(),
            tables: vec![("t".repeat(100), 1); 200],
        };
        let summary = "\"".repeat(60_000);
        let body = fit(finished(
            StepOutcome::Ok {
                changed: true,
                summary,
            },
            vec![rows; 5],
        ));
        assert!(size(&body) <= MAX_REPORT_BYTES);
        let refusals = vec![
            Refusal {
                at: None,
                reason: "\n".repeat(3000)
            };
            500
        ];
        let rollout = RolloutId::from_random([1; 6]);
        assert!(size(&fit(ReportBody::Declined { rollout, refusals })) <= MAX_REPORT_BYTES);
    }
}
