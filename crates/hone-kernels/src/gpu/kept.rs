//! What lies on the device for all operators of a backend and its clones.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::{Device, Gpu, GpuBuf, Uploaded};
use crate::{CodeBook, Compute};

/// What is made when it is first asked for.
pub(super) struct Kept<D: Device> {
    books: OnceLock<Uploaded<D>>,
    /// Room for a weight that is dequantised to be multiplied, and its bytes.
    scratch: Mutex<Option<(D::Memory, usize)>>,
}

impl<D: Device> Kept<D> {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Kept { books: OnceLock::new(), scratch: Mutex::new(None) })
    }
}

impl<D: Device> std::fmt::Debug for Kept<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

/// A book as kernels search it: its values; then its midpoints as a tree, whose node k has its children
/// at 2k and 2k + 1, and whose first place is empty.
fn laid_out(book: &CodeBook) -> impl Iterator<Item = f32> {
    let midpoint = |node: usize| {
        let level = node.ilog2();
        let place = node - (1 << level);
        book.bounds[((2 * place + 1) << (7 - level)) - 1]
    };
    book.values.into_iter().chain(std::iter::once(0.0)).chain((1..256).map(midpoint))
}

impl<D: Device> Gpu<D> {
    /// The books of the first and of the second moments of 8 bits.
    pub(super) fn books(&self) -> &Uploaded<D> {
        self.kept.books.get_or_init(|| {
            let books = [CodeBook::signed(), CodeBook::unsigned()];
            self.put_f32(&books.into_iter().flat_map(laid_out).collect::<Vec<f32>>())
        })
    }

    /// Calls `run` with a buffer of `n` values that hold this and may be anything. It is the same memory every
    /// time, as large as the largest has been, so that nothing is allocated and cleared for each
    /// product; `run` may not come here again.
    pub(super) fn with_scratch<T>(
        &self,
        n: usize,
        holds: Compute,
        run: impl FnOnce(&mut GpuBuf<D>) -> T,
    ) -> T {
        // Held until all has been asked for: then the next may write over it, as the device keeps the order.
        let mut kept = self.kept.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = n * holds.value_bytes();
        let (memory, bytes) = match kept.take() {
            Some((memory, bytes)) if bytes >= wanted => (memory, bytes),
            // The smaller one is freed before.
            smaller => {
                drop(smaller);
                (self.device.alloc_unset(wanted), wanted)
            }
        };
        let mut buf = GpuBuf { memory, len: n, holds };
        let result = run(&mut buf);
        *kept = Some((buf.memory, bytes));
        result
    }
}
