//! One row: a conversation in, a rendered one or a reject out.

use hone_chat::{ChatTemplate, Given, Located, Rewritten, Sample};
use hone_schema::{Conversation, Kind, Part, Reject, Rendered, Span, parse_messages};
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
        Kind::Text => vec![Sample { answer: None, located: plain_text(template, row) }],
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
    let one = |Sample { answer, located }| {
        if u32::try_from(located.text.len()).is_err() {
            return Err(reject("too long", format!("{} bytes", located.text.len())));
        }
        let rendered = Rendered {
            id: answer.map_or_else(|| row.id.clone(), |answer| format!("{}#{answer}", row.id)),
            source: row.source.clone(),
            split: row.split,
            kind: row.kind,
            text: located.text,
            spans: located.spans,
            prompt_len: located.prompt_len,
            meta: row.meta.clone(),
        };
        Ok((rendered, located.notes))
    };
    samples.into_iter().map(one).collect()
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
