//! Tables that are used where they lie: Arrow IPC files whose columns are slices of the file's bytes.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::ipc::convert::try_fb_to_schema;
use arrow::ipc::reader::{FileDecoder, read_footer_length};
use arrow::ipc::root_as_footer;
use bytes::Bytes;

use crate::{Sealed, StoreError};

/// Bytes behind the footer: its length and the mark of the format.
const TRAILER: usize = 10;

impl Sealed {
    /// The batches of an Arrow IPC file, checked; their columns lie in what `map` makes of the file, and cost no memory of their own when
    /// that is a mapping.
    ///
    /// # Errors
    /// As [`Sealed::file`], a file that is not Arrow IPC, or one that cannot be mapped.
    pub fn ipc_mapped<B: AsRef<[u8]> + Send + 'static>(
        &self,
        name: &str,
        map: impl FnOnce(&File) -> io::Result<B>,
    ) -> Result<Vec<RecordBatch>, StoreError> {
        let path = self.path(name);
        let file = self.file(name)?;
        let bytes = map(&file).map_err(|e| StoreError::io("map", &path, e))?;
        batches(&path, Buffer::from(Bytes::from_owner(bytes)))
    }
}

fn batches(path: &Path, bytes: Buffer) -> Result<Vec<RecordBatch>, StoreError> {
    let wrong = |what: &dyn std::fmt::Display| StoreError::table(path, what);
    let short = || wrong(&"the file ends before its table does");
    let trailer = bytes.len().checked_sub(TRAILER).ok_or_else(short)?;
    let end = bytes[trailer..].try_into().expect("so many bytes are left");
    let len = read_footer_length(end).map_err(|e| wrong(&e))?;
    let start = trailer.checked_sub(len).ok_or_else(short)?;
    let footer = root_as_footer(&bytes[start..trailer]).map_err(|e| wrong(&e))?;
    let schema = footer.schema().ok_or_else(|| wrong(&"the table has no schema"))?;
    let schema = try_fb_to_schema(schema).map_err(|e| wrong(&e))?;
    let decoder = FileDecoder::new(Arc::new(schema), footer.version());
    let mut batches = Vec::new();
    for block in footer.recordBatches().into_iter().flatten() {
        let metadata = usize::try_from(block.metaDataLength()).map_err(|e| wrong(&e))?;
        let body = usize::try_from(block.bodyLength()).map_err(|e| wrong(&e))?;
        let at = usize::try_from(block.offset()).map_err(|e| wrong(&e))?;
        let len = metadata.checked_add(body).ok_or_else(short)?;
        // A message begins with its mark and its length.
        if metadata < 8 || at.checked_add(len).is_none_or(|end| end > start) {
            return Err(short());
        }
        let data = bytes.slice_with_length(at, len);
        let batch = decoder.read_record_batch(block, &data).map_err(|e| wrong(&e))?;
        batches.extend(batch);
    }
    Ok(batches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, UInt32Array};

    fn file() -> (Vec<u8>, Vec<RecordBatch>) {
        let batch = |from: u32| {
            let ids: ArrayRef = Arc::new(UInt32Array::from_iter_values(from..from + 100));
            RecordBatch::try_from_iter([("ids", ids)]).unwrap()
        };
        let all = vec![batch(0), batch(100)];
        let mut out = Vec::new();
        let mut writer =
            arrow::ipc::writer::FileWriter::try_new(&mut out, &all[0].schema()).unwrap();
        all.iter().for_each(|batch| writer.write(batch).unwrap());
        writer.finish().unwrap();
        drop(writer);
        (out, all)
    }

    #[test]
    fn a_mapped_table_is_the_one_that_was_written_and_is_not_copied() {
        let (out, all) = file();
        let bytes = Buffer::from_vec(out);
        let range = bytes.as_ptr_range();
        let read = batches(Path::new("x"), bytes).unwrap();
        assert_eq!(read, all);
        let column = read[1].column(0).to_data().buffers()[0].as_ptr();
        assert!(range.contains(&column), "the column was copied");
    }

    #[test]
    fn a_damaged_table_is_an_error() {
        let (out, _) = file();
        let try_bytes = |bytes: Vec<u8>| batches(Path::new("x"), Buffer::from_vec(bytes));
        assert!(try_bytes(out.clone()).is_ok());
        let mut n_errors = 0;
        for len in 0..out.len() {
            n_errors += usize::from(try_bytes(out[..len].to_vec()).is_err());
            n_errors += usize::from(try_bytes(out[out.len() - len..].to_vec()).is_err());
        }
        assert!(n_errors > out.len(), "{n_errors} of {} cuts were seen", 2 * out.len());
    }
}
