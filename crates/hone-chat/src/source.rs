//! A look at a template's source before the engine sees it: `generation` blocks become calls, what
//! loops go over is checked, and string literals are collected.
//!
//! `{% generation %} .. {% endgeneration %}` is a statement that transformers adds to Jinja to mark
//! what an assistant writes; the engine does not know it. A `call` block is the same construct in
//! its eyes: its body is a scope of its own and both its tags eat white space in the same way, so
//! replacing the keyword inside the tag changes no byte of the output.

use std::collections::HashSet;

/// Name of the function that a `generation` block calls.
pub(crate) const GENERATION: &str = "hone_generation";

/// Name of the function that what a loop goes over passes through: the engine takes `none` for an
/// empty list there, and Python does not.
pub(crate) const EACH: &str = "hone_each";

/// What the scan of a source found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// The source with `generation` blocks as `call` blocks.
    pub(crate) source: String,
    /// Texts of all string literals, unescaped, sorted, each once, none empty.
    pub(crate) literals: Vec<String>,
    /// Names of attributes, `b` of `a.b`.
    pub(crate) attributes: HashSet<String>,
    /// Whether there was a `generation` block.
    pub(crate) has_generation: bool,
}

/// Walks the source once, past comments and raw blocks.
pub(crate) fn scan(source: &str) -> Scanned {
    let mut out = String::with_capacity(source.len());
    let (mut literals, mut attributes) = (Vec::new(), HashSet::new());
    let mut has_generation = false;
    let mut rest = source;
    while let Some(open) = next_tag(rest) {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let (tag, after) = tag.split_at(tag_len(tag, &mut literals, &mut attributes));
        match rewritten(tag) {
            Some(new) => {
                has_generation |= !new.contains(EACH);
                out.push_str(&new);
            }
            None => out.push_str(tag),
        }
        rest = after;
        if keyword(tag) == Some("raw") {
            let end = raw_end(rest);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    literals.sort();
    literals.dedup();
    Scanned { source: out, literals, attributes, has_generation }
}

/// Where the next tag, expression or comment begins.
fn next_tag(text: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = text[from..].find('{').map(|at| at + from) {
        if matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// Length of the tag that `text` begins with; to the end of the text where it is not closed (the
/// engine says so later).
fn tag_len(text: &str, literals: &mut Vec<String>, attributes: &mut HashSet<String>) -> usize {
    let close = match text.as_bytes()[1] {
        b'{' => "}}",
        b'%' => "%}",
        _ => return text.find("#}").map_or(text.len(), |at| at + 2),
    };
    let mut at = 2;
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with(close) {
            return at + 2;
        }
        match rest.as_bytes()[0] {
            quote @ (b'\'' | b'"') => {
                let (len, literal) = literal(rest, quote);
                if !literal.is_empty() {
                    literals.push(literal);
                }
                at += len;
            }
            b'_' | b'a'..=b'z' | b'A'..=b'Z' => {
                let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
                let len = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
                if text[..at].ends_with('.') {
                    attributes.insert(rest[..len].to_owned());
                }
                at += len;
            }
            _ => at += rest.chars().next().map_or(1, char::len_utf8),
        }
    }
    text.len()
}

/// Length and unescaped text of the string literal that `text` begins with.
fn literal(text: &str, quote: u8) -> (usize, String) {
    let mut unescaped = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some((_, 'n')) => unescaped.push('\n'),
                Some((_, 't')) => unescaped.push('\t'),
                Some((_, 'r')) => unescaped.push('\r'),
                Some((_, kind @ ('x' | 'u' | 'U'))) => {
                    let n_digits = match kind {
                        'x' => 2,
                        'u' => 4,
                        _ => 8,
                    };
                    let digits: String = chars.by_ref().take(n_digits).map(|(_, c)| c).collect();
                    let code = u32::from_str_radix(&digits, 16).ok();
                    unescaped.extend(code.and_then(char::from_u32));
                }
                Some((_, other)) => unescaped.push(other),
                None => break,
            },
            c if c == char::from(quote) => return (at + 1, unescaped),
            c => unescaped.push(c),
        }
    }
    (text.len(), unescaped)
}

/// The first word of a statement tag.
fn keyword(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let inner = inner.trim_start_matches(['-', '+']).trim_start();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    Some(&inner[..end])
}

