//! What a GPU must get right, tried on the one that is there: every operator of the conformance table against the plain
//! twin, rounded buffers, and whole trainings beside the processor's.
//!
//! `gpu_check [directory]`; `just gpu-check` makes a bundle of it that runs on a machine without Rust. A table goes to the
//! standard output, `results.json` into the directory. Exit codes: 0 all is right, 1 something is not, 4 no device.

mod operators;
mod trainings;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use hone_kernels::gpu::Gpu;
use hone_kernels::gpu::cuda::Cuda;
use serde_json::{Value, json};

/// What was tried, on what, and what came of it.
pub(crate) struct Check {
    /// What was tried.
    pub(crate) name: String,
    /// Whether it holds.
    pub(crate) passed: bool,
    /// What was found, in words and figures.
    pub(crate) found: String,
}

fn main() -> io::Result<ExitCode> {
    let out = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| ".".to_owned()));
    let device = match Cuda::open(0) {
        Ok(device) => device,
        Err(error) => {
            writeln!(io::stderr(), "error: {error}")?;
            return Ok(ExitCode::from(4));
        }
    };
    let about = describe(&device);
    writeln!(io::stdout(), "{about}")?;
    let gpu = Gpu::new(device);
    let start = Instant::now();
    let mut checks = operators::run(&gpu);
    checks.extend(trainings::run(&gpu));
    let mut stdout = io::stdout().lock();
    for Check { name, passed, found } in &checks {
        writeln!(stdout, "{} {name:<40} {found}", if *passed { "ok  " } else { "FAIL" })?;
    }
    let n_failed = checks.iter().filter(|check| !check.passed).count();
    let seconds = start.elapsed().as_secs_f64();
    writeln!(stdout, "{} checks, {n_failed} failed, {seconds:.1} s", checks.len())?;
    let rows: Vec<Value> = checks
        .iter()
        .map(|check| json!({"name": check.name, "passed": check.passed, "found": check.found}))
        .collect();
    let results = json!({"device": about, "seconds": seconds, "checks": rows});
    std::fs::write(out.join("results.json"), format!("{results:#}\n"))?;
    Ok(ExitCode::from(u8::from(n_failed > 0)))
}

/// The device's name, its compute capability, its memory.
fn describe(device: &Cuda) -> String {
    let (major, minor) = device.capability();
    let memory = device.memory().map_or_else(
        |error| error.to_string(),
        |(free, all)| format!("{:.1} of {:.1} GB free", free as f64 / 1e9, all as f64 / 1e9),
    );
    format!("{}, compute capability {major}.{minor}, {memory}", device.device_name())
}
