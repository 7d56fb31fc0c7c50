//! The instruction sets of x86-64: AVX-512, and AVX2 with FMA.
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;

use half::bf16;

use super::Simd;
use crate::cpu::turn;

/// Proof that the machine has AVX-512 F, VL, BW and DQ.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

/// Proof that the machine has AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx512 {
    /// The proof, where it is true.
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        (has && Avx2::detect().is_some()).then_some(Avx512(()))
    }
}

impl Avx2 {
    /// The proof, where it is true.
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        has.then_some(Avx2(()))
    }
}

/// The mask of the first `n` lanes, of all from 16 on.
#[inline(always)]
fn first(n: usize) -> u16 {
    if n >= 16 { u16::MAX } else { (1 << n) - 1 }
}

/// Implements [`Simd`] by intrinsics.
macro_rules! intrinsics {
    ($proof:ty, $v:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $add:ident,
     $sub:ident, $mul:ident, $div:ident, $fma:ident, $max:ident, $min:ident, $to_int:ident,
     $to_float:ident, $shift:ident, $add_int:ident, $splat_int:ident, { $($more:tt)* }) => {
        impl Simd for $proof {
            type V = $v;
            const LANES: usize = $lanes;

            #[inline(always)]
            fn splat(self, x: f32) -> $v {
                // SAFETY: `self` proves that the machine has the instruction.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            fn load(self, x: &[f32]) -> $v {
                let x: &[f32; $lanes] = x.first_chunk().expect("at least LANES values");
                // SAFETY: `self` proves the instruction, the array reference its bounds.
                unsafe { $load(x.as_ptr()) }
            }
            #[inline(always)]
            fn store(self, x: &mut [f32], v: $v) {
                let x: &mut [f32; $lanes] = x.first_chunk_mut().expect("at least LANES values");
                // SAFETY: `self` proves the instruction, the array reference its bounds.
                unsafe { $store(x.as_mut_ptr(), v) }
            }
            #[inline(always)]
            fn add(self, a: $v, b: $v) -> $v {
                // SAFETY: `self` proves that the machine has the instruction.
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            fn sub(self, a: $v, b: $v) -> $v {
                // SAFETY: `self` proves that the machine has the instruction.
                unsafe { $sub(a, b) }
            }
            #[inline(always)]
            fn mul(self, a: $v, b: $v) -> $v {
                // SAFETY: `self` proves that the machine has the instruction.
                unsafe { $mul(a, b) }
            }
            #[inline(always)]
            fn div(self, a: $v, b: $v) -> $v {
                // SAFETY: `self` proves that the machine has the instruction.
                unsafe { $div(a, b) }
            }
            #[inline(always)]
            fn fma(self, a: $v, b: $v, c: $v) -> $v {
                // SAFETY: `self` proves that the machine has the instruction.
                unsafe { $fma(a, b, c) }
            }
            #[inline(always)]
            fn max(self, a: $v, b: $v) -> $v {
                // SAFETY: `self` proves that the machine has the instruction.
                unsafe { $max(a, b) }
            }
            #[inline(always)]
            fn min(self, a: $v, b: $v) -> $v {
                // SAFETY: `self` proves that the machine has the instruction.
                unsafe { $min(a, b) }
            }
            #[inline(always)]
            fn pow2(self, k: $v) -> $v {
                // SAFETY: `self` proves that the machine has the instructions.
                unsafe { $to_float($add_int($shift::<23>($to_int(k)), $splat_int(127 << 23))) }
            }
            $($more)*
        }
    };
}

intrinsics!(
    Avx512,
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_div_ps,
    _mm512_fmadd_ps,
    _mm512_max_ps,
    _mm512_min_ps,
    _mm512_castps_si512,
    _mm512_castsi512_ps,
    _mm512_slli_epi32,
    _mm512_add_epi32,
    _mm512_set1_epi32,
    {
        #[inline(always)]
        fn load_bf16(self, x: &[bf16]) -> __m512 {
            let x: &[bf16; 16] = x.first_chunk().expect("at least LANES values");
            // SAFETY: `self` proves the instructions, the array reference its bounds; a bf16 is
            // the upper half of an f32.
            unsafe {
                let upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper))
            }
        }
        #[inline(always)]
        fn store_bf16(self, x: &mut [bf16], v: __m512) {
            self.store_part_bf16(&mut x[..16], v);
        }
        #[inline(always)]
        fn load_part_bf16(self, x: &[bf16]) -> __m512 {
            // SAFETY: `self` proves the instructions; the mask keeps to the slice's bounds; a
            // bf16 is the upper half of an f32.
            unsafe {
                let values = _mm256_maskz_loadu_epi16(first(x.len()), x.as_ptr().cast());
                let upper = _mm512_cvtepu16_epi32(values);
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper))
            }
        }
        #[inline(always)]
        fn store_part_bf16(self, x: &mut [bf16], v: __m512) {
            // SAFETY: `self` proves the instructions; the mask keeps to the slice's bounds.
            unsafe {
                let bits = _mm512_castps_si512(v);
                let upper = _mm512_srli_epi32::<16>(bits);
                let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
                let up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                let near = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, up));
                let quiet = _mm512_set1_epi32(0x40);
                let near = _mm512_mask_or_epi32(near, is_nan, upper, quiet);
                let (to, near) = (x.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(near));
                _mm256_mask_storeu_epi16(to, first(x.len()), near);
            }
        }
        #[inline(always)]
        fn times_pow2(self, p: __m512, k: __m512) -> __m512 {
            // SAFETY: `self` proves that the machine has the instruction.
            unsafe { _mm512_scalef_ps(p, k) }
        }
        #[inline(always)]
        fn load_part(self, x: &[f32], fill: f32) -> __m512 {
            // SAFETY: `self` proves the instructions; the mask keeps to the slice's bounds.
            unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(x.len()), x.as_ptr()) }
        }
        #[inline(always)]
        fn store_part(self, x: &mut [f32], v: __m512) {
            // SAFETY: `self` proves the instruction; the mask keeps to the slice's bounds.
            unsafe { _mm512_mask_storeu_ps(x.as_mut_ptr(), first(x.len()), v) }
        }
        #[inline(always)]
        fn turn(self, square: &mut [__m512; 16]) {
            // SAFETY: `self` proves that the machine has the instructions.
            unsafe { turn::square(square) }
        }
    }
);
intrinsics!(
    Avx2,
    __m256,
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_div_ps,
    _mm256_fmadd_ps,
    _mm256_max_ps,
    _mm256_min_ps,
    _mm256_castps_si256,
    _mm256_castsi256_ps,
    _mm256_slli_epi32,
    _mm256_add_epi32,
    _mm256_set1_epi32,
    {
        #[inline(always)]
        fn load_bf16(self, x: &[bf16]) -> __m256 {
            let x: &[bf16; 8] = x.first_chunk().expect("at least LANES values");
            // SAFETY: `self` proves the instructions, the array reference its bounds; a bf16 is
            // the upper half of an f32.
            unsafe {
                let upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper))
            }
        }
        #[inline(always)]
        fn store_bf16(self, x: &mut [bf16], v: __m256) {
            let x: &mut [bf16; 8] = x.first_chunk_mut().expect("at least LANES values");
            // SAFETY: `self` proves the instructions, the array reference its bounds.
            unsafe {
                let bits = _mm256_castps_si256(v);
                let upper = _mm256_srli_epi32::<16>(bits);
                let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
                let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
                let up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
                let near = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, up));
                let nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
                let near = _mm256_blendv_epi8(near, nan, is_nan);
                // Packed in each half of the vector: the halves' lower quarters are wanted.
                let packed = _mm256_packus_epi32(near, near);
                let packed = _mm256_permute4x64_epi64::<0b1000>(packed);
                let lower = _mm256_castsi256_si128(packed);
                _mm_storeu_si128(x.as_mut_ptr().cast(), lower);
            }
        }
    }
);
