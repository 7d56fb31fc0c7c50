//! Rows to conversations, one function a schema.
//!
//! Input is a canonical JSON object; output is a [`Row`] or the [`Fault`] that keeps it out. Texts
//! are taken as they are: nothing is trimmed, joined or rewritten but what a schema defines
//! (alpaca's `input` goes behind the instruction, on its own line) and the suffix the user asked to
//! strip. Columns that no schema takes are kept in `meta`.

mod messages;
mod preference;

use std::collections::BTreeMap;

use hone_schema::{Kind, Sha256Hex, sha256};

use crate::fault::{Fault, Reason};
use crate::json::{Fields, Raw, Shape, canonical, quote};
use crate::schema::{COMPLETION, CONVERSATIONS, OUTPUT, PROMPT, Schema};

/// Columns of pictures, sound and film. What they hold belongs to the prompt, and hone reads text.
const MEDIA: [&str; 8] =
    ["images", "image", "videos", "video", "audios", "audio", "image_url", "video_url"];

/// How a source wants its rows read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// New names of columns, by the name they have.
    pub(crate) rename: BTreeMap<String, String>,
    /// A text that is taken off the end of responses.
    pub(crate) strip_suffix: Option<String>,
}

/// A row as ingest hands it on, without its place in the data set.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    /// The id it came with.
    pub(crate) id: Option<String>,
    pub(crate) kind: Kind,
    /// Canonical JSON list.
    pub(crate) messages: String,
    pub(crate) tools: Option<String>,
    /// The chat template's variables that are the row's own, as a JSON object.
    pub(crate) variables: Option<String>,
    pub(crate) text: Option<String>,
    pub(crate) weight: f32,
    pub(crate) chosen: Option<String>,
    pub(crate) rejected: Option<String>,
    pub(crate) meta: Option<String>,
    /// Messages in the conversation.
    pub(crate) n_messages: u32,
}

impl Row {
    fn new(kind: Kind, messages: &[String]) -> Self {
        Row {
            id: None,
            kind,
            messages: format!("[{}]", messages.join(",")),
            tools: None,
            variables: None,
            text: None,
            weight: 1.0,
            chosen: None,
            rejected: None,
            meta: None,
            n_messages: messages.len() as u32,
        }
    }

    /// Hash of what is learned from: equal for equal rows, whatever their id, weight and further
    /// columns.
    pub(crate) fn content(&self) -> Sha256Hex {
        let parts = [
            Some(self.kind.as_str()),
            Some(self.messages.as_str()),
            self.tools.as_deref(),
            self.text.as_deref(),
            self.chosen.as_deref(),
            self.rejected.as_deref(),
        ];
        let parts: Vec<&str> = parts.into_iter().map(Option::unwrap_or_default).collect();
        // JSON texts and names hold no zero byte; of plain text only one part is there.
        let mut all = parts.join("\0");
        if let Some(variables) = &self.variables {
            all.push('\0');
            all.push_str(variables);
        }
        sha256(all.as_bytes())
    }

    /// Bytes of text it holds, roughly what a tokenizer will see.
    pub(crate) fn n_bytes(&self) -> u64 {
        let parts = [&self.tools, &self.text, &self.chosen, &self.rejected];
        let rest: usize = parts.into_iter().flatten().map(String::len).sum();
        (self.messages.len() + rest) as u64
    }

    /// The end-of-text marker with which the answer (or the text) ends: written into the data for
    /// some other program.
    pub(crate) fn end_marker(&self) -> Option<&str> {
        let end = match &self.text {
            Some(text) => text.trim_end(),
            None => self.messages.strip_suffix("\"}]")?,
        };
        let marker = &end[end.rfind('<')?..];
        let is_marker = (marker.starts_with("<|") && marker.ends_with("|>"))
            || ["</s>", "<eos>", "<end_of_turn>"].contains(&marker);
        (is_marker && marker.len() <= 32).then_some(marker)
    }
}

/// Reads a row of bytes as an object of canonical JSON: the text, from which [`Fields`] are taken.
pub(crate) fn object(bytes: &[u8]) -> Result<String, Fault> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        Fault::new(Reason::NotUtf8, format!("at byte {} of the row", e.valid_up_to()))
    })?;
    let text = canonical(text)?;
    match Raw(&text).shape() {
        Shape::Object => Ok(text),
        other => Err(Fault::new(Reason::NotAnObject, format!("the row is {}", other.name()))),
    }
}

