//! Orders: pointers into a compiled plan that the agent holds, and the facts bound to them.

use serde::{Deserialize, Serialize};

use crate::action::migration::Tool;
use crate::action::postgres::Level;
use crate::approval::Signed;
use crate::ids::{Digest, Epoch, HostId, LossId, PlanDigest, StepKey};
use crate::values::Timestamp;

/// A pointer to one step that one agent is to do now. It says *when*, never *what*.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// Rollout, host, step, direction and attempt.
    pub key: StepKey,
    /// The plan that holds the step.
    pub plan: PlanDigest,
    /// The term of the controller that gives it (INV-4).
    pub epoch: Epoch,
    /// Refused afterwards, in the controller's time.
    pub not_after: Timestamp,
    /// Facts that exist only at run time, each with its origin.
    pub bindings: Vec<Binding>,
}

/// A fact with the step that reported it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Binding {
    /// The step that reported it; for an approval, the gate's place under the name of a host
    /// `controller`.
    pub origin: StepKey,
    /// What it says.
    pub fact: Fact,
    /// By the host that the origin names, in hexadecimal; of a person's word, an armoured SSH
    /// signature. See [`crate::evidence`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// Something that a step proved, in a form that other steps and the controller understand.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Fact {
    /// A backup exists.
    Backup {
        /// The database.
        database: String,
        /// Its name in the backup directory of the host that made it.
        id: String,
        /// Digest of the archive.
        digest: Digest,
        /// Size of the archive in bytes.
        size: u64,
        /// When its snapshot was taken.
        taken_at: Timestamp,
        /// The fence that was up at the time, if one was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fence: Option<String>,
    },
    /// A backup was proven, up to a level.
    BackupVerified {
        /// The database.
        database: String,
        /// The backup's id.
        id: String,
        /// Digest of the archive that was looked at.
        digest: Digest,
        /// The fence that was up when the backup was taken, if one was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fence: Option<String>,
        /// The level that was reached. Agents of releases without levels say none: they had
        /// restored it.
        #[serde(default = "restored", skip_serializing_if = "is_restored")]
        level: Level,
        /// When the backup's snapshot was taken, by the server's clock; agents of releases without
        /// levels do not say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        taken_at: Option<Timestamp>,
    },
    /// All that a database holds was looked at.
    Integrity {
        /// The database.
        database: String,
        /// The name of what was written down, on the host that looked.
        id: String,
        /// Its digest.
        digest: Digest,
        /// When, by the server's clock.
        taken_at: Timestamp,
    },
    /// The server's physical backups can be brought back to this moment.
    RestorePoint {
        /// The database that the step named; the point is one of its whole server.
        database: String,
        /// The point's name.
        name: String,
        /// Its place in the server's log of changes: `0/3000060`.
        lsn: String,
        /// The archived file that holds it.
        archived: String,
        /// When, by the server's clock.
        taken_at: Timestamp,
    },
    /// The host's backup system has taken a physical backup.
    ExternalBackup {
        /// The database that the step named; the backup is one of its whole server.
        database: String,
        /// The system's name for the backup.
        label: String,
        /// What it holds, in the system's word: `full`, `diff`, `incr`.
        holds: String,
        /// Where the server's log of changes was when it began.
        from: String,
        /// And when it ended: it can be brought back to any moment from here on.
        to: String,
    },
    /// A fence is up.
    Fenced {
        /// The database.
        database: String,
        /// The fence's token, kept in the database itself.
        fence: String,
    },
    /// The revision that a database is at.
    Revision {
        /// The database.
        database: String,
        /// Before the step; empty if the database has none.
        before: String,
        /// After the step.
        after: String,
    },
    /// SQL that was shown to people, and that a migration must still render when it runs (INV-12).
    SqlPlan {
        /// The database.
        database: String,
        /// Rendered from this revision; empty if the database has none.
        from: String,
        /// To this one.
        to: String,
        /// Digest of all that is approved with the SQL ([`sql_digest`]); where no tool is named,
        /// that of the SQL alone.
        digest: Digest,
        /// The SQL itself, shortened to 20 KiB.
        sql: String,
        /// Whose migrations they are.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tool: Option<Tool>,
        /// Digest of all files of migrations in the release.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        files: Option<Digest>,
        /// What would run beside the SQL, and cannot be shown: a sentence for each.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        opaque: Vec<String>,
        /// What the SQL may do to a database that is in use, for people: a sentence for each.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        hazards: Vec<String>,
    },
    /// A person has said what an attempt did whose outcome nothing could prove. The binding's
    /// origin is that attempt.
    Resolved {
        /// Whether it was done.
        done: bool,
        /// Who said so.
        by: String,
    },
    /// A person has accepted what an undo would lose. The binding's origin is the undo that refused
    /// because of it.
    LossAccepted {
        /// What exactly.
        loss: LossId,
        /// Who accepted it.
        by: String,
    },
    /// People approved.
    Approved {
        /// Who, with their groups.
        by: Vec<String>,
        /// What they saw: the plan's digest, and the digests of SQL shown before.
        evidence: Digest,
        /// Their signatures; none if nobody has signed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signed: Option<Box<Signed>>,
    },
    /// The release that was active before the rollout.
    PreviousRelease {
        /// The application.
        app: String,
        /// Its release; empty if none was active.
        release: String,
    },
    /// Rows of a table.
    Rows {
        /// The database.
        database: String,
        /// Tables with their rows.
        tables: Vec<(String, u64)>,
    },
    /// A part of the host's state (INV-6). Those of a rollback must equal the first ones.
    State {
        /// What: `release employee-system`, `service employee-backend`, `file /etc/x`,
        /// `database employee_system`.
        name: String,
        /// Digest of the state.
        digest: Digest,
        /// The state in words, for people: never secret.
        text: String,
    },
    /// An address was proven to refuse connections: downtime begins.
    Refused {
        /// The address.
        address: String,
    },
    /// A health check was met: downtime ends.
    Healthy {
        /// The URL or address.
        url: String,
    },
    /// Anything else worth a line in the report.
    Note {
        /// A short name.
        name: String,
        /// The value, in words.
        value: String,
    },
}

