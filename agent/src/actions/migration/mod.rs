//! Schema migrations with the application's own tool, run from the release that holds them.
//!
//! ```text
//! plan     render `upgrade <current>:<target> --sql`; people approve its digest
//! apply    verified backup? fence still up? same SQL? -> lock -> upgrade -> look at the revision
//! undo     as the plan says: keep the schema, or fence still up, or nothing written to what goes?
//!          -> lock -> downgrade to the recorded revision, with the same release
//! ```
//!
//! `postgres.rehearse` goes all of this way, and back, on the restored backup.
//!
//! The tool keeps the revision in the database, in the transaction of the migration itself, so
//! what an interrupted attempt has done can be read there once its sessions are gone (INV-7).

#[cfg(test)]
mod alike;
mod apply;
mod blocked;
mod dropped;
mod guard;
mod kept;
#[cfg(test)]
mod kills;
mod lint;
mod look;
mod rehearse;
mod returns;
mod run;
mod schema;
mod source;
mod tools;
mod undo;
mod watched;
