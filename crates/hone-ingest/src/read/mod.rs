//! Files to rows: what a file is (said by its first bytes, then by its name), and one reader a
//! format.
//!
//! Every reader hands out [`RawRow`]s: a line number and one JSON text. Cells of tables become JSON
//! objects here, so that one path leads from a row to a conversation whatever it came in. Memory is
//! bounded by [`ROW_BYTES_MAX`] a row, whatever the size of the file; compressed input is streamed
//! and may not expand without bound.

mod array;
mod delimited;
mod lines;
mod packed;
mod parquet;

use std::io::{BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use hone_store::{StoreError, input};

use crate::fault::Fault;

/// Longest row read, in bytes: over a hundred times the longest row of the common instruction sets.
pub(crate) const ROW_BYTES_MAX: usize = 16 << 20;

/// A row as it stood in its file.
#[derive(Debug)]
pub(crate) struct RawRow {
    /// Line (from 1) where it begins; for Parquet its row (from 1).
    pub(crate) line: u64,
    /// Its text; of a row that is too long, the beginning.
    pub(crate) bytes: Vec<u8>,
    /// Why it cannot be a row, when the reader knows already.
    pub(crate) fault: Option<Fault>,
}

/// How rows lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    JsonLines,
    JsonArray,
    Csv,
    Tsv,
    Parquet,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::JsonLines => "JSON lines",
            Format::JsonArray => "a JSON array",
            Format::Csv => "CSV",
            Format::Tsv => "TSV",
            Format::Parquet => "Parquet",
        }
    }
}

/// What the reader of tables is told by the configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct TableOptions {
    /// Names of the columns of a file without a header line.
    pub(crate) columns: Option<Vec<String>>,
    /// Whether cells may be quoted; unset, they may in CSV and may not in TSV.
    pub(crate) quoting: Option<bool>,
    /// Whether `schema = "flan"` was asked for: then a TSV file without a header has FLAN's own
    /// columns.
    pub(crate) flan: bool,
}

/// A file that cannot be read on as a whole.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("{}{}: {what}", file.display(), line.map(|n| format!(":{n}")).unwrap_or_default())]
    Refused { file: PathBuf, line: Option<u64>, what: String, hint: Option<&'static str> },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ReadError {
    fn refused(file: &Path, line: impl Into<Option<u64>>, what: impl Into<String>) -> Self {
        let (file, line) = (file.to_owned(), line.into());
        ReadError::Refused { file, line, what: what.into(), hint: None }
    }

    fn hint(self, text: &'static str) -> Self {
        match self {
            ReadError::Refused { file, line, what, .. } => {
                ReadError::Refused { file, line, what, hint: Some(text) }
            }
            other => other,
        }
    }
}

/// Text behind its decompressor.
type Text = BufReader<Box<dyn Read + Send>>;

/// The rows of one file, in order.
pub(crate) struct Rows {
    pub(crate) format: Format,
    /// What the reader has to say about how it took the file.
    pub(crate) note: Option<String>,
    rows: Box<dyn Iterator<Item = Result<RawRow, ReadError>> + Send>,
}

impl Iterator for Rows {
    type Item = Result<RawRow, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.rows.next()
    }
}

/// Endings of names that mean rows; `.gz` and `.zst` may follow.
const ENDINGS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];

/// The ending that says what is in a file, that of its compression taken off.
fn ending(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = [".gz", ".zst", ".zstd"].iter().find_map(|e| name.strip_suffix(e)).unwrap_or(&name);
    name.rsplit_once('.').map(|(_, ending)| ending.to_owned())
}

/// Whether a file of a directory looks like rows by its name.
pub(crate) fn is_rows(path: &Path) -> bool {
    ending(path).is_some_and(|ending| ENDINGS.contains(&ending.as_str()))
}

/// Refuses pipes and devices, without opening them: that could wait forever.
///
/// # Errors
/// It is one, or is not there.
pub(crate) fn check_regular(path: &Path) -> Result<(), ReadError> {
    if !input::is_file(path) && !input::is_dir(path) {
        input::len(path)?;
        let what = "this is a pipe or a device, and sources are files that are read twice";
        return Err(ReadError::refused(path, None, what).hint("write its content to a file first"));
    }
    Ok(())
}

