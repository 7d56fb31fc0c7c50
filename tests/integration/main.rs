//! What crosses crates: the real programs, run as a user runs them, and the invariants of the workspace.

mod tidy;