/// The tag of a `generation` block as that of a `call` block, that of a loop with what it goes over
/// checked.
fn rewritten(tag: &str) -> Option<String> {
    match keyword(tag)? {
        "generation" => Some(tag.replacen("generation", &format!("call {GENERATION}()"), 1)),
        "endgeneration" => Some(tag.replacen("endgeneration", "endcall", 1)),
        "for" => {
            let range = looped(tag)?;
            let (before, after) = (&tag[..range.start], &tag[range.end..]);
            Some(format!("{before} {EACH}(({})) {after}", &tag[range]))
        }
        _ => None,
    }
}

/// What a loop goes over: from behind `in` to `if`, `recursive` or the end of the tag.
fn looped(tag: &str) -> Option<std::ops::Range<usize>> {
    let end = tag.trim_end_matches(['%', '}', '-', '+']).len();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut at, mut depth, mut start) = (2, 0i32, None);
    while at < end {
        let rest = &tag[at..end];
        let first = rest.chars().next()?;
        if is_word(first) {
            let len = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
            match (&rest[..len], start, depth) {
                ("in", None, 0) => start = Some(at + len),
                ("if" | "recursive", Some(start), 0) => return Some(start..at),
                _ => {}
            }
            at += len;
            continue;
        }
        at += match first {
            '\'' | '"' => literal(rest, first as u8).0,
            '(' | '[' | '{' => {
                depth += 1;
                1
            }
            ')' | ']' | '}' => {
                depth -= 1;
                1
            }
            other => other.len_utf8(),
        };
    }
    start.map(|start| start..end)
}

/// Where the tag that ends a raw block begins; the end of the text where there is none.
fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find("{%").map(|at| at + from) {
        let close = text[at..].find("%}").map_or(text.len(), |end| at + end + 2);
        if keyword(&text[at..close]) == Some("endraw") {
            return at;
        }
        from = at + 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, rewritten: &str, literals: &[&str]) {
        let scanned = scan(source);
        assert_eq!(scanned.source, rewritten);
        assert_eq!(scanned.literals, literals);
        assert_eq!(scanned.has_generation, source != rewritten);
    }

    #[test]
    fn generation_blocks_become_calls() {
        check(
            "a {%- generation -%}\nb{% endgeneration +%}c",
            "a {%- call hone_generation() -%}\nb{% endcall +%}c",
            &[],
        );
    }

    #[test]
    fn what_loops_go_over_is_checked() {
        let check = |source: &str, expect: &str| {
            let scanned = scan(source);
            assert_eq!(scanned.source, expect);
            assert!(!scanned.has_generation);
        };
        check("{% for a in b %}{% endfor %}", "{% for a in hone_each(( b )) %}{% endfor %}");
        check("{%- for a, c in b.items() -%}", "{%- for a, c in hone_each(( b.items() )) -%}");
        check(
            "{% for a in f(x if y else ' if ')|g if a in c recursive %}",
            "{% for a in hone_each(( f(x if y else ' if ')|g )) if a in c recursive %}",
        );
        check("{% for in %}{% for a %}", "{% for in hone_each(( )) %}{% for a %}");
    }

    #[test]
    fn comments_raw_blocks_and_texts_are_left_alone() {
        for source in [
            "{# {% generation %} #}x",
            "{% raw %}{% generation %}{{ 'a' }}{%- endraw %}",
            "{{ '{% generation %}' }}{ { %}",
            "{% generation",
        ] {
            let scanned = scan(source);
            assert_eq!(scanned.source, source);
            assert!(!scanned.has_generation);
        }
    }

    #[test]
    fn literals_are_unescaped() {
        check(
            r#"{% if 'a\'b' in x %}{{ "\n}}" + "" + '\u00e9' }}{% endif %}'no'"#,
            r#"{% if 'a\'b' in x %}{{ "\n}}" + "" + '\u00e9' }}{% endif %}'no'"#,
            &["\n}}", "a'b", "é"],
        );
    }

    #[test]
    fn names_of_attributes_are_collected() {
        let scanned =
            scan("a.b {{ c.d_2.items() ~ 'e.f' }}{% for g in h.i %}{# j.k #}{% endfor %}");
        let mut attributes: Vec<_> = scanned.attributes.into_iter().collect();
        attributes.sort();
        assert_eq!(attributes, ["d_2", "i", "items"]);
    }

    #[test]
    fn unclosed_things_end_with_the_source() {
        for source in ["{{ 'a", "{{ a", "{% raw %}x", "{#", "{", "{%"] {
            assert_eq!(scan(source).source, source);
        }
    }
}