/// Opens a file of rows.
///
/// # Errors It is missing, no regular file, of no known format, compressed twice, or its header
/// does not fit.
pub(crate) fn open(path: &Path, options: &TableOptions) -> Result<Rows, ReadError> {
    check_regular(path)?;
    let mut file = input::open(path)?;
    let mut head = Vec::new();
    let io =
        |e| ReadError::Store(StoreError::Io { action: "read", path: path.to_owned(), source: e });
    file.by_ref().take(8).read_to_end(&mut head).map_err(io)?;
    file.rewind().map_err(io)?;
    if head.starts_with(b"PAR1") {
        let rows = parquet::rows(file, path)?;
        return Ok(Rows { format: Format::Parquet, note: None, rows: Box::new(rows) });
    }
    let packing = packed::Packing::of(&head);
    let mut text: Text = BufReader::with_capacity(1 << 16, packed::unpack(file, packing, path)?);
    let start = begin(&mut text, path, packing.is_some())?;
    let format = format(path, &start)?;
    let path = path.to_owned();
    let mut note = None;
    let rows: Box<dyn Iterator<Item = _> + Send> = match format {
        Format::JsonLines => Box::new(lines::rows(text, path)),
        Format::JsonArray => Box::new(array::rows(text, path)),
        Format::Csv | Format::Tsv => {
            let rows = delimited::rows(text, path, format == Format::Tsv, options)?;
            note.clone_from(&rows.note);
            Box::new(rows)
        }
        Format::Parquet => unreachable!("Parquet was taken above"),
    };
    Ok(Rows { format, note, rows })
}

/// Skips a byte-order mark, refuses what is not text, and gives the first bytes.
fn begin(text: &mut Text, path: &Path, was_packed: bool) -> Result<Vec<u8>, ReadError> {
    let head = text.fill_buf().map_err(|e| packed::error(path, None, &e))?;
    if was_packed && packed::Packing::of(head).is_some() {
        return Err(
            ReadError::refused(path, None, "the file is compressed twice").hint("unpack it once")
        );
    }
    if head.starts_with(b"PAR1") {
        return Err(ReadError::refused(path, None, "a Parquet file inside a compressed file")
            .hint("unpack it: Parquet is compressed by itself"));
    }
    if head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]) {
        return Err(ReadError::refused(path, 1, "the text is UTF-16")
            .hint("write it as UTF-8, for instance with `iconv -f UTF-16 -t UTF-8`"));
    }
    if head.starts_with(b"ARROW1") {
        return Err(ReadError::refused(path, None, "this is an Arrow file, not Parquet")
            .hint("write it as Parquet or JSON lines"));
    }
    if head.starts_with("\u{feff}".as_bytes()) {
        text.consume(3);
    }
    let head = text.fill_buf().map_err(|e| packed::error(path, None, &e))?;
    Ok(head.iter().take(4096).copied().collect())
}

/// What a text is: by its name when that says it is a table, else by its first character.
fn format(path: &Path, start: &[u8]) -> Result<Format, ReadError> {
    let ending = ending(path);
    let first = start.iter().find(|b| !b.is_ascii_whitespace());
    match (ending.as_deref(), first) {
        (Some("csv"), _) => Ok(Format::Csv),
        (Some("tsv" | "tab"), _) => Ok(Format::Tsv),
        (Some("parquet"), _) => Err(ReadError::refused(
            path,
            None,
            "this is no Parquet file: it does not begin with PAR1",
        )),
        (_, Some(b'[')) => Ok(Format::JsonArray),
        (_, Some(b'{')) | (Some("json" | "jsonl" | "ndjson"), _) => Ok(Format::JsonLines),
        _ => Err(ReadError::refused(
            path,
            None,
            "neither the name nor the content says what rows these are",
        )
        .hint("hone-ingest reads .jsonl, .json, .csv, .tsv (also .gz and .zst) and .parquet")),
    }
}

#[cfg(test)]
mod tests;
