//! Headers that lie, and blocks decoded beside the plain formulas of their types.

use std::io::Cursor;

use super::*;
use crate::fixture::{Meta, Writer, tiny};

fn read(bytes: Vec<u8>) -> Result<Gguf, GgufError> {
    Gguf::read(Cursor::new(bytes))
}

#[test]
fn a_whole_file_is_read() {
    let gguf = read(tiny().bytes()).unwrap();
    assert_eq!(gguf.version, 3);
    assert_eq!(gguf.tensors.len(), 11);
    assert_eq!(gguf.metadata.str("general.architecture").unwrap(), "llama");
    let key = "llama.attention.layer_norm_rms_epsilon";
    assert_eq!(gguf.metadata.try_f64(key).unwrap(), Some(1e-5), "not 9.999999747378752e-6");
    let q = &gguf.tensors[4];
    assert_eq!((q.name.as_str(), q.shape.as_slice()), ("blk.0.attn_q.weight", &[8, 8][..]));
    let values = read_f32(Cursor::new(tiny().bytes()), q).unwrap();
    assert_eq!((values[0], values[63]), (4.0, 4.0 + 63.0 / 64.0));
}

#[test]
fn version_2_has_the_same_form() {
    let bytes = Writer { version: 2, ..tiny() }.bytes();
    assert_eq!(read(bytes).unwrap().version, 2);
}

/// Every proper prefix of a file is refused, and none of them panics.
#[test]
fn every_cut_is_refused() {
    let bytes = tiny().bytes();
    for len in 0..bytes.len() {
        assert!(read(bytes[..len].to_vec()).is_err(), "the first {len} bytes of {}", bytes.len());
    }
}

/// Any damaged byte of the header gives a header or an error, and never a panic or a huge
/// allocation.
#[test]
fn no_damaged_byte_panics() {
    let bytes = tiny().bytes();
    let header_len = read(bytes.clone()).unwrap().tensors[0].start as usize;
    let mut n_refused = 0;
    for at in 0..header_len {
        for damage in [0xff, 0x80, 0x01] {
            let mut bytes = bytes.clone();
            bytes[at] ^= damage;
            n_refused += usize::from(read(bytes).is_err());
        }
    }
    assert!(n_refused > header_len / 4, "only {n_refused} of {} were refused", 3 * header_len);
}