fn restored() -> Level {
    Level::Restored
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_restored(level: &Level) -> bool {
    *level == restored()
}

impl Fact {
    /// Whether later orders may carry it: then its host signs it.
    pub fn may_be_bound(&self) -> bool {
        matches!(
            self,
            Self::Backup { .. }
                | Self::BackupVerified { .. }
                | Self::Integrity { .. }
                | Self::Fenced { .. }
                | Self::Revision { .. }
                | Self::SqlPlan { .. }
                | Self::Rows { .. }
        )
    }

    /// As orders carry it: of SQL the digest is what binds; the text was for people.
    #[must_use]
    pub fn as_bound(&self) -> Self {
        let mut fact = self.clone();
        if let Self::SqlPlan { sql, hazards, .. } = &mut fact {
            sql.clear();
            hazards.clear();
        }
        fact
    }

    /// Whether what was shown is SQL of this digest, and nothing else than what is said here.
    pub fn is_of_sql(&self, sql: Digest) -> bool {
        match self {
            Self::SqlPlan {
                from,
                to,
                digest,
                tool: Some(tool),
                files: Some(files),
                opaque,
                ..
            } => sql_digest(*tool, (from, to), *files, opaque, sql) == *digest,
            Self::SqlPlan { digest, .. } => sql == *digest,
            _ => false,
        }
    }
}

/// What an approval of SQL binds to: the tool, from where to where, the files of the release, what
/// cannot be shown, and the SQL's own digest.
pub fn sql_digest(
    tool: Tool,
    (from, to): (&str, &str),
    files: Digest,
    opaque: &[String],
    sql: Digest,
) -> Digest {
    let all = serde_json::to_vec(&("lockstep sql 1", tool, from, to, files, opaque, sql));
    Digest::of(&all.expect("texts are JSON"))
}

/// The name of the note that a schema stays, up to the database.
const SCHEMA_OF: &str = "schema of ";

impl Fact {
    /// That the schema of a database stays when a rollback takes back the rest; how, in words.
    pub fn schema_stays(database: &str, value: String) -> Self {
        let name = format!("{SCHEMA_OF}{database}");
        Self::Note { name, value }
    }

    /// The database whose schema stays, if this says so.
    pub fn staying(&self) -> Option<&str> {
        match self {
            Self::Note { name, .. } => name.strip_prefix(SCHEMA_OF),
            _ => None,
        }
    }
}

/// SQL without what differs and means nothing: blank lines and spaces at the ends of lines. This is
/// what [`Fact::SqlPlan`] has the digest of.
pub fn normal_sql(sql: &str) -> String {
    let lines = sql
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty());
    lines.fold(String::new(), |sql, line| sql + line + "\n")
}

/// The largest fact in its JSON form, in bytes: it fits into a report with room for the rest.
pub const MAX_FACT_BYTES: usize = 26 << 10;

/// The greatest number of facts that one report carries.
pub const MAX_FACTS: usize = 64;

/// The host name under which the controller's own facts stand.
pub fn controller_host() -> HostId {
    "controller".parse().expect("`controller` is a host name")
}
