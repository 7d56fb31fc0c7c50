//! `explain`: one token, whose it is, and why it has its weight.

use std::collections::BTreeMap;

use hone_cli::{Common, Context, Exit, Failure, Pipeline};
use hone_schema::{ArtefactKind, Conversation, Split, parse_messages};
use hone_store::Sealed;
use serde_json::{Map, Value, json};

use crate::args::split;
use crate::documents::{Packs, documents, views};
use crate::inputs::Inputs;
use crate::view::{Rule, View};
use hone_cli::text::one_line;

/// Characters of text shown on either side of a token.
const AROUND: usize = 60;

/// Which token.
#[derive(clap::Args)]
pub(crate) struct ExplainArgs {
    /// A pack and a token in it, both counted from 0.
    #[arg(value_name = "PACK:TOKEN", value_parser = place, required_unless_present = "id")]
    at: Option<(usize, usize)>,
    /// Id of a row instead.
    #[arg(long, value_name = "ID", conflicts_with = "at", requires = "token")]
    id: Option<String>,
    /// Number of the token in that row, from 0.
    #[arg(long, value_name = "N", requires = "id")]
    token: Option<usize>,
    /// Split of the pack.
    #[arg(long, value_name = "SPLIT", value_parser = split, default_value = "train")]
    split: Split,
}

fn place(text: &str) -> Result<(usize, usize), String> {
    let numbers = text.split_once(':').and_then(|(p, t)| Some((p.parse().ok()?, t.parse().ok()?)));
    numbers.ok_or_else(|| "a token is named by its pack and its number there, as in `3:217`".into())
}

