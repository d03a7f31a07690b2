//! Lockstep: the controller and the command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod api;
mod app;
mod blobs;
mod config;
mod driver;
mod hub;
mod identity;
mod journal;
mod logs;
mod notify;
mod pki;
mod secrets;
mod session;
mod tls;

// Of the allocators that were measured it alone gives memory back after 10,000 agents have left;
// the unit file sets its decay times.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(name = "lockstep", version, about = "Moves a fleet of hosts in step")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the controller.
    Serve {
        /// The configuration file.
        #[arg(long, default_value = "/etc/lockstep/controller.toml")]
        config: PathBuf,
        /// Write the bound address here once calls are taken.
        #[arg(long)]
        ready_file: Option<PathBuf>,
        /// Begin a term above this one: after the state came back from a backup.
        #[arg(long, default_value_t = 0)]
        epoch_above: u64,
    },
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LOCKSTEP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let Command::Serve {
        config,
        ready_file,
        epoch_above,
    } = Args::parse().command;
    let options = app::ServeOptions {
        config,
        ready_file,
        epoch_above,
    };
    match app::serve(&options) {
        Ok(app::Drained) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "the controller ends");
            ExitCode::from(error.exit_code())
        }
    }
}
