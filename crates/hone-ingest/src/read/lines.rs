//! One JSON value a line.

use std::io::{self, BufRead};
use std::path::PathBuf;

use super::{ROW_BYTES_MAX, RawRow, ReadError, Text, packed};
use crate::fault::{Fault, Reason};

/// The lines of a text that are not blank.
pub(super) fn rows(
    mut text: Text,
    path: PathBuf,
) -> impl Iterator<Item = Result<RawRow, ReadError>> + Send {
    let (mut line, mut over) = (0, false);
    std::iter::from_fn(move || {
        while !over {
            line += 1;
            let mut bytes = Vec::new();
            match read_line(&mut text, &mut bytes) {
                Err(e) => {
                    over = true;
                    return Some(Err(packed::error(&path, Some(line), &e)));
                }
                Ok(None) => over = true,
                Ok(Some(whole)) if whole && bytes.iter().all(u8::is_ascii_whitespace) => {}
                Ok(Some(whole)) => {
                    let fault = (!whole).then(too_long);
                    return Some(Ok(RawRow { line, bytes, fault }));
                }
            }
        }
        None
    })
}

pub(super) fn too_long() -> Fault {
    Fault::new(Reason::LineTooLong, format!("longer than {} MiB", ROW_BYTES_MAX >> 20))
}

/// Reads up to the end of the line, which is taken off; `Some(false)` when the line was longer than
/// the limit and only its beginning is in `bytes`, `None` at the end of the text.
fn read_line(text: &mut impl BufRead, bytes: &mut Vec<u8>) -> io::Result<Option<bool>> {
    let (mut any, mut whole) = (false, true);
    loop {
        let block = match text.fill_buf() {
            Ok(block) => block,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if block.is_empty() {
            return Ok(any.then_some(whole));
        }
        any = true;
        let end = block.iter().position(|b| *b == b'\n');
        let part = &block[..end.unwrap_or(block.len())];
        let room = ROW_BYTES_MAX - bytes.len();
        whole &= part.len() <= room;
        bytes.extend_from_slice(&part[..part.len().min(room)]);
        let n = end.map_or(block.len(), |end| end + 1);
        text.consume(n);
        if end.is_some() {
            return Ok(Some(whole));
        }
    }
}
