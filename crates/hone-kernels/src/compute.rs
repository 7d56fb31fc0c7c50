//! What the factors of matrix products are rounded to.

use half::bf16;
use serde::{Deserialize, Serialize};

/// The arithmetic of matrix products and of attention: the type to which their factors are rounded.
/// Sums are f32 in both, and so is the arithmetic of everything that is neither: norms, activations,
/// loss, moments, and the weights that are trained.
///
/// Results are f32 as well, unless they go into a buffer of [`crate::Backend::zeros_rounded`]: what
/// is written there is rounded, whichever operator writes it. PyTorch's autocast rounds the results
/// of all products. A decoder keeps in such buffers what is a factor of products or is read again by
/// a backward, and in f32 what is added up: the residual stream and its gradient.
///
/// Attention rounds queries, keys, values and the gradient of its output, and then what tiles
/// multiply: probabilities and the gradients of scores. Scores, softmax with its maxima and sums,
/// and the slopes are f32. That is what a flash attention in bf16 does, PyTorch's among them. On
/// normal inputs, 9 heads of 64 over 3 and documents of 64 to 2,048 tokens, outputs stored in bf16
/// are off by 1.7e-3 to 2.0e-3 (root mean square, of their own), as PyTorch's are to within a
/// hundredth; gradients of queries by 2.5e-3 to 3.7e-3, PyTorch's alike; of keys and values by
/// 2.2e-3 to 3.4e-3, PyTorch's by 3.5e-3 to 6.5e-3: it rounds each head's part before the heads of
/// a group are added, here they are one sum. Without instructions for bf16 the
/// rounded values are multiplied in f32. The attention of one token against its cache is f32.
///
/// In configurations and reports it is written as its [`Compute::name`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Factors as they are.
    #[default]
    F32,
    /// Factors rounded to bf16, to nearest, ties to even; what is not a number stays so. Values
    /// below 2^-126, which a product of bf16 may take for zero, are the one exception.
    Bf16,
}

impl Compute {
    /// `x` as a factor of a product.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Compute::F32 => x,
            Compute::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }

    /// Bytes of a weight (out, in) that [`crate::Backend::freeze`] has taken on the CPU: in bf16 it is
    /// packed in groups of 16 rows and pairs of columns, and what is missing in the last of them is
    /// zeros.
    pub fn frozen_bytes(self, out: usize, inp: usize) -> usize {
        match self {
            Compute::F32 => size_of::<f32>() * out * inp,
            Compute::Bf16 => size_of::<bf16>() * out.next_multiple_of(16) * inp.next_multiple_of(2),
        }
    }

    /// Bytes of a value that is kept rounded: of a weight that [`crate::Backend::freeze`] has taken,
    /// of a buffer that [`crate::Backend::zeros_rounded`] has made.
    pub fn value_bytes(self) -> usize {
        match self {
            Compute::F32 => size_of::<f32>(),
            Compute::Bf16 => size_of::<bf16>(),
        }
    }

    /// Its name in configurations and reports.
    pub fn name(self) -> &'static str {
        match self {
            Compute::F32 => "f32",
            Compute::Bf16 => "bf16",
        }
    }
}
