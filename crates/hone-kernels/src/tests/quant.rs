//! 4-bit quantisation: against bitsandbytes' own results bit for bit, against the plain twin, and
//! its products against those of the dequantised weight.
//!
//! tests/golden/make_quant.py wrote the files and says from which versions.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

use crate::conformance::data;
use crate::quant::*;
use crate::reference::quant as plain;
use crate::{Backend, Cpu, Mat, MatMut, rng};

/// Golden cases, so that none is lost.
const N_GOLDEN: usize = 101;

fn golden() -> HashMap<String, Tensor> {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/quant"));
    candle_core::safetensors::load(dir.join("cases.safetensors"), &Device::Cpu).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The bits of f32 values, -0 as +0: of FP4's two zeros some of bitsandbytes' kernels make -0.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|&x| if x == 0.0 { 0 } else { x.to_bits() }).collect()
}

/// `nf4.64.nested.bfloat16`, the end of a case's name.
fn spec(name: &str) -> QuantSpec {
    let parts: Vec<&str> = name.rsplit('.').collect();
    let [dtype, nested, block, book, ..] = parts[..] else { panic!("{name}") };
    QuantSpec {
        book: if book == "nf4" { CodeBook::Nf4 } else { CodeBook::Fp4 },
        block: block.parse().unwrap(),
        nested: nested == "nested",
        values: match dtype {
            "float32" => ValueType::F32,
            "bfloat16" => ValueType::Bf16,
            "float16" => ValueType::F16,
            other => panic!("{other}"),
        },
    }
}

#[test]
fn codes_scales_and_values_are_those_of_bitsandbytes() {
    let golden = golden();
    let names: Vec<&str> = golden.keys().filter_map(|key| key.strip_suffix("/input")).collect();
    assert_eq!(names.len(), N_GOLDEN);
    for name in names {
        let part = |part: &str| &golden[&format!("{name}/{part}")];
        let found = Quantized::quantize(&floats(part("input")), spec(name)).unwrap();
        assert_eq!(found.codes(), part("codes").to_vec1::<u8>().unwrap(), "{name}: codes");
        match found.scales() {
            Scales::Plain(absmax) => {
                assert_eq!(bits(absmax), bits(&floats(part("absmax"))), "{name}: absmax");
            }
            Scales::Nested(nested) => {
                assert_eq!(nested.offset, floats(part("offset"))[0], "{name}: offset");
                assert_eq!(bits(&nested.absmax), bits(&floats(part("nested_absmax"))), "{name}");
                assert_eq!(nested.codes, part("absmax").to_vec1::<u8>().unwrap(), "{name}: absmax");
            }
        }
        let expected = floats(part("values"));
        assert_eq!(bits(&found.dequantize()), bits(&expected), "{name}: values");
        // As a file's parts, read back in runs that start and end anywhere.
        let (codes, scales) = (found.codes().to_vec(), found.scales().clone());
        let again = Quantized::from_parts(spec(name), found.len(), codes, scales).unwrap();
        assert_eq!(again, found);
        for seed in 0..20 {
            let draw = |i| rng::mix(seed, i) as usize;
            let start = draw(0) % (found.len() + 1);
            let mut run = vec![f32::NAN; draw(1) % (found.len() - start + 1)];
            found.dequantize_into(start, &mut run);
            let expected = &expected[start..start + run.len()];
            assert_eq!(bits(&run), bits(expected), "{name}: values from {start}");
        }
    }
}

#[test]
fn tables_are_those_of_bitsandbytes() {
    let golden = golden();
    assert_eq!(bits(&dynamic_map()), bits(&floats(&golden["dynamic_map"])));
    for book in [CodeBook::Nf4, CodeBook::Fp4] {
        assert_eq!(bits(book.values()), bits(&floats(&golden[book.name()])));
    }
}

/// Every book, block and size through the plain twin.
#[test]
fn quantisation_matches_its_plain_twin() {
    let mut n = 0;
    for book in [CodeBook::Nf4, CodeBook::Fp4] {
        for block in BLOCKS {
            for (seed, len) in [0, 1, 31, 64, 1000, 4096, 40_001].into_iter().enumerate() {
                for scale in [0.0, 1e-40, 0.02, 1e30] {
                    let spec = QuantSpec { book, block, nested: false, values: ValueType::F32 };
                    let values = data(seed as u64, len, scale);
                    let (codes, absmax) = plain::quantize(&values, spec);
                    let fast = Quantized::quantize(&values, spec).unwrap();
                    let unpacked: Vec<u8> =
                        fast.codes().iter().flat_map(|b| [b >> 4, b & 15]).take(len).collect();
                    assert_eq!(unpacked, codes, "{spec:?} {len} {scale}");
                    assert_eq!(*fast.scales(), Scales::Plain(absmax.clone()));
                    let nested = QuantSpec { nested: true, values: ValueType::Bf16, ..spec };
                    let fast = Quantized::quantize(&values, nested).unwrap();
                    let Scales::Nested(scales) = fast.scales() else { panic!("not nested") };
                    let centred: Vec<f32> = absmax.iter().map(|x| x - scales.offset).collect();
                    let twin = plain::quantize_dynamic(&centred);
                    assert_eq!((scales.codes.clone(), scales.absmax.clone()), twin);
                    let values: Vec<f32> = (0..len).map(|i| plain::value(&fast, i)).collect();
                    assert_eq!(bits(&fast.dequantize()), bits(&values));
                    n += 1;
                }
            }
        }
    }
    assert_eq!(n, 2 * 8 * 7 * 4);
}

