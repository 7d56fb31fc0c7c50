//! Vectors of f32 at three levels of the x86-64 instruction set, chosen once at run time.
//!
//! A kernel is written once, generic over [`Simd`], and `simd_fn!` compiles it for each level: 16
//! lanes of AVX-512, 8 lanes of AVX2 with FMA, and 8 lanes of plain arrays, which the compiler
//! turns into whatever the target has. A value of [`Avx512`] or [`Avx2`] is the proof that the
//! machine has the instructions, so the methods are safe to call.

use half::bf16;

/// Lanes of the widest level: partial sums are laid out for it.
pub(crate) const MAX_LANES: usize = 16;

/// The instruction set in use.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    /// 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// 256-bit vectors with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// What every machine of the target has.
    Baseline,
}

impl Level {
    /// Every level this machine has, the fastest first.
    pub(crate) fn all() -> Vec<Level> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(Avx512::detect().map(Level::Avx512));
            levels.extend(Avx2::detect().map(Level::Avx2));
        }
        levels.push(Level::Baseline);
        levels
    }
}

/// Operations on vectors of f32; `self` is the proof that the machine has them.
pub(crate) trait Simd: Copy + Send + Sync {
    /// A vector of [`Simd::LANES`] values.
    type V: Copy;
    /// Values in a vector.
    const LANES: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// The first lanes of `x`, which has at least [`Simd::LANES`] values.
    fn load(self, x: &[f32]) -> Self::V;
    /// Writes all lanes to the start of `x`, which has at least [`Simd::LANES`] values.
    fn store(self, x: &mut [f32], v: Self::V);
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of each lane; `b` where either is not a number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each lane; `b` where either is not a number.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `2^k` of lanes `k + EXP_MAGIC`, for whole k in -126 ..= 127.
    fn pow2(self, k_plus_magic: Self::V) -> Self::V;

    /// `p 2^k` of lanes, for whole k in -252 ..= 254, rounded once. 2^k is applied in two halves, so
    /// that neither over- nor underflows by itself.
    #[inline(always)]
    fn times_pow2(self, p: Self::V, k: Self::V) -> Self::V {
        let magic = self.splat(EXP_MAGIC);
        let half_plus_magic = self.fma(k, self.splat(0.5), magic);
        let rest = self.sub(k, self.sub(half_plus_magic, magic));
        self.mul(self.mul(p, self.pow2(half_plus_magic)), self.pow2(self.add(rest, magic)))
    }

    /// The first lanes of `x`, which has at least [`Simd::LANES`] values, widened.
    fn load_bf16(self, x: &[bf16]) -> Self::V;
    /// Writes all lanes to the start of `x`, which has at least [`Simd::LANES`] values, rounded to
    /// nearest, ties to even: the bytes of [`bf16::from_f32`], denormal values and NaN too.
    fn store_bf16(self, x: &mut [bf16], v: Self::V);

    /// [`Simd::load_part`] of bf16, filled with zeros.
    #[inline(always)]
    fn load_part_bf16(self, x: &[bf16]) -> Self::V {
        if x.len() >= Self::LANES {
            return self.load_bf16(x);
        }
        let mut full = [bf16::ZERO; MAX_LANES];
        full[..x.len()].copy_from_slice(x);
        self.load_bf16(&full)
    }

    /// [`Simd::store_part`] of bf16.
    #[inline(always)]
    fn store_part_bf16(self, x: &mut [bf16], v: Self::V) {
        if x.len() >= Self::LANES {
            return self.store_bf16(x, v);
        }
        let mut full = [bf16::ZERO; MAX_LANES];
        self.store_bf16(&mut full, v);
        let n = x.len();
        x.copy_from_slice(&full[..n]);
    }

    /// `x`, zero-extended to a vector where it is shorter.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::V {
        if x.len() >= Self::LANES {
            return self.load(x);
        }
        let mut full = [fill; MAX_LANES];
        full[..x.len()].copy_from_slice(x);
        self.load(&full)
    }

    /// As many lanes as `x` has room for.
    #[inline(always)]
    fn store_part(self, x: &mut [f32], v: Self::V) {
        if x.len() >= Self::LANES {
            return self.store(x, v);
        }
        let mut full = [0.0; MAX_LANES];
        self.store(&mut full, v);
        let n = x.len();
        x.copy_from_slice(&full[..n]);
    }

    /// Turns a square, of which the first [`Simd::LANES`] vectors are used: lane j of vector i
    /// becomes lane i of vector j.
    #[inline(always)]
    fn turn(self, square: &mut [Self::V; MAX_LANES]) {
        let mut rows = [[0.0; MAX_LANES]; MAX_LANES];
        for (row, &v) in rows.iter_mut().zip(square.iter()) {
            self.store(row, v);
        }
        for (j, v) in square.iter_mut().enumerate().take(Self::LANES) {
            let mut column = [0.0; MAX_LANES];
            column.iter_mut().zip(&rows).for_each(|(x, row)| *x = row[j]);
            *v = self.load(&column);
        }
    }

    /// The sum of the lanes, halves folded onto each other.
    #[inline(always)]
    fn sum_lanes(self, v: Self::V) -> f32 {
        self.fold_lanes(v, |a, b| a + b)
    }

    /// The largest lane.
    #[inline(always)]
    fn max_lanes(self, v: Self::V) -> f32 {
        self.fold_lanes(v, |a, b| if a > b { a } else { b })
    }

    /// Lanes combined by `f`, halves folded onto each other.
    #[inline(always)]
    fn fold_lanes(self, v: Self::V, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut x = [0.0; MAX_LANES];
        self.store(&mut x, v);
        let mut n = Self::LANES;
        while n > 1 {
            n /= 2;
            for i in 0..n {
                x[i] = f(x[i], x[i + n]);
            }
        }
        x[0]
    }
}

