//! The products of a training step of SmolLM2-135M, each by itself: rates in bf16 and in f32.

use hone_kernels::{Backend, Compute, Cpu, CpuBuf, CpuFrozen, Mat, MatMut, Op};
use serde_json::{Value, json};

use crate::{median_of, normals};

/// Tokens, inputs and outputs of the linear maps: queries, keys and values; attention's output; gates and ups; the map down; the head,
/// some rows at a time.
const MAPS: [[usize; 3]; 5] =
    [[2048, 576, 960], [2048, 576, 576], [2048, 576, 3072], [2048, 1536, 576], [256, 576, 49_152]];

/// Tokens, wide side and rank of an adapter's products.
const THIN: [[usize; 3]; 2] = [[2048, 576, 16], [2048, 1536, 16]];

/// How long each is measured, in seconds.
const SECONDS: f64 = 0.25;

/// A map's buffers, as a step has them: activations rounded where products are.
struct Map {
    cpu: Cpu,
    sides: [usize; 3],
    x: CpuBuf,
    y: CpuBuf,
}

impl Map {
    fn new(compute: Compute, [t, inp, out]: [usize; 3]) -> Self {
        let cpu = Cpu::new().with_compute(compute);
        let rounded = |n: usize| {
            let mut buf = cpu.zeros_rounded(n);
            cpu.copy(&normals(&cpu, n), &mut buf, n);
            buf
        };
        let (x, y) = (rounded(t * inp), rounded(t * out));
        Map { cpu, sides: [t, inp, out], x, y }
    }

    /// GFLOP/s.
    fn rate(&self, run: impl FnMut()) -> f64 {
        let [t, inp, out] = self.sides;
        2e-9 * (t * inp * out) as f64 / median_of(SECONDS, run)
    }

    /// Y <- X Wt.
    fn forward(&mut self, w: &CpuFrozen) -> f64 {
        let [t, inp, out] = self.sides;
        let mut y = self.cpu.zeros_rounded(t * out);
        let x = Mat::new(&self.x, t, inp);
        self.rate(|| self.cpu.linear(x, w, MatMut::new(&mut y, t, out), 0.0))
    }

    /// dX <- dY W.
    fn backward(&mut self, w: &CpuFrozen) -> f64 {
        let [t, inp, out] = self.sides;
        let mut dx = self.cpu.zeros(t * inp);
        let dy = Mat::new(&self.y, t, out);
        self.rate(|| self.cpu.linear_dx(dy, w, MatMut::new(&mut dx, t, inp), 0.0))
    }

    /// dW <- dYt X.
    fn gradient(&mut self) -> f64 {
        let [t, inp, out] = self.sides;
        let mut dw = self.cpu.zeros(out * inp);
        let (x, dy) = (Mat::new(&self.x, t, inp), Mat::new(&self.y, t, out));
        self.rate(|| {
            self.cpu.gemm(dy, Op::T, x, Op::N, MatMut::new(&mut dw, out, inp), 1.0, 0.0);
        })
    }

    /// U <- X At, `x` being wide and `y` thin.
    fn project(&mut self) -> f64 {
        let [t, inp, rank] = self.sides;
        let (a, mut u) = (normals(&self.cpu, rank * inp), self.cpu.zeros(t * rank));
        let (x, a) = (Mat::new(&self.x, t, inp), Mat::new(&a, rank, inp));
        self.rate(|| {
            self.cpu.gemm(x, Op::N, a, Op::T, MatMut::new(&mut u, t, rank), 1.0, 0.0);
        })
    }

    /// dA <- dUt X.
    fn thin_gradient(&mut self) -> f64 {
        let [t, inp, rank] = self.sides;
        let (du, mut da) = (normals(&self.cpu, t * rank), self.cpu.zeros(rank * inp));
        let (x, du) = (Mat::new(&self.x, t, inp), Mat::new(&du, t, rank));
        self.rate(|| {
            self.cpu.gemm(du, Op::T, x, Op::N, MatMut::new(&mut da, rank, inp), 1.0, 0.0);
        })
    }
}

/// One JSON object a product, in the order of `peers/torch_products.py`.
pub fn products() -> Vec<Value> {
    let both = |of: &dyn Fn(Compute) -> f64| [Compute::Bf16, Compute::F32].map(of);
    let mut found = Vec::new();
    let mut add = |what: &str, [t, inp, out]: [usize; 3], of: &dyn Fn(Compute) -> f64| {
        let [bf16, f32] = both(of);
        found.push(json!({"what": what, "sides": [t, inp, out], "bf16": bf16, "f32": f32}));
    };
    for sides in MAPS {
        let [_, inp, out] = sides;
        let weight = |cpu: &Cpu| cpu.freeze(&cpu.download(&normals(cpu, out * inp)), out, inp);
        let with = |compute: Compute| {
            let map = Map::new(compute, sides);
            let weight = weight(&map.cpu);
            (map, weight)
        };
        add("X Wt", sides, &|compute| {
            let (mut map, weight) = with(compute);
            map.forward(&weight)
        });
        add("dY W", sides, &|compute| {
            let (mut map, weight) = with(compute);
            map.backward(&weight)
        });
        add("dYt X", sides, &|compute| Map::new(compute, sides).gradient());
    }
    for sides in THIN {
        add("X At", sides, &|compute| Map::new(compute, sides).project());
        add("dUt X", sides, &|compute| Map::new(compute, sides).thin_gradient());
    }
    found
}
