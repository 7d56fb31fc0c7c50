//! Text of rows as people may see it: what would drive a terminal, turn a line around or hide is made visible instead.

/// A piece of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bit<'a> {
    /// As it is; line ends and tabs included.
    Plain(&'a str),
    /// A character that is shown by its number.
    Hidden(char),
}

/// Whether a character acts on whatever shows it, or cannot be seen: control characters of both sets, bidirectional marks and
/// overrides, separators of other systems, blanks of no width, tags, fillers. Joiners are part of how scripts are written
/// and stay.
fn is_hidden(c: char) -> bool {
    match c {
        '\n' | '\t' => false,
        '\u{ad}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180e}' | '\u{200b}' => true,
        '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => true,
        '\u{3164}' | '\u{feff}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}' => true,
        '\u{fffe}' | '\u{ffff}' | '\u{e0000}'..='\u{e0fff}' => true,
        c => c.is_control(),
    }
}

/// The pieces of a text, in order.
pub fn bits(text: &str) -> impl Iterator<Item = Bit<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let first = rest.chars().next()?;
        if is_hidden(first) {
            rest = &rest[first.len_utf8()..];
            return Some(Bit::Hidden(first));
        }
        let (plain, more) = rest.split_at(rest.find(is_hidden).unwrap_or(rest.len()));
        rest = more;
        Some(Bit::Plain(plain))
    })
}

/// The number of a character, as Unicode writes it.
pub fn number(c: char) -> String {
    format!("U+{:04X}", u32::from(c))
}

/// A text for the terminal; line ends and tabs stay.
pub fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for bit in bits(text) {
        match bit {
            Bit::Plain(plain) => out.push_str(plain),
            Bit::Hidden(c) => out.push_str(&format!("⟨{}⟩", number(c))),
        }
    }
    out
}

/// A text on one line: line ends, tabs and backslashes too are written out.
pub fn one_line(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n").replace('\t', "\\t");
    visible(&text)
}

/// A number with a comma before every three digits.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (idx, digit) in digits.char_indices() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, shown: &str) {
        assert_eq!(one_line(text), shown);
    }

    #[test]
    fn what_acts_or_hides_is_written_out() {
        check("plain é 漢字 👩‍👩‍👧 אבג", "plain é 漢字 👩‍👩‍👧 אבג");
        check("\x1b]0;title\x07", "⟨U+001B⟩]0;title⟨U+0007⟩");
        check("a\rb\x08c\x7f", "a⟨U+000D⟩b⟨U+0008⟩c⟨U+007F⟩");
        check("\u{9b}31m", "⟨U+009B⟩31m");
        check("user\u{202e}nimda\u{2066}", "user⟨U+202E⟩nimda⟨U+2066⟩");
        check("\u{200b}\u{feff}\u{e0041}\u{2028}", "⟨U+200B⟩⟨U+FEFF⟩⟨U+E0041⟩⟨U+2028⟩");
        check("a\n\tb\\n", "a\\n\\tb\\\\n");
        assert_eq!(visible("a\n\tb\0"), "a\n\tb⟨U+0000⟩");
    }

    #[test]
    fn digits_stand_in_groups_of_three() {
        let shown = [0, 12, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(shown, ["0", "12", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn the_pieces_are_the_text() {
        let text = "a\x1bb\u{202e}\u{202e}c";
        let back: String = bits(text)
            .map(|bit| match bit {
                Bit::Plain(plain) => plain.to_owned(),
                Bit::Hidden(c) => c.to_string(),
            })
            .collect();
        assert_eq!(back, text);
        assert_eq!(bits(text).count(), 6);
    }
}
