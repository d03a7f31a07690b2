//! Who keeps the log of a server's changes.

use super::bin_dir;
use crate::process::User;

/// A backup system, really installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Archive {
    /// pgBackRest.
    Pgbackrest,
    /// Barman.
    Barman,
}

impl Archive {
    /// Where Debian's package puts it.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Pgbackrest => "/usr/bin/pgbackrest",
            Self::Barman => "/usr/bin/barman",
        }
    }

    /// Its configuration for a server.
    pub(super) fn configuration(self, root: &str, port: u16) -> String {
        match self {
            Self::Pgbackrest => format!(
                "[global]\nrepo1-path={root}/repository\nlog-path={root}\n\
                 lock-path={root}/lock\nspool-path={root}/spool\nrepo1-retention-full=9\n\
                 start-fast=y\n\
                 [main]\npg1-path={root}/data\npg1-port={port}\npg1-socket-path={root}\n"
            ),
            Self::Barman => format!(
                "[barman]\nbarman_user = {user}\nbarman_home = {root}/repository\n\
                 log_file = {root}/barman.log\nconfiguration_files_directory = {root}/none\n\
                 [main]\ndescription = main\nbackup_method = postgres\narchiver = on\n\
                 immediate_checkpoint = true\npath_prefix = {bin}\n\
                 conninfo = host={root} port={port} user=postgres dbname=postgres\n",
                user = if rustix::process::geteuid().is_root() {
                    "postgres".to_owned()
                } else {
                    User::current().unwrap().name
                },
                bin = bin_dir().display()
            ),
        }
    }

    /// What the server runs for each file of its log.
    pub(super) fn command(self, root: &str) -> String {
        match self {
            Self::Pgbackrest => format!(
                "{} --config={root}/archive.conf --stanza=main archive-push %p",
                self.program()
            ),
            Self::Barman => format!("/bin/cp %p {root}/repository/main/incoming/%f"),
        }
    }

    /// What is done once when the server runs.
    pub(super) fn setup(self, conf: &str) -> Vec<String> {
        let words = match self {
            Self::Pgbackrest => format!("--config={conf} --stanza=main stanza-create"),
            Self::Barman => format!("-c {conf} switch-wal --force --archive main"),
        };
        words.split(' ').map(str::to_owned).collect()
    }
}
