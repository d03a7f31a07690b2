//! The targets of `lockstep-fuzz` under libFuzzer; `LOCKSTEP_FUZZ` says which. `make fuzz` runs
//! them all.

#![no_main]

use std::sync::OnceLock;

use lockstep_fuzz::Target;

static TARGET: OnceLock<&Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: {
        let name = std::env::var("LOCKSTEP_FUZZ").unwrap_or_default();
        let target = lockstep_fuzz::find(&name);
        let target = target.unwrap_or_else(|| panic!("LOCKSTEP_FUZZ names no target: `{name}`"));
        TARGET.get_or_init(|| target);
    },
    |bytes: &[u8]| {
        let target = TARGET.get().expect("it was looked up before");
        (target.run)(bytes);
    }
);
