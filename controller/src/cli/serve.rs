//! `lockstep serve`: the controller in this process.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use lockstep_core::trust::Subject;
use lockstep_proto::oneline::OneLine;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::exit::Exit;
use crate::app::{self, Drained, ServeOptions};

#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// The configuration file
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/lockstep/controller.toml"
    )]
    config: PathBuf,
    /// Write the bound address here once calls are taken
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Take over: from a controller that may still be alive, or from a backup of its state
    ///
    /// Begins a term above every one that began before, whatever copy of the state began it.
    /// Agents obey this controller from then on, and the other one ends with exit code 12 when it
    /// meets one of them. Records that this state lacks are named. Give it for one start; the
    /// journal remembers it.
    #[arg(long)]
    take_over: bool,
    /// Begin a term above this one: where the clock is not to be trusted
    #[arg(
        long,
        value_name = "EPOCH",
        default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(..u64::MAX)
    )]
    epoch_above: u64,
    /// Suspend `host:NAME`, `operator:NAME` or `serial:HEX` before anybody is let in
    ///
    /// For a controller that cannot be asked, because it ends. `lockstep unsuspend` lifts it.
    #[arg(long, value_name = "SUBJECT")]
    suspend: Vec<Subject>,
}

/// `lockstep serve`. A controller speaks through its log, at the level that `LOCKSTEP_LOG` says.
pub(crate) fn serve(arguments: Serve) -> Exit {
    let asked = std::env::var("LOCKSTEP_LOG").ok();
    let (filter, mistake) = match asked.as_deref().map(str::parse::<Targets>) {
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (Targets::new().with_default(LevelFilter::INFO), Some(error)),
        None => (Targets::new().with_default(LevelFilter::INFO), None),
    };
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(move || OneLine::new(std::io::stderr(), colours))
        .with_ansi(colours);
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .init();
    if let Some(error) = mistake {
        tracing::warn!(%error, "LOCKSTEP_LOG is no level, such as `info` or `debug`; `info` holds");
    }
    let Serve {
        config,
        ready_file,
        take_over,
        epoch_above,
        suspend,
    } = arguments;
    match app::serve(&ServeOptions {
        config,
        ready_file,
        epoch_above,
        take_over,
        suspend,
    }) {
        Ok(Drained) => Exit::Done,
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                hint = error.hint(),
                "the controller ends"
            );
            Exit::of_controller(&error)
        }
    }
}
