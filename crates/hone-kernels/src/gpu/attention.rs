//! Attention, its backward, and a step of decoding; `kernels/attention.cu`, `kernels/attention_mma.cu`
//! and `kernels/decode.cu`.
//!
//! Tiles of queries or keys are listed here, so that a block exists where there is work and no other: those
//! that see most come first, as blocks begin in the order of their numbers.

use super::{Arg, Device, Gpu, GpuBuf, Launch, Uploaded, view};
use crate::shape::{check_heads, check_mask, documents};
use crate::{AttnMask, Compute, Heads, Mat};

/// Queries or keys of a tile, `TILE` in `kernels/attention.cuh`.
const TILE: usize = 64;

/// `n` as kernels count inside a document, or count heads.
fn small(n: usize) -> i32 {
    i32::try_from(n).expect("less than 2^31")
}

/// The arguments of heads and of the mask.
fn plan(heads: Heads, mask: AttnMask) -> [Arg; 6] {
    check_heads(heads);
    check_mask(mask);
    [
        small(heads.n_q).into(),
        small(heads.n_kv).into(),
        small(heads.dim).into(),
        mask.window.map_or(i32::MAX, |w| i32::try_from(w).unwrap_or(i32::MAX)).into(),
        mask.scale.into(),
        mask.soft_cap.unwrap_or(0.0).into(),
    ]
}

/// What a tile's rows are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Queries,
    Keys,
}

/// The tiles of all documents.
struct Tiles<D: Device> {
    on_device: Uploaded<D>,
    n: usize,
}

impl<D: Device> Tiles<D> {
    /// Start and length of a document and the first row in it, of each tile; most work first.
    fn new(gpu: &Gpu<D>, docs: &[(usize, usize)], mask: AttnMask, side: Side) -> Self {
        let mut tiles = Vec::new();
        for &(start, len) in docs {
            for first in (0..len).step_by(TILE) {
                // Tiles of the other side that it meets, to within one.
                let all = if side == Side::Queries { (first + TILE).min(len) } else { len - first };
                let work = mask.window.map_or(all, |w| all.min(w.saturating_add(TILE)));
                tiles.push((work.div_ceil(TILE), start, len, first));
            }
        }
        // Those with as much work stay as they lie.
        tiles.sort_by_key(|&(work, ..)| std::cmp::Reverse(work));
        let numbers: Vec<u32> = (tiles.iter())
            .flat_map(|&(_, start, len, first)| [start, len, first])
            .map(|n| u32::try_from(small(n)).expect("not negative"))
            .collect();
        Tiles { on_device: gpu.put_u32(&numbers), n: tiles.len() }
    }

    /// A block of the kernel for each tile, head, and part of the columns.
    fn launch(&self, n_heads: usize, kernel: &Kernel) -> Launch {
        let x = u32::try_from(self.n * n_heads).expect("fewer than 2^31 blocks");
        Launch { grid: [x, kernel.parts, 1], shared_bytes: kernel.shared_bytes }
    }
}

