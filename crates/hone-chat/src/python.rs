//! Python's string methods and filters where the engine's own differ or may grow without bound.
//!
//! Fuel counts instructions, not bytes: one `replace` can turn a megabyte into a terabyte. So
//! everything here that makes a text longer than what it was given refuses to go beyond
//! [`TEXT_BYTES_MAX`].

use minijinja::value::{Kwargs, Rest, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Longest text that a method or filter makes: far beyond any context, far below the memory of any
/// machine.
const TEXT_BYTES_MAX: usize = 16 << 20;

/// Widest field of `format`, `indent`, `ljust` and the like.
const WIDTH_MAX: usize = 1000;

/// What Python's `str.isspace` takes for white space: Unicode's, and four separators of ASCII.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Refuses a text of `n_bytes` that is too long to make.
fn bounded(n_bytes: Option<usize>) -> Result<(), Error> {
    match n_bytes {
        Some(n) if n <= TEXT_BYTES_MAX => Ok(()),
        _ => Err(wrong(format!("the template makes a text of more than {TEXT_BYTES_MAX} bytes"))),
    }
}

/// `str.replace`.
fn replace(text: &str, old: &str, new: &str, count: Option<i64>) -> Result<Value, Error> {
    let limit = count.and_then(|n| usize::try_from(n).ok());
    let found = text.matches(old).count();
    let n = limit.map_or(found, |limit| found.min(limit));
    bounded(n.checked_mul(new.len()).and_then(|n| n.checked_add(text.len())))?;
    Ok(Value::from(text.replacen(old, new, n)))
}

/// The filter `replace(old, new, count=None)`.
pub(crate) fn replace_filter(
    text: Value,
    old: Value,
    new: Value,
    count: Option<i64>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named: Option<i64> = kwargs.get("count")?;
    kwargs.assert_all_used()?;
    let count = count.or(named);
    replace(&text.to_string(), &old.to_string(), &new.to_string(), count)
}

/// The filter `trim(chars=None)`.
pub(crate) fn trim(text: Value, chars: Option<String>) -> Value {
    Value::from(strip(&text.to_string(), chars.as_deref(), true, true))
}

/// The test `iterable`: what Python can iterate over, which `none` is not.
pub(crate) fn is_iterable(value: Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// The filter `indent(width=4, first=False, blank=False)`.
pub(crate) fn indent(text: String, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(name)?;
        Ok(args.get(at).cloned().or(named))
    };
    let width = match argument(0, "width")? {
        None => " ".repeat(4),
        Some(width) => match (width.as_str(), width.as_usize()) {
            (Some(text), _) if text.len() <= WIDTH_MAX => text.to_owned(),
            (None, Some(width)) if width <= WIDTH_MAX => " ".repeat(width),
            _ => return Err(wrong(format!("indent: at most {WIDTH_MAX} wide"))),
        },
    };
    let truth = |value: Option<Value>| value.is_some_and(|v| v.is_true());
    let first = truth(argument(1, "first")?);
    let blank = truth(argument(2, "blank")?);
    kwargs.assert_all_used()?;
    let n_lines = text.matches('\n').count() + 1;
    bounded(n_lines.checked_mul(width.len() + 1).and_then(|n| n.checked_add(text.len())))?;
    let mut out = String::new();
    for (at, line) in text.split('\n').enumerate() {
        if at > 0 {
            out.push('\n');
        }
        if (at > 0 || first) && (blank || !line.is_empty()) {
            out.push_str(&width);
        }
        out.push_str(line);
    }
    Ok(Value::from(out))
}

/// The filter `format`, with widths bounded.
pub(crate) fn format(form: &str, args: Rest<Value>) -> Result<String, Error> {
    bounded_widths(form)?;
    minijinja::formatting::format(minijinja::formatting::FormatStyle::Printf, form, &args)
}

/// Refuses a format that asks for a field of more than [`WIDTH_MAX`], or takes a width from its
/// arguments.
fn bounded_widths(form: &str) -> Result<(), Error> {
    let mut numbers = form.split(|c: char| !c.is_ascii_digit());
    let is_wide =
        |digits: &str| digits.len() > 9 || digits.parse().is_ok_and(|n: usize| n > WIDTH_MAX);
    if numbers.any(is_wide) || form.contains("%*") || form.contains(":{") {
        return Err(wrong(format!("format: a field is at most {WIDTH_MAX} wide")));
    }
    Ok(())
}

/// Methods that the engine does not know, or knows otherwise than Python; the rest is
/// minijinja-contrib's.
pub(crate) fn method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = text_method(text, method, args)
    {
        return result;
    }
    if method == "index" && value.as_str().is_none() && value.as_object().is_some() {
        let (wanted,): (Value,) = from_args(args)?;
        for (at, item) in value.try_iter()?.checked().enumerate() {
            if item? == wanted {
                return Ok(Value::from(at));
            }
        }
        return Err(wrong(format!("{wanted} is not in the list")));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn text_method(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match method {
        "strip" | "lstrip" | "rstrip" => from_args(args).map(|(chars,): (Option<String>,)| {
            let (start, end) = (method != "rstrip", method != "lstrip");
            Value::from(strip(text, chars.as_deref(), start, end))
        }),
        "split" | "rsplit" => split(text, method == "rsplit", args),
        "splitlines" => from_args(args)
            .map(|(keep,): (Option<bool>,)| texts(lines(text, keep.unwrap_or(false)))),
        "partition" | "rpartition" => from_args(args).map(|(sep,): (&str,)| {
            let cut =
                if method == "partition" { text.split_once(sep) } else { text.rsplit_once(sep) };
            texts(match cut {
                Some((before, after)) => [before, sep, after],
                None if method == "partition" => [text, "", ""],
                None => ["", "", text],
            })
        }),
        "removeprefix" => from_args(args)
            .map(|(prefix,): (&str,)| Value::from(text.strip_prefix(prefix).unwrap_or(text))),
        "removesuffix" => from_args(args)
            .map(|(suffix,): (&str,)| Value::from(text.strip_suffix(suffix).unwrap_or(text))),
        "replace" => from_args(args).and_then(|(old, new, count): (&str, &str, Option<i64>)| {
            replace(text, old, new, count)
        }),
        "ljust" | "rjust" | "center" | "zfill" => justify(text, method, args),
        "isspace" => {
            from_args(args).map(|()| Value::from(!text.is_empty() && text.chars().all(is_space)))
        }
        "format" => match bounded_widths(text) {
            Ok(()) => return None,
            Err(e) => Err(e),
        },
        _ => return None,
    })
}

/// A list of texts.
fn texts<'a>(pieces: impl IntoIterator<Item = &'a str>) -> Value {
    pieces.into_iter().map(Value::from).collect()
}

