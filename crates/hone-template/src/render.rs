//! A look at one conversation.

use std::path::Path;

use hone_chat::Given;
use hone_cli::{Common, Context, Exit, Failure, Pipeline};
use hone_schema::parse_messages;
use hone_store::{ModelDir, input};
use serde_json::{Map, Value, json};

use crate::args::{Config, RenderArgs};
use crate::run::failure;
use crate::source::{self, Tokenizer};
use crate::worker::Job;

/// Largest conversation read.
const CHAT_BYTES_MAX: u64 = 64 << 20;

/// Renders a conversation from files and prints it.
///
/// # Errors
/// Files that cannot be read or used, a template that refuses.
pub(crate) fn render(args: &RenderArgs, common: &Common, ctx: &Context) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let config: Config = pipeline.stage("template")?;
    let mut tokenizer = match &pipeline.base {
        Some(base) => Tokenizer::read(&ModelDir::open(base)?)?,
        None => Tokenizer::default(),
    };
    for (name, token) in [("bos_token", &args.bos_token), ("eos_token", &args.eos_token)] {
        if let Some(token) = token {
            tokenizer.tokens.insert(name.to_owned(), token.clone());
        }
    }
    let source = source::find(&source::choice(&args.template), &tokenizer)?;
    let name = source.name.clone();
    let (templates, _) = Job { source, tokenizer, config }.compile()?;
    let row = Row::read(args)?;
    let messages = parse_messages(&row.messages.to_string())
        .map_err(|e| Failure::input(format!("{}: {e}", args.messages.display())))?;
    let given = Given {
        tools: row.tools.as_ref(),
        documents: row.documents.as_ref(),
        variables: Some(&row.variables),
    };
    let template = templates.of(given.tools.is_some());
    let refused = |e| failure(&name, &e);
    if !args.spans {
        let text = template.render_with(&messages, &given, args.add_generation_prompt);
        ctx.print(text.map_err(refused)?);
        return Ok(Exit::Done);
    }
    let found = template.locate_with(&messages, &given, 1.0).map_err(refused)?;
    let spans: Vec<Value> = found
        .spans
        .iter()
        .map(|span| {
            json!({
                "text": found.text[span.start as usize..span.end as usize],
                "part": span.part.as_str(),
                "message": span.message,
                "role": span.role,
                "weight": span.weight,
                "chosen": span.chosen,
            })
        })
        .collect();
    let object = json!({
        "text": found.text,
        "prompt_len": found.prompt_len,
        "stops": template.stops(),
        "notes": found.notes,
        "spans": spans,
    });
    ctx.print(format!("{object:#}"));
    Ok(Exit::Done)
}

/// A conversation from files and flags.
struct Row {
    messages: Value,
    tools: Option<Value>,
    documents: Option<Value>,
    variables: Map<String, Value>,
}

impl Row {
    fn read(args: &RenderArgs) -> Result<Self, Failure> {
        let mut row = match json_file(&args.messages)? {
            Value::Object(mut row) if row.contains_key("messages") => {
                let mut take = |key: &str| row.remove(key).filter(|value| !value.is_null());
                let variables = match take("chat_template_kwargs") {
                    None => Map::new(),
                    Some(Value::Object(variables)) => variables,
                    Some(_) => {
                        let path = args.messages.display();
                        let failure = format!("{path}: `chat_template_kwargs` is no object");
                        return Err(Failure::input(failure));
                    }
                };
                let (tools, documents) = (take("tools"), take("documents"));
                let messages = take("messages").unwrap_or_default();
                Row { messages, tools, documents, variables }
            }
            messages => Row { messages, tools: None, documents: None, variables: Map::new() },
        };
        if let Some(path) = &args.tools {
            row.tools = Some(json_file(path)?);
        }
        if let Some(path) = &args.documents {
            row.documents = Some(json_file(path)?);
        }
        if let Some(kwargs) = &args.kwargs {
            let kwargs: Map<String, Value> = serde_json::from_str(kwargs).map_err(|e| {
                Failure::usage(format!("`--kwargs` is no JSON object: {e}"))
                    .hint("write it like `--kwargs '{\"enable_thinking\": false}'`")
            })?;
            row.variables.extend(kwargs);
        }
        Ok(row)
    }
}

fn json_file(path: &Path) -> Result<Value, Failure> {
    let bytes = input::read(path, CHAT_BYTES_MAX)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::input(format!("{}: not UTF-8", path.display())))?;
    serde_json::from_str(&text)
        .map_err(|e| Failure::input(format!("{}: not JSON: {e}", path.display())))
}