/// What is known of a token, in the order in which it is said.
#[derive(Default)]
struct Facts(Vec<(&'static str, Value)>);

impl Facts {
    fn add(&mut self, name: &'static str, value: impl Into<Value>) {
        self.0.push((name, value.into()));
    }

    fn print(self, ctx: &Context, common: &Common) {
        if common.json {
            let object: Map<String, Value> =
                self.0.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            ctx.print(Value::Object(object).to_string());
            return;
        }
        for (name, value) in self.0 {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            ctx.print(format!("{:<9} {}", name.replace('_', " "), one_line(&text)));
        }
    }
}

/// Explains a token.
pub(crate) fn explain(ctx: &Context, common: &Common, args: &ExplainArgs) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let mut facts = Facts::default();
    match (&args.at, &args.id) {
        (Some((pack, token)), _) => {
            in_pack(&mut facts, common, &pipeline, args.split, (*pack, *token))?;
        }
        (None, Some(id)) => {
            let inputs = Inputs::open(&pipeline)?;
            let view = find(&inputs, id)?;
            let token = args.token.expect("`--id` requires `--token`");
            if token >= view.tokens.len() {
                let (id, n) = (one_line(id), view.tokens.len());
                let message = format!("row `{id}` has {n} tokens, counted from 0");
                return Err(Failure::input(message));
            }
            in_row(&mut facts, &pipeline, &inputs, &view, token);
        }
        (None, None) => unreachable!("clap asks for one of them"),
    }
    facts.print(ctx, common);
    Ok(Exit::Done)
}

fn find(inputs: &Inputs, id: &str) -> Result<View, Failure> {
    for rows in inputs.batches()? {
        if let Some(row) = rows?.into_iter().find(|row| row.id == id) {
            return Ok(View::new(&inputs.vocab, &inputs.rules, row));
        }
    }
    Err(Failure::input(format!("no rendered row has the id `{}`", one_line(id))))
}

fn in_pack(
    facts: &mut Facts,
    common: &Common,
    pipeline: &Pipeline,
    split: Split,
    (n, token): (usize, usize),
) -> Result<(), Failure> {
    let packs = Packs::of(pipeline, common)?;
    let pack = packs.nth(split, n)?;
    let docs = documents(&pack);
    let Some(nr) = docs.iter().position(|doc| doc.tokens.contains(&token)) else {
        let len = pack.input_ids.len();
        return Err(Failure::input(format!("pack {n} has {len} tokens, counted from 0")));
    };
    let doc = &docs[nr];
    let at = token - doc.tokens.start;
    let row_token = doc.in_row()[at];
    let whole = if doc.doc.truncated { ", which is not its whole row" } else { "" };
    facts.add("pack", format!("{n} of split {split}, token {token} of {}", pack.input_ids.len()));
    facts.add(
        "document",
        format!("{} of {}, token {at} of {}{whole}", nr + 1, docs.len(), doc.doc.len),
    );
    let inputs = Inputs::open(pipeline);
    let view = match &inputs {
        Ok(inputs) => views(inputs, std::slice::from_ref(doc))?.pop().flatten(),
        Err(_) => None,
    };
    match (inputs, view) {
        (Ok(inputs), Some(view)) => {
            in_row(facts, pipeline, &inputs, &view, row_token);
            if at == 0 && row_token > 0 {
                facts.add(
                    "packed",
                    "not trained: the first token of a piece is predicted by nothing",
                );
            }
        }
        (inputs, _) => {
            facts.add("row", doc.doc.row_id.clone());
            facts.add("source", doc.doc.source.clone());
            facts.add("id", doc.ids[at]);
            facts.add("text", packs.vocab()?.token(doc.ids[at]).unwrap_or_default());
            facts.add("weight", f64::from(doc.weights[at]));
            facts.add("rule", not_known(&packs, inputs.err()));
        }
    }
    Ok(())
}

/// Why there is no rule for a token of a pack; `failure` says why the rows could not be opened.
fn not_known(packs: &Packs, failure: Option<Failure>) -> String {
    match failure {
        _ if packs.is_imported() => "not known: the labels were imported".to_owned(),
        Some(failure) => format!("not known: {failure}"),
        None => "not known: with today's configuration its row makes other tokens; \
                 `hone-tokenize --why` says what changed"
            .to_owned(),
    }
}

fn in_row(facts: &mut Facts, pipeline: &Pipeline, inputs: &Inputs, view: &View, idx: usize) {
    let token = &view.tokens[idx];
    let row = &view.rendered;
    facts.add("row", row.id.clone());
    facts.add("source", row.source.clone());
    facts.add(
        "token",
        format!("{idx} of {}, bytes {}..{}", view.tokens.len(), token.bytes.start, token.bytes.end),
    );
    facts.add("id", token.id);
    facts.add("text", view.text(token));
    facts.add("spelled", inputs.vocab.token(token.id).unwrap_or_default());
    facts.add("around", around(view, idx));
    if let Some(span) = view.span(token) {
        let message = span.message.map_or("none".to_owned(), |m| m.to_string());
        let role = if span.role.is_empty() { "none" } else { &span.role };
        facts.add("message", format!("{message}, role {role}, part {}", span.part));
    }
    facts.add("weight", f64::from(token.weight));
    facts.add("rule", view.sentence(token));
    if token.rule == Rule::Straddles {
        facts.add("straddles", straddled(view, idx));
    }
    if token.weight > 0.0
        && let Some(factors) = factors(pipeline, view, idx)
    {
        facts.add("factors", factors);
    }
    match &view.fate {
        Err(refusal) => facts.add("refused", format!("the row is not taken: {refusal}")),
        Ok(_) if !token.kept => facts.add("cut", "the token is cut off: the row is too long"),
        Ok(_) => {}
    }
}

/// The text around a token, which stands between `⟦` and `⟧`.
fn around(view: &View, idx: usize) -> String {
    let text = &view.rendered.text;
    let bytes = &view.tokens[idx].bytes;
    let before: Vec<char> = text[..bytes.start].chars().rev().take(AROUND).collect();
    let before: String = before.into_iter().rev().collect();
    let after: String = text[bytes.end..].chars().take(AROUND).collect();
    format!("{before}⟦{}⟧{after}", &text[bytes.clone()])
}

/// The spans that a straddling token has bytes of.
fn straddled(view: &View, idx: usize) -> String {
    let bytes = &view.tokens[idx].bytes;
    let spans = view.rendered.spans.iter();
    let parts: Vec<String> = spans
        .filter(|span| (span.start as usize) < bytes.end && bytes.start < span.end as usize)
        .map(|span| {
            let shared = bytes.start.max(span.start as usize)..bytes.end.min(span.end as usize);
            let role = if span.role.is_empty() { "template" } else { &span.role };
            format!("{:?} of {role} {}", &view.rendered.text[shared], span.part)
        })
        .collect();
    parts.join(" and ")
}

/// What the weight of a token in the data is the product of, where the conversations are still there.
fn factors(pipeline: &Pipeline, view: &View, idx: usize) -> Option<Value> {
    let span = view.span(&view.tokens[idx])?;
    let sealed = Sealed::open(&pipeline.dir("ingest"), ArtefactKind::Conversations).ok()?;
    let is_it =
        |row: &Conversation| row.id == view.rendered.id && row.source == view.rendered.source;
    let row = sealed.parquet("conversations.parquet").ok()?.find_map(|batch| {
        let rows = Conversation::from_batch(&batch.ok()?).ok()?;
        rows.into_iter().find(is_it)
    })?;
    let messages = parse_messages(&row.messages).ok()?;
    let message = match span.message {
        Some(message) => messages.get(message as usize)?.weight,
        None => 1.0,
    };
    let mut factors = BTreeMap::from([("source and row", row.weight), ("message", message)]);
    let rest = span.weight / (row.weight * message);
    if rest.is_finite() && (rest - 1.0).abs() > 1e-6 {
        factors.insert("span", rest);
    }
    let words: Vec<String> = factors.iter().map(|(name, w)| format!("{name} {w}")).collect();
    Some(json!(words.join(" x ")))
}
