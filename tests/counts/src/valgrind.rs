//! How many instructions a run takes, as cachegrind counts them.

use std::io;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::paths::Path;

/// The allocator's settings: by itself it tidies up and gives memory back as time passes, in a
/// thread of its own, and shares memory out by the machine's cores. Without all that, a path in one
/// thread takes the same in every run, to the instruction.
const ALLOCATOR: &str = "abort_conf:true,background_thread:false,experimental_tcache_gc:false,\
                         dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1";

/// What one time of a path takes.
pub(crate) fn of_one_time(path: &Path) -> Result<u64> {
    let few = of_run(path.name, path.few)?;
    let many = of_run(path.name, path.many)?;
    let more = many.checked_sub(few);
    let more = more.with_context(|| format!("{}: more times took less", path.name))?;
    let times = u64::from(path.many - path.few);
    Ok((more + times / 2) / times)
}

fn of_run(name: &str, times: u32) -> Result<u64> {
    let program = std::env::current_exe().context("this program has a path")?;
    let output = Command::new("valgrind")
        .args(["--tool=cachegrind", "--cache-sim=no"])
        .arg("--cachegrind-out-file=/dev/null")
        .arg(program)
        .args(["path", name, &times.to_string()])
        .env("MALLOC_CONF", ALLOCATOR)
        .output();
    let output = match output {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("valgrind is missing: `make prepare` installs it, or says how")
        }
        output => output.context("valgrind cannot be started")?,
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{name}: {} under valgrind:\n{said}",
        output.status
    );
    read(&said).with_context(|| format!("{name}: valgrind has not counted:\n{said}"))
}

/// The instructions in what cachegrind says at the end: `==12== I   refs:      1,234`.
fn read(said: &str) -> Option<u64> {
    let mut lines = said.lines().map(str::split_ascii_whitespace);
    lines.find_map(|mut words| match (words.nth(1)?, words.next()?) {
        ("I", "refs:") => words.next()?.replace(',', "").parse().ok(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_found_in_what_cachegrind_says() {
        let said = "==7== Cachegrind, a cache and branch-prediction profiler\n==7== \n\
                    ==7== I   refs:      1,234,567\n";
        assert_eq!(read(said), Some(1_234_567));
        // As releases from 3.21 on say it.
        assert_eq!(read("==7== I refs:        12\n"), Some(12));
        assert_eq!(read("==7== \nwhatever\n"), None);
    }
}
