//! Prints what this machine can do as one JSON line: GFLOP/s of a large product in bf16 and f32, GB/s of memory read. With `products`,
//! rates of the products of a training step instead.

fn main() {
    if std::env::args().nth(1).as_deref() == Some("products") {
        println!("{}", serde_json::Value::Array(bench_ops::products()));
        return;
    }
    let found = bench_ops::Ceilings::measure();
    let (bf16, f32, read) = (found.gemm_bf16, found.gemm_f32, found.read);
    println!("{}", serde_json::json!({"gemm_bf16": bf16, "gemm_f32": f32, "read": read}));
}
