//! Programs of other people that tests run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lockstep_proto::ids::Digest;

/// A tool's program from `PATH`. Without it the test says so, and shows nothing; with
/// `LOCKSTEP_REQUIRE_TOOLS` it fails.
#[expect(clippy::print_stderr, reason = "a test that shows nothing must say so")]
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|program| program.exists());
    if found.is_none() {
        let message = format!("NOT TESTED: {name} is not installed; tests/prepare.sh says how");
        assert!(
            std::env::var_os("LOCKSTEP_REQUIRE_TOOLS").is_none(),
            "{message}"
        );
        eprintln!("{message}");
    }
    found
}

/// A virtual environment with what a file of requirements names: made once, kept beside the build.
pub(crate) fn environment(requirements: &Path) -> PathBuf {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let wanted = fs::read(requirements).unwrap();
    let exe = std::env::current_exe().unwrap();
    let target = exe
        .parent()
        .and_then(Path::parent)
        .expect("target/debug/deps");
    let venv = target.join(format!("test-venv-{}", Digest::of(&wanted).short()));
    // Test processes may run at the same time, too.
    let lock = fs::File::create(target.join("test-venv.lock")).unwrap();
    lock.lock().unwrap();
    let ready = venv.join("ready");
    if !ready.exists() {
        let run = |program: &mut Command| {
            let output = program.output().unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        };
        run(Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&venv));
        run(Command::new(venv.join("bin/pip"))
            .args(["install", "-q", "-r"])
            .arg(requirements));
        fs::write(ready, "").unwrap();
    }
    venv
}