/// Kernels of one operator: those that take any head, for so many columns of a result, and those that
/// multiply on tensor cores, for heads of one width.
struct Family {
    plain: &'static [(usize, &'static str)],
    mma: [(usize, &'static str); 2],
    /// What a block of the latter shares: tiles of bf16, and values of f32.
    tiles: usize,
    values: usize,
}

const FORWARD: Family = Family {
    plain: &[(64, "attention_plain64"), (128, "attention_plain128"), (256, "attention_plain256")],
    mma: [(64, "attention_mma64"), (128, "attention_mma128")],
    tiles: 3,
    values: 0,
};
const OF_QUERIES: Family = Family {
    plain: &[(64, "attention_dq_plain64"), (128, "attention_dq_plain128")],
    mma: [(64, "attention_dq_mma64"), (128, "attention_dq_mma128")],
    tiles: 6,
    values: 0,
};
const OF_KEYS: Family = Family {
    plain: &[(64, "attention_dkv_plain64"), (128, "attention_dkv_plain128")],
    mma: [(64, "attention_dkv_mma64"), (128, "attention_dkv_mma128")],
    tiles: 6,
    // The log-sum-exp and delta of the queries of two tiles.
    values: 4 * TILE,
};

/// The kernel of a family for a head.
struct Kernel {
    name: &'static str,
    /// Blocks that share the columns of a head.
    parts: u32,
    shared_bytes: u32,
    /// Whether it rounds what it multiplies, where it may do either.
    rounds: Option<bool>,
}

impl Kernel {
    fn new(family: &Family, dim: usize, compute: Compute) -> Self {
        let mma = family.mma.iter().find(|(width, _)| *width == dim && compute == Compute::Bf16);
        if let Some(&(_, name)) = mma {
            let bytes = family.tiles * TILE * dim * Compute::Bf16.value_bytes()
                + family.values * Compute::F32.value_bytes();
            let shared_bytes = u32::try_from(bytes).expect("few");
            return Kernel { name, parts: 1, shared_bytes, rounds: None };
        }
        let fits = family.plain.iter().find(|(columns, _)| *columns >= dim);
        let &(columns, name) = fits.or(family.plain.last()).expect("a family has kernels");
        let parts = u32::try_from(dim.div_ceil(columns)).expect("few");
        Kernel { name, parts, shared_bytes: 0, rounds: Some(compute == Compute::Bf16) }
    }

    /// What it reads: one type for all factors, bf16 on tensor cores; otherwise the wider of those that
    /// there are, which holds the other's values too.
    fn reads<D: Device>(&self, factors: &[&GpuBuf<D>]) -> Compute {
        let all_rounded = factors.iter().all(|buf| buf.holds == Compute::Bf16);
        if self.rounds.is_none() || all_rounded { Compute::Bf16 } else { Compute::F32 }
    }

    /// Runs it on these tiles; `args` are those before the tiles.
    fn run<D: Device>(
        &self,
        gpu: &Gpu<D>,
        holds: &[Compute],
        tiles: (&Tiles<D>, usize),
        args: &[Arg],
        plan: [Arg; 6],
    ) {
        let (tiles, n_heads) = tiles;
        let mut args = args.to_vec();
        args.push(tiles.on_device.arg());
        args.extend(plan);
        args.extend(self.rounds.map(Arg::from));
        gpu.launch(self.name, holds, tiles.launch(n_heads, self), &args);
    }
}

/// A buffer as it is, or a copy of its first values that holds something else.
enum Held<'a, D: Device> {
    There(&'a GpuBuf<D>),
    Made(GpuBuf<D>),
}

impl<'a, D: Device> Held<'a, D> {
    fn new(gpu: &Gpu<D>, buf: &'a GpuBuf<D>, rows: usize, cols: usize, holds: Compute) -> Self {
        if buf.holds == holds {
            Held::There(buf)
        } else {
            Held::Made(gpu.converted(Mat::new(buf, rows, cols), holds))
        }
    }

    fn buf(&self) -> &GpuBuf<D> {
        match self {
            Held::There(buf) => buf,
            Held::Made(buf) => buf,
        }
    }
}

pub(super) fn attention<D: Device>(
    gpu: &Gpu<D>,
    qkv: &GpuBuf<D>,
    heads: Heads,
    seq_lens: &[usize],
    mask: AttnMask,
    out: &mut GpuBuf<D>,
    lse: &mut GpuBuf<D>,
) {
    let plan = plan(heads, mask);
    let docs = documents(heads, seq_lens, qkv.len, out.len, lse.len);
    let t: usize = seq_lens.iter().sum();
    if t == 0 {
        return;
    }
    let kernel = Kernel::new(&FORWARD, heads.dim, gpu.compute);
    let reads = kernel.reads(&[qkv]);
    let qkv = Held::new(gpu, qkv, t, heads.qkv_width(), reads);
    let tiles = Tiles::new(gpu, &docs, mask, Side::Queries);
    let args = [
        qkv.buf().first(t * heads.qkv_width()),
        out.first(t * heads.out_width()),
        lse.first_f32(t * heads.n_q),
    ];
    kernel.run(gpu, &[reads, out.holds], (&tiles, heads.n_q), &args, plan);
}

/// The sums of `dout out`, one a row and head, in f32.
fn delta<D: Device>(
    gpu: &Gpu<D>,
    dout: &GpuBuf<D>,
    out: &GpuBuf<D>,
    rows: usize,
    dim: usize,
) -> GpuBuf<D> {
    let sums = gpu.buf(rows, Compute::F32);
    let args = [
        dout.first(rows * dim),
        out.first(rows * dim),
        sums.first(rows),
        rows.into(),
        small(dim).into(),
    ];
    // A warp each, eight in a block.
    let launch = super::blocks(rows.div_ceil(8));
    gpu.launch("attention_delta", &[dout.holds, out.holds], launch, &args);
    sums
}

#[allow(clippy::too_many_arguments, reason = "the operator's")]
pub(super) fn attention_backward<D: Device>(
    gpu: &Gpu<D>,
    dout: &GpuBuf<D>,
    qkv: &GpuBuf<D>,
    out: &GpuBuf<D>,
    lse: &GpuBuf<D>,
    heads: Heads,
    seq_lens: &[usize],
    mask: AttnMask,
    dqkv: &mut GpuBuf<D>,
) {
    let plan = plan(heads, mask);
    let docs = documents(heads, seq_lens, qkv.len.min(dqkv.len), out.len.min(dout.len), lse.len);
    let t: usize = seq_lens.iter().sum();
    if t == 0 {
        return;
    }
    let delta = delta(gpu, dout, out, t * heads.n_q, heads.dim);
    let kernel = |family| Kernel::new(family, heads.dim, gpu.compute);
    let reads = kernel(&OF_KEYS).reads(&[dout, qkv]);
    let dout = Held::new(gpu, dout, t, heads.out_width(), reads);
    let qkv = Held::new(gpu, qkv, t, heads.qkv_width(), reads);
    let args = [
        dout.buf().first(t * heads.out_width()),
        qkv.buf().first(t * heads.qkv_width()),
        lse.first_f32(t * heads.n_q),
        delta.first(t * heads.n_q),
        dqkv.first(t * heads.qkv_width()),
    ];
    for (side, n_heads, family) in
        [(Side::Keys, heads.n_kv, &OF_KEYS), (Side::Queries, heads.n_q, &OF_QUERIES)]
    {
        let tiles = Tiles::new(gpu, &docs, mask, side);
        kernel(family).run(gpu, &[reads, dqkv.holds], (&tiles, n_heads), &args, plan);
    }
}

/// Query heads and columns of a block of the decoding kernel, `HEADS` and `COLUMNS` there.
const DECODE_HEADS: usize = 8;
const DECODE_COLUMNS: usize = 128;

/// Bytes that such a block shares, `Found` and its queries there: for each of eight warps the weights of 32
/// keys, the maximum, the sum and the result of each head.
fn decode_shared(dim: usize) -> u32 {
    let values = 8 * DECODE_HEADS * (32 + 2 + DECODE_COLUMNS) + DECODE_HEADS * dim;
    u32::try_from(values * size_of::<f32>()).expect("few")
}

#[allow(clippy::too_many_arguments, reason = "the operator's")]
pub(super) fn attention_decode<D: Device>(
    gpu: &Gpu<D>,
    q: Mat<'_, Gpu<D>>,
    k_cache: &GpuBuf<D>,
    v_cache: &GpuBuf<D>,
    capacity: usize,
    lens: &[usize],
    heads: Heads,
    mask: AttnMask,
    out: &mut GpuBuf<D>,
) {
    let plan = plan(heads, mask);
    assert!(q.rows == lens.len() && q.cols == heads.out_width(), "{} x {}", q.rows, q.cols);
    assert!(lens.iter().all(|&len| 0 < len && len <= capacity), "{lens:?} of {capacity}");
    assert!(k_cache.holds == v_cache.holds, "both caches are rounded, or neither");
    let n = lens.len();
    if n == 0 {
        return;
    }
    let cached = n * capacity * heads.n_kv * heads.dim;
    let numbers: Vec<u32> =
        lens.iter().map(|&len| u32::try_from(small(len)).expect("not negative")).collect();
    let (lens, from) = (gpu.put_u32(&numbers), view(gpu, &q));
    let mut args = vec![
        from.at,
        from.stride,
        k_cache.first(cached),
        v_cache.first(cached),
        capacity.into(),
        lens.arg(),
        out.first(n * heads.out_width()),
    ];
    args.extend(plan);
    let group = heads.n_q / heads.n_kv;
    let grid = [n * heads.n_kv, group.div_ceil(DECODE_HEADS), heads.dim.div_ceil(DECODE_COLUMNS)]
        .map(|n| u32::try_from(n).expect("fewer than 2^31 blocks"));
    let launch = Launch { grid, shared_bytes: decode_shared(heads.dim) };
    gpu.launch("attention_decode", &[from.holds, k_cache.holds, out.holds], launch, &args);
}
