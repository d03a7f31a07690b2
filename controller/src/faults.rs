//! Where tests reach in: points at which they kill the process, and faults that they plant. Nothing
//! of it is in binaries for users, which are built without the feature `faults`.

/// The process has come to a point: one stands before and after each write of the journal.
#[cfg(feature = "faults")]
pub(crate) use lockstep_tests::points::reached;

/// The process has come to a point.
#[cfg(not(feature = "faults"))]
pub(crate) fn reached(_point: &str) {}

/// Whether a fault is planted: `planted!(SendBeforePersist)`.
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
