//! The contract between Lockstep's controller, agents and operators.
//!
//! ```text
//! plan.yaml -> CompiledPlan -> SealedPlan (bytes, digest)        plan, action, seal
//!                                   |
//! controller -- Order, a pointer --> agent                       order
//! controller <-- Report, numbered -- agent                       report
//! ```
//!
//! Start with [`plan::CompiledPlan`], then [`order::Order`] and [`report::ReportBody`]. The pure
//! core uses this crate without its `grpc` feature; generated code and conversions are in
//! `wire`, and wire types go no further than that module.

pub mod action;
pub mod approval;
pub mod evidence;
pub mod floor;
pub mod ids;
pub mod json;
pub mod loss;
pub mod oneline;
pub mod order;
pub mod plan;
pub mod refusals;
pub mod report;
pub mod seal;
pub mod shown;
#[cfg(feature = "signatures")]
pub mod sshsig;
#[cfg(feature = "signatures")]
pub mod trust;
pub mod values;
#[cfg(feature = "grpc")]
pub mod wire;
pub mod witness;
