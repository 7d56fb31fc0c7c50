//! How fast text becomes ids: the library's `encode_batch`, this crate by way of the library, this crate's own encoder, in turns.
//!
//! `cargo run --release --example encode_speed -- tokenizer.json rows.jsonl [pairs]`; a row is an object with `instruction`,
//! `input` and `output`, rendered as ChatML. Each round encodes all rows on two threads. CPU time counts where others compute too.

use std::error::Error;
use std::io::Write;
use std::time::Instant;

use hone_tokens::Vocab;
use serde_json::Value;
use tokenizers::Tokenizer;

/// Threads of a round; the library is told by RAYON_NUM_THREADS.
const THREADS: usize = 2;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, tokenizer, rows, rest @ ..] = &args[..] else {
        return Err("tokenizer.json rows.jsonl [pairs]".into());
    };
    let pairs: usize = rest.first().map_or(Ok(5), |n| n.parse())?;
    let json = std::fs::read(tokenizer)?;
    let texts: Vec<String> =
        std::fs::read_to_string(rows)?.lines().map(chatml).collect::<Result<_, _>>()?;
    let mut out = std::io::stdout().lock();
    let begun = (Instant::now(), cpu_seconds());
    let fast = Vocab::from_json(&json)?;
    let loaded = (begun.0.elapsed().as_secs_f64(), cpu_seconds() - begun.1);
    let begun = Instant::now();
    let reference = Vocab::reference(&json)?;
    writeln!(
        out,
        "{} rows; loaded in {:.3} s ({:.2} s of CPU), by the library in {:.3} s; compiled: {}",
        texts.len(),
        loaded.0,
        loaded.1,
        begun.elapsed().as_secs_f64(),
        fast.is_compiled()
    )?;
    let library = Tokenizer::from_bytes(&json)?;
    let ways: [(&str, &dyn Fn() -> usize); 3] = [
        ("library", &|| {
            let encodings = library.encode_batch(texts.clone(), false).expect("it encodes");
            encodings.iter().map(|e| e.get_ids().len()).sum()
        }),
        ("reference", &|| on_threads(&reference, &texts)),
        ("fast", &|| on_threads(&fast, &texts)),
    ];
    let mut seconds = vec![Vec::new(); ways.len()];
    for round in 0..=pairs {
        for (way, (name, run)) in ways.iter().enumerate() {
            let begun = (Instant::now(), cpu_seconds());
            let n = run();
            let (wall, cpu) = (begun.0.elapsed().as_secs_f64(), cpu_seconds() - begun.1);
            let rates = (texts.len() as f64 / wall, n as f64 / wall / 1e6, n as f64 / cpu / 1e6);
            writeln!(
                out,
                "{round} {name:<9} {n} tokens, wall {wall:.3} s, CPU {cpu:.2} s; {:.0} rows/s, {:.2} M tokens/s, {:.2} M a CPU second",
                rates.0, rates.1, rates.2
            )?;
            // The first round warms caches up.
            if round > 0 {
                seconds[way].push((wall, cpu));
            }
        }
    }
    let fast = &seconds[2];
    for (way, name) in ["library", "reference"].iter().enumerate() {
        let ratio = |of: fn(&(f64, f64)) -> f64| {
            let mut all: Vec<f64> =
                seconds[way].iter().zip(fast).map(|(a, b)| of(a) / of(b).max(0.01)).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        writeln!(
            out,
            "fast is {:.1} x {name} by wall time, {:.1} x by CPU",
            ratio(|t| t.0),
            ratio(|t| t.1)
        )?;
    }
    Ok(())
}

fn chatml(line: &str) -> serde_json::Result<String> {
    let row: Value = serde_json::from_str(line)?;
    let part = |name: &str| row[name].as_str().unwrap_or("");
    Ok(format!(
        "<|im_start|>user\n{}\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n",
        part("instruction"),
        part("input"),
        part("output")
    ))
}

fn on_threads(vocab: &Vocab, texts: &[String]) -> usize {
    let encode = |text: &String| {
        let all = 0..text.len();
        vocab.encode(text, std::slice::from_ref(&all)).expect("it encodes").ids.len()
    };
    std::thread::scope(|scope| {
        let halves = texts.chunks(texts.len().div_ceil(THREADS));
        let threads: Vec<_> = halves
            .map(|half| scope.spawn(move || half.iter().map(encode).sum::<usize>()))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("it does not panic")).sum()
    })
}

/// CPU time of this process; 0 where /proc has no such thing.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let ticks = |idx: usize| fields.get(idx).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}
