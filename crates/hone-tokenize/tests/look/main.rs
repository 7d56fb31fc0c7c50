//! What people do with the outputs of the program: look at them, ask about a token, compare two, take them elsewhere and back.

mod diff;
mod exchange;
mod explain;
mod show;
mod support;
