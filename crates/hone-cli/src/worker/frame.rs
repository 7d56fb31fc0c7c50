//! Frames: a tag, a length, bytes.

use std::io::{Error, ErrorKind, Read, Result, Write};

/// Longest frame: a batch of rows with the largest texts that rows may have is far below.
const FRAME_BYTES_MAX: u64 = 1 << 31;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// What was asked for.
    Data = 0,
    /// A failure, as JSON.
    Failure = 1,
}

/// Writes a frame and flushes.
pub(super) fn write(out: &mut impl Write, tag: Tag, bytes: &[u8]) -> Result<()> {
    out.write_all(&[tag as u8])?;
    out.write_all(&(bytes.len() as u64).to_le_bytes())?;
    out.write_all(bytes)?;
    out.flush()
}

/// Reads a frame; `None` where the pipe ends between two.
pub(super) fn read(from: &mut impl Read) -> Result<Option<(Tag, Vec<u8>)>> {
    let mut tag = [0];
    if from.read(&mut tag)? == 0 {
        return Ok(None);
    }
    let tag = match tag[0] {
        0 => Tag::Data,
        1 => Tag::Failure,
        other => return Err(Error::new(ErrorKind::InvalidData, format!("frame tag {other}"))),
    };
    let mut len = [0; 8];
    from.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    if len > FRAME_BYTES_MAX {
        return Err(Error::new(ErrorKind::InvalidData, format!("a frame of {len} bytes")));
    }
    // Grows as bytes come: a length alone allocates nothing.
    let mut bytes = Vec::new();
    if from.take(len).read_to_end(&mut bytes)? as u64 != len {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(Some((tag, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_read_back_and_damage_is_an_error() {
        let mut pipe = Vec::new();
        write(&mut pipe, Tag::Data, b"abc").unwrap();
        write(&mut pipe, Tag::Failure, b"").unwrap();
        let mut from = pipe.as_slice();
        assert_eq!(read(&mut from).unwrap(), Some((Tag::Data, b"abc".to_vec())));
        assert_eq!(read(&mut from).unwrap(), Some((Tag::Failure, Vec::new())));
        assert_eq!(read(&mut from).unwrap(), None);
        for len in 1..pipe.len() - 9 {
            assert!(read(&mut &pipe[..len]).is_err(), "{len}");
        }
        assert!(read(&mut &[7u8; 9][..]).is_err());
        assert!(read(&mut &[0, 255, 255, 255, 255, 255, 255, 255, 255][..]).is_err());
    }
}
