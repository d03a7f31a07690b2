//! What must hold of every parser that meets bytes from elsewhere, as targets for a fuzzer.
//!
//! ```text
//! tests/fuzz/src        targets: bytes in, a panic where a promise is broken
//! tests/fuzz/corpus     inputs that are kept, a directory for each target
//! tests/fuzz/tests      replays them, and a few thousand changes of each, with a stable compiler
//! tests/fuzz/libfuzzer  the same targets under libFuzzer, which looks for more: `make fuzz`
//! ```
//!
//! A target asserts more than that nothing panics: what is decoded is encoded to the same bytes
//! again, what was changed is refused, what is shown does nothing on a screen. To add one, write a
//! function here, add a row to [`TARGETS`], and put a few real inputs into its directory.

mod contract;
mod mutate;
mod plans;
mod rollouts;
pub mod seeds;
mod trust;

pub use mutate::Mutator;

/// Bytes in; panics where a promise is broken.
#[derive(Debug)]
pub struct Target {
    /// Also that of its directory.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// The longest input that is tried, in bytes.
    pub max_len: usize,
    /// Plays it.
    pub run: fn(&[u8]),
}

macro_rules! targets {
    ($($name:literal $run:path, $max_len:literal, $about:literal;)*) => {
        /// All targets.
        pub const TARGETS: &[Target] = &[
            $(Target { name: $name, about: $about, max_len: $max_len, run: $run },)*
        ];
    };
}

targets! {
    "plan" plans::plan, 10240, "a plan file in YAML, read, compiled and opened";
    "compiled_plan" plans::compiled_plan, 16384, "a compiled plan, opened, shown and submitted";
    "order" contract::order, 8192, "what a controller says to an agent";
    "report" contract::report, 8192, "what an agent says to a controller";
    "policy" lockstep_agent::fuzzing::policy, 4096, "a host's policy, and actions held against it";
    "policy_patterns" lockstep_agent::fuzzing::policy_patterns, 512, "patterns of a policy";
    "signature" trust::signature, 2048, "an SSH signature, held against keys";
    "agent_journal" lockstep_agent::fuzzing::journal, 8192, "an agent's journal";
    "controller_journal" rollouts::controller_journal, 8192, "records of a controller's journal";
    "export" lockstep::fuzzing::export, 8192, "an exported journal";
    "san" trust::san, 512, "a URI of a certificate";
    "certificate" trust::certificate, 2048, "a certificate";
    "enrolment" trust::enrolment, 2048, "a request for a certificate";
    "bridge" contract::bridge, 8192, "frames between the two processes of an agent";
    "session" rollouts::session, 8192, "reports of hostile agents, and calls, in a rollout";
    "statements" trust::statements, 4096, "floors, witnesses, ids and values in text";
    "shown" contract::shown, 8192, "what hosts and controllers say, on screens and in reports";
    "vault_answer" lockstep_agent::fuzzing::vault_answer, 4096, "a vault's answer";
}

/// The target of this name.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
