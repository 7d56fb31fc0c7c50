//! Attention's factors as pairs of bf16 that VDPBF16PS multiplies: two products and their sum a
//! lane, at the rate of one in f32.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;

use half::bf16;

use super::super::Engine;
use super::super::dot::Avx512Bf16;
use super::super::pairs::{first, interleaving};
use super::Value;
use crate::cpu::attention::tasks::{self, BackwardTask, BackwardWork, ForwardTask, ForwardWork};
use crate::cpu::simd::{Avx512, Level};
use crate::cpu::tile::{Factors, Stored};

/// Values rounded to bf16, two to a slot; sums in f32. Holds the proofs of both instruction sets.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Pairs {
    simd: Avx512,
    _dot: Avx512Bf16,
}

impl Pairs {
    /// The proof, where a level and an engine are those.
    pub(super) fn new(level: Level, engine: Engine) -> Option<Self> {
        match (level, engine) {
            (Level::Avx512(simd), Engine::Dot(dot, _)) => Some(Pairs { simd, _dot: dot }),
            _ => None,
        }
    }
}

#[inline(always)]
fn bf16_lanes(x: __m512) -> __m512bh {
    // SAFETY: two names for 512 bits.
    unsafe { std::mem::transmute(x) }
}

impl Factors for Pairs {
    type S = Avx512;
    const PER_SLOT: usize = 2;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.simd
    }
    #[inline(always)]
    fn dot(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves that the machine has the instruction.
        unsafe { _mm512_dpbf16_ps(c, bf16_lanes(a), bf16_lanes(b)) }
    }
    #[inline(always)]
    fn along(self, values: impl Fn(usize) -> __m512) -> __m512 {
        let (low, high) = (values(0), values(1));
        // SAFETY: `self` proves that the machine has the instruction; two names for 512 bits.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
    }
    #[inline(always)]
    fn across(self, values: impl Fn(usize) -> __m512) -> __m512 {
        let (even, odd) = (values(0), values(1));
        // SAFETY: `self` proves that the machine has the instructions; two names for 512 bits.
        unsafe {
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleaving(), both))
        }
    }
}

impl Stored<Pairs> for bf16 {
    #[inline(always)]
    fn load(_: Pairs, from: &[bf16]) -> __m512 {
        // SAFETY: the first argument proves that the machine has the instructions; the mask keeps
        // to the slice, and a bf16 is its 16 bits, the upper ones of an f32.
        unsafe {
            let bits = _mm256_maskz_loadu_epi16(first(from.len()) as u16, from.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }
    }
    #[inline(always)]
    fn store(_: Pairs, to: &mut [bf16], v: __m512) {
        // SAFETY: as above; two names for 256 bits.
        unsafe {
            let bits = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            _mm256_mask_storeu_epi16(to.as_mut_ptr().cast(), first(to.len()) as u16, bits);
        }
    }
}

/// Declares a function of [`Pairs`] and a task, which is compiled with their instructions.
macro_rules! with_pairs {
    ($(#[$meta:meta])* fn $name:ident($work:ident, $task:ident) = $body:path) => {
        $(#[$meta])*
        pub(super) fn $name<T: Value, O: Value>(
            proof: Pairs,
            work: $work<'_, T, O>,
            task: &$task,
            scratch: &mut Vec<f32>,
        ) {
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")]
            fn with_features<T: Value, O: Value>(
                proof: Pairs,
                work: $work<'_, T, O>,
                task: &$task,
                scratch: &mut Vec<f32>,
            ) {
                $body(proof, work, task, scratch);
            }
            // SAFETY: the first argument proves that the machine has the instructions.
            unsafe { with_features(proof, work, task, scratch) }
        }
    };
}

with_pairs! {
    /// One task of the backward.
    fn backward_task(BackwardWork, BackwardTask) = tasks::run_backward
}

with_pairs! {
    /// One task of the forward.
    fn forward_task(ForwardWork, ForwardTask) = tasks::run_forward
}