/// 1.5 * 2^23: adding it rounds a small f32 to a whole number, which then lies in the low bits.
pub(crate) const EXP_MAGIC: f32 = 12_582_912.0;

/// ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
/// The rest of ln 2.
const LN2_LOW: f32 = -2.121_944_4e-4;

/// Minimax polynomial of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, found by Remez exchange in 50
/// digits; it makes exp wrong by at most 3.1e-9 of itself, a twentieth of a unit in the last place.
const EXP_POLY: [f32; 5] =
    [0.499_999_93, 0.166_665_2, 0.041_668_39, 0.008_368_717, 0.001_381_459_9];

/// The polynomial of [`EXP_POLY`] at r.
#[inline(always)]
fn exp_poly<S: Simd>(s: S, r: S::V) -> S::V {
    let mut p = s.splat(EXP_POLY[4]);
    p = s.fma(p, r, s.splat(EXP_POLY[3]));
    p = s.fma(p, r, s.splat(EXP_POLY[2]));
    p = s.fma(p, r, s.splat(EXP_POLY[1]));
    s.fma(p, r, s.splat(EXP_POLY[0]))
}

/// exp(x) in each lane: 0 below -104, infinite above 88.73, NaN of NaN; within two units in the
/// last place.
///
/// exp(x) = 2^k exp(r) with k = round(x / ln 2).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // The bound is the first argument, so that NaN, the second, stays.
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let magic = s.splat(EXP_MAGIC);
    let k = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), magic), magic);
    let r = s.fma(k, s.splat(-LN2_LOW), s.fma(k, s.splat(-LN2_HIGH), x));
    let p = s.fma(s.mul(r, r), exp_poly(s, r), r);
    let p = s.add(p, s.splat(1.0));
    s.times_pow2(p, k)
}

/// tanh(x) in each lane: within four units in the last place, also near 0; NaN of NaN.
///
/// tanh(x) = m / (m + 2) with m = exp(2x) - 1, and m = 2^k (exp(r) - 1) + (2^k - 1) with k and r as
/// in [`exp`], so that nothing cancels where x is small. Beyond 10 it is 1 in f32.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    // The bound is the first argument, so that NaN, the second, stays.
    let x = s.max(s.splat(-10.0), s.min(s.splat(10.0), x));
    let x = s.add(x, x);
    let magic = s.splat(EXP_MAGIC);
    let k_plus_magic = s.fma(x, s.splat(std::f32::consts::LOG2_E), magic);
    let k = s.sub(k_plus_magic, magic);
    let r = s.fma(k, s.splat(-LN2_LOW), s.fma(k, s.splat(-LN2_HIGH), x));
    let p = s.fma(s.mul(r, r), exp_poly(s, r), r);
    let power = s.pow2(k_plus_magic);
    let m = s.fma(power, p, s.sub(power, s.splat(1.0)));
    s.div(m, s.add(m, s.splat(2.0)))
}

