//! What crosses crates: the real programs, run as a user runs them, and the invariants of the
//! workspace.

mod bad_input;
mod chain;
mod faults;
mod fixture;
mod hostile;
mod locks;
mod measured;
mod methods;
mod plan;
mod resume;
mod same_bytes;
mod settings;
mod tidy;
mod told;
mod watch;
