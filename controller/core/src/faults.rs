//! Where tests plant faults. Nothing of it is in binaries for users, which are built without the
//! feature `faults`.

/// Whether a fault is planted: `planted!(UndoTwice)`.
#[cfg(feature = "faults")]
macro_rules! planted {
    ($fault:ident) => {
        lockstep_tests::planted::is(lockstep_tests::planted::Fault::$fault)
    };
}

/// Whether a fault is planted.
#[cfg(not(feature = "faults"))]
macro_rules! planted {
    ($fault:ident) => {
        false
    };
}

pub(crate) use planted;
