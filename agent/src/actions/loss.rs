//! Undoing without losing data silently (INV-6): what would be lost is refused with an id, and goes
//! only once a person has accepted exactly that.

use lockstep_proto::ids::{Direction, LossId};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};

use super::bound;
use super::postgres::written::few;
use crate::step::{Context, hinted};

/// Refuses an undo that would lose something, unless a person has accepted just that. `what` begins
/// the refusal's sentence, `lines` name what is lost, and `otherwise` says what else to do. Returns
/// who has accepted it.
pub(crate) fn accepted(
    cx: &Context,
    what: &str,
    lines: &[String],
    otherwise: &str,
) -> Result<Fact, Failure> {
    let id = LossId::of(&cx.key, lines);
    for line in lines {
        cx.log.line(line);
    }
    let by = bound(&cx.bindings, |fact| match fact {
        Fact::LossAccepted { loss, by } if *loss == id => Some(by),
        _ => None,
    });
    if let Some(by) = by {
        let value = format!("{by} has accepted {id}: {}", few(lines));
        cx.log.line(&value);
        return Ok(Fact::Note {
            name: "accepted loss".into(),
            value,
        });
    }
    let (key, few) = (&cx.key, few(lines));
    // Only what a rollback does can wait for a person's word.
    if key.direction != Direction::Undo {
        let message = format!("{what}. Lost would be {few}");
        return Err(hinted(Cause::Refused, message, otherwise));
    }
    Err(hinted(
        Cause::Refused,
        format!("{what}. Lost would be {} {few}", id.shown()),
        format!(
            "{otherwise}. To lose it, see all of it in `lockstep logs`, then say `lockstep \
             accept-loss {} {} {} {id} --reason TEXT`, and `lockstep resume {}`",
            key.rollout, key.host, key.at, key.rollout
        ),
    ))
}
