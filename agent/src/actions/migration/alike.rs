//! For tests: the other actions about the migrations that an [`Apply`] brings.

use lockstep_proto::action::migration::{Apply, Current, Downgrade, Plan, Verify};

pub(super) fn current(apply: Apply) -> Current {
    Current {
        tool: apply.tool,
        database: apply.database,
        app: apply.app,
        release: apply.release,
        dir: apply.dir,
        program: apply.program,
    }
}

pub(super) fn plan(apply: Apply, to: &str) -> Plan {
    Plan {
        tool: apply.tool,
        database: apply.database,
        app: apply.app,
        release: apply.release,
        dir: apply.dir,
        program: apply.program,
        to: to.to_owned(),
        fail_on: vec![],
    }
}

pub(super) fn verify(apply: Apply, to: &str) -> Verify {
    Verify {
        tool: apply.tool,
        database: apply.database,
        app: apply.app,
        release: apply.release,
        dir: apply.dir,
        program: apply.program,
        to: to.to_owned(),
    }
}

pub(super) fn downgrade(apply: Apply, to: &str) -> Downgrade {
    Downgrade {
        tool: apply.tool,
        database: apply.database,
        app: apply.app,
        release: apply.release,
        dir: apply.dir,
        program: apply.program,
        to: to.to_owned(),
        apply: apply.apply,
        lock_timeout: apply.lock_timeout,
        statement_timeout: apply.statement_timeout,
    }
}
