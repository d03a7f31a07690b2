//! How the databases of a restore are called.

use lockstep_proto::ids::Digest;
use lockstep_proto::report::Failure;

use crate::actions::postgres::scratch;
use crate::sql::{Database, Session};
use crate::step::Context;

/// The names of a restore's databases.
pub(super) struct Names {
    pub(super) live: String,
    pub(super) new: String,
    pub(super) failed: String,
    pub(super) undone: String,
}

impl Names {
    /// Those of a step: all of its attempts work on the same ones.
    pub(super) fn of(cx: &Context, database: &Database) -> Self {
        Self::ending(database, &step(cx))
    }

    /// Those of one undo of a step. A migration may be undone, applied again and undone again:
    /// what the first undo has kept is not the second one's.
    pub(super) fn of_undo(cx: &Context, database: &Database, number: u16) -> Self {
        Self::ending(database, &format!("{}_{number}", step(cx)))
    }

    fn ending(database: &Database, id: &str) -> Self {
        let live = database.dbname().to_owned();
        let name = |what: &str| {
            let tail = format!("__{what}_{id}");
            // The server cuts names after 63 bytes; a digest keeps two long ones apart.
            let room = 63 - tail.len();
            if live.len() <= room {
                return format!("{live}{tail}");
            }
            let head = crate::process::head(&live, room.saturating_sub(9));
            format!("{head}_{}{tail}", &Digest::of(live.as_bytes()).hex()[..8])
        };
        let (new, failed, undone) = (name("restore"), name("failed"), name("restored"));
        Self {
            live,
            new,
            failed,
            undone,
        }
    }
}

/// What a step is called in names: rollout, phase and step.
fn step(cx: &Context) -> String {
    let rollout = cx.key.rollout.as_str();
    let rollout = rollout.strip_prefix("ro_").unwrap_or(rollout);
    format!("{rollout}_{}_{}", cx.key.at.phase, cx.key.at.step)
}

/// Which of them there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct There {
    pub(super) live: bool,
    pub(super) failed: bool,
    pub(super) undone: bool,
}

impl There {
    pub(super) async fn look(session: &Session, names: &Names) -> Result<Self, Failure> {
        let exists = async |name: &String| scratch::exists(session, name).await;
        Ok(Self {
            live: exists(&names.live).await?,
            failed: exists(&names.failed).await?,
            undone: exists(&names.undone).await?,
        })
    }

    pub(super) fn swapped(self) -> bool {
        self.live && self.failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_their_tails_and_stay_apart() {
        let config = |dbname: String| {
            let text = format!("host = '/x'\nuser = 'u'\ndbname = '{dbname}'");
            Database::of("db", toml::from_str(&text).unwrap())
        };
        let cx = crate::testing::Host::new().context();
        let short = Names::of(&cx, &config("staff".into()));
        assert_eq!(short.failed, "staff__failed_010101010101_0_0");
        let undo = Names::of_undo(&cx, &config("staff".into()), 2);
        assert_eq!(undo.failed, "staff__failed_010101010101_0_0_2");
        let one = Names::of(&cx, &config(format!("{}a", "ä".repeat(30))));
        let two = Names::of(&cx, &config(format!("{}b", "ä".repeat(30))));
        assert!(one.new.len() <= 63 && one.new.ends_with("__restore_010101010101_0_0"));
        assert_ne!(one.failed, two.failed);
    }
}
