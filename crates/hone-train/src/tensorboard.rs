//! TensorBoard event files.
//!
//! A file is a sequence of records: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the payload, all little-endian.
//! A payload is a protocol-buffer `Event`; of its fields only wall_time (1, double), step (2, varint), file_version (3, string),
//! session_log (7) and summary (5) are written, a summary being values (1) of tag (1, string) and simple_value (2, float), or of tag,
//! a tensor (8) and metadata (9) that name the plugin which shows it: `text`, whose tensor is a string, and `hparams`, whose
//! settings stand in the metadata.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use hone_cli::Failure;
use hone_store::Live;
use serde_json::{Map, Value};

/// TensorFlow's numbers of the types of floats and strings.
const FLOAT_TYPE: u64 = 1;
const STRING_TYPE: u64 = 7;

/// Name under which TensorBoard looks for a run's settings.
const SETTINGS: &[u8] = b"_hparams_/session_start_info";

/// TensorFlow's number of a session's start.
const SESSION_START: u64 = 1;

/// An event file that TensorBoard can follow while it grows.
pub(crate) struct EventFile {
    file: Live,
}

impl EventFile {
    /// Makes a new file in `dir`, named by the time so that a resumed run continues the curve in a second file: it begins with the
    /// word that a session starts at `step`, which takes back what a killed one wrote of later steps.
    pub(crate) fn create(dir: &Path, step: u64) -> Result<Self, Failure> {
        let now = now();
        let name = format!("events.out.tfevents.{:010}.hone.{}", now as u64, std::process::id());
        let mut file = Live::create(&dir.join(name))?;
        let mut event = Vec::new();
        double(&mut event, 1, now);
        bytes(&mut event, 3, b"brain.Event:2");
        file.write(&record(&event))?;
        let (mut event, mut session) = (Vec::new(), Vec::new());
        key(&mut session, 1, 0);
        varint(&mut session, SESSION_START);
        double(&mut event, 1, now);
        key(&mut event, 2, 0);
        varint(&mut event, step);
        bytes(&mut event, 7, &session);
        file.write(&record(&event))?;
        Ok(EventFile { file })
    }

    /// Writes scalars of a step. What is not finite is left out, as TensorBoard draws nothing for it.
    pub(crate) fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), Failure> {
        let mut summary = Vec::new();
        for (tag, value) in values.iter().filter(|(_, value)| value.is_finite()) {
            let mut one = Vec::new();
            bytes(&mut one, 1, tag.as_bytes());
            key(&mut one, 2, 5);
            one.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &one);
        }
        self.summary(step, &summary)
    }

    /// Writes a text of a step, as Markdown.
    pub(crate) fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<(), Failure> {
        let mut tensor = tensor(STRING_TYPE, 1);
        bytes(&mut tensor, 8, text.as_bytes());
        self.summary(step, &shown_by(b"text", &[], tag.as_bytes(), &tensor))
    }

    /// Writes the settings of the run, which TensorBoard lists beside those of others.
    pub(crate) fn settings(&mut self, settings: &Map<String, Value>) -> Result<(), Failure> {
        let (mut session, mut data) = (Vec::new(), Vec::new());
        for (name, value) in settings.iter().filter(|(_, value)| !value.is_null()) {
            let mut entry = Vec::new();
            bytes(&mut entry, 1, name.as_bytes());
            bytes(&mut entry, 2, &any(value));
            bytes(&mut session, 1, &entry);
        }
        double(&mut session, 5, now());
        bytes(&mut data, 3, &session);
        self.summary(0, &shown_by(b"hparams", &data, SETTINGS, &tensor(FLOAT_TYPE, 0)))
    }

    fn summary(&mut self, step: u64, summary: &[u8]) -> Result<(), Failure> {
        let mut event = Vec::new();
        double(&mut event, 1, now());
        key(&mut event, 2, 0);
        varint(&mut event, step);
        bytes(&mut event, 5, summary);
        Ok(self.file.write(&record(&event))?)
    }
}

/// A `google.protobuf.Value`; of what is neither a number, a text nor a truth its JSON.
fn any(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    match value {
        Value::Bool(is) => {
            key(&mut out, 4, 0);
            varint(&mut out, u64::from(*is));
        }
        Value::Number(number) => double(&mut out, 2, number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => bytes(&mut out, 3, text.as_bytes()),
        other => bytes(&mut out, 3, other.to_string().as_bytes()),
    }
    out
}

/// Type and shape of a tensor of `n` values in a row.
fn tensor(of: u64, n: u64) -> Vec<u8> {
    let (mut tensor, mut shape, mut dim) = (Vec::new(), Vec::new(), Vec::new());
    key(&mut dim, 1, 0);
    varint(&mut dim, n);
    bytes(&mut shape, 2, &dim);
    key(&mut tensor, 1, 0);
    varint(&mut tensor, of);
    bytes(&mut tensor, 2, &shape);
    tensor
}

/// A summary of one value that a plugin shows.
fn shown_by(name: &[u8], data: &[u8], tag: &[u8], tensor: &[u8]) -> Vec<u8> {
    let (mut plugin, mut metadata) = (Vec::new(), Vec::new());
    bytes(&mut plugin, 1, name);
    bytes(&mut plugin, 2, data);
    bytes(&mut metadata, 1, &plugin);
    let (mut one, mut summary) = (Vec::new(), Vec::new());
    bytes(&mut one, 1, tag);
    bytes(&mut one, 8, tensor);
    bytes(&mut one, 9, &metadata);
    bytes(&mut summary, 1, &one);
    summary
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(payload.len() + 16);
    out.extend(length);
    out.extend(masked(&length).to_le_bytes());
    out.extend(payload);
    out.extend(masked(payload).to_le_bytes());
    out
}

/// TensorFlow's mask over a CRC-32C: rotated right by 15 bits, plus a constant.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    varint(out, field << 3 | wire_type);
}

fn double(out: &mut Vec<u8>, field: u64, value: f64) {
    key(out, field, 1);
    out.extend(value.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(out, field, 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_framed_as_tensorflow_frames_it() {
        // The CRC of "123456789" is the check value of CRC-32C.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let framed = record(b"abc");
        assert_eq!(framed[..8], 3u64.to_le_bytes());
        assert_eq!(framed[12..15], *b"abc");
        assert_eq!(framed.len(), 8 + 4 + 3 + 4);
        assert_eq!(framed[15..], masked(b"abc").to_le_bytes());
    }

    #[test]
    fn varints_carry_seven_bits_a_byte() {
        for (value, expect) in [(0, vec![0]), (127, vec![127]), (300, vec![0xac, 2])] {
            let mut out = Vec::new();
            varint(&mut out, value);
            assert_eq!(out, expect);
        }
    }
}
