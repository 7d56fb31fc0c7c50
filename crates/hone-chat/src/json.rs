//! `tojson` to the byte as transformers has it: Python's `json.dumps` with `ensure_ascii` off, and
//! no HTML escapes.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Widest indent that a template may ask for: wider ones serve nobody and fill the memory.
const INDENT_MAX: usize = 64;

/// Most levels of lists and maps; deeper rows do not come out of the JSON reader.
const DEPTH_MAX: usize = 200;

struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

/// The filter: `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(crate) fn tojson(value: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let style = Style::read(&args, &kwargs)?;
    kwargs.assert_all_used()?;
    let mut out = String::new();
    style.write(&value, 0, &mut out)?;
    Ok(Value::from(out))
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

impl Style {
    fn read(args: &[Value], kwargs: &Kwargs) -> Result<Self, Error> {
        let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
            let named: Option<Value> = kwargs.get(name)?;
            let value = args.get(at).cloned().or(named);
            Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
        };
        let truth = |value: Option<Value>| value.is_some_and(|v| v.is_true());
        let ensure_ascii = truth(argument(0, "ensure_ascii")?);
        let indent = argument(1, "indent")?.map(indent).transpose()?;
        let separators = argument(2, "separators")?;
        let sort_keys = truth(argument(3, "sort_keys")?);
        let (item, key) = match separators {
            None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
            Some(pair) => {
                let part = |at| -> Result<String, Error> {
                    let part = pair.get_item_by_index(at)?;
                    let text = part.as_str().map(str::to_owned);
                    text.ok_or_else(|| wrong("tojson: separators are two strings"))
                };
                (part(0)?, part(1)?)
            }
        };
        Ok(Style { ensure_ascii, indent, item, key, sort_keys })
    }

    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(wrong("tojson: too many levels"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth, out)?,
            ValueKind::Map => self.map(value, depth, out)?,
            other => return Err(wrong(format!("tojson: {other} is not JSON"))),
        }
        Ok(())
    }

    fn list(&self, list: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut n = 0;
        out.push('[');
        for item in list.try_iter()?.checked() {
            self.between(n, depth + 1, out);
            self.write(&item?, depth + 1, out)?;
            n += 1;
        }
        self.close(n, depth, ']', out);
        Ok(())
    }

    fn map(&self, map: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut pairs = Vec::new();
        for key in map.try_iter()?.checked() {
            let key = key?;
            let name = match key.kind() {
                ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                ValueKind::Number => number(&key),
                ValueKind::Bool => key.is_true().to_string(),
                ValueKind::None => "null".to_owned(),
                other => return Err(wrong(format!("tojson: {other} is not a key"))),
            };
            pairs.push((name, map.get_item(&key)?));
        }
        if self.sort_keys {
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
        }
        out.push('{');
        for (at, (name, value)) in pairs.iter().enumerate() {
            self.between(at, depth + 1, out);
            self.text(name, out);
            out.push_str(&self.key);
            self.write(value, depth + 1, out)?;
        }
        self.close(pairs.len(), depth, '}', out);
        Ok(())
    }

    fn between(&self, at: usize, depth: usize, out: &mut String) {
        if at > 0 {
            out.push_str(&self.item);
        }
        self.line(depth, out);
    }

    fn close(&self, n: usize, depth: usize, bracket: char, out: &mut String) {
        if n > 0 {
            self.line(depth, out);
        }
        out.push(bracket);
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn text(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                c if c.is_ascii() || !self.ensure_ascii => escape(c, out),
                c => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").expect("a String takes any text");
                    }
                }
            }
        }
        out.push('"');
    }
}

/// One character inside a JSON string, with `ensure_ascii` off.
fn escape(c: char, out: &mut String) {
    match c {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        '\u{8}' => out.push_str("\\b"),
        '\u{c}' => out.push_str("\\f"),
        c if c < ' ' => {
            write!(out, "\\u{:04x}", u32::from(c)).expect("a String takes any text");
        }
        c => out.push(c),
    }
}

/// What `text` becomes inside a JSON string.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| escape(c, &mut out));
    out
}

/// The indent of one level.
fn indent(value: Value) -> Result<String, Error> {
    let width = match value.as_str() {
        Some(text) if text.len() <= INDENT_MAX => return Ok(text.to_owned()),
        Some(_) => None,
        None => value.as_i64(),
    };
    // Python takes a negative width as 0.
    width
        .map(|width| usize::try_from(width).unwrap_or(0))
        .filter(|width| *width <= INDENT_MAX)
        .map(|width| " ".repeat(width))
        .ok_or_else(|| wrong(format!("tojson: an indent is at most {INDENT_MAX} wide")))
}

/// A number as Python writes it: floats in the shortest form that reads back, with an exponent
/// below 1e-4 and from 1e16 on.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if !float.is_finite() {
        let name = if float.is_nan() { "NaN" } else { "Infinity" };
        return format!("{}{name}", if float < 0.0 { "-" } else { "" });
    }
    let short = format!("{float:e}");
    let (digits, exponent) = short.split_once('e').expect("`{:e}` writes an e");
    let exponent: i32 = exponent.parse().expect("`{:e}` writes an integer behind it");
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = float.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}
