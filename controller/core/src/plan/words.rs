//! Words of the plan language that this version does not do yet: known, and refused by name, so
//! that nobody takes them for a spelling mistake or believes that they work.

/// Keys.
pub(crate) const KEYS_FOR_LATER: &[&str] = &[
    "bake",
    "contacts",
    "escalate_after",
    "followup",
    "no_data",
    "retry",
    "rollback_if",
    "triggers",
    "when",
];

/// Actions.
pub(crate) const ACTIONS_FOR_LATER: &[&str] = &[
    "service.reload",
    "postgres.query",
    "postgres.integrity",
    "postgres.analyze",
    "postgres.replication",
    "postgres.activity",
    "migration.lint",
    "kubernetes.apply",
    "kubernetes.wait",
    "kubernetes.set_image",
    "kubernetes.rollout",
    "kubernetes.undo",
    "kubernetes.scale",
    "kubernetes.job",
    "kubernetes.secret",
    "traffic.switch",
    "maintenance.on",
    "maintenance.off",
    "check.dns",
    "check.redis",
    "check.metric",
    "check.version",
    "check.env",
    "check.bench",
    "files.backup",
    "files.copy",
    "files.sync",
    "files.verify",
    "notify.statuspage",
];

/// Values, with the type that will have them.
const VALUES_FOR_LATER: &[(&str, &[&str])] = &[
    ("Driver", &["compose", "pm2", "kubernetes"]),
    ("Tool", &["prisma", "diesel", "sqlx", "sql"]),
    ("RawStrategy", &["blue_green"]),
    ("FenceVia", &["read_only", "pgbouncer"]),
];

/// Whether a later version of the type called `of` has this value.
pub(crate) fn is_for_later(of: &str, value: &str) -> bool {
    let mut rows = VALUES_FOR_LATER.iter();
    rows.any(|(name, values)| *name == of && values.contains(&value))
}