/// A header with one field set to `value`, found by the eight bytes before which it stands.
fn refused(damage: impl FnOnce(&mut Writer), patch: &[(usize, u64)], message: &str) {
    let mut writer = tiny();
    damage(&mut writer);
    let mut bytes = writer.bytes();
    for &(at, value) in patch {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    match read(bytes) {
        Ok(_) => panic!("was read, though: {message}"),
        Err(error) => assert!(error.to_string().contains(message), "{error}\nnot: {message}"),
    }
}

/// Position of a tensor's entry after its name: dimensions, sizes, type, offset.
fn entry_of(writer: &Writer, name: &str) -> usize {
    let bytes = writer.bytes();
    let place = bytes.windows(name.len()).position(|window| window == name.as_bytes());
    place.unwrap() + name.len()
}

#[test]
fn headers_that_lie() {
    let none = |_: &mut Writer| {};
    refused(none, &[(0, 0x0000_0003_4c4d_4747)], "does not begin with the letters GGUF");
    refused(none, &[(0, 0x0300_0000_4655_4747)], "big-endian");
    refused(none, &[(0, 0x0000_0001_4655_4747)], "GGUF version 1");
    refused(none, &[(8, u64::MAX)], "the number of tensors is 18446744073709551615");
    refused(none, &[(16, 1 << 40)], "the number of metadata keys is 1099511627776");
    refused(none, &[(24, u64::MAX)], "the length of a metadata key");
    let twice = |w: &mut Writer| w.metadata.push(("llama.vocab_size", Meta::U32(1)));
    refused(twice, &[], "`llama.vocab_size`: it is in the file twice");
    let alignment = |w: &mut Writer| w.set("general.alignment", Meta::U32(0));
    refused(alignment, &[], "0 is not a power of two");
    let alignment = |w: &mut Writer| w.set("general.alignment", Meta::U32(33));
    refused(alignment, &[], "33 is not a power of two");
    let alignment = |w: &mut Writer| w.set("general.alignment", Meta::Str("x"));
    refused(alignment, &[], "it is a text, not a whole number");
    let twice = |w: &mut Writer| {
        let tensor = w.tensors[0].clone();
        w.tensors.push(tensor);
    };
    refused(twice, &[], "tensor `token_embd.weight`: it is in the file twice");
}

#[test]
fn tables_that_lie() {
    let none = |_: &mut Writer| {};
    let name = "blk.0.attn_q.weight";
    let at = entry_of(&tiny(), name);
    // n_dims u32, two sizes u64, type u32, offset u64.
    let (n_dims, sizes, kind, offset) = (at, at + 4, at + 20, at + 24);
    refused(none, &[(n_dims, 9)], "9 dimensions, not 1 to 4");
    refused(none, &[(n_dims, 0)], "0 dimensions, not 1 to 4");
    refused(none, &[(sizes, 0)], "one of its sizes is 0");
    refused(none, &[(sizes, 1 << 62), (sizes + 8, 1 << 62)], "is larger than any memory");
    refused(none, &[(sizes, 1 << 40)], "end after the file");
    refused(none, &[(kind, 16)], "type 16 (IQ2_XXS), which cannot be decoded");
    refused(none, &[(kind, 77)], "type 77, which cannot be decoded");
    // A shape of 8 values in blocks of 32.
    refused(none, &[(kind, 8)], "its rows of 8 values are no whole blocks of 32");
    refused(none, &[(offset, 7)], "its offset 7 is no multiple of 32");
    refused(none, &[(offset, u64::MAX - 31)], "end after the file");
    refused(none, &[(offset, 1 << 30)], "end after the file");
    refused(none, &[(offset, 0)], "overlap");
    let control = |w: &mut Writer| w.tensors[0].0 = "a\u{1b}[31m".to_owned();
    refused(control, &[], "the name of a tensor is \"a\\u{1b}[31m\"");
}

#[test]
fn arrays_that_lie() {
    let none = |_: &mut Writer| {};
    let key = "tokenizer.ggml.merges";
    // Type 9, type of the elements, length.
    let at = entry_of(&tiny(), key);
    refused(none, &[(at + 8, u64::MAX)], "the length of `tokenizer.ggml.merges`");
    refused(none, &[(at + 8, 1 << 33)], "the length of `tokenizer.ggml.merges`");
    let mut bytes = tiny().bytes();
    bytes[at + 4] = 9;
    assert!(read(bytes).unwrap_err().to_string().contains("an array of arrays"));
    let mut bytes = tiny().bytes();
    bytes[at + 4] = 13;
    assert!(read(bytes).unwrap_err().to_string().contains("the unknown type 13"));
}

/// A stream of numbers without pattern, for blocks.
fn noise(n: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let step = |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..n).map(step).collect()
}

fn half(bits: [u8; 2]) -> f32 {
    let bits = u16::from_le_bytes(bits);
    let (sign, exponent, mantissa) = (bits >> 15, (bits >> 10) & 31, bits & 1023);
    let value = match exponent {
        0 => f32::from(mantissa) * 2f32.powi(-24),
        _ => (1.0 + f32::from(mantissa) / 1024.0) * 2f32.powi(i32::from(exponent) - 15),
    };
    if sign == 1 { -value } else { value }
}

