//! Every input that is kept, and changes of them: the same ones in each run, without a fuzzer.

use std::path::{Path, PathBuf};

use lockstep_fuzz::{Mutator, TARGETS, Target, find};

/// Changes that are tried for each target: a second or two without optimisation.
const CHANGES: usize = 1000;

/// Kept inputs are read by every build, so that they stay small.
const MOST_INPUTS: usize = 300;
const MOST_BYTES: usize = 1 << 20;
const LARGEST: usize = 16 << 10;

/// Keeps the input on which a target has failed, and says where.
struct Tried<'a> {
    target: &'a str,
    bytes: &'a [u8],
}

impl Drop for Tried<'_> {
    #[expect(
        clippy::print_stderr,
        reason = "it is for whoever reads the test's failure"
    )]
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", self.target));
        if std::fs::write(&path, self.bytes).is_ok() {
            eprintln!("{}: the input is kept in {}", self.target, path.display());
        }
    }
}

fn run(target: &Target, bytes: &[u8]) {
    let tried = Tried {
        target: target.name,
        bytes,
    };
    (target.run)(bytes);
    drop(tried);
}

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let entries = std::fs::read_dir(&directory);
    let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("the directory can be read").path();
        let bytes = std::fs::read(&path).expect("an input can be read");
        (path, bytes)
    };
    let mut inputs: Vec<_> = entries.map(read).collect();
    // Directories are in no order.
    inputs.sort();
    inputs
}

fn replay(name: &str) {
    let target = find(name).expect("a target");
    let inputs = corpus(name);
    assert!(
        !inputs.is_empty() && inputs.len() <= MOST_INPUTS,
        "{} inputs",
        inputs.len()
    );
    let total: usize = inputs.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(total <= MOST_BYTES, "{total} bytes");
    for (path, bytes) in &inputs {
        assert!(bytes.len() <= LARGEST, "{}", path.display());
        run(target, bytes);
    }
    let inputs: Vec<Vec<u8>> = inputs.into_iter().map(|(_, bytes)| bytes).collect();
    let mut mutator = Mutator::new(1);
    for _ in 0..CHANGES {
        run(target, &mutator.change(&inputs, target.max_len));
    }
}

macro_rules! replayed {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*

        #[test]
        fn every_target_is_replayed() {
            let replayed = [$(stringify!($name)),*];
            let targets: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(targets, replayed);
        }
    };
}

replayed! {
    plan compiled_plan order report policy policy_patterns signature agent_journal
    controller_journal export san certificate enrolment bridge session statements shown
    vault_answer
}
