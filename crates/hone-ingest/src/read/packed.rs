//! Compressed files, streamed under a limit of expansion.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ReadError;

/// Output bytes a compressed byte may become, once [`FREE_BYTES`] are out. Instruction data
/// compresses 3 to 30 times.
const RATIO_MAX: u64 = 200;
/// Output that is not held against the ratio: small files may be very regular.
const FREE_BYTES: u64 = 1 << 20;
/// Largest zstd window taken, as its logarithm: 128 MiB, what the `zstd` program takes without
/// being asked.
const WINDOW_LOG_MAX: u32 = 27;

/// How a file is compressed, said by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Zstd,
}

impl Packing {
    pub(super) fn of(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, ..] => Some(Packing::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Packing::Zstd),
            // A frame to be skipped, which may come before the first real one.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Packing::Zstd),
            _ => None,
        }
    }
}

/// The text of a file, unpacked as it is read.
pub(super) fn unpack(
    file: impl Read + Send + 'static,
    packing: Option<Packing>,
    path: &Path,
) -> Result<Box<dyn Read + Send>, ReadError> {
    let taken = Arc::new(AtomicU64::new(0));
    let file = Counted { inner: file, taken: taken.clone() };
    let inner: Box<dyn Read + Send> = match packing {
        None => return Ok(Box::new(file)),
        Some(Packing::Gzip) => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Some(Packing::Zstd) => {
            let wrong = |e: io::Error| error(path, None, &e);
            let mut decoder = zstd::stream::read::Decoder::new(file).map_err(wrong)?;
            decoder.window_log_max(WINDOW_LOG_MAX).map_err(wrong)?;
            Box::new(decoder)
        }
    };
    Ok(Box::new(Bounded { inner, taken, given: 0 }))
}

/// An error while reading: of the data when it is compressed wrongly, of the machine otherwise.
pub(super) fn error(path: &Path, line: Option<u64>, error: &io::Error) -> ReadError {
    let what = match error.kind() {
        io::ErrorKind::UnexpectedEof => "the compressed data ends too early".to_owned(),
        _ => format!("cannot read on: {error}"),
    };
    ReadError::refused(path, line, what)
        .hint("get the file again, or unpack it by hand to see how much of it is sound")
}

/// Counts the bytes that went through.
struct Counted<R> {
    inner: R,
    taken: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.taken.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Fails once the output is out of proportion to the input.
struct Bounded {
    inner: Box<dyn Read + Send>,
    taken: Arc<AtomicU64>,
    given: u64,
}

impl Read for Bounded {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.given += n as u64;
        let taken = self.taken.load(Ordering::Relaxed);
        if self.given > FREE_BYTES.saturating_add(taken.saturating_mul(RATIO_MAX)) {
            let text = format!(
                "{taken} compressed bytes became {}, more than {RATIO_MAX} times as many",
                self.given
            );
            return Err(io::Error::other(text));
        }
        Ok(n)
    }
}