/// `str.strip` and its one-sided kin.
fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let drop = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(drop) } else { text };
    if end { text.trim_end_matches(drop) } else { text }
}

/// `str.split(sep=None, maxsplit=-1)` and `str.rsplit`.
fn split(text: &str, from_end: bool, args: &[Value]) -> Result<Value, Error> {
    let (sep, limit, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let sep = sep.or(kwargs.get("sep")?).filter(|v| !v.is_none());
    let limit = limit.or(kwargs.get("maxsplit")?);
    kwargs.assert_all_used()?;
    let limit = limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX - 1);
    let pieces: Vec<&str> = match sep {
        Some(sep) => {
            let sep = sep.as_str().ok_or_else(|| wrong("split: the separator is a string"))?;
            if sep.is_empty() {
                return Err(wrong("split: the separator is empty"));
            }
            if from_end {
                let mut pieces: Vec<&str> = text.rsplitn(limit + 1, sep).collect();
                pieces.reverse();
                pieces
            } else {
                text.splitn(limit + 1, sep).collect()
            }
        }
        None if from_end => words_from_end(text, limit),
        None => words(text, limit),
    };
    Ok(texts(pieces))
}

/// Words between white space; what is left after `limit` splits is the last.
fn words(text: &str, limit: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        if pieces.len() == limit {
            pieces.push(rest);
            break;
        }
        let end = rest.find(is_space).unwrap_or(rest.len());
        pieces.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(is_space);
    }
    pieces
}

/// The same from the end.
fn words_from_end(text: &str, limit: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        if pieces.len() == limit {
            pieces.push(rest);
            break;
        }
        let word = rest.trim_end_matches(|c| !is_space(c)).len();
        pieces.push(&rest[word..]);
        rest = rest[..word].trim_end_matches(is_space);
    }
    pieces.reverse();
    pieces
}

/// `str.splitlines`: at every line boundary that Unicode knows.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}')
            || matches!(c, '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut pieces = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(is_end) else {
            pieces.push(rest);
            break;
        };
        let end = match &rest[at..] {
            line_end if line_end.starts_with("\r\n") => at + 2,
            line_end => at + line_end.chars().next().map_or(1, char::len_utf8),
        };
        pieces.push(&rest[..if keep { end } else { at }]);
        rest = &rest[end..];
    }
    pieces
}