/// Declares a function for every [`Level`]: its first argument is the level, and inside it the
/// named value is the [`Simd`] in use. This is the only place where a kernel meets an instruction
/// set.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$simd:ident $(, $of:ident: $bound:path)*>(
        $($arg:ident: $ty:ty),* $(,)?
    ) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "a kernel names all that its formula names")]
        #[allow(unsafe_code, reason = "calling an instruction set that the level proves")]
        $vis fn $name<$($of: $bound),*>(
            level: $crate::cpu::simd::Level,
            $($arg: $ty),*
        ) $(-> $ret)? {
            use $crate::cpu::simd::{Level, Portable, Simd};

            #[inline(always)]
            fn body<S: Simd $(, $of: $bound)*>($simd: S, $($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            fn avx512<$($of: $bound),*>(
                proof: $crate::cpu::simd::Avx512,
                $($arg: $ty),*
            ) $(-> $ret)? {
                body(proof, $($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<$($of: $bound),*>(
                proof: $crate::cpu::simd::Avx2,
                $($arg: $ty),*
            ) $(-> $ret)? {
                body(proof, $($arg),*)
            }

            match level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the proof exists only on machines that have the features.
                Level::Avx512(proof) => unsafe { avx512(proof, $($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the proof exists only on machines that have the features.
                Level::Avx2(proof) => unsafe { avx2(proof, $($arg),*) },
                Level::Baseline => body(Portable, $($arg),*),
            }
        }
    };
}
pub(crate) use simd_fn;

/// Arrays of eight: right on every machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// Applies `f` lane by lane.
#[inline(always)]
fn lanes2(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = [f32; 8];
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> [f32; 8] {
        *x.first_chunk().expect("callers pass at least LANES values")
    }
    #[inline(always)]
    fn store(self, x: &mut [f32], v: [f32; 8]) {
        *x.first_chunk_mut().expect("callers pass at least LANES values") = v;
    }
    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        lanes2(lanes2(a, b, |a, b| a * b), c, |ab, c| ab + c)
    }
    #[inline(always)]
    fn max(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn pow2(self, k: [f32; 8]) -> [f32; 8] {
        k.map(|k| f32::from_bits((k.to_bits() << 23).wrapping_add(127 << 23)))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> [f32; 8] {
        let x: &[bf16; 8] = x.first_chunk().expect("callers pass at least LANES values");
        x.map(|x| x.to_f32())
    }
    #[inline(always)]
    fn store_bf16(self, x: &mut [bf16], v: [f32; 8]) {
        *x.first_chunk_mut().expect("callers pass at least LANES values") = v.map(bf16::from_f32);
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use super::*;

    simd_fn! {
        /// exp of a slice, for the test.
        fn exp_all<s>(x: &[f32], y: &mut [f32]) {
            for (x, y) in x.chunks(S::LANES).zip(y.chunks_mut(S::LANES)) {
                s.store_part(y, exp(s, s.load_part(x, 0.0)));
            }
        }
    }

    simd_fn! {
        /// tanh of a slice, for the test.
        fn tanh_all<s>(x: &[f32], y: &mut [f32]) {
            for (x, y) in x.chunks(S::LANES).zip(y.chunks_mut(S::LANES)) {
                s.store_part(y, tanh(s, s.load_part(x, 0.0)));
            }
        }
    }

    #[test]
    fn tanh_is_within_four_units_in_the_last_place() {
        let mut x: Vec<f32> = (0..1_000_000).map(|i| i as f32 * (12.0 / 1e6) - 6.0).collect();
        // Down to where tanh(x) is x.
        x.extend(
            (0..200_000).map(|i| (i as f32 * -2e-4).exp2() * if i % 2 == 0 { 1.0 } else { -1.0 }),
        );
        x.retain(|&x| x != 0.0);
        for level in Level::all() {
            let mut y = vec![0.0; x.len()];
            tanh_all(level, &x, &mut y);
            let worst =
                (x.iter().zip(&y)).map(|(&x, &y)| ulps(y, f64::from(x).tanh())).fold(0.0, f64::max);
            assert!(worst < 4.0, "{level:?}: {worst} ulp");
            let x = [0.0, -0.0, 9.5, -9.5, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY];
            let mut y = [0.5; 8];
            tanh_all(level, &x, &mut y);
            assert_eq!(y, [0.0, 0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0], "{level:?}");
            tanh_all(level, &[f32::NAN; 8], &mut y);
            assert!(y.iter().all(|y| y.is_nan()), "{level:?}");
        }
    }

    /// Distance from the right value in units of its last place.
    fn ulps(got: f32, want: f64) -> f64 {
        let near = want as f32;
        let unit = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
        (f64::from(got) - want).abs() / unit
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let x: Vec<f32> = (0..2_000_000).map(|i| -87.0 + i as f32 * (175.5 / 2e6)).collect();
        for level in Level::all() {
            let mut y = vec![0.0; x.len()];
            exp_all(level, &x, &mut y);
            let worst =
                (x.iter().zip(&y)).map(|(&x, &y)| ulps(y, f64::from(x).exp())).fold(0.0, f64::max);
            assert!(worst < 2.0, "{level:?}: {worst} ulp");
        }
    }

    #[test]
    fn exp_keeps_its_limits() {
        let x = [0.0, -0.0, -104.0, -1e4, -1e30, f32::NEG_INFINITY, 89.0, 1e30, f32::INFINITY];
        let want = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY, f32::INFINITY];
        for level in Level::all() {
            let mut y = [0.5; 9];
            exp_all(level, &x, &mut y);
            assert_eq!(y, want, "{level:?}");
            exp_all(level, &[f32::NAN; 9], &mut y);
            assert!(y.iter().all(|y| y.is_nan()), "{level:?}");
            // Denormal results lose bits, not their size.
            exp_all(level, &[-95.0; 9], &mut y);
            assert!(y.iter().all(|&y| (f64::from(y) - (-95.0_f64).exp()).abs() < 2e-45));
        }
    }
}
