//! Reads the header's fields, and knows where in the file it is and what is left.

use std::io::{BufReader, Read, Seek, SeekFrom};

use super::GgufError;

/// Longest header read: ten times that of the largest vocabulary known (a quarter of a million
/// tokens with merges).
const HEADER_BYTES_MAX: u64 = 256 << 20;

/// A reader of little-endian fields that refuses to read beyond the file.
pub(super) struct HeaderReader<R> {
    file: BufReader<R>,
    at: u64,
    len: u64,
}

impl<R: Read + Seek> HeaderReader<R> {
    pub(super) fn new(mut file: R) -> Result<Self, GgufError> {
        let len = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        Ok(HeaderReader { file: BufReader::new(file), at: 0, len })
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    /// Length of the whole file.
    pub(super) fn file_len(&self) -> u64 {
        self.len
    }

    /// Refuses a field of `n_bytes` that the file or the limit on headers has no room for.
    fn room(&self, what: &str, n_bytes: u64) -> Result<(), GgufError> {
        let what = || what.to_owned();
        if n_bytes > self.len - self.at {
            return Err(GgufError::Truncated { what: what(), at: self.at, len: self.len });
        }
        if n_bytes > HEADER_BYTES_MAX - self.at.min(HEADER_BYTES_MAX) {
            let reason = format!("the header is longer than {HEADER_BYTES_MAX} bytes");
            return Err(GgufError::Field { at: self.at, reason });
        }
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        self.room(what, N as u64)?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things of at least `bytes_each` bytes that follow, at most `max`.
    pub(super) fn count(
        &mut self,
        what: &str,
        max: u64,
        bytes_each: u64,
    ) -> Result<u64, GgufError> {
        let at = self.at;
        let found = self.u64(what)?;
        let max = max.min((self.len - self.at) / bytes_each);
        if found > max {
            return Err(GgufError::TooMany { what: what.to_owned(), at, found, max });
        }
        Ok(found)
    }

    /// A text that is printed in messages, so that it may hold no control characters.
    pub(super) fn name(&mut self, what: &str, bytes_max: u64) -> Result<String, GgufError> {
        let at = self.at;
        let name = self.string(what, bytes_max)?;
        if name.is_empty() || name.chars().any(char::is_control) {
            let reason = format!("{what} is {name:?}");
            return Err(GgufError::Field { at, reason });
        }
        Ok(name)
    }

    /// A text with its length before it.
    pub(super) fn string(&mut self, what: &str, bytes_max: u64) -> Result<String, GgufError> {
        let at = self.at;
        let n_bytes = self.count(&format!("the length of {what}"), bytes_max, 1)?;
        self.room(what, n_bytes)?;
        let mut bytes = vec![0; usize::try_from(n_bytes).expect("bounded by the header's limit")];
        self.file.read_exact(&mut bytes)?;
        self.at += n_bytes;
        let reason = |_| GgufError::Field { at, reason: format!("{what} is not UTF-8 text") };
        String::from_utf8(bytes).map_err(reason)
    }
}
