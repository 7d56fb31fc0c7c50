//! Settings that are a name alone, `"lion"`, or a table with knobs, `{name = "lion", beta2 =
//! 0.98}`.

use serde::de::{DeserializeOwned, Error};
use serde_json::{Map, Value};

/// The name and the other keys; a table without a name has the name `otherwise`.
pub(crate) fn split<E: Error>(value: Value, otherwise: Option<&str>) -> Result<(String, Value), E> {
    match value {
        Value::String(name) => Ok((name, Value::Object(Map::new()))),
        Value::Object(mut table) => match (table.remove("name"), otherwise) {
            (Some(Value::String(name)), _) => Ok((name, Value::Object(table))),
            (None, Some(name)) => Ok((name.to_owned(), Value::Object(table))),
            (None, None) => Err(E::custom("the table has no `name`")),
            (Some(other), _) => Err(E::custom(format!("`name` = {other} is not a name"))),
        },
        other => Err(E::custom(format!("{other} is neither a name nor a table with a `name`"))),
    }
}

/// The knobs of `name`; an unknown one is refused by name.
pub(crate) fn knobs<T: DeserializeOwned, E: Error>(name: &str, table: Value) -> Result<T, E> {
    serde_json::from_value(table).map_err(|e| E::custom(format!("`{name}`: {e}")))
}
