//! How the backward of attention is cut into tasks, and what they write put together.
//!
//! A task is a range of keys of one document and one key/value head. Documents are cut into ranges
//! only where there would be too few tasks; the gradients of the queries are then made in parts,
//! and added in the order of the ranges.

use std::ops::Range;

use rayon::prelude::*;

use super::backward::KEYS;
use super::pack::{self, Rows};
use super::{Columns, Plan};

/// Tasks that are enough to go round, unevenly, among the usual numbers of cores.
const TASKS_ENOUGH: usize = 12;

/// Most ranges into which the keys of a document are cut: each makes its part of the gradients of
/// all queries behind it.
const RANGES_MAX: usize = 4;

/// Fewest keys of a range where a document has several.
const RANGE_MIN: usize = 256;

/// The inputs of the backward.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Saved<'a, T> {
    pub(in crate::cpu) dout: &'a [T],
    pub(in crate::cpu) qkv: &'a [T],
    pub(in crate::cpu) out: &'a [T],
    pub(in crate::cpu) lse: &'a [f32],
}

/// A range of keys of one document, for one key/value head.
#[derive(Clone, Debug)]
pub(in crate::cpu) struct Task {
    /// First token of the document.
    pub(super) start: usize,
    /// Tokens of the document.
    pub(super) len: usize,
    /// The key/value head.
    pub(super) kv: usize,
    /// The keys, counted within the document.
    pub(super) keys: Range<usize>,
    /// First row of this range's part of the gradients of the queries, if those are made in parts.
    pub(super) part: Option<usize>,
}

impl Task {
    /// The queries that see one of its keys.
    pub(super) fn queries(&self, plan: Plan) -> Range<usize> {
        self.keys.start..plan.end_query(self.keys.end - 1, self.len)
    }
}

/// All tasks, and the rows of all parts.
fn tasks_of(plan: Plan, docs: &[(usize, usize)]) -> (Vec<Task>, usize) {
    let work = |len: usize| len * len.min(plan.mask.window.unwrap_or(len));
    let all: usize = docs.iter().map(|doc| work(doc.1)).sum();
    let (mut tasks, mut n_rows) = (Vec::new(), 0);
    for &(start, len) in docs.iter().filter(|doc| doc.1 > 0) {
        let wanted = (TASKS_ENOUGH * work(len)).div_ceil(all * plan.heads.n_kv);
        let n_ranges = wanted.min(len / RANGE_MIN).clamp(1, RANGES_MAX);
        let n_keys = len.div_ceil(n_ranges).next_multiple_of(KEYS);
        for from in (0..len).step_by(n_keys) {
            let keys = from..len.min(from + n_keys);
            let mut task = Task { start, len, kv: 0, keys, part: None };
            if n_keys < len {
                task.part = Some(n_rows);
                n_rows += task.queries(plan).len();
            }
            tasks.extend((0..plan.heads.n_kv).map(|kv| Task { kv, ..task.clone() }));
        }
    }
    (tasks, n_rows)
}

/// What a task reads and writes besides its scratch.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Work<'a, T, O> {
    pub(super) plan: Plan,
    pub(super) saved: Saved<'a, T>,
    /// Gradients, as `qkv` lies.
    pub(super) dqkv: Columns<O>,
    /// Parts of the gradients of queries, (rows, H K).
    pub(super) parts: Columns<f32>,
}

impl<'a, T, O> Work<'a, T, O> {
    /// Queries of one head, the gradients of their outputs, and the outputs.
    #[inline(always)]
    pub(super) fn queries(&self, task: &Task, head: usize, tile: Range<usize>) -> [Rows<'a, T>; 3] {
        let (heads, first) = (self.plan.heads, task.start + tile.start);
        let rows = |data: &'a [T], stride: usize| {
            let data = &data[first * stride + head * heads.dim..];
            Rows { data, stride, n: tile.len(), dim: heads.dim }
        };
        let Saved { dout, qkv, out, .. } = self.saved;
        let width = heads.out_width();
        [rows(qkv, heads.qkv_width()), rows(dout, width), rows(out, width)]
    }

    /// Asks for them.
    #[inline(always)]
    pub(super) fn ask_for_queries(&self, task: &Task, head: usize, tile: Range<usize>) {
        for rows in self.queries(task, head, tile) {
            rows.ask_for();
        }
    }
}

/// Runs all tasks, then adds up what was made in parts.
pub(in crate::cpu) fn each_task<T: Copy + Sync, O: Copy + Send + Sync>(
    plan: Plan,
    docs: &[(usize, usize)],
    saved: Saved<'_, T>,
    dqkv: &mut [O],
    run: impl Fn(Work<'_, T, O>, &Task, &mut Vec<f32>) + Sync,
    store: impl Fn(&mut O, f32) + Sync,
) {
    let (width, out_width) = (plan.heads.qkv_width(), plan.heads.out_width());
    let (tasks, n_rows) = tasks_of(plan, docs);
    let mut parts = vec![0.0; n_rows * out_width];
    let work = Work {
        plan,
        saved,
        dqkv: Columns::new(dqkv, width),
        parts: Columns::new(&mut parts, out_width),
    };
    tasks.par_iter().for_each(|task| pack::with_scratch(|scratch| run(work, task, scratch)));
    // The ranges of one document lie side by side; each is in `tasks` once for each key/value head.
    let ranges: Vec<&Task> = tasks.iter().filter(|t| t.kv == 0 && t.part.is_some()).collect();
    for ranges in ranges.chunk_by(|a, b| a.start == b.start) {
        let doc = ranges[0];
        let rows = &mut dqkv[doc.start * width..][..doc.len * width];
        rows.par_chunks_mut(width).with_min_len(16).enumerate().for_each(|(i, row)| {
            let mut sums = [0.0; 64];
            for at in (0..out_width).step_by(sums.len()) {
                let n = sums.len().min(out_width - at);
                sums.fill(0.0);
                for range in ranges.iter().filter(|range| range.queries(plan).contains(&i)) {
                    let part = range.part.unwrap_or(0) + i - range.keys.start;
                    let part = &parts[part * out_width + at..][..n];
                    sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
                row[at..at + n].iter_mut().zip(sums).for_each(|(to, sum)| store(to, sum));
            }
        });
    }
}
