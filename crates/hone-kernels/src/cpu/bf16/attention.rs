//! Attention whose factors are rounded to bf16, with sums, softmax and its slopes in f32.
//!
//! Queries, keys, values and the gradient of the output are rounded where they are not yet bf16;
//! so are probabilities and gradients of scores once they are factors. Machines without the
//! instruction for pairs multiply the rounded values in f32.

use std::borrow::Cow;

use half::bf16;

use super::Engine;
#[cfg(target_arch = "x86_64")]
use crate::Compute;
#[cfg(target_arch = "x86_64")]
use crate::cpu::attention::tasks;
use crate::cpu::attention::{self, Plan, Saved};
use crate::cpu::simd::Level;
#[cfg(target_arch = "x86_64")]
use crate::cpu::tile::Stored;
use crate::cpu::value;
#[cfg(target_arch = "x86_64")]
use pairs::Pairs;

#[cfg(target_arch = "x86_64")]
mod pairs;

/// What values stored in such a type must be able to do for the tiles of this machine.
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) trait Tiled: Stored<Pairs> {}
#[cfg(target_arch = "x86_64")]
impl<T: Stored<Pairs>> Tiled for T {}

/// What values stored in such a type must be able to do for the tiles of this machine.
#[cfg(not(target_arch = "x86_64"))]
pub(in crate::cpu) trait Tiled: Copy + Send + Sync {}
#[cfg(not(target_arch = "x86_64"))]
impl<T: Copy + Send + Sync> Tiled for T {}

/// A type in which what attention reads and writes is stored: f32 or bf16.
pub(in crate::cpu) trait Value: value::Value + Tiled {
    /// The values in f32.
    fn widened(values: &[Self]) -> Cow<'_, [f32]>;
}

impl Value for f32 {
    fn widened(values: &[f32]) -> Cow<'_, [f32]> {
        Cow::Borrowed(values)
    }
}

impl Value for bf16 {
    fn widened(values: &[bf16]) -> Cow<'_, [f32]> {
        Cow::Owned(values.iter().map(|x| x.to_f32()).collect())
    }
}

/// `to` <- values, rounded to its type.
fn narrow<O: Value>(values: &[f32], to: &mut [O]) {
    to.iter_mut().zip(values).for_each(|(to, &x)| *to = O::of(x));
}

/// See [`crate::Backend::attention`].
pub(in crate::cpu) fn forward<T: Value, O: Value>(
    (level, engine): (Level, Engine),
    plan: Plan,
    docs: &[(usize, usize)],
    qkv: &[T],
    out: &mut [O],
    lse: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(proof) = Pairs::new(level, engine) {
        return tasks::each_forward(plan, docs, qkv, out, lse, |work, task, scratch| {
            pairs::forward_task(proof, work, task, scratch);
        });
    }
    let _ = engine;
    let n_tokens: usize = docs.iter().map(|doc| doc.1).sum();
    let mut wide = vec![0.0; n_tokens * plan.heads.out_width()];
    attention::forward((level, Compute::Bf16), plan, docs, &T::widened(qkv), &mut wide, lse);
    narrow(&wide, out);
}

/// See [`crate::Backend::attention_backward`].
pub(in crate::cpu) fn backward<T: Value, O: Value>(
    (level, engine): (Level, Engine),
    plan: Plan,
    docs: &[(usize, usize)],
    saved: Saved<'_, T>,
    dqkv: &mut [O],
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(proof) = Pairs::new(level, engine) {
        return tasks::each_backward(
            plan,
            docs,
            saved,
            dqkv,
            |work, task, scratch| pairs::backward_task(proof, work, task, scratch),
            |to, sum| *to = O::of(sum),
        );
    }
    let _ = engine;
    let (dout, qkv, out) = (T::widened(saved.dout), T::widened(saved.qkv), T::widened(saved.out));
    let saved = Saved { dout: &dout, qkv: &qkv, out: &out, lse: saved.lse };
    let n_tokens: usize = docs.iter().map(|doc| doc.1).sum();
    let mut wide = vec![0.0; n_tokens * plan.heads.qkv_width()];
    attention::backward((level, Compute::Bf16), plan, docs, saved, &mut wide);
    narrow(&wide, dqkv);
}

#[cfg(test)]
mod tests;
