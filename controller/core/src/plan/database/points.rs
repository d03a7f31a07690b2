//! Restore points, and migrations that a recovery of the whole server undoes.

use super::super::draft::{DraftStep, On};
use super::super::finding::Code;
use super::SoFar;

/// A restore point.
pub(super) struct Point<'a> {
    pub(super) line: usize,
    pub(super) hosts: Option<&'a On>,
    /// Whether it has counted what a recovery would lose.
    pub(super) recoverable: bool,
    /// The fence that was up, and has been since.
    pub(super) fence: Option<usize>,
    /// The step that has changed the database since, by its line.
    pub(super) left: Option<usize>,
}

impl SoFar<'_> {
    /// A step changes a database: its restore point is from before that.
    pub(super) fn leave_point(&mut self, name: &str, line: usize) {
        let point = self
            .databases
            .get_mut(name)
            .and_then(|of| of.point.as_mut());
        if let Some(point) = point {
            point.left.get_or_insert(line);
        }
    }

    /// A migration whose undo takes the whole server back.
    pub(super) fn recovery(&self, step: &DraftStep, name: &str, hosts: Option<&On>) {
        let at = self.at(step, "undo_by");
        let point = self.databases.get(name).and_then(|of| of.point.as_ref());
        let refused = |message: String| {
            let hint = format!(
                "put `postgres.restore_point: {{database: {name}, recoverable: true}}` before this \
                 step, behind a fence and a `postgres.external_backup`"
            );
            self.reader
                .report(Code::NoPointToRecover, at, message, Some(hint));
        };
        let Some(point) = point else {
            return refused(format!(
                "`undo_by: recover` needs a restore point of `{name}`, and no earlier step makes one"
            ));
        };
        let line = point.line;
        if !point.recoverable {
            return refused(format!(
                "the restore point of `{name}` on line {line} counts nothing, so a recovery could \
                 not tell what it would lose"
            ));
        }
        if let Some(left) = point.left {
            return refused(format!(
                "the restore point of `{name}` on line {line} is older than what line {left} does: a \
                 recovery would take that back, too"
            ));
        }
        self.elsewhere(step, ("restore point", name), (line, point.hosts), hosts);
        let message = format!(
            "a rollback of this migration takes all databases of the server of `{name}` back to the \
             restore point on line {line}"
        );
        let hint = if point.fence.is_some() {
            "it refuses if anything was written to the others since; `undo_by: restore` takes back \
             one database"
        } else {
            "no fence is up from the restore point on: it refuses as soon as an application writes; \
             raise one before it"
        };
        self.reader.warn(Code::WholeServer, at, message, hint);
    }
}
