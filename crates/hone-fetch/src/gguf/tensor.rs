//! The table of tensors, and decoding their blocks.

use std::io::{Read, Seek, SeekFrom};

use candle_core::Device;
use candle_core::quantized::{GgmlDType, ggml_file};

use super::GgufError;
use super::reader::HeaderReader;

/// Longest name of a tensor; the format says 64, some writers do not care.
const NAME_BYTES_MAX: u64 = 1024;

/// Most dimensions; the format says so.
const DIMENSIONS_MAX: u32 = 4;

/// A tensor of a GGUF file, not yet read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorInfo {
    /// Name in the file.
    pub(crate) name: String,
    /// Sizes, outermost first (the file has them the other way round).
    pub(crate) shape: Vec<usize>,
    /// How its values are stored.
    pub(crate) dtype: GgmlDType,
    /// Its first byte, counted from the beginning of the file.
    pub(crate) start: u64,
    /// Its length in the file.
    pub(crate) n_bytes: u64,
}

impl TensorInfo {
    pub(super) fn error(&self, reason: impl Into<String>) -> GgufError {
        GgufError::Tensor { name: self.name.clone(), reason: reason.into() }
    }

    /// One entry of the table. `start` is still counted from the beginning of the data.
    pub(super) fn read<R: Read + Seek>(reader: &mut HeaderReader<R>) -> Result<Self, GgufError> {
        let name = reader.name("the name of a tensor", NAME_BYTES_MAX)?;
        let error = |reason: String| GgufError::Tensor { name: name.clone(), reason };
        let n_dims = reader.u32("the number of a tensor's dimensions")?;
        if n_dims == 0 || n_dims > DIMENSIONS_MAX {
            return Err(error(format!("it has {n_dims} dimensions, not 1 to {DIMENSIONS_MAX}")));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let size = reader.u64("a tensor's size")?;
            let size = usize::try_from(size).ok().filter(|&size| size > 0);
            shape.push(size.ok_or_else(|| error("one of its sizes is 0 or too large".into()))?);
        }
        shape.reverse();
        let number = reader.u32("a tensor's type")?;
        let dtype = dtype(number).ok_or_else(|| error(unknown_dtype(number)))?;
        let n_bytes = n_bytes(&shape, dtype).map_err(error)?;
        let start = reader.u64("a tensor's offset")?;
        Ok(TensorInfo { name, shape, dtype, start, n_bytes })
    }

    /// Turns the offset into a position in the file, and refuses one that is not there.
    pub(super) fn place(
        &mut self,
        data_start: u64,
        alignment: u64,
        file_len: u64,
    ) -> Result<(), GgufError> {
        let offset = self.start;
        if !offset.is_multiple_of(alignment) {
            return Err(self.error(format!("its offset {offset} is no multiple of {alignment}")));
        }
        let start = data_start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(self.n_bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => {
                self.start = start;
                Ok(())
            }
            _ => {
                let n = self.n_bytes;
                let what = format!("its {n} bytes at offset {offset} end after the file");
                Err(self.error(format!("{what}, which has {file_len} bytes")))
            }
        }
    }

    /// Number of values.
    pub(crate) fn n_values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Length of a tensor in the file: whole blocks along the innermost dimension.
fn n_bytes(shape: &[usize], dtype: GgmlDType) -> Result<u64, String> {
    let inner = *shape.last().expect("a tensor has at least one dimension");
    let block = dtype.block_size();
    if !inner.is_multiple_of(block) {
        return Err(format!("its rows of {inner} values are no whole blocks of {block}"));
    }
    shape
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(size))
        .and_then(|n| (n / block).checked_mul(dtype.type_size()))
        // Its values as f32 must be addressable too.
        .filter(|&n| n <= isize::MAX as usize / 32)
        .map(|n| n as u64)
        .ok_or_else(|| format!("its shape {shape:?} is larger than any memory"))
}

/// The type with that number in a file, of those that can be decoded.
fn dtype(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// Says which type it is, as far as it is known which one has that number.
fn unknown_dtype(number: u32) -> String {
    let name = match number {
        9 => " (Q8_1)",
        15 => " (Q8_K)",
        16 => " (IQ2_XXS)",
        17 => " (IQ2_XS)",
        18 => " (IQ3_XXS)",
        19 => " (IQ1_S)",
        20 => " (IQ4_NL)",
        21 => " (IQ3_S)",
        22 => " (IQ2_S)",
        23 => " (IQ4_XS)",
        24..=28 => " (not a type of weights)",
        29 => " (IQ1_M)",
        34 => " (TQ1_0)",
        35 => " (TQ2_0)",
        39 => " (MXFP4)",
        _ => "",
    };
    let known = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K can be";
    format!("it is stored as type {number}{name}, which cannot be decoded; {known}")
}

/// The values of a tensor, row-major, as f32.
pub(crate) fn read_f32(
    mut file: impl Read + Seek,
    tensor: &TensorInfo,
) -> Result<Vec<f32>, GgufError> {
    file.seek(SeekFrom::Start(tensor.start))?;
    let n_bytes = usize::try_from(tensor.n_bytes).expect("bounded when the table was read");
    let mut bytes = vec![0; n_bytes];
    file.read_exact(&mut bytes)?;
    let decode = || {
        let shape = tensor.shape.clone();
        let blocks = ggml_file::qtensor_from_ggml(tensor.dtype, &bytes, shape, &Device::Cpu)?;
        blocks.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
    };
    decode().map_err(|error: candle_core::Error| tensor.error(error.to_string()))
}
