//! Compiles every `.cu` file of `kernels/` for the processor.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rustc-check-cfg=cfg(no_simulator)");
    // Whoever has no C++ compiler builds all the rest; the tests say that they were skipped.
    if !cc::Build::new().cpp(true).is_flag_supported("-std=c++17").unwrap_or(false) {
        println!("cargo:warning=no C++ compiler: kernels of GPUs are not tested");
        println!("cargo:rustc-cfg=no_simulator");
        return;
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
    println!("cargo:rerun-if-changed={}", kernels.display());
    let mut sources: Vec<PathBuf> = std::fs::read_dir(&kernels)
        .expect("kernels/ lies beside crates/")
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    let simulator = kernels.join("sim");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        // Products and sums that nvcc may fuse are not fused here, and nothing depends on it.
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        .flag("-Wall")
        .flag("-Wno-unused-function")
        .flag("-Wno-unknown-pragmas")
        .include(&simulator)
        .include(&kernels)
        .flag("-include")
        .flag("cusim.h")
        // A kernel registers itself as the program starts: nobody refers to it by name.
        .link_lib_modifier("+whole-archive")
        .file(simulator.join("threads.cpp"))
        .file(simulator.join("memory.cpp"));
    for source in &sources {
        build.file(copied_as_cpp(source));
    }
    build.compile("hone_kernels_sim");
}

/// A `.cpp` file that is the kernel file: compilers know a language by its ending.
fn copied_as_cpp(source: &Path) -> PathBuf {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names it"));
    let name = source.file_stem().expect("a file has a name").to_string_lossy();
    let to = out.join(format!("{name}.cpp"));
    let text = format!("#include \"{}\"\n", source.display());
    std::fs::write(&to, text).expect("the build's directory can be written");
    to
}