/// A mean in PyTorch's order is within the rounding of a mean in f64.
#[test]
fn the_offset_is_the_mean() {
    for len in [1, 7, 8, 100, 5000, 100_000] {
        let values = data(3, 32 * len, 0.02);
        let spec = QuantSpec { block: 32, ..QuantSpec::qlora(ValueType::F32) };
        let tensor = Quantized::quantize(&values, spec).unwrap();
        let (_, absmax) = plain::quantize(&values, spec);
        let mean = absmax.iter().map(|&x| f64::from(x)).sum::<f64>() / len as f64;
        let Scales::Nested(nested) = tensor.scales() else { panic!("not nested") };
        let off = (f64::from(nested.offset) - mean).abs() / mean;
        assert!(off < 5e-7, "{len}: off by {off:e}");
    }
}

#[test]
fn what_is_broken_is_refused() {
    let spec = QuantSpec::qlora(ValueType::F32);
    let message = |result: Result<Quantized, QuantError>| result.unwrap_err().to_string();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = data(1, 200, 1.0);
        values[130] = bad;
        let found = message(Quantized::quantize(&values, spec));
        assert_eq!(found, "the value at index 130 is not finite");
    }
    let odd = QuantSpec { block: 48, ..spec };
    assert!(message(Quantized::quantize(&[1.0], odd)).contains("a block size of 48"));
    let parts = |n_codes, absmax: Vec<f32>| {
        Quantized::from_parts(spec, 130, vec![0; n_codes], Scales::Plain(absmax))
    };
    assert!(message(parts(64, vec![1.0; 3])).contains("codes has 64 entries"));
    assert!(message(parts(65, vec![1.0; 2])).contains("absmax has 2 entries"));
    assert!(message(parts(65, vec![1.0, 1.0, f32::NAN])).contains("scale of block 2"));
    assert_eq!(parts(65, vec![1.0; 3]).unwrap().len(), 130);
}

/// 4-bit weights of several parts against the same values frozen in full.
#[test]
fn products_are_those_of_the_dequantised_weight() {
    // The last two are cut into several panels, inside a part and across two.
    let shapes = [
        (1, vec![1], 1),
        (3, vec![5, 2, 7], 33),
        (17, vec![64, 32, 32], 64),
        (40, vec![700, 900, 3], 1000),
        (2, vec![40], 60_000),
    ];
    for (t, rows, inp) in shapes {
        for spec in [
            QuantSpec::qlora(ValueType::Bf16),
            QuantSpec { book: CodeBook::Fp4, nested: false, ..QuantSpec::qlora(ValueType::F32) },
        ] {
            let out: usize = rows.iter().sum();
            let part = |(seed, n): (usize, &usize)| {
                Quantized::quantize(&data(seed as u64, n * inp, 0.1), spec).unwrap()
            };
            let parts: Vec<Quantized> = rows.iter().enumerate().map(part).collect();
            let values: Vec<f32> = parts.iter().flat_map(Quantized::dequantize).collect();
            for cpu in Cpu::all_levels() {
                let small = cpu.freeze_4bit(parts.clone(), inp);
                let full = cpu.freeze(&values, out, inp);
                assert_eq!(cpu.thaw(&small), values);
                let (x, dy) =
                    (cpu.upload(&data(7, t * inp, 1.0)), cpu.upload(&data(8, t * out, 1.0)));
                for beta in [0.0, 0.5] {
                    let run = |w| {
                        let mut y = cpu.upload(&data(9, t * out, 1.0));
                        let mut dx = cpu.upload(&data(10, t * inp, 1.0));
                        cpu.linear(Mat::new(&x, t, inp), w, MatMut::new(&mut y, t, out), beta);
                        cpu.linear_dx(Mat::new(&dy, t, out), w, MatMut::new(&mut dx, t, inp), beta);
                        (y, dx)
                    };
                    let (y, dx) = run(&small);
                    let (y_full, dx_full) = run(&full);
                    close(&y, &y_full);
                    close(&dx, &dx_full);
                }
            }
        }
    }
}

/// Within the rounding of sums in another order: 1e-6 of the largest.
fn close(a: &[f32], b: &[f32]) {
    let top = b.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
    let apart = a.iter().zip(b).fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(apart <= 1e-6 * top, "{apart:e} of {top:e}");
}
