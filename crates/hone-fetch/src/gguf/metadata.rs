//! The metadata of a GGUF file: typed values under dotted keys.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{Read, Seek};

use super::GgufError;
use super::reader::HeaderReader;

/// Longest key; the format says so.
const KEY_BYTES_MAX: u64 = 65_535;

/// Longest text in the metadata: chat templates and licences are texts of some ten thousand bytes.
const STRING_BYTES_MAX: u64 = 16 << 20;

/// Most array elements in the whole of a header: four times those of the largest vocabulary known.
const ELEMENTS_MAX: u64 = 8 << 20;

/// A value; integers and floats are widened, which loses nothing.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// Unsigned, of any width.
    Unsigned(u64),
    /// Signed, of any width.
    Signed(i64),
    /// Single precision; kept apart so that 1e-5 stays 1e-5.
    F32(f32),
    /// Double precision.
    F64(f64),
    /// Truth.
    Bool(bool),
    /// Text.
    String(String),
    /// Values of one type, which is never itself an array.
    Array(Vec<Value>),
}

impl Value {
    /// Name of the type in messages.
    fn kind(&self) -> &'static str {
        match self {
            Value::Unsigned(_) => "an unsigned integer",
            Value::Signed(_) => "a signed integer",
            Value::F32(_) | Value::F64(_) => "a float",
            Value::Bool(_) => "a truth value",
            Value::String(_) => "a text",
            Value::Array(_) => "an array",
        }
    }

    fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Unsigned(value) => Some(*value),
            Value::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    fn as_str(&self) -> Option<&str> {
        if let Value::String(text) = self { Some(text) } else { None }
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Unsigned(value) => write!(f, "{value}"),
            Value::Signed(value) => write!(f, "{value}"),
            Value::F32(value) => write!(f, "{value}"),
            Value::F64(value) => write!(f, "{value}"),
            Value::Bool(value) => write!(f, "{value}"),
            Value::String(text) => write!(f, "{text:?}"),
            Value::Array(values) => {
                write!(f, "[")?;
                for (idx, value) in values.iter().take(4).enumerate() {
                    write!(f, "{}{value}", if idx > 0 { ", " } else { "" })?;
                }
                write!(
                    f,
                    "{}] ({} values)",
                    if values.len() > 4 { ", .." } else { "" },
                    values.len()
                )
            }
        }
    }
}

/// All metadata of a file.
#[derive(Debug, Default)]
pub(crate) struct Metadata {
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(super) fn read<R: Read + Seek>(
        reader: &mut HeaderReader<R>,
        n_keys: u64,
    ) -> Result<Self, GgufError> {
        let mut values = BTreeMap::new();
        let mut elements_left = ELEMENTS_MAX;
        for _ in 0..n_keys {
            let key = reader.name("a metadata key", KEY_BYTES_MAX)?;
            let kind = reader.u32("the type of a metadata value")?;
            let value = read_value(reader, kind, &key, &mut elements_left)?;
            match values.entry(key) {
                Entry::Vacant(place) => {
                    place.insert(value);
                }
                Entry::Occupied(place) => {
                    let reason = "it is in the file twice".to_owned();
                    return Err(GgufError::Key { key: place.key().clone(), reason });
                }
            }
        }
        Ok(Metadata { values })
    }