/// Decodes two rows of two blocks of `block_bytes` bytes with halves at `halves`, and compares with
/// `formula` bit for bit.
fn check_blocks(
    kind: u32,
    block_len: u64,
    block_bytes: usize,
    halves: &[usize],
    formula: impl Fn(&[u8]) -> Vec<f32>,
) {
    let mut bytes = noise(4 * block_bytes);
    for (at, block) in bytes.chunks_exact_mut(block_bytes).enumerate() {
        // Scales must be finite: exponents of 8 to 15, of both signs.
        for &half in halves {
            block[half + 1] = (block[half + 1] & 0x83) | (0x20 + 4 * at as u8);
        }
    }
    let mut writer = tiny();
    let shape = vec![2, 2 * block_len];
    writer.tensors.push(("x".to_owned(), shape, kind, bytes.clone()));
    let file = writer.bytes();
    let gguf = read(file.clone()).unwrap();
    let found = read_f32(Cursor::new(file), gguf.tensors.last().unwrap()).unwrap();
    let expected: Vec<f32> = bytes.chunks_exact(block_bytes).flat_map(formula).collect();
    assert_eq!(expected.len() as u64, 4 * block_len);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(&expected), "type {kind}");
}

#[test]
fn plain_values() {
    check_blocks(0, 1, 4, &[2], |b| vec![f32::from_le_bytes([b[0], b[1], b[2], b[3]])]);
    check_blocks(1, 1, 2, &[0], |b| vec![half([b[0], b[1]])]);
    check_blocks(30, 1, 2, &[0], |b| vec![f32::from_le_bytes([0, 0, b[0], b[1]])]);
}

/// Low halves of the bytes first, then the high halves.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = f32> {
    let low = bytes.iter().map(|b| f32::from(b & 15));
    low.chain(bytes.iter().map(|b| f32::from(b >> 4)))
}

/// The fifth bits of 32 values, one a bit.
fn fifth_bits(bytes: &[u8]) -> impl Iterator<Item = f32> {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    (0..32).map(move |i| if bits >> i & 1 == 1 { 16.0 } else { 0.0 })
}

#[test]
fn blocks_of_32() {
    // d (q - 8)
    check_blocks(2, 32, 18, &[0], |b| {
        let d = half([b[0], b[1]]);
        nibbles(&b[2..]).map(|q| d * (q - 8.0)).collect()
    });
    // d q + m
    check_blocks(3, 32, 20, &[0, 2], |b| {
        let (d, m) = (half([b[0], b[1]]), half([b[2], b[3]]));
        nibbles(&b[4..]).map(|q| d * q + m).collect()
    });
    // d (q - 16), q of five bits
    check_blocks(6, 32, 22, &[0], |b| {
        let d = half([b[0], b[1]]);
        nibbles(&b[6..]).zip(fifth_bits(&b[2..6])).map(|(q, high)| d * (q + high - 16.0)).collect()
    });
    // d q + m, q of five bits
    check_blocks(7, 32, 24, &[0, 2], |b| {
        let (d, m) = (half([b[0], b[1]]), half([b[2], b[3]]));
        nibbles(&b[8..]).zip(fifth_bits(&b[4..8])).map(|(q, high)| d * (q + high) + m).collect()
    });
    // d q, q a signed byte
    check_blocks(8, 32, 34, &[0], |b| {
        let d = half([b[0], b[1]]);
        b[2..].iter().map(|&q| d * f32::from(q as i8)).collect()
    });
}

/// Six bits: four low ones and two high ones, in groups of 128; d * scale * (q - 32), a signed
/// scale for each 16 values.
#[test]
fn super_blocks_of_six_bits() {
    check_blocks(14, 256, 210, &[208], |b| {
        let d = half([b[208], b[209]]);
        let value = |i: usize| {
            let (group, within) = (i / 128, i % 128);
            let (quarter, l) = (within / 32, within % 32);
            let low = b[group * 64 + (quarter % 2) * 32 + l] >> (4 * (quarter / 2)) & 15;
            let high = b[128 + group * 32 + l] >> (2 * quarter) & 3;
            let q = f32::from(low | high << 4) - 32.0;
            let scale = f32::from(b[192 + group * 8 + quarter * 2 + l / 16] as i8);
            d * scale * q
        };
        (0..256).map(value).collect()
    });
}
