//! Compiles the CUDA kernels, where the feature `cuda` asks for them: one fat binary a file, of machine code
//! for compute capabilities 8.0 and 9.0 and of PTX that drivers make code of for later ones.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What each file is compiled for.
const TARGETS: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_80,code=compute_80"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
    println!("cargo:rerun-if-changed={}", kernels.display());
    println!("cargo:rerun-if-env-changed=NVCC");
    let nvcc = std::env::var_os("NVCC").map_or_else(|| PathBuf::from("nvcc"), PathBuf::from);
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names it"));
    let mut table = String::from("pub(super) const KERNELS: &[(&str, &[u8])] = &[\n");
    for source in sources(&kernels) {
        let name = source.file_stem().expect("a file has a name").to_string_lossy().into_owned();
        let image = out.join(format!("{name}.fatbin"));
        compile(&nvcc, &source, &image);
        table += &format!("    ({name:?}, include_bytes!({:?})),\n", image.display().to_string());
    }
    table += "];\n";
    std::fs::write(out.join("kernels.rs"), table).expect("the build's directory can be written");
}

/// The `.cu` files, in order.
fn sources(kernels: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(kernels).expect("kernels/ lies beside crates/");
    let mut sources: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    sources
}

fn compile(nvcc: &Path, source: &Path, image: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "-o"]).arg(image).arg(source);
    for target in TARGETS {
        command.args(["-gencode", target]);
    }
    let done = command.status();
    assert!(
        done.as_ref().is_ok_and(|status| status.success()),
        "{} did not compile {}: {done:?}. nvcc of CUDA 13 is wanted: `just cuda-toolkit` installs it, and NVCC names it",
        nvcc.display(),
        source.display()
    );
}