/// The fields of a row of canonical JSON, renamed, each key once.
pub(crate) fn fields<'a>(text: &'a str, options: &Options) -> Result<Fields<'a>, Fault> {
    let mut fields = Raw(text)
        .fields()
        .ok_or_else(|| Fault::new(Reason::NotAnObject, "the row is no object"))?;
    fields.rename(&options.rename);
    match fields.repeated() {
        Some(key) => Err(Fault::new(Reason::RepeatedKey, format!("`{key}` stands twice"))),
        None => Ok(fields),
    }
}

/// Converts a row of bytes.
pub(crate) fn convert(bytes: &[u8], schema: Schema, options: &Options) -> Result<Row, Fault> {
    let text = object(bytes)?;
    let mut fields = fields(&text, options)?;
    no_media(&fields)?;
    no_undesired(&mut fields, schema)?;
    let mut row = match schema {
        Schema::Preference => preference::convert(&mut fields)?,
        Schema::Messages => conversation(&mut fields, &["messages"])?,
        Schema::Sharegpt => conversation(&mut fields, &CONVERSATIONS)?,
        Schema::Alpaca => alpaca(&mut fields, options)?,
        Schema::Flan => pair(&mut fields, &["inputs"], &["targets"], options)?,
        Schema::PromptCompletion => pair(&mut fields, &PROMPT, &COMPLETION, options)?,
        Schema::Text => text_row(&mut fields, options)?,
    };
    row.id = id(&mut fields);
    row.tools = tools(&mut fields)?;
    row.variables = variables(&mut fields)?;
    row.weight = weight(&mut fields)?;
    row.meta = fields.rest();
    Ok(row)
}

fn no_media(fields: &Fields) -> Result<(), Fault> {
    let is_empty = |value: Raw| matches!(value.0, "[]" | "\"\"" | "{}");
    match MEDIA.into_iter().find(|key| fields.get(key).is_some_and(|value| !is_empty(value))) {
        Some(key) => {
            Err(Fault::new(Reason::NotText, format!("the column `{key}` holds something")))
        }
        None => Ok(()),
    }
}

/// Unpaired preferences (KTO) label each row; an answer labelled false is one not to learn.
fn no_undesired(fields: &mut Fields, schema: Schema) -> Result<(), Fault> {
    if matches!(schema, Schema::Preference | Schema::Text) {
        return Ok(());
    }
    let label = ["label", "kto_tag"]
        .into_iter()
        .find(|key| fields.get(key).is_some_and(|v| v.0 == "false"));
    match label {
        Some(key) => Err(Fault::new(Reason::Undesired, format!("`{key}` is false"))),
        None => Ok(()),
    }
}

/// The text of a field that has to be one.
fn text_of(key: &str, value: Raw) -> Result<String, Fault> {
    value.text().ok_or_else(|| {
        Fault::new(Reason::WrongType, format!("`{key}` is {}, not a text", value.shape().name()))
    })
}

fn text_field(fields: &mut Fields, key: &str) -> Result<Option<String>, Fault> {
    fields.take(key).map(|value| text_of(key, value)).transpose()
}

