//! Tables of rotary positions: cosines and sines of positions, for every stretch of the frequencies
//! that a document may need.
//!
//! Most scalings have one set of frequencies. LongRoPE has two, chosen by a document's length, and
//! dynamic scaling one for each length beyond the original context. So a table has sections, and
//! the rows of a document are those of its section: a document in a pack is rotated as it is alone.
//!
//! Frequencies and angles are rounded to f32 where transformers rounds them, because at a position
//! in the thousands the product's rounding is the larger part of a logit's difference.

use std::collections::BTreeMap;

use hone_kernels::Backend;

use crate::config::{Rope, RopeScaling};
use crate::{Batch, ModelConfig};

/// Section of documents that need nothing special.
const COMMON: usize = 0;

/// Section of documents beyond LongRoPE's original context. Dynamic scaling takes the documents'
/// lengths, which are larger.
const LONG: usize = 1;

/// Where a section's rows lie.
#[derive(Clone, Copy, Debug)]
struct Section {
    first: usize,
    n_rows: usize,
}

/// The table of one set of rotary positions.
struct Table<B: Backend> {
    rope: Rope,
    /// R.
    rotary_dim: usize,
    /// `max_position_embeddings`.
    positions: usize,
    /// (P, R): a row is R/2 cosines, then R/2 sines.
    cos_sin: B::Buf,
    sections: BTreeMap<usize, Section>,
    /// Row of each token of the batch last prepared.
    rows: Vec<u32>,
}

/// All tables of a model.
pub(crate) struct Ropes<B: Backend> {
    tables: Vec<Table<B>>,
}

impl<B: Backend> Ropes<B> {
    /// Empty tables.
    pub(crate) fn new(backend: &B, config: &ModelConfig) -> Self {
        let table = |rope: Rope| Table {
            rope,
            rotary_dim: config.rotary_dim(),
            positions: config.max_position_embeddings,
            cos_sin: backend.zeros(0),
            sections: BTreeMap::new(),
            rows: Vec::new(),
        };
        Ropes { tables: config.ropes().into_iter().map(table).collect() }
    }

    /// Makes the tables large enough for a batch, and finds its rows.
    pub(crate) fn prepare(&mut self, backend: &B, batch: &Batch) {
        for table in &mut self.tables {
            table.reserve(backend, &batch.seq_lens);
            let mut rows = std::mem::take(&mut table.rows);
            rows.clear();
            for &len in &batch.seq_lens {
                rows.extend((0..len).map(|position| table.row(len, position)));
            }
            table.rows = rows;
        }
    }

    /// Makes the tables large enough for documents of these lengths.
    pub(crate) fn reserve(&mut self, backend: &B, lens: &[usize]) {
        self.tables.iter_mut().for_each(|table| table.reserve(backend, lens));
    }

    /// The table of a set, and the rows of the batch last prepared.
    pub(crate) fn of_batch(&self, set: usize) -> (&B::Buf, &[u32]) {
        (&self.tables[set].cos_sin, &self.tables[set].rows)
    }

    /// The rows of the last tokens of documents of these lengths, one list for each table.
    pub(crate) fn last_rows(&self, lens: &[usize]) -> Vec<Vec<u32>> {
        let rows = |table: &Table<B>| lens.iter().map(|&len| table.row(len, len - 1)).collect();
        self.tables.iter().map(rows).collect()
    }

    /// Whether the earlier tokens of a document are rotated otherwise once it grows to `len`, so
    /// that cached keys no longer hold.
    pub(crate) fn changes_at(&self, len: usize) -> bool {
        self.tables.iter().any(|table| len > 1 && table.section(len) != table.section(len - 1))
    }
}

impl<B: Backend> Table<B> {
    /// The section of a document of `len` tokens.
    fn section(&self, len: usize) -> usize {
        match self.rope.scaling {
            RopeScaling::Dynamic { .. } if len > self.positions => len.max(LONG + 1),
            RopeScaling::LongRope { original, .. } if len > original => LONG,
            _ => COMMON,
        }
    }

    /// The row of a position in a document of `len` tokens.
    fn row(&self, len: usize, position: usize) -> u32 {
        (self.sections[&self.section(len)].first + position) as u32
    }

