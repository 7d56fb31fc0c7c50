//! Comma- and tab-separated files: cells are texts, a header line names them.
//!
//! CSV cells may be quoted (RFC 4180). TSV cells may not unless `quoting = true`: tab-separated
//! text has no quoting of its own (IANA `text/tab-separated-values`), and FLAN's files begin cells
//! with quotation marks that belong to the text.

use std::collections::BTreeSet;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{ROW_BYTES_MAX, RawRow, ReadError, TableOptions, Text};
use crate::fault::{Fault, Reason};
use crate::json::quote;

/// The columns of FLAN's chain-of-thought files, which have no header line.
const FLAN_COLUMNS: [&str; 3] = ["inputs", "targets", "rationale"];

const HEADER_HINT: &str =
    "name the columns of a file without a header line: `columns = [\"prompt\", \"completion\"]`";

pub(super) struct Delimited {
    reader: csv::Reader<Metered>,
    since_row: Arc<AtomicUsize>,
    /// Whether lines end in `\r\n`.
    crlf: bool,
    path: PathBuf,
    columns: Vec<String>,
    /// A line that was read to find out about the header and is a row.
    pending: Option<(u64, csv::ByteRecord)>,
    /// Whether `\n` in a cell stands for a new line, as in FLAN's files.
    unescape: bool,
    over: bool,
    pub(super) note: Option<String>,
}

/// Fails when more bytes than a row may have went by without a row: a quotation mark is missing.
struct Metered {
    text: Text,
    since_row: Arc<AtomicUsize>,
}

impl Read for Metered {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.text.read(buf)?;
        if self.since_row.fetch_add(n, Ordering::Relaxed) > ROW_BYTES_MAX {
            let text = format!(
                "a row is longer than {} MiB; is a quotation mark missing?",
                ROW_BYTES_MAX >> 20
            );
            return Err(std::io::Error::other(text));
        }
        Ok(n)
    }
}

pub(super) fn rows(
    mut text: Text,
    path: PathBuf,
    tabs: bool,
    options: &TableOptions,
) -> Result<Delimited, ReadError> {
    let head = text.fill_buf().map_err(|e| super::packed::error(&path, None, &e))?;
    let crlf = head.iter().position(|b| *b == b'\n').is_some_and(|at| head[..at].ends_with(b"\r"));
    let since_row = Arc::new(AtomicUsize::new(0));
    let reader = csv::ReaderBuilder::new()
        .delimiter(if tabs { b'\t' } else { b',' })
        .quoting(options.quoting.unwrap_or(!tabs))
        .has_headers(false)
        .flexible(true)
        .from_reader(Metered { text, since_row: since_row.clone() });
    let mut rows = Delimited {
        reader,
        since_row,
        crlf,
        path,
        columns: Vec::new(),
        pending: None,
        unescape: false,
        over: false,
        note: None,
    };
    rows.header(tabs, options)?;
    Ok(rows)
}

impl Delimited {
    /// Finds the names of the columns.
    fn header(&mut self, tabs: bool, options: &TableOptions) -> Result<(), ReadError> {
        if let Some(columns) = &options.columns {
            self.columns.clone_from(columns);
            return Ok(());
        }
        let Some((line, record)) = self.record()? else { return Ok(()) };
        let cells: Vec<String> =
            record.iter().map(|cell| String::from_utf8_lossy(cell).trim().to_owned()).collect();
        // A name is short and has no space in it; the first cell of FLAN's files is a question.
        let is_name = |cell: &String| {
            !cell.is_empty() && cell.len() <= 64 && !cell.contains(char::is_whitespace)
        };
        if cells.iter().all(is_name) && !options.flan {
            return self.named(line, cells);
        }
        let is_flan = (2..=3).contains(&cells.len()) && !cells.iter().any(String::is_empty);
        if tabs && is_flan && (options.flan || cells[0].contains(char::is_whitespace)) {
            self.columns =
                FLAN_COLUMNS[..cells.len()].iter().map(|name| (*name).to_owned()).collect();
            self.note = Some(format!(
                "no header line; {} tab-separated columns are taken as FLAN's own ({}), \
                 `\\n` in them as a new line",
                cells.len(),
                self.columns.join(", ")
            ));
            self.unescape = true;
            self.pending = Some((line, record));
            return Ok(());
        }
        let what =
            "the first line does not look like a header: a name is short and has no space in it";
        Err(ReadError::refused(&self.path, line, what).hint(HEADER_HINT))
    }

    fn named(&mut self, line: u64, cells: Vec<String>) -> Result<(), ReadError> {
        let mut seen = BTreeSet::new();
        if let Some(twice) = cells.iter().find(|cell| !seen.insert(*cell)) {
            let what = format!("the header names the column `{twice}` twice");
            return Err(ReadError::refused(&self.path, line, what));
        }
        self.columns = cells;
        Ok(())
    }

    /// The next record that is not an empty line, and its line.
    fn record(&mut self) -> Result<Option<(u64, csv::ByteRecord)>, ReadError> {
        if let Some(pending) = self.pending.take() {
            return Ok(Some(pending));
        }
        let before = self.reader.position().line();
        let mut record = csv::ByteRecord::new();
        let more = self.reader.read_byte_record(&mut record).map_err(|e| {
            let line = self.reader.position().line();
            read_error(&self.path, line, &e)
        })?;
        // What is buffered beyond this row counts for the next one, which is on the safe side.
        self.since_row.store(0, Ordering::Relaxed);
        // The reader counts a line when it takes its `\n`: before the row come the `\n` of a `\r\n`
        // and empty lines, behind it the `\n` that ends it; what is in its cells is in between.
        let n_ended = self.reader.position().line() - before;
        let n_inner = record.as_slice().iter().filter(|b| **b == b'\n').count() as u64;
        let line = before + n_ended.saturating_sub(n_inner + u64::from(!self.crlf));
        Ok(more.then_some((line, record)))
    }

    fn row(&self, line: u64, record: &csv::ByteRecord) -> RawRow {
        let raw =
            record.iter().map(String::from_utf8_lossy).collect::<Vec<_>>().join("\t").into_bytes();
        if record.len() != self.columns.len() {
            let detail =
                format!("{} columns, where {} are named", record.len(), self.columns.len());
            return RawRow {
                line,
                bytes: raw,
                fault: Some(Fault::new(Reason::ColumnCount, detail)),
            };
        }
        let mut parts = Vec::with_capacity(record.len());
        for (name, cell) in self.columns.iter().zip(record) {
            let Ok(cell) = std::str::from_utf8(cell) else {
                let fault = Fault::new(Reason::NotUtf8, format!("column `{name}`"));
                return RawRow { line, bytes: raw, fault: Some(fault) };
            };
            let cell = if self.unescape { cell.replace("\\n", "\n") } else { cell.to_owned() };
            parts.push(format!("{}:{}", quote(name), quote(&cell)));
        }
        RawRow { line, bytes: format!("{{{}}}", parts.join(",")).into_bytes(), fault: None }
    }
}

impl Iterator for Delimited {
    type Item = Result<RawRow, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let record = self.record();
        self.over = !matches!(record, Ok(Some(_)));
        record.map(|record| record.map(|(line, record)| self.row(line, &record))).transpose()
    }
}

fn read_error(path: &Path, line: u64, error: &csv::Error) -> ReadError {
    match error.kind() {
        csv::ErrorKind::Io(e) => super::packed::error(path, Some(line), e),
        _ => ReadError::refused(path, line, error.to_string()),
    }
}
