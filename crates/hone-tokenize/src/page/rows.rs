//! Rows on the page.

use std::collections::BTreeSet;

use hone_schema::Part;

use super::html::{attribute, content, count, percent};
use crate::view::{Rule, View};

/// Most tokens of one row on the page: of a longer one its beginning and its end are shown, this many in all.
const ROW_TOKENS_MAX: usize = 4000;

/// A row that is shown.
pub(crate) struct Shown {
    /// Its number in its split.
    pub(crate) n: u64,
    pub(crate) view: View,
}

/// A row as an element.
pub(crate) fn row(shown: &Shown) -> String {
    let Shown { n, view } = shown;
    let (before, now) = (view.before(), view.outcome());
    let row = &view.rendered;
    let state = match &view.fate {
        Err(_) => "refused",
        Ok(_) if view.is_cut() => "cut",
        Ok(_) => "taken",
    };
    let roles: BTreeSet<&str> =
        row.spans.iter().map(|s| s.role.as_str()).filter(|r| !r.is_empty()).collect();
    let roles: Vec<String> = roles.into_iter().map(attribute).collect();
    let trained = if view.fate.is_ok() { now.trained } else { before.trained };
    let mut out = format!(
        "<article class=\"{state}\" data-n=\"{n}\" data-split=\"{}\" data-source=\"{}\" \
         data-roles=\"{}\" data-tokens=\"{}\" data-trained=\"{trained}\" data-lost=\"{}\">\n\
         <header><b>{} {n}</b> <code>{}</code> <span>{}</span> <span class=\"num first\">{} tokens</span> \
         <span class=\"num\">{} trained, {}</span>{}</header>\n",
        row.split,
        attribute(&row.source),
        roles.join("&#10;"),
        before.tokens,
        before.trained - now.trained,
        row.split,
        content(&row.id),
        content(&row.source),
        count(before.tokens),
        count(trained),
        percent(trained, before.tokens),
        meter(trained, before.tokens),
    );
    match &view.fate {
        Err(refusal) => out.push_str(&format!(
            "<p class=\"why\"><b>refused: {}</b> {}</p>\n",
            refusal.reason,
            content(&refusal.detail)
        )),
        Ok(_) if view.is_cut() => out.push_str(&format!(
            "<p class=\"why\"><b>cut</b> {} of {} tokens go out; {} trained ones are lost</p>\n",
            count(now.tokens),
            count(before.tokens),
            count(before.trained - now.trained)
        )),
        Ok(_) => {}
    }
    out.push_str("<div class=\"text\" dir=\"auto\">");
    text(&mut out, view);
    out.push_str("</div>\n</article>\n");
    out
}

/// How much of a row is trained.
fn meter(trained: u64, tokens: u64) -> String {
    let width = 60.0 * trained as f64 / tokens.max(1) as f64;
    format!(
        "<svg class=\"meter\" width=\"60\" height=\"6\" aria-hidden=\"true\"><rect class=\"all\" width=\"60\" \
         height=\"6\" rx=\"3\"/><rect width=\"{width:.1}\" height=\"6\" rx=\"3\"/></svg>"
    )
}

/// The row's text: runs of tokens with one rule, in each the tokens.
fn text(out: &mut String, view: &View) {
    let n = view.tokens.len();
    if n == 0 {
        out.push_str(&content(&view.rendered.text));
        return;
    }
    let hidden = match n {
        n if n > ROW_TOKENS_MAX => ROW_TOKENS_MAX * 3 / 4..n - ROW_TOKENS_MAX / 4,
        _ => n..n,
    };
    let mut last: Option<(String, String)> = None;
    for piece in view.pieces(&view.all()) {
        let Some(idx) = piece.token else {
            // Bytes that no token stands for: blanks that an added token took, what a normalizer dropped.
            close(out, &mut last);
            let text = content(&view.rendered.text[piece.bytes]);
            out.push_str(&format!("<span class=\"none\" title=\"in no token\">{text}</span>"));
            continue;
        };
        if hidden.contains(&idx) {
            if idx == hidden.start {
                close(out, &mut last);
                let n = count(hidden.len() as u64);
                out.push_str(&format!("<em>… {n} tokens are not on this page …</em>"));
            }
            continue;
        }
        let token = &view.tokens[idx];
        let run = (class(view, idx), view.sentence(token));
        if last.as_ref() != Some(&run) {
            close(out, &mut last);
            out.push_str(&format!("<span class=\"{}\" title=\"{}\"", run.0, attribute(&run.1)));
            if token.weight > 0.0 && token.weight != 1.0 {
                out.push_str(&format!(" data-w=\"{}\"", token.weight));
            }
            out.push('>');
            last = Some(run);
        }
        let text = content(&view.rendered.text[piece.bytes]);
        let class = if text.is_empty() { " class=\"part\"" } else { "" };
        out.push_str(&format!("<i{class} data-t=\"{idx} {}\">{text}</i>", token.id));
    }
    close(out, &mut last);
}

fn close(out: &mut String, last: &mut Option<(String, String)>) {
    if last.take().is_some() {
        out.push_str("</span>");
    }
}

/// The classes of a token's run: how it looks, and what it is.
fn class(view: &View, idx: usize) -> String {
    let token = &view.tokens[idx];
    let Some(span) = view.span(token) else { return "head".to_owned() };
    let look = match (token.weight > 0.0, token.rule) {
        (true, Rule::Stop) => "on stop",
        (true, _) => match span.part {
            Part::Reasoning => "on think",
            Part::ToolCall => "on call",
            _ => "on",
        },
        (false, Rule::Straddles) => "off",
        (false, _) => match (span.part, span.role.as_str()) {
            (Part::Scaffold | Part::Stop, _) => "head",
            (_, "system" | "developer") => "sys",
            (_, "user") => "user",
            (_, "tool" | "ipython" | "function") => "tool",
            _ => "off",
        },
    };
    if token.kept { look.to_owned() } else { format!("{look} lost") }
}
