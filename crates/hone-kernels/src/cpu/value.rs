//! What buffers hold, as vectors of f32: values of bf16 are widened as they are read and rounded as
//! they are written, so that an operator is one loop whatever its buffers are.

use half::bf16;

use super::simd::Simd;

/// A value of a buffer.
pub(super) trait Value: Copy + Send + Sync + 'static {
    /// Nothing.
    const ZERO: Self;

    /// As f32.
    fn get(self) -> f32;
    /// `x`, rounded where it has to be.
    fn of(x: f32) -> Self;
    /// A vector of the first values of `x`, filled with zeros where it is shorter.
    fn load<S: Simd>(s: S, x: &[Self]) -> S::V;
    /// As many lanes as `x` has room for.
    fn store<S: Simd>(s: S, x: &mut [Self], v: S::V);
}

impl Value for f32 {
    const ZERO: f32 = 0.0;

    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[f32]) -> S::V {
        s.load_part(x, 0.0)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, x: &mut [f32], v: S::V) {
        s.store_part(x, v);
    }
}

impl Value for bf16 {
    const ZERO: bf16 = bf16::ZERO;

    #[inline(always)]
    fn get(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn of(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[bf16]) -> S::V {
        s.load_part_bf16(x)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, x: &mut [bf16], v: S::V) {
        s.store_part_bf16(x, v);
    }
}
