//! How Parquet files are written, inside artefacts and outside.

use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

/// Most bytes of a row group, compressed: a writer holds it back until it is whole.
const ROW_GROUP_BYTES: usize = 32 << 20;

/// Level of zstd: the artefacts between stages are read as often as written, and level 3 takes twice
/// the time for a few percent of the size.
const ZSTD_LEVEL: i32 = 1;

/// The properties of a file (zstd) whose row groups have at most `rows` rows: a reader holds a group at once.
pub(crate) fn properties(rows: usize) -> WriterProperties {
    let level = ZstdLevel::try_new(ZSTD_LEVEL).expect("1 is a zstd level");
    WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_created_by("hone".to_owned())
        .set_max_row_group_row_count(Some(rows))
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
        .build()
}
