//! What frames hold: rows as an Arrow stream, and several things in one.

use arrow::array::RecordBatch;
use arrow::error::ArrowError;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;

use crate::Failure;

/// Rows as bytes.
///
/// # Errors
/// Arrow's own.
pub fn encode_rows(rows: &RecordBatch) -> Result<Vec<u8>, Failure> {
    let wrong = |e: ArrowError| Failure::input(e.to_string());
    let mut writer = StreamWriter::try_new(Vec::new(), &rows.schema()).map_err(wrong)?;
    writer.write(rows).map_err(wrong)?;
    writer.into_inner().map_err(wrong)
}

/// Rows from bytes that [`encode_rows`] made.
///
/// # Errors
/// Bytes that hold no rows.
pub fn decode_rows(bytes: &[u8]) -> Result<RecordBatch, Failure> {
    let wrong = |why: String| Failure::environment(format!("a worker's pipe brought {why}"));
    let arrow = |e: ArrowError| wrong(format!("rows that are none: {e}"));
    let mut batches = StreamReader::try_new(bytes, None).map_err(arrow)?;
    batches.next().ok_or_else(|| wrong("no rows".to_owned()))?.map_err(arrow)
}

/// Several things as one.
pub fn join(parts: &[&[u8]]) -> Vec<u8> {
    let mut all = Vec::with_capacity(parts.iter().map(|part| part.len() + 8).sum());
    for part in parts {
        all.extend_from_slice(&(part.len() as u64).to_le_bytes());
        all.extend_from_slice(part);
    }
    all
}

/// The `N` things that [`join`] made one.
///
/// # Errors
/// Bytes that are not `N` things.
pub fn split<const N: usize>(bytes: &[u8]) -> Result<[&[u8]; N], Failure> {
    let wrong = || Failure::environment(format!("a worker's answer is not {N} things"));
    let mut rest = bytes;
    let mut parts: [&[u8]; N] = [&[]; N];
    for part in &mut parts {
        let (len, behind) = rest.split_first_chunk::<8>().ok_or_else(wrong)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| wrong())?;
        (*part, rest) = behind.split_at_checked(len).ok_or_else(wrong)?;
    }
    if rest.is_empty() { Ok(parts) } else { Err(wrong()) }
}

/// All things that [`join`] made one.
///
/// # Errors
/// Bytes that are cut off.
pub(super) fn split_all(bytes: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
    let wrong = || Failure::environment("a worker's answer is cut off");
    let (mut rest, mut parts) = (bytes, Vec::new());
    while !rest.is_empty() {
        let (len, behind) = rest.split_first_chunk::<8>().ok_or_else(wrong)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| wrong())?;
        let (part, behind) = behind.split_at_checked(len).ok_or_else(wrong)?;
        parts.push(part.to_vec());
        rest = behind;
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_come_apart_again() {
        let all = join(&[b"ab", b"", b"c"]);
        assert_eq!(split::<3>(&all).unwrap(), [&b"ab"[..], b"", b"c"]);
        assert!(split::<2>(&all).is_err());
        assert!(split::<4>(&all).is_err());
        assert!(split::<3>(&all[..all.len() - 1]).is_err());
        assert!(split::<1>(&[255; 8]).is_err());
        assert_eq!(split_all(&all).unwrap(), [&b"ab"[..], b"", b"c"]);
        assert!(split_all(&all[..all.len() - 1]).is_err());
        assert!(split_all(&[255; 8]).is_err());
    }
}
