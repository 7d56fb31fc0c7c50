//! A look at one conversation.

use std::path::Path;

use hone_cli::{Common, Context, Exit, Failure, Pipeline};
use hone_schema::parse_messages;
use hone_store::{ModelDir, input};
use serde_json::{Value, json};

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
    let (template, _) = Job { source, tokenizer, config }.compile()?;
    let messages = parse_messages(&text(&args.messages)?)
        .map_err(|e| Failure::input(format!("{}: {e}", args.messages.display())))?;
    let tools = args.tools.as_deref().map(tools).transpose()?;
    let refused = |e| failure(&name, &e);
    if !args.spans {
        let text = template.render(&messages, tools.as_ref(), args.add_generation_prompt);
        ctx.print(text.map_err(refused)?);
        return Ok(Exit::Done);
    }
    let found = template.locate(&messages, tools.as_ref(), 1.0).map_err(refused)?;
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

fn text(path: &Path) -> Result<String, Failure> {
    let bytes = input::read(path, CHAT_BYTES_MAX)?;
    String::from_utf8(bytes).map_err(|_| Failure::input(format!("{}: not UTF-8", path.display())))
}

fn tools(path: &Path) -> Result<Value, Failure> {
    serde_json::from_str(&text(path)?)
        .map_err(|e| Failure::input(format!("{}: not JSON: {e}", path.display())))
}
