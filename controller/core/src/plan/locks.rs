//! Gates that free the lock while they wait: only where nothing was changed before, for then the
//! hosts can be looked at again as if the rollout began.

use lockstep_proto::action::gate::OnTimeout;
use lockstep_proto::action::{Action, Class};

use super::draft::{Draft, DraftStep};
use super::finding::Code;
use super::reader::Reader;

/// Reports each gate that cannot free the lock.
pub(super) fn check(reader: &Reader<'_>, draft: &Draft) {
    let tree = reader.tree;
    // The first that changes something, and its line.
    let mut changed: Option<(&str, usize)> = None;
    for phase in &draft.phases {
        if let Some(fence) = &phase.fence {
            let line = tree.span(fence.node).line;
            changed = changed.or(Some(("the fence", line)));
        }
        for step in &phase.steps {
            if step.action.as_ref().is_some_and(Action::releases_lock) {
                gate(reader, step, changed);
            }
            if step.info.class != Class::Observing && !step.is_controllers() {
                let line = tree.span(step.node).line;
                changed = changed.or(Some((step.info.name, line)));
            }
        }
    }
}

fn gate(reader: &Reader<'_>, step: &DraftStep, changed: Option<(&str, usize)>) {
    let name = step.info.name;
    let at = |key| reader.tree.get(step.args, key).unwrap_or(step.args);
    if let Some((what, line)) = changed {
        let message = format!(
            "`{name}` cannot free the lock: {what} on line {line} changes hosts before it, and \
             others would find them half done"
        );
        let hint = "leave `lock` out, or let the gate stand before everything that changes \
                    something";
        reader.report(Code::KeptLock, at("lock"), message, Some(hint.to_owned()));
    }
    let on_timeout = match &step.action {
        Some(Action::GateApproval(gate)) => gate.on_timeout,
        Some(Action::GateChecklist(gate)) => gate.on_timeout,
        _ => OnTimeout::Abort,
    };
    if on_timeout == OnTimeout::Halt {
        let message = format!("`{name}` frees the lock, and one that halts keeps it");
        let hint = "leave `on_timeout` or `lock` out: nothing was changed, so nothing is undone";
        reader.report(
            Code::KeptLock,
            at("on_timeout"),
            message,
            Some(hint.to_owned()),
        );
    }
}
