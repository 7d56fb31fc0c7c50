//! One row: a conversation in, a rendered one or a reject out.

use hone_chat::{ChatTemplate, Given, Located, Rewritten, Sample};
use hone_schema::{Conversation, Kind, Part, Reject, Rendered, Share, Span, parse_messages};
use serde_json::{Map, Value};

/// The template of a stage, and that for rows with tools, where there is another.
#[derive(Debug)]
pub(crate) struct Templates {
    pub(crate) plain: ChatTemplate,
    pub(crate) tool_use: Option<ChatTemplate>,
}

impl Templates {
    /// The template for a row.
    pub(crate) fn of(&self, has_tools: bool) -> &ChatTemplate {
        self.tool_use.as_ref().filter(|_| has_tools).unwrap_or(&self.plain)
    }

    /// What ends an answer in either, the longest first.
    pub(crate) fn stops(&self) -> Vec<&str> {
        let both = [Some(&self.plain), self.tool_use.as_ref()].into_iter().flatten();
        let mut stops: Vec<&str> = both.flat_map(ChatTemplate::stops).map(String::as_str).collect();
        stops.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        stops.dedup();
        stops
    }
}

/// A rendered row and what a report should count of it.
pub(crate) type Done = (Rendered, Vec<&'static str>);

/// Renders a row: one sample, or several where the template rewrites what earlier answers say.
///
/// # Errors
/// The row, with the reason why it is not rendered.
pub(crate) fn render(
    templates: &Templates,
    rewritten: Rewritten,
    row: &Conversation,
) -> Result<Vec<Done>, Box<Reject>> {
    let reject = |reason: &str, detail: String| Box::new(reject(row, reason, detail));
    let template = templates.of(row.tools.is_some());
    let samples = match row.kind {
        Kind::Text => {
            let located = plain_text(template, row);
            vec![Sample { answer: None, share: Share::Main, located }]
        }
        Kind::Preference => {
            let detail =
                "rows with a chosen and a rejected answer need an objective that compares them"
                    .to_owned();
            return Err(reject("preference rows are not supported", detail));
        }
        Kind::Sft => {
            let messages =
                parse_messages(&row.messages).map_err(|e| reject("bad messages", e.to_string()))?;
            if messages.is_empty() {
                return Err(reject("bad messages", "there are none".to_owned()));
            }
            let tools = row.tools.as_deref().map(serde_json::from_str::<Value>).transpose();
            let tools = tools.map_err(|e| reject("bad tools", e.to_string()))?;
            let variables = row.variables.as_deref().map(serde_json::from_str).transpose();
            let mut variables: Map<String, Value> =
                variables.map_err(|e| reject("bad variables", e.to_string()))?.unwrap_or_default();
            let documents = variables.remove("documents");
            let given = Given {
                tools: tools.as_ref(),
                documents: documents.as_ref(),
                variables: Some(&variables),
            };
            let samples = template.samples(&messages, &given, row.weight, rewritten);
            samples.map_err(|e| reject(e.reason(), e.to_string()))?
        }
    };
    let one = |Sample { answer, share, located }| {
        if u32::try_from(located.text.len()).is_err() {
            return Err(reject("too long", format!("{} bytes", located.text.len())));
        }
        let rendered = Rendered {
            id: sample_id(&row.id, answer),
            source: row.source.clone(),
            split: row.split,
            kind: row.kind,
            text: located.text,
            spans: located.spans,
            share,
            prompt_len: located.prompt_len,
            meta: row.meta.clone(),
        };
        Ok((rendered, located.notes))
    };
    samples.into_iter().map(one).collect()
}

/// What a sample of an answer has behind the id of its row, before the number of the message.
const OF_ANSWER: &str = "#m";

/// The id of a sample: the row's, and for one answer of it `<id>#m<message>`. A row may have any id,
/// also one that reads so; such a one gets a `!`, so that no two samples of different rows have the
/// same id.
fn sample_id(row: &str, answer: Option<usize>) -> String {
    let reads_so = || {
        let parts = row.trim_end_matches('!').rsplit_once(OF_ANSWER);
        parts.is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    match answer {
        Some(answer) => format!("{row}{OF_ANSWER}{answer}"),
        None if reads_so() => format!("{row}!"),
        None => row.to_owned(),
    }
}

/// A row that is not rendered.
pub(crate) fn reject(row: &Conversation, reason: &str, detail: String) -> Reject {
    Reject {
        source: row.source.clone(),
        file: row.id.clone(),
        line: row.source_row,
        reason: reason.to_owned(),
        detail,
        raw: row.text.clone().unwrap_or_else(|| row.messages.clone()),
    }
}

/// A row of plain text: between the tokens that begin and end a text, where the tokenizer has such.
fn plain_text(template: &ChatTemplate, row: &Conversation) -> Located {
    let parts = [
        (template.token("bos_token").unwrap_or_default(), Part::Scaffold),
        (row.text.as_deref().unwrap_or_default(), Part::Content),
        (template.token("eos_token").unwrap_or_default(), Part::Stop),
    ];
    let (mut text, mut spans) = (String::new(), Vec::new());
    for (piece, part) in parts.into_iter().filter(|(piece, _)| !piece.is_empty()) {
        let start = text.len() as u32;
        text.push_str(piece);
        let is_ours = part == Part::Scaffold;
        spans.push(Span {
            start,
            end: text.len() as u32,
            message: None,
            role: if is_ours { String::new() } else { "text".to_owned() },
            part,
            weight: if is_ours { 0.0 } else { row.weight },
            chosen: false,
        });
    }
    Located { text, spans, prompt_len: None, notes: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_different_rows_have_different_ids() {
        let rows = [
            "a", "a#1", "a#2", "a#m1", "a#m1!", "a#m1!!", "a#m1#m1", "a#m", "a#mx", "#m1", "a!",
            "a#m1#m1!", "",
        ];
        let mut ids: Vec<String> = Vec::new();
        for row in rows {
            let answers = [None, Some(1), Some(2), Some(11)];
            ids.extend(answers.map(|answer| sample_id(row, answer)));
        }
        assert_eq!(ids[..2], ["a", "a#m1"]);
        assert_eq!((ids[4].as_str(), ids[12].as_str()), ("a#1", "a#m1!"));
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 4 * rows.len());
    }
}
