//! A service that another action stops and starts again.

use lockstep_proto::action::service::Driver;
use lockstep_proto::report::Failure;
use tokio::time::Instant;

use super::{Phase, Service};
use crate::step::Context;

/// A service of the host's configuration, to be stopped and started.
pub(crate) struct Switch<'a> {
    cx: &'a Context,
    name: &'a str,
    service: Service<'a>,
}

impl<'a> Switch<'a> {
    /// Finds it; fails if the host has no such service.
    pub(crate) async fn open(
        cx: &'a Context,
        name: &'a str,
        driver: Driver,
    ) -> Result<Self, Failure> {
        let service = Service::open(cx, name, driver).await?;
        Ok(Self { cx, name, service })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        self.name
    }

    /// Whether it runs, in the driver's words.
    pub(crate) async fn runs(&self) -> Result<(bool, String), Failure> {
        let state = self.service.state(self.cx).await?;
        Ok((state.phase == Phase::Running, state.words))
    }

    /// Whether it neither runs nor is on its way up or down.
    pub(crate) async fn is_down(&self) -> Result<bool, Failure> {
        Ok(!self.service.state(self.cx).await?.phase.is_up())
    }

    /// Stops it.
    pub(crate) async fn stop(&self, until: Instant) -> Result<(), Failure> {
        self.service.stop(self.cx, until).await
    }

    /// Starts it. It may still be on its way up, or down again.
    pub(crate) async fn start(&self, until: Instant) -> Result<(), Failure> {
        self.service.forget_failure().await?;
        self.service.start(self.cx, until).await
    }

    /// What it wrote last.
    pub(crate) async fn last_lines(&self) -> Vec<String> {
        self.service.last_lines(self.cx).await
    }
}