    /// Makes the sections of documents of these lengths. Those that many lengths share at least
    /// double, so that they are seldom made anew; those of one length go when others come.
    fn reserve(&mut self, backend: &B, lens: &[usize]) {
        let mut needed = BTreeMap::new();
        for &len in lens {
            let n_rows = needed.entry(self.section(len)).or_insert(0);
            *n_rows = len.max(*n_rows);
        }
        let has = |(section, n_rows): (&usize, &usize)| {
            self.sections.get(section).is_some_and(|section| section.n_rows >= *n_rows)
        };
        if needed.iter().all(has) {
            return;
        }
        for (&section, old) in self.sections.range(..=LONG) {
            let n_rows = needed.entry(section).or_insert(old.n_rows);
            if *n_rows > old.n_rows {
                *n_rows = (2 * old.n_rows).min(self.positions).max(*n_rows);
            }
        }
        self.sections.clear();
        let mut values = Vec::new();
        for (section, n_rows) in needed {
            let first = values.len() / self.rotary_dim;
            self.sections.insert(section, Section { first, n_rows });
            self.fill(section, n_rows, &mut values);
        }
        self.cos_sin = backend.upload(&values);
    }

    /// Adds positions 0 to `n_rows` - 1 of a section.
    fn fill(&self, section: usize, n_rows: usize, values: &mut Vec<f32>) {
        let (frequencies, factor) =
            frequencies(&self.rope, self.rotary_dim, self.positions, section);
        for position in 0..n_rows {
            let angle = |&frequency: &f32| f64::from(position as f32 * frequency);
            values.extend(frequencies.iter().map(|f| angle(f).cos() as f32 * factor));
            values.extend(frequencies.iter().map(|f| angle(f).sin() as f32 * factor));
        }
    }
}

/// The frequencies of a section, R/2 of them, and the factor on their cosines and sines: those of
/// transformers' `modeling_rope_utils`.
fn frequencies(rope: &Rope, dim: usize, positions: usize, section: usize) -> (Vec<f32>, f32) {
    let theta = rope.theta as f32;
    let inverse = |w: f32| 1.0 / w;
    let plain = || waves(theta, dim).into_iter().map(inverse);
    match &rope.scaling {
        RopeScaling::Dynamic { factor } if section > LONG => {
            // Base' = base (s L / P - (s - 1))^(R / (R - 2)) of a document of L tokens.
            let factor = *factor as f32;
            let stretch = factor * section as f32 / positions as f32 - (factor - 1.0);
            let exponent = dim as f64 / (dim as f64 - 2.0);
            let theta = theta * f64::from(stretch).powf(exponent) as f32;
            (waves(theta, dim).into_iter().map(inverse).collect(), 1.0)
        }
        RopeScaling::None | RopeScaling::Dynamic { .. } => (plain().collect(), 1.0),
        RopeScaling::Linear { factor } => (plain().map(|f| f / *factor as f32).collect(), 1.0),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
            let blend =
                |f| llama3(f, *factor, [*low_freq_factor, *high_freq_factor], *original as f64);
            (plain().map(blend).collect(), 1.0)
        }
        RopeScaling::Yarn { attention_factor, .. } => {
            (yarn(rope, waves(theta, dim)), *attention_factor as f32)
        }
        RopeScaling::LongRope { short, long, attention_factor, .. } => {
            let divisors = if section == LONG { long } else { short };
            let waves = waves(theta, dim).into_iter().zip(divisors);
            (waves.map(|(w, d)| inverse(*d as f32 * w)).collect(), *attention_factor as f32)
        }
    }
}

/// theta^(2i / R), the waves' lengths over 2 pi.
fn waves(theta: f32, dim: usize) -> Vec<f32> {
    let wave = |i| {
        let exponent = (2 * i) as f32 / dim as f32;
        f64::from(theta).powf(f64::from(exponent)) as f32
    };
    (0..dim / 2).map(wave).collect()
}

/// Llama 3.1: a wave longer than the original context over `low` is divided by the factor, one
/// shorter than it over `high` is kept, and between the two both are blended.
fn llama3(frequency: f32, factor: f64, [low, high]: [f64; 2], original: f64) -> f32 {
    let wave = std::f32::consts::TAU / frequency;
    if wave < (original / high) as f32 {
        return frequency;
    }
    if wave > (original / low) as f32 {
        return frequency / factor as f32;
    }
    let smooth = (original as f32 / wave - low as f32) / (high - low) as f32;
    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
}

/// YaRN: frequencies of dimensions that turn more than `beta_fast` times within the original
/// context are kept, of those that turn less than `beta_slow` times divided, blended between.
fn yarn(rope: &Rope, waves: Vec<f32>) -> Vec<f32> {
    let RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, .. } = rope.scaling
    else {
        unreachable!("the caller has matched YaRN");
    };
    let dim = 2.0 * waves.len() as f64;
    let dimension = |turns: f64| {
        let wave = original as f64 / (turns * std::f64::consts::TAU);
        dim * wave.ln() / (2.0 * rope.theta.ln())
    };
    let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        // As transformers has it: a ramp needs some width.
        high += 0.001;
    }
    let blend = |(i, wave): (usize, f32)| {
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let kept = 1.0 - ramp;
        1.0 / (factor as f32 * wave) * (1.0 - kept) + 1.0 / wave * kept
    };
    waves.into_iter().enumerate().map(blend).collect()
}

