//! What is said where kernels cannot be tried.

#![cfg(no_simulator)]

#[test]
#[allow(clippy::print_stderr, reason = "a test that is skipped says so")]
fn kernels_are_not_tried_without_a_cpp_compiler() {
    eprintln!("skipped: there is no C++ compiler, and the kernels of GPUs were not tried");
}
