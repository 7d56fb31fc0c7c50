//! Files mapped into memory, read-only.

#![allow(unsafe_code, reason = "mapping a file is unsafe by nature; see the one block below")]

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// The bytes of a file, mapped; see [`map`].
#[derive(Debug)]
pub struct Mapped {
    /// `None` for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

/// Maps a file read-only. Pages are read when they are touched and never count as this process's
/// own.
///
/// The file must not be changed or cut while it is mapped: artefacts of hone never are, since a new
/// one appears by renaming.
///
/// # Errors
/// The file cannot be mapped.
pub fn map(file: &File) -> io::Result<Mapped> {
    if file.metadata()?.len() == 0 {
        return Ok(Mapped { map: None });
    }
    // SAFETY: the map is read-only, and the bytes are only ever parsed with bounds checks as plain
    // data. A writer that changes the file in place would change what is read, or end the process
    // when it cuts the file; it cannot break memory safety of what is derived here, since no
    // reference into the map is given a type with invalid bit patterns.
    let map = unsafe { Mmap::map(file)? };
    Ok(Mapped { map: Some(map) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn bytes_are_those_of_the_file_and_an_empty_file_has_none() {
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(map(&file).unwrap().as_ref(), b"");
        file.write_all(b"abc").unwrap();
        assert_eq!(map(&file).unwrap().as_ref(), b"abc");
    }
}
