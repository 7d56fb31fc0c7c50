//! What the factors of matrix products are rounded to.

use half::bf16;

/// The arithmetic of matrix products: the type to which their factors are rounded. Sums and results
/// are f32 in both, and so is everything that is not a product of matrices: norms, attention,
/// activations, loss, moments, and the weights that are trained.
///
/// bf16 is the arithmetic of PyTorch's autocast but for two things. Autocast rounds the results of
/// products too, because they are stored in 16 bits; here they stay f32. And attention computes in
/// f32 from queries, keys and values that nobody rounded: its products are of tiles that lie in the
/// nearest caches, where packing them as bf16 would cost what it saves, and probabilities of 8 bits
/// are the largest error that a flash attention in bf16 makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

    /// Its name in configurations and reports.
    pub fn name(self) -> &'static str {
        match self {
            Compute::F32 => "f32",
            Compute::Bf16 => "bf16",
        }
    }
}
