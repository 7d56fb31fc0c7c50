//! Text and numbers as HTML.

pub(crate) use hone_cli::text::grouped as count;
use hone_cli::text::{Bit, bits, number, visible};

/// A text as the content of an element: no character of it can end the element, act on the page or hide.
pub(crate) fn content(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    for bit in bits(text) {
        match bit {
            Bit::Plain(plain) => escape(&mut out, plain),
            Bit::Hidden(c) => out.push_str(&format!("<u>{}</u>", number(c))),
        }
    }
    out
}

/// A text as the value of an attribute in double quotes.
pub(crate) fn attribute(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    escape(&mut out, &visible(text));
    out
}

fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
}

/// `part` of `whole` in percent; a dash of none.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "–".to_owned(),
        _ => format!("{:.1} %", 100.0 * part as f64 / whole as f64),
    }
}

/// Bars beside each other as SVG: for each its name, its height, and whether it stands out.
pub(crate) fn bars(bars: &[(String, u64, bool)]) -> String {
    let highest = bars.iter().map(|(_, n, _)| *n).max().unwrap_or(0).max(1);
    let width = 100.0 / bars.len().max(1) as f64;
    let mut out =
        String::from("<svg viewBox=\"0 0 100 40\" preserveAspectRatio=\"none\" role=\"img\">");
    for (idx, (name, n, stands_out)) in bars.iter().enumerate() {
        // What is there at all can be seen.
        let least = if *n > 0 { 0.6 } else { 0.0 };
        let height = (40.0 * *n as f64 / highest as f64).max(least);
        let class = if *stands_out { " class=\"out\"" } else { "" };
        out.push_str(&format!(
            "<rect{class} x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{height:.2}\">\
             <title>{}: {}</title></rect>",
            idx as f64 * width + width * 0.08,
            40.0 - height,
            width * 0.84,
            content(name),
            count(*n)
        ));
    }
    out.push_str("</svg>");
    out
}

/// Bytes in the alphabet of base 64, as a Content-Security-Policy names hashes.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in bytes.chunks(3) {
        let byte = |idx: usize| u32::from(three.get(idx).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for idx in 0..4 {
            let digit = (bits >> (18 - 6 * idx)) & 63;
            let is_filled = idx <= three.len();
            out.push(if is_filled { char::from(ALPHABET[digit as usize]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_place() {
        let text = "</script><img src=x onerror='alert(\"1\")'>&\u{1b}[0m\u{202e}\0\r\n\t";
        assert_eq!(
            content(text),
            "&lt;/script&gt;&lt;img src=x onerror=&#39;alert(&quot;1&quot;)&#39;&gt;&amp;\
             <u>U+001B</u>[0m<u>U+202E</u><u>U+0000</u><u>U+000D</u>\n\t"
        );
        assert_eq!(attribute("\" onmouseover=\"x\0"), "&quot; onmouseover=&quot;x⟨U+0000⟩");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!((percent(1, 3), percent(0, 0)), ("33.3 %".to_owned(), "–".to_owned()));
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