/// The first of several names that is there, as a text.
fn first_text(fields: &mut Fields, keys: &[&'static str]) -> Result<Option<String>, Fault> {
    fields.take_any(keys).map(|(key, value)| text_of(key, value)).transpose()
}

/// A given id: a text or a number that is not empty. One of another kind stays in `meta`.
fn id(fields: &mut Fields) -> Option<String> {
    let value = fields.get("id")?;
    let id = match value.shape() {
        Shape::String => value.text()?,
        Shape::Number => value.0.to_owned(),
        _ => return None,
    };
    if id.trim().is_empty() {
        return None;
    }
    fields.take("id");
    Some(id)
}

/// The tools as a JSON list. They come as a list, or as the text of one; an empty list is no tools.
fn tools(fields: &mut Fields) -> Result<Option<String>, Fault> {
    let Some(value) = fields.take("tools") else { return Ok(None) };
    let list = match value.text() {
        Some(text) if text.trim().is_empty() => return Ok(None),
        Some(text) => canonical(&text)
            .map_err(|fault| Fault::new(Reason::WrongType, format!("`tools`: {}", fault.detail)))?,
        None => value.0.to_owned(),
    };
    match Raw(&list).shape() {
        Shape::List => Ok((list != "[]").then_some(list)),
        Shape::Object => Ok(Some(format!("[{list}]"))),
        Shape::Null => Ok(None),
        other => {
            let detail = format!("`tools` is {}, not a list", other.name());
            Err(Fault::new(Reason::WrongType, detail))
        }
    }
}

/// `chat_template_kwargs` and `documents` as one JSON object; each comes as JSON, or as the text of
/// it. Documents for templates are a list of objects; a column of that name that is none is another
/// thing, and stays in `meta`.
fn variables(fields: &mut Fields) -> Result<Option<String>, Fault> {
    let json = |value: Raw| match value.text() {
        Some(text) if text.trim().is_empty() => Some("null".to_owned()),
        Some(text) => canonical(&text).ok(),
        None => Some(value.0.to_owned()),
    };
    let mut entries = Vec::new();
    if let Some(value) = fields.take("chat_template_kwargs") {
        let object = json(value).unwrap_or_else(|| value.0.to_owned());
        match Raw(&object).shape() {
            Shape::Null => {}
            Shape::Object => {
                let own = Raw(&object).fields().into_iter();
                entries.extend(own.flat_map(|fields| {
                    let pairs = fields.iter().map(|(key, v)| format!("{}:{}", quote(key), v.0));
                    pairs.collect::<Vec<_>>()
                }));
            }
            other => {
                let detail = format!("`chat_template_kwargs` is {}, not an object", other.name());
                return Err(Fault::new(Reason::WrongType, detail));
            }
        }
    }
    let documents = fields.get("documents").and_then(json).filter(|list| {
        let items = Raw(list).items().unwrap_or_default();
        !items.is_empty() && items.iter().all(|item| item.shape() == Shape::Object)
    });
    if let Some(documents) = documents {
        fields.take("documents");
        entries.push(format!("\"documents\":{documents}"));
    }
    Ok((!entries.is_empty()).then(|| format!("{{{}}}", entries.join(","))))
}

/// The weight of a row: a number of at least 0, or the text of one (in tables).
fn weight(fields: &mut Fields) -> Result<f32, Fault> {
    let Some(value) = fields.take("weight") else { return Ok(1.0) };
    let text = value.text();
    if text.as_deref().is_some_and(|text| text.trim().is_empty()) {
        return Ok(1.0);
    }
    let number = value.number().or_else(|| text.and_then(|text| text.trim().parse().ok()));
    number.map(|n| n as f32).filter(|n| n.is_finite() && *n >= 0.0).ok_or_else(|| {
        let detail = format!("`weight` is {}, not a number of at least 0", value.0);
        Fault::new(Reason::WrongType, detail)
    })
}

fn system(fields: &mut Fields) -> Result<Option<String>, Fault> {
    let text = first_text(fields, &["system", "system_prompt"])?;
    Ok(text.filter(|text| !text.is_empty()).map(|text| messages::plain("system", &text)))
}

/// `messages` and ShareGPT's `conversations`.
fn conversation(fields: &mut Fields, keys: &[&'static str]) -> Result<Row, Fault> {
    let (key, value) = fields.take_any(keys).ok_or_else(|| Fault::missing(keys[0]))?;
    let mut list = messages::list(key, value)?;
    // A conversation that begins with its own system message keeps it, and the column stays in
    // `meta`.
    let first_role = list.first().and_then(|first| Raw(first).fields()?.get("role")?.text());
    if first_role.is_some_and(|role| role != "system") {
        list.splice(0..0, system(fields)?);
    }
    messages::check(&list)?;
    Ok(Row::new(Kind::Sft, &list))
}

fn alpaca(fields: &mut Fields, options: &Options) -> Result<Row, Fault> {
    let instruction =
        text_field(fields, "instruction")?.ok_or_else(|| Fault::missing("instruction"))?;
    let (input, output) = match fields.take("instances") {
        Some(instances) => instance(instances)?,
        None => (first_text(fields, &["input", "context"])?, first_text(fields, &OUTPUT)?),
    };
    let output = output.ok_or_else(|| Fault::missing("output"))?;
    let prompt = match input.filter(|input| !input.is_empty()) {
        Some(input) if instruction.is_empty() => input,
        Some(input) => format!("{instruction}\n{input}"),
        None => instruction,
    };
    let mut list: Vec<String> = system(fields)?.into_iter().collect();
    list.extend(history(fields)?);
    list.push(asked(&prompt)?);
    list.push(answered(&output, options)?);
    Ok(Row::new(Kind::Sft, &list))
}

/// Self-Instruct's seed tasks: the input and output of the one instance that a row holds.
fn instance(value: Raw) -> Result<(Option<String>, Option<String>), Fault> {
    let wrong = |detail: &str| Fault::new(Reason::WrongType, format!("`instances` {detail}"));
    let items = value.items().ok_or_else(|| wrong("is not a list"))?;
    let [one] = items.as_slice() else {
        return Err(wrong(&format!("holds {} tasks; a row holds one", items.len())));
    };
    let mut fields = one.fields().ok_or_else(|| wrong("does not hold objects"))?;
    Ok((text_field(&mut fields, "input")?, text_field(&mut fields, "output")?))
}

/// Alpaca's earlier turns: `[[question, answer], ...]`, or the text of that.
fn history(fields: &mut Fields) -> Result<Vec<String>, Fault> {
    let Some(value) = fields.take("history") else { return Ok(Vec::new()) };
    let wrong = || Fault::new(Reason::WrongType, "`history` is not a list of pairs of texts");
    let inner = match value.text() {
        Some(text) if text.trim().is_empty() => return Ok(Vec::new()),
        Some(text) => canonical(&text).map_err(|_| wrong())?,
        None => value.0.to_owned(),
    };
    let mut list = Vec::new();
    for pair in Raw(&inner).items().ok_or_else(wrong)? {
        let pair = pair.items().ok_or_else(wrong)?;
        let [question, answer] = pair.as_slice() else { return Err(wrong()) };
        let (question, answer) =
            (question.text().ok_or_else(wrong)?, answer.text().ok_or_else(wrong)?);
        list.push(messages::plain("user", &question));
        list.push(answered(&answer, &Options::default())?);
    }
    Ok(list)
}

fn asked(prompt: &str) -> Result<String, Fault> {
    if prompt.trim().is_empty() {
        return Err(Fault::new(Reason::EmptyPrompt, "there is nothing to respond to"));
    }
    Ok(messages::plain("user", prompt))
}

fn answered(answer: &str, options: &Options) -> Result<String, Fault> {
    let suffix = options.strip_suffix.as_deref().unwrap_or_default();
    let answer = answer.strip_suffix(suffix).unwrap_or(answer);
    if answer.trim().is_empty() {
        return Err(Fault::new(Reason::EmptyResponse, "the response is empty"));
    }
    Ok(messages::plain("assistant", answer))
}

/// A prompt and its completion, each a text or a list of messages.
fn pair(
    fields: &mut Fields,
    prompts: &[&'static str],
    completions: &[&'static str],
    options: &Options,
) -> Result<Row, Fault> {
    let (prompt_key, prompt) =
        fields.take_any(prompts).ok_or_else(|| Fault::missing(prompts[0]))?;
    let completion = fields.take_any(completions).ok_or_else(|| Fault::missing(completions[0]))?;
    let (completion_key, completion) = completion;
    let mut list: Vec<String> = system(fields)?.into_iter().collect();
    match prompt.shape() {
        Shape::List => list.extend(messages::list(prompt_key, prompt)?),
        _ => list.push(asked(&text_of(prompt_key, prompt)?)?),
    }
    match completion.shape() {
        Shape::List => list.extend(messages::list(completion_key, completion)?),
        _ => list.push(answered(&text_of(completion_key, completion)?, options)?),
    }
    messages::check(&list)?;
    Ok(Row::new(Kind::Sft, &list))
}

fn text_row(fields: &mut Fields, options: &Options) -> Result<Row, Fault> {
    let text = text_field(fields, "text")?.ok_or_else(|| Fault::missing("text"))?;
    let suffix = options.strip_suffix.as_deref().unwrap_or_default();
    let text = text.strip_suffix(suffix).map(str::to_owned).unwrap_or(text);
    if text.trim().is_empty() {
        return Err(Fault::new(Reason::EmptyText, "`text` is empty"));
    }
    let mut row = Row::new(Kind::Text, &[]);
    row.text = Some(text);
    Ok(row)
}

#[cfg(test)]
mod tests;
