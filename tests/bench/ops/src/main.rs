//! Prints the ceilings of this machine as one JSON line: GFLOP/s of a large product in bf16 and f32, GB/s of memory read.

fn main() {
    let found = bench_ops::Ceilings::measure();
    let (bf16, f32, read) = (found.gemm_bf16, found.gemm_f32, found.read);
    println!("{}", serde_json::json!({"gemm_bf16": bf16, "gemm_f32": f32, "read": read}));
}
