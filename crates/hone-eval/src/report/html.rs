//! Escaping, and numbers as people read them.

pub(crate) use hone_cli::text::grouped as count;

/// A text as HTML: no character of it can end an element or an attribute.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // What a model writes is shown and not obeyed: control characters become visible.
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A share as percent; a dash for none.
pub(crate) fn percent(share: Option<f64>) -> String {
    share.map_or_else(dash, |share| format!("{:.1} %", 100.0 * share))
}

/// A number with that many decimals; a dash for none.
pub(crate) fn decimals(value: Option<f64>, n: usize) -> String {
    value.map_or_else(dash, |value| format!("{value:.n$}"))
}

/// A change in percent, with its sign.
pub(crate) fn signed_percent(value: f64) -> String {
    let sign = if value < 0.0 { '−' } else { '+' };
    format!("{sign}{:.1} %", value.abs())
}

fn dash() -> String {
    "–".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_place() {
        assert_eq!(
            escape("<script>\"a\" & 'b'\u{1b}[0m\n"),
            "&lt;script&gt;&quot;a&quot; &amp; &#39;b&#39;\u{fffd}[0m\n"
        );
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(percent(Some(0.9547)), "95.5 %");
        assert_eq!(percent(None), "–");
        assert_eq!(decimals(Some(2.34567), 3), "2.346");
        assert_eq!(
            (count(7), count(1234), count(1_234_567)),
            ("7".into(), "1,234".into(), "1,234,567".into())
        );
    }
}
