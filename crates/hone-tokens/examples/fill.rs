//! How full packs are, and how long finding them takes: reads lengths of documents from stdin, one a line, and packs them each way.
//!
//! `cargo run --release --example fill -- 2048 < lengths`

use std::error::Error;
use std::io::Write;
use std::time::Instant;

use hone_tokens::{Packing, pack};

fn main() -> Result<(), Box<dyn Error>> {
    let capacity: u32 = std::env::args().nth(1).ok_or("tokens of a pack, such as 2048")?.parse()?;
    let lens = std::io::read_to_string(std::io::stdin())?;
    let lens = lens.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>()?;
    let n_read = lens.len();
    let lens: Vec<u32> = lens.into_iter().filter(|len| (1..=capacity).contains(len)).collect();
    let tokens: u64 = lens.iter().map(|len| u64::from(*len)).sum();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} of {n_read} documents fit, {tokens} tokens", lens.len())?;
    for packing in [Packing::BestFit, Packing::Sequential, Packing::None] {
        let start = Instant::now();
        let packs = pack(&lens, capacity, packing).len() as u64;
        let seconds = start.elapsed().as_secs_f64();
        let fill = 100.0 * tokens as f64 / (packs * u64::from(capacity)) as f64;
        writeln!(out, "{packing:?}: {packs} packs, {fill:.3} % full, {seconds:.3} s")?;
    }
    Ok(())
}