/// `ljust`, `rjust`, `center` and `zfill`.
fn justify(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<char>) = from_args(args)?;
    let width = usize::try_from(width).unwrap_or(0);
    if width > WIDTH_MAX {
        return Err(wrong(format!("{method}: at most {WIDTH_MAX} wide")));
    }
    let missing = width.saturating_sub(text.chars().count());
    let fill = fill.unwrap_or(if method == "zfill" { '0' } else { ' ' });
    let pad = |n: usize| fill.to_string().repeat(n);
    let (before, after) = match method {
        "ljust" => (0, missing),
        "rjust" => (missing, 0),
        "zfill" => {
            let sign = usize::from(text.starts_with(['+', '-']));
            return Ok(Value::from(format!("{}{}{}", &text[..sign], pad(missing), &text[sign..])));
        }
        // CPython puts the odd one on the left when the width is odd.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            (left, missing - left)
        }
    };
    Ok(Value::from(format!("{}{text}{}", pad(before), pad(after))))
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;

    /// Each pair: an expression, and what Python 3.11 with Jinja2 3.1 makes of it.
    fn check(cases: &[(&str, &str)]) {
        let mut env = Environment::new();
        crate::engine::furnish(&mut env);
        for (expression, expect) in cases {
            let found = env.render_str(&format!("{{{{ {expression} }}}}"), ());
            let found = found.unwrap_or_else(|e| format!("error: {}", e.detail().unwrap_or("")));
            assert_eq!(&found, expect, "{expression}");
        }
    }

    #[test]
    fn strings_behave_as_in_python() {
        check(&[
            ("' a '.strip() ~ '|'", "a|"),
            ("'xxaxx'.strip('x') ~ 'xxa'.lstrip('x') ~ 'axx'.rstrip('x')", "aaa"),
            ("'a\\x1c'|trim ~ '|'", "a|"),
            (
                "(none is iterable) ~ ('a' is iterable) ~ (1 is iterable) ~ (missing is iterable)",
                "FalseTrueFalseTrue",
            ),
            ("' a  b c '.split()|tojson", r#"["a", "b", "c"]"#),
            ("' a  b c '.split(none, 1)|tojson", r#"["a", "b c "]"#),
            ("' a  b c '.rsplit(none, 1)|tojson", r#"[" a  b", "c"]"#),
            ("'a,b,c'.rsplit(',', 1)|tojson", r#"["a,b", "c"]"#),
            ("'a,b,c'.split(',', maxsplit=1)|tojson", r#"["a", "b,c"]"#),
            ("'a\\nb\\r\\nc\\n'.splitlines()|tojson", r#"["a", "b", "c"]"#),
            ("'a\\nb\\r\\nc'.splitlines(true)|tojson", r#"["a\n", "b\r\n", "c"]"#),
            ("'a=b=c'.partition('=')|tojson", r#"["a", "=", "b=c"]"#),
            ("'a'.rpartition('=')|tojson", r#"["", "", "a"]"#),
            ("'abc'.removeprefix('a').removesuffix('c')", "b"),
            ("'aaa'.replace('a', 'b', 2)", "bba"),
            ("'aaa'|replace('a', 'b')", "bbb"),
            ("'ab'.center(5, '*') ~ '-5'.zfill(4)", "**ab*-005"),
            ("'a\\n\\nb'|indent(2)", "a\n\n  b"),
            ("'%05.1f|%s'|format(2.25, 'x')", "002.2|x"),
            ("'abcd'[::-1] ~ [1, 2, 3][::-1]|tojson", "dcba[3, 2, 1]"),
            ("[1, 2, 3].index(2)", "1"),
        ]);
    }

    #[test]
    fn json_is_pythons() {
        check(&[
            (
                "{'b': 1, 'a': [true, none, 1.0, 'é\"<\\n']}|tojson",
                r#"{"b": 1, "a": [true, null, 1.0, "é\"<\n"]}"#,
            ),
            ("{'b': 1, 'a': 2}|tojson(sort_keys=true)", r#"{"a": 2, "b": 1}"#),
            (
                "{'b': [1, {}], 'a': []}|tojson(indent=2)",
                "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": []\n}",
            ),
            ("[1, 2]|tojson(separators=(',', ':'))", "[1,2]"),
            ("'é😀'|tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude00""#),
            (
                "[1e16, 1e15, 0.0001, 0.00001, 1.5e-7, 0.1, -0.0, 123456789.5]|tojson",
                "[1e+16, 1000000000000000.0, 0.0001, 1e-05, 1.5e-07, 0.1, -0.0, 123456789.5]",
            ),
            ("18446744073709551615|tojson", "18446744073709551615"),
            ("missing|tojson", "error: tojson: undefined is not JSON"),
        ]);
    }

    #[test]
    fn growth_is_bounded() {
        let long = "error: the template makes a text of more than 16777216 bytes";
        check(&[
            ("('a' * 10000)|replace('a', 'b' * 10000)|length", long),
            ("('a' * 10000).replace('a', 'b' * 10000)|length", long),
            ("'x'|indent(1000000000, true)", "error: indent: at most 1000 wide"),
            ("'%1000000000d'|format(1)", "error: format: a field is at most 1000 wide"),
            ("'{:1000000000}'.format(1)", "error: format: a field is at most 1000 wide"),
            ("'x'.ljust(1000000000)", "error: ljust: at most 1000 wide"),
            ("[1]|tojson(indent=1000000000)", "error: tojson: an indent is at most 64 wide"),
        ]);
    }
}
