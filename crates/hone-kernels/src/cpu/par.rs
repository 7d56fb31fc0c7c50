//! How work is cut into tasks: by the shape alone, never by the number of threads.

use std::ops::Range;

use rayon::prelude::*;

/// Values a task of a light loop handles: 64 KiB, long enough to pay for being scheduled.
pub(super) const TASK_VALUES: usize = 1 << 14;

/// Rows of `width` values that make a task.
pub(super) fn task_rows(width: usize) -> usize {
    (TASK_VALUES / width.max(1)).max(1)
}

/// Calls `f(task, piece)` on pieces of `size` values of `x`, on all threads if there are several.
pub(super) fn pieces<T: Send>(x: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
    if x.len() <= size {
        if !x.is_empty() {
            f(0, x);
        }
        return;
    }
    x.par_chunks_mut(size).enumerate().for_each(|(task, piece)| f(task, piece));
}

/// `f` of tasks 0 .. n, collected in their order.
pub(super) fn map<T: Send>(n: usize, f: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    if n <= 1 {
        return (0..n).map(f).collect();
    }
    (0..n).into_par_iter().map(f).collect()
}

/// A pointer that tasks share, each writing a part that no other touches.
#[derive(Clone, Copy)]
pub(super) struct SharedPtr<T>(pub(super) *mut T);

// SAFETY: it is only a number; every use that reads or writes through it states why its parts are
// disjoint.
#[allow(unsafe_code, reason = "tasks write disjoint parts of one buffer")]
unsafe impl<T> Send for SharedPtr<T> {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "tasks write disjoint parts of one buffer")]
unsafe impl<T> Sync for SharedPtr<T> {}

impl<T> SharedPtr<T> {
    /// The pointer `offset` values further on.
    pub(super) fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

/// Calls `run` with the rows and the columns of each block of an (m, n) matrix that is cut into blocks
/// of these sides; in parallel where there are several.
pub(super) fn each_block(
    (m, n): (usize, usize),
    (rows, cols): (usize, usize),
    run: impl Fn(Range<usize>, Range<usize>) + Sync,
) {
    let n_across = n.div_ceil(cols);
    let run = |task: usize| {
        let (i, j) = (task / n_across * rows, task % n_across * cols);
        run(i..m.min(i + rows), j..n.min(j + cols));
    };
    match m.div_ceil(rows) * n_across {
        1 => run(0),
        tasks => (0..tasks).into_par_iter().for_each(run),
    }
}
