//! The plain twin of [`crate::quant`]: one value at a time, without tables, packing or threads.

use crate::quant::{CodeBook, NESTED_BLOCK, QuantSpec, Quantized, Scales, dynamic_map};

/// Codes (one a value) and absmax of every block: the code whose value lies nearest to the value
/// over its block's absmax, the lower one where two are equally near.
pub fn quantize(values: &[f32], spec: QuantSpec) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in values.chunks(spec.block) {
        let absmax = block.iter().map(|x| x.abs()).fold(0.0, f32::max);
        let is_whole = block.len() == spec.block;
        let divisor = if absmax < 1e-38 { 1e-38 } else { absmax };
        for x in block {
            let scaled = if is_whole { x * (1.0 / divisor) } else { x / divisor };
            codes.push(nearest(spec.book, scaled));
        }
        scales.push(if is_whole { absmax } else { divisor });
    }
    (codes, scales)
}

/// The code nearest to `x`.
fn nearest(book: CodeBook, x: f32) -> u8 {
    let values = book.values();
    let mut by_value: Vec<u8> = (0..16).collect();
    by_value.sort_by(|&a, &b| values[usize::from(a)].total_cmp(&values[usize::from(b)]));
    let is_mine = |pair: &&[u8]| {
        let [low, high] = [pair[0], pair[1]].map(|code| values[usize::from(code)]);
        x <= (low + high) / 2.0
    };
    by_value.windows(2).find(is_mine).map_or(by_value[15], |pair| pair[0])
}

/// Codes and scales of double quantisation of absmax less their mean: the value over its block's
/// largest is moved to a grid of 65,536 points, and takes the nearest code to that point.
pub fn quantize_dynamic(centred: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let map = dynamic_map();
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in centred.chunks(NESTED_BLOCK) {
        let top = block.iter().map(|x| x.abs()).fold(0.0, f32::max);
        scales.push(top);
        for x in block {
            let scaled = (x * (1.0 / top)).clamp(-1.0, 1.0);
            let point = (((scaled + 1.0) * 0.5).mul_add(65535.0, 0.5)).floor();
            let on_grid = -1.0 + (2.0 * point) / 65535.0;
            let below = |pair: &&[f32]| 0.5 * (pair[0] + pair[1]) < on_grid;
            let code = map.windows(2).filter(below).count();
            codes.push(if top == 0.0 { 0 } else { code as u8 });
        }
    }
    (codes, scales)
}

/// Value `i` of a quantised tensor.
pub fn value(tensor: &Quantized, i: usize) -> f32 {
    let spec = tensor.spec();
    let byte = tensor.codes()[i / 2];
    let code = if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
    let block = i / spec.block;
    let absmax = match tensor.scales() {
        Scales::Plain(absmax) => absmax[block],
        Scales::Nested(nested) => {
            let value = nested.map[usize::from(nested.codes[block])];
            value * nested.absmax[block / NESTED_BLOCK] + nested.offset
        }
    };
    spec.values.round(spec.book.values()[usize::from(code)] * absmax)
}