#[cfg(test)]
mod tests {
    use hone_kernels::{Backend, Cpu};
    use serde_json::Value;

    use super::*;

    fn numbers(value: &Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    /// Largest difference of a frequency over itself: the last place, in which powers of PyTorch
    /// and of libm differ now and then.
    const LAST_PLACE: f64 = 1.4e-7;

    /// At the sizes of published models and positions up to 131071: tests/golden/README.md.
    #[test]
    fn tables_are_those_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/families/rope.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let cases = file["ropes"].as_array().unwrap();
        assert_eq!(cases.len(), 11);
        for case in cases {
            check(case);
        }
    }

    fn check(case: &Value) {
        let name = case["name"].as_str().unwrap();
        let config = ModelConfig::from_json(&case["config"].to_string()).unwrap();
        let len = case["seq_len"].as_u64().unwrap() as usize;
        let mut ropes = Ropes::new(&Cpu::new(), &config);
        ropes.reserve(&Cpu::new(), &[len]);
        let table = &ropes.tables[0];
        let (section, dim) = (table.section(len), table.rotary_dim);
        let (found, factor) = frequencies(&table.rope, dim, table.positions, section);
        let wanted = numbers(&case["frequencies"]);
        assert_eq!(found.len(), wanted.len(), "{name}");
        for (found, wanted) in found.iter().zip(&wanted) {
            let off = (f64::from(*found) - wanted).abs() / wanted;
            assert!(off <= LAST_PLACE, "{name}: {found}, not {wanted}");
        }
        let off = f64::from(factor) - case["factor"].as_f64().unwrap();
        assert!(off.abs() <= LAST_PLACE, "{name}: {factor}");
        for (i, position) in numbers(&case["positions"]).into_iter().enumerate() {
            let mut row = vec![0.0; dim];
            let at = table.row(len, position as usize) as usize * dim;
            Cpu::new().read(&table.cos_sin, at, &mut row);
            for (part, row) in
                [&case["cos"][i], &case["sin"][i]].into_iter().zip(row.chunks(dim / 2))
            {
                for ((found, wanted), frequency) in row.iter().zip(numbers(part)).zip(&found) {
                    // An angle is off by the last place of its frequency.
                    let bound = 2.0 * LAST_PLACE * (1.0 + position * f64::from(*frequency));
                    let off = (f64::from(*found) - wanted).abs();
                    assert!(off <= bound, "{name} at {position}: {found}, not {wanted}");
                }
            }
        }
    }

    /// Sections of documents of any length exist once asked for, and those that many share stay.
    #[test]
    fn sections_come_and_go() {
        let config = |scaling: &str| {
            ModelConfig::from_json(&format!(
                r#"{{"model_type": "llama", "vocab_size": 9, "hidden_size": 8,
                    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                    "max_position_embeddings": 10, "rope_scaling": {scaling}}}"#
            ))
            .unwrap()
        };
        let dynamic = config(r#"{"type": "dynamic", "factor": 3}"#);
        let mut ropes = Ropes::new(&Cpu::new(), &dynamic);
        ropes.reserve(&Cpu::new(), &[4]);
        ropes.reserve(&Cpu::new(), &[5, 12, 12, 30]);
        let lens: Vec<usize> = ropes.tables[0].sections.keys().copied().collect();
        assert_eq!(lens, [COMMON, 12, 30]);
        assert_eq!(ropes.last_rows(&[5, 8, 12, 30]), [[4, 7, 8 + 11, 8 + 12 + 29]]);
        ropes.reserve(&Cpu::new(), &[11]);
        assert_eq!(ropes.last_rows(&[8, 11]), [[7, 8 + 10]]);
        assert!(!ropes.changes_at(10) && ropes.changes_at(11) && ropes.changes_at(12));
        let long = config(
            r#"{"type": "longrope", "original_max_position_embeddings": 4,
                "short_factor": [1, 1, 1, 1], "long_factor": [2, 2, 2, 2]}"#,
        );
        let mut ropes = Ropes::new(&Cpu::new(), &long);
        ropes.reserve(&Cpu::new(), &[3, 7]);
        assert_eq!(ropes.last_rows(&[3, 7]), [[2, 3 + 6]]);
        assert!(!ropes.changes_at(1) && !ropes.changes_at(4));
        assert!(ropes.changes_at(5) && !ropes.changes_at(6));
    }
}
