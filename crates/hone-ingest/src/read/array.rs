//! One JSON array whose elements are the rows, split without holding more than one element.
//!
//! Only strings and brackets are followed here; whether an element is JSON is seen when it is
//! parsed. An array that does not end is refused as a file: an unclosed bracket would otherwise
//! swallow every row behind it unseen.

use std::io::{self, BufRead};
use std::path::PathBuf;

use super::lines::too_long;
use super::{ROW_BYTES_MAX, RawRow, ReadError, Text, packed};

/// Where the splitter is.
struct Splitter {
    text: Text,
    path: PathBuf,
    line: u64,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Before,
    Inside,
    Behind,
    Over,
}

/// How an element ended.
enum End {
    Comma,
    Bracket,
}

/// The elements of the array.
pub(super) fn rows(
    text: Text,
    path: PathBuf,
) -> impl Iterator<Item = Result<RawRow, ReadError>> + Send {
    let mut splitter = Splitter { text, path, line: 1, state: State::Before };
    std::iter::from_fn(move || {
        let row = splitter.row();
        if !matches!(row, Ok(Some(_))) {
            splitter.state = State::Over;
        }
        row.transpose()
    })
}

impl Splitter {
    fn row(&mut self) -> Result<Option<RawRow>, ReadError> {
        loop {
            match self.state {
                State::Before => {
                    let first = self.token()?;
                    assert_eq!(first, Some(b'['), "the format was seen by this character");
                    self.state = State::Inside;
                }
                State::Inside => {
                    let mut row = RawRow { line: self.line, bytes: Vec::new(), fault: None };
                    let end = self.element(&mut row)?;
                    if matches!(end, End::Bracket) {
                        self.state = State::Behind;
                    }
                    let blank = row.bytes.iter().all(u8::is_ascii_whitespace);
                    // `[]` has no rows, and neither has the place behind a last comma.
                    if !blank || matches!(end, End::Comma) {
                        return Ok(Some(row));
                    }
                }
                State::Behind => {
                    if self.token()?.is_some() {
                        let what = "there is more text behind the end of the array";
                        return Err(ReadError::refused(&self.path, self.line, what)
                            .hint("put one array in a file, or one object a line"));
                    }
                    self.state = State::Over;
                }
                State::Over => return Ok(None),
            }
        }
    }

    fn block(&mut self) -> Result<&[u8], ReadError> {
        loop {
            match self.text.fill_buf() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(packed::error(&self.path, Some(self.line), &e)),
                // The borrow checker cannot see that the first borrow ends here, so the buffer is
                // asked again.
                Ok(_) => return Ok(self.text.buffer()),
            }
        }
    }

    /// The next character that is no white space.
    fn token(&mut self) -> Result<Option<u8>, ReadError> {
        loop {
            let Some(byte) = self.block()?.first().copied() else { return Ok(None) };
            self.text.consume(1);
            self.line += u64::from(byte == b'\n');
            if !byte.is_ascii_whitespace() {
                return Ok(Some(byte));
            }
        }
    }

    /// Reads one element into `row`, and the character that ends it.
    fn element(&mut self, row: &mut RawRow) -> Result<End, ReadError> {
        let (mut depth, mut quoted, mut escaped, mut begun) = (0usize, false, false, false);
        loop {
            let mut line = self.line;
            let block = self.block()?;
            if block.is_empty() {
                let what =
                    format!("the file ends inside the array, in the row of line {}", row.line);
                return Err(ReadError::refused(&self.path, self.line, what).hint(
                    "the file is cut off or a bracket is missing; get it again or mend that row",
                ));
            }
            let (mut n, mut end) = (0, None);
            for &byte in block {
                n += 1;
                line += u64::from(byte == b'\n');
                if !begun && !byte.is_ascii_whitespace() {
                    (begun, row.line) = (true, line);
                }
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if quoted => escaped = true,
                    b'"' => quoted = !quoted,
                    _ if quoted => {}
                    b'{' | b'[' => depth += 1,
                    b',' if depth == 0 => end = Some(End::Comma),
                    b']' if depth == 0 => end = Some(End::Bracket),
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                if end.is_some() {
                    break;
                }
            }
            let part = &block[..n - usize::from(end.is_some())];
            let room = ROW_BYTES_MAX - row.bytes.len();
            row.bytes.extend_from_slice(&part[..part.len().min(room)]);
            if part.len() > room {
                row.fault = Some(too_long());
            }
            self.text.consume(n);
            self.line = line;
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }
}
