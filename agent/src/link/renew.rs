//! The certificate's renewal: at half its life, over the session that it made possible.
//!
//! Nothing is interrupted for it. The new certificate counts from the next connection on, and that
//! is made when nothing is being said, or before the old certificate ends. Steps go on meanwhile;
//! what they report waits in the journal.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::wire::enroll_v1::RenewRequest;
use lockstep_proto::wire::enroll_v1::enroll_service_client::EnrollServiceClient;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::Ended;
use crate::config::Config;
use crate::enroll::{PairError, Pending, settle};
use crate::errors::chain;
use crate::tls::{Identity, TlsError};

/// For the controller's answer.
const WITHIN: Duration = Duration::from_secs(20);

/// How far from half of its life a certificate may be renewed, as a part of its half: a fleet that
/// was enrolled in one go does not renew in one go.
const JITTER: f64 = 0.1;

/// The longest sleep: certificates that people replace are noticed.
const LONGEST: Duration = Duration::from_hours(1);

/// Nothing said for so long is a good moment to connect anew; less for a short life.
const QUIET: Duration = Duration::from_secs(1);

/// When something was last said, in either direction.
#[derive(Debug)]
pub(super) struct Activity(Cell<Instant>);

impl Activity {
    pub(super) fn new() -> Self {
        Self(Cell::new(Instant::now()))
    }

    /// Something was said.
    pub(super) fn touch(&self) {
        self.0.set(Instant::now());
    }
}

#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Pair(#[from] PairError),
    #[error("the controller did not answer within {} s", WITHIN.as_secs())]
    Silent,
    #[error("{}", .0.message())]
    Status(#[source] Box<Status>),
}

impl RenewError {
    /// Whether it makes no sense to ask again in this session.
    fn is_final(&self) -> bool {
        match self {
            Self::Status(status) => matches!(
                status.code(),
                Code::FailedPrecondition | Code::Unimplemented | Code::PermissionDenied
            ),
            // Files that people made, where the agent may not write.
            Self::Pair(PairError::File { .. }) => true,
            Self::Tls(_) | Self::Pair(_) | Self::Silent => false,
        }
    }
}

/// Resolves when the session is to be replaced by one with the next certificate.
pub(super) async fn keep(config: &Arc<Config>, channel: Channel, activity: &Activity) -> Ended {
    let old = loop {
        let old = match Identity::load(&config.tls) {
            Ok(identity) => identity,
            Err(error) => {
                tracing::error!(error = chain(&error), "the certificate cannot be read");
                sleep(LONGEST).await;
                continue;
            }
        };
        let due = due(&old);
        if !due.is_zero() {
            sleep(due.min(LONGEST)).await;
            continue;
        }
        match renew(config, &old, channel.clone()).await {
            Ok(()) => break old,
            Err(error) if error.is_final() => {
                tracing::warn!(
                    why = chain(&error),
                    ends_in_h = left(&old).as_secs() / 3600,
                    "this host's certificate is not renewed by this controller"
                );
                return std::future::pending().await;
            }
            Err(error) => {
                tracing::warn!(why = chain(&error), "the certificate was not renewed yet");
                sleep(again(&old)).await;
            }
        }
    };
    tracing::info!("the certificate was renewed");
    let margin = life(&old) / 10;
    let quiet = QUIET.min(life(&old) / 40);
    while left(&old) > margin {
        let silence = activity.0.get().elapsed();
        if silence >= quiet {
            break;
        }
        sleep(quiet.saturating_sub(silence)).await;
    }
    Ended::Renewed
}

async fn renew(config: &Config, old: &Identity, channel: Channel) -> Result<(), RenewError> {
    let pending = Pending::of(&config.tls)?;
    let csr = pending.request(&old.domain, &old.host)?.into();
    let mut client = EnrollServiceClient::new(channel);
    let answer = timeout(WITHIN, client.renew(RenewRequest { csr })).await;
    let answer = answer.map_err(|_| RenewError::Silent)?;
    let answer = answer.map_err(|status| RenewError::Status(Box::new(status)))?;
    let uri = format!("spiffe://{}/agent/{}", old.domain, old.host);
    pending.complete(&config.tls, &uri, &answer.into_inner().certificates)?;
    settle(&config.tls)?;
    // What cannot be read again is found out now, while the old session is up.
    Identity::load(&config.tls)?;
    Ok(())
}

/// How long until a certificate is to be renewed; zero from then on. The jitter follows from the
/// certificate, so that it is the same whenever one asks.
fn due(identity: &Identity) -> Duration {
    let seed = identity.seed();
    let share = f64::from(seed) / f64::from(u32::MAX);
    let part = 0.5 * (1.0 - JITTER + 2.0 * JITTER * share);
    let at = life(identity).mul_f64(1.0 - part);
    left(identity).saturating_sub(at)
}

/// After a failure.
fn again(identity: &Identity) -> Duration {
    let pause = life(identity) / 20;
    pause.clamp(Duration::from_millis(200), Duration::from_mins(1))
}

fn life(identity: &Identity) -> Duration {
    let seconds = identity.not_after.saturating_sub(identity.not_before);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn left(identity: &Identity) -> Duration {
    let ends = u64::try_from(identity.not_after)
        .unwrap_or(0)
        .saturating_mul(1000);
    Duration::from_millis(ends.saturating_sub(crate::exec::wall_clock().0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(begun_ago: i64, life: i64, seed: u8) -> Identity {
        let now = i64::try_from(crate::exec::wall_clock().0 / 1000).unwrap();
        let (not_before, not_after) = (now - begun_ago, now - begun_ago + life);
        Identity::of_life(not_before, not_after, seed)
    }

    #[test]
    fn a_certificate_is_renewed_around_half_of_its_life() {
        const DAY: i64 = 24 * 3600;
        let mut dues = Vec::new();
        for seed in 0..=255 {
            let due = due(&identity(0, DAY, seed)).as_secs_f64() / 3600.0;
            assert!((10.79..=13.21).contains(&due), "{seed}: {due}");
            dues.push(due);
        }
        let spread =
            dues.iter().copied().fold(0.0, f64::max) - dues.iter().copied().fold(24.0, f64::min);
        assert!(spread > 2.0, "a fleet does not renew in one go: {spread}");
        assert!(due(&identity(14 * 3600, DAY, 0)).is_zero());
        assert!(
            due(&identity(2 * DAY, DAY, 0)).is_zero(),
            "one that has ended"
        );
    }

    #[test]
    fn short_lives_have_short_pauses() {
        assert_eq!(again(&identity(0, 8, 0)), Duration::from_millis(400));
        assert_eq!(again(&identity(0, 24 * 3600, 0)), Duration::from_mins(1));
    }
}