    /// Keys and values, sorted by key.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        view: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let reason = || format!("it is {}, not {expected}", value.kind());
        let wrong = || GgufError::Key { key: key.to_owned(), reason: reason() };
        view(value).map(Some).ok_or_else(wrong)
    }

    /// A whole number, if the key is there.
    pub(crate) fn try_u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a whole number", Value::as_u64)
    }

    /// A number, if the key is there. A float of single precision becomes the double that is
    /// written with the same digits: 1e-5 is meant where 9.999999747378752e-6 is stored.
    pub(crate) fn try_f64(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", |value| match value {
            Value::F32(value) => {
                Some(value.to_string().parse().expect("a float's own text is a number"))
            }
            Value::F64(value) => Some(*value),
            _ => None,
        })
    }

    /// A truth value, if the key is there.
    pub(crate) fn try_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        let view = |value: &Value| if let Value::Bool(truth) = value { Some(*truth) } else { None };
        self.typed(key, "a truth value", view)
    }

    /// A text, if the key is there.
    pub(crate) fn try_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a text", Value::as_str)
    }

    /// An array of texts, if the key is there.
    pub(crate) fn try_strs(&self, key: &str) -> Result<Option<Vec<&str>>, GgufError> {
        self.typed(key, "an array of texts", |value| match value {
            Value::Array(values) => values.iter().map(Value::as_str).collect(),
            _ => None,
        })
    }

    /// An array of whole numbers, if the key is there.
    pub(crate) fn try_u64s(&self, key: &str) -> Result<Option<Vec<u64>>, GgufError> {
        self.typed(key, "an array of whole numbers", |value| match value {
            Value::Array(values) => values.iter().map(Value::as_u64).collect(),
            _ => None,
        })
    }

    /// A text that must be there.
    pub(crate) fn str(&self, key: &str) -> Result<&str, GgufError> {
        self.try_str(key)?.ok_or_else(|| GgufError::NoKey(key.to_owned()))
    }

    /// An array of texts that must be there.
    pub(crate) fn strs(&self, key: &str) -> Result<Vec<&str>, GgufError> {
        self.try_strs(key)?.ok_or_else(|| GgufError::NoKey(key.to_owned()))
    }
}

/// Type number of an array.
const ARRAY: u32 = 9;

fn read_value<R: Read + Seek>(
    reader: &mut HeaderReader<R>,
    kind: u32,
    key: &str,
    elements_left: &mut u64,
) -> Result<Value, GgufError> {
    if kind != ARRAY {
        return read_scalar(reader, kind, key);
    }
    let at = reader.position();
    let kind = reader.u32("the type of an array's values")?;
    if kind == ARRAY {
        let reason = format!("`{key}` is an array of arrays, which no known model has");
        return Err(GgufError::Field { at, reason });
    }
    let Some(bytes_each) = bytes_min(kind) else { return Err(unknown_type(at, kind, key)) };
    let n = reader.count(&format!("the length of `{key}`"), *elements_left, bytes_each)?;
    *elements_left -= n;
    let values = (0..n).map(|_| read_scalar(reader, kind, key)).collect::<Result<_, _>>()?;
    Ok(Value::Array(values))
}

fn unknown_type(at: u64, kind: u32, key: &str) -> GgufError {
    GgufError::Field { at, reason: format!("`{key}` has a value of the unknown type {kind}") }
}

/// Fewest bytes of a value in the file.
fn bytes_min(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        8 | 10..=12 => Some(8),
        _ => None,
    }
}

fn read_scalar<R: Read + Seek>(
    reader: &mut HeaderReader<R>,
    kind: u32,
    key: &str,
) -> Result<Value, GgufError> {
    let at = reader.position();
    let unsigned = |value: u64| Ok(Value::Unsigned(value));
    let signed = |value: i64| Ok(Value::Signed(value));
    match kind {
        0 => unsigned(u8::from_le_bytes(reader.array(key)?).into()),
        1 => signed(i8::from_le_bytes(reader.array(key)?).into()),
        2 => unsigned(u16::from_le_bytes(reader.array(key)?).into()),
        3 => signed(i16::from_le_bytes(reader.array(key)?).into()),
        4 => unsigned(u32::from_le_bytes(reader.array(key)?).into()),
        5 => signed(i32::from_le_bytes(reader.array(key)?).into()),
        6 => Ok(Value::F32(f32::from_le_bytes(reader.array(key)?))),
        7 => match reader.array::<1>(key)? {
            [0] => Ok(Value::Bool(false)),
            [1] => Ok(Value::Bool(true)),
            [other] => {
                let reason = format!("`{key}` is a truth value of {other}");
                Err(GgufError::Field { at, reason })
            }
        },
        8 => Ok(Value::String(reader.string(key, STRING_BYTES_MAX)?)),
        10 => unsigned(u64::from_le_bytes(reader.array(key)?)),
        11 => signed(i64::from_le_bytes(reader.array(key)?)),
        12 => Ok(Value::F64(f64::from_le_bytes(reader.array(key)?))),
        _ => Err(unknown_type(at, kind, key)),
    }
}
