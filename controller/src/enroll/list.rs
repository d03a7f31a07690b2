//! The agents' revocation list: signed whenever it changes and at half its life, for whoever else
//! relies on the agents' issuer. The controller itself asks [`crate::suspensions`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lockstep_core::Coordinator;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::issuer::{Issuer, LIST_LIFE};
use crate::config::{Enroll, TlsFiles};
use crate::driver::{Handle, wall_clock};
use crate::suspensions::Suspensions;

/// After a failure.
const AGAIN: Duration = Duration::from_mins(1);

/// What keeps the list.
#[derive(Debug)]
pub(crate) struct Lists {
    /// Where it is written.
    pub(crate) path: PathBuf,
    pub(crate) enroll: Enroll,
    pub(crate) tls: TlsFiles,
    pub(crate) domain: String,
    pub(crate) driver: Handle,
    pub(crate) suspensions: Arc<Suspensions>,
}

/// Where a controller keeps the list.
pub(crate) fn path(state: &Path) -> PathBuf {
    state.join("agents.crl")
}

impl Lists {
    /// Keeps the list fresh until told to stop.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut signed = Instant::now();
        loop {
            let changed = self.suspensions.changed();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            let wait = match self.sign().await {
                Ok(revoked) => {
                    signed = Instant::now();
                    tracing::info!(revoked, "the agents' revocation list was signed");
                    LIST_LIFE / 2
                }
                Err(why) => {
                    let left = LIST_LIFE.saturating_sub(signed.elapsed());
                    tracing::error!(
                        why, ends_in = ?left, "the agents' revocation list cannot be signed anew"
                    );
                    AGAIN
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = changed => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn sign(&self) -> Result<usize, String> {
        let now = wall_clock();
        let read = move |coordinator: &Coordinator| coordinator.trust().revoked(now);
        let revoked = self.driver.read(read).await;
        let revoked = revoked.map_err(|error| error.to_string())?;
        let count = revoked.len();
        let (enroll, tls) = (self.enroll.clone(), self.tls.clone());
        let (domain, path) = (self.domain.clone(), self.path.clone());
        let signed = tokio::task::spawn_blocking(move || {
            let issuer = Issuer::load(&enroll, &tls, &domain).map_err(|error| error.to_string())?;
            let list = issuer
                .sign_list(now, revoked)
                .map_err(|error| error.to_string())?;
            write(&path, &list).map_err(|error| format!("{}: {error}", path.display()))
        });
        signed.await.map_err(|error| error.to_string())??;
        Ok(count)
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text)?;
    fs::rename(fresh, path)
}
