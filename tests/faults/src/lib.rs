//! Lockstep under faults. Built apart from the product: with this package in a build, both
//! sides have points at which they are killed, and faults that can be planted in them.

pub mod chaos;
