//! Who keeps a migration waiting, told while it waits.

use std::convert::Infallible;
use std::time::Duration;

use crate::sql::{Session, application_name};
use crate::step::Context;

/// How often is looked.
const EVERY: Duration = Duration::from_secs(3);

/// Each session of the attempt that waits for a lock, with one that has it: what for, the other's
/// process, program, state, and for how long its transaction has been open. Not the other's
/// statement: it may hold what nobody else should read.
const WAITING: &str = "
    SELECT format('waits for %s%s; process %s (%s, %s, its transaction open for %s s) is in the way',
        coalesce(l.mode, w.wait_event), coalesce(' on ' || l.relation::regclass::text, ''), b.pid,
        coalesce(nullif(b.application_name, ''), 'no name'), coalesce(b.state, 'no state'),
        coalesce(extract(epoch FROM clock_timestamp() - b.xact_start)::int8, 0))
    FROM pg_stat_activity w
    CROSS JOIN LATERAL unnest(pg_blocking_pids(w.pid)) AS blocker(pid)
    JOIN pg_stat_activity b ON b.pid = blocker.pid
    LEFT JOIN LATERAL (SELECT mode, relation FROM pg_locks
        WHERE pid = w.pid AND NOT granted LIMIT 1) l ON true
    WHERE w.application_name = $1 AND w.usename = session_user AND w.pid <> pg_backend_pid() ORDER BY 1 LIMIT 5";

/// Writes into the step's log who keeps the attempt's sessions waiting, until it is dropped.
pub(super) async fn watch(cx: &Context, session: &Session) -> Infallible {
    let name = application_name(&cx.key);
    loop {
        tokio::time::sleep(EVERY).await;
        // What it cannot see now, it may see later: the migration itself is not concerned.
        let rows = session
            .query("looking who is in the way", WAITING, &[&name])
            .await;
        for row in rows.unwrap_or_default() {
            cx.log.line(row.get(0));
        }
    }
}
