//! What every backend is held to: a table of cases that runs each operator on ordinary, odd and
//! extreme shapes and magnitudes, to be compared with [`struct@crate::Reference`].
//!
//! It is part of the library so that backends outside of this crate can be held to it, and so that it
//! can be carried to a machine that has a GPU.

mod cases;
mod further;
pub mod rounded;

pub use cases::{Case, Output, all as all_cases, data, heads};
pub use further::all_options;

/// Largest difference relative to the largest magnitude wanted; infinite where one is not a number
/// alone.
pub fn error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let top = want.iter().filter(|x| x.is_finite()).fold(f32::MIN_POSITIVE, |a, x| a.max(x.abs()));
    let pairs = got.iter().zip(want);
    pairs.fold(0.0, |worst: f32, (&g, &w)| {
        let same = g == w || (g.is_nan() && w.is_nan());
        let far = if same { 0.0 } else { (g - w).abs() / top };
        worst.max(if far.is_nan() { f32::INFINITY } else { far })
    })
}
