//! Lockstep's decisions, and nothing else: no IO, no clock, no randomness.
//!
//! ```text
//! plan.yaml -> plan::Plan -> compile -> SealedPlan                    the language
//! Event -> Coordinator::handle -> Effects (persist, send, publish)    the rollout machine
//! Journal -> Coordinator::recover -> the same Coordinator             the same fold
//! ```
//!
//! The flow of one event: `decide` reads the state and returns records; `apply` folds them into
//! the state; `advance` repeats that until nothing is due. The driver persists the records before
//! it sends anything (INV-2). Barriers (INV-3), the five outcomes (INV-5), rollback (INV-6) and
//! ends (INV-8) are decided in [`rollout`]; start reading at [`Coordinator::handle`].

mod ascending;
pub mod compile;
pub mod coordinator;
pub mod event;
mod faults;
pub mod plan;
pub mod record;
pub mod refusal;
pub mod rollout;
pub mod schema;
pub mod trust;

pub use coordinator::{Config, Coordinator, RecoverError, Summary};
pub use event::{Answer, Call, Effects, Event, Message, Notify, Refused, RolloutEvent, TrustCall};
pub use record::{Archived, End, Entry, MAX_TEXT, Record};
pub use rollout::{Left, LeftState};
