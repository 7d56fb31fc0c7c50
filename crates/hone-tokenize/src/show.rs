//! `show`: rows or a pack on the terminal, each token looking as it is trained; or as one page, see `page`.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::ValueEnum;
use hone_cli::{Common, Context, Exit, Failure, Pipeline};
use hone_schema::{Part, Rendered, Split};
use hone_tokens::{Taken, Vocab};

use crate::args::split;
use crate::documents::{Document, Packs, documents, views};
use crate::inputs::Inputs;
use crate::page;
use crate::view::{Token, View};
use hone_cli::text::{one_line, visible};

/// Which example, and how it is shown.
#[derive(clap::Args)]
pub(crate) struct ShowArgs {
    /// Number of the row in its split (and source, where one is given), from 0.
    #[arg(long, value_name = "N", conflicts_with_all = ["id", "pack", "html"])]
    pub(crate) row: Option<usize>,
    /// Id of the row.
    #[arg(long, value_name = "ID", conflicts_with_all = ["pack", "html"])]
    pub(crate) id: Option<String>,
    /// Number of a pack in its split, from 0: all its documents, with their borders.
    #[arg(long, value_name = "N", conflicts_with = "html")]
    pub(crate) pack: Option<usize>,
    /// Split that rows and packs are counted in; `train` when not given, and all of them with `--html`.
    #[arg(long, value_name = "SPLIT", value_parser = split)]
    pub(crate) split: Option<Split>,
    /// Source that rows are counted in.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["id", "pack"])]
    pub(crate) source: Option<String>,
    /// One line a token: index, id, bytes, weight, part, role, message, rule, text.
    #[arg(long, conflicts_with = "html")]
    pub(crate) tokens: bool,
    /// Write a page that needs nothing beside it, instead of the terminal.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) html: Option<PathBuf>,
    /// Most rows on the page.
    #[arg(long, value_name = "N", requires = "html", default_value_t = 200)]
    pub(crate) rows: usize,
    /// Put the worst rows on the page instead of the first: refused, then cut, then with the least of them trained.
    #[arg(long, requires = "html")]
    pub(crate) worst: bool,
    /// Colours, or marks made of characters.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) color: Color,
    /// Marks made of characters: `--color never`.
    #[arg(long, conflicts_with = "color")]
    pub(crate) no_color: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// Colours on a terminal that does not ask for none (`NO_COLOR`), marks elsewhere.
    #[default]
    Auto,
    /// Colours everywhere.
    Always,
    /// Marks everywhere.
    Never,
}

impl ShowArgs {
    fn is_colored(&self) -> bool {
        let asks_for_none = || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        match self.color {
            _ if self.no_color => false,
            Color::Always => true,
            Color::Never => false,
            Color::Auto => std::io::stdout().is_terminal() && !asks_for_none(),
        }
    }
}

/// How a token looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Template,
    System,
    User,
    Tool,
    Untrained,
    Trained,
    Reasoning,
    ToolCall,
    Stop,
    Cut,
}

impl Look {
    const ALL: [Look; 10] = [
        Look::Template,
        Look::System,
        Look::User,
        Look::Tool,
        Look::Untrained,
        Look::Trained,
        Look::Reasoning,
        Look::ToolCall,
        Look::Stop,
        Look::Cut,
    ];

    fn of(view: &View, token: &Token) -> Self {
        let Some(span) = view.span(token) else { return Look::Template };
        match (token.weight > 0.0, span.part) {
            _ if !token.kept => Look::Cut,
            (true, Part::Stop) => Look::Stop,
            (true, Part::Reasoning) => Look::Reasoning,
            (true, Part::ToolCall) => Look::ToolCall,
            (true, Part::Content | Part::Scaffold) => Look::Trained,
            (false, Part::Scaffold | Part::Stop) => Look::Template,
            (false, _) => match span.role.as_str() {
                "system" | "developer" => Look::System,
                "user" => Look::User,
                "tool" | "ipython" | "function" => Look::Tool,
                _ => Look::Untrained,
            },
        }
    }

    fn name(self) -> &'static str {
        match self {
            Look::Template => "template",
            Look::System => "system",
            Look::User => "user",
            Look::Tool => "tool result",
            Look::Untrained => "said, not trained",
            Look::Trained => "trained",
            Look::Reasoning => "trained thought",
            Look::ToolCall => "trained tool call",
            Look::Stop => "trained stop token",
            Look::Cut => "cut off",
        }
    }

    /// What stands before it and behind it.
    fn marks(self, is_colored: bool) -> [&'static str; 2] {
        let reset = "\x1b[0m";
        match (self, is_colored) {
            (Look::Template, true) => ["\x1b[2m", reset],
            (Look::System, true) => ["\x1b[36m", reset],
            (Look::User, true) => ["\x1b[34m", reset],
            (Look::Tool, true) => ["\x1b[33m", reset],
            (Look::Untrained, true) => ["\x1b[31m", reset],
            (Look::Trained, true) => ["\x1b[32m", reset],
            (Look::Reasoning, true) => ["\x1b[35m", reset],
            (Look::ToolCall, true) => ["\x1b[1;32m", reset],
            (Look::Stop, true) => ["\x1b[1;30;42m", reset],
            (Look::Cut, true) => ["\x1b[2;9m", reset],
            (Look::Trained | Look::Reasoning | Look::ToolCall, false) => ["[", "]"],
            (Look::Stop, false) => ["{", "}"],
            (Look::Cut, false) => ["~", "~"],
            (_, false) => ["", ""],
        }
    }
}

/// Prints an example or a pack, or writes the page.
pub(crate) fn show(ctx: &Context, common: &Common, args: &ShowArgs) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    if let Some(n) = args.pack {
        return pack(ctx, common, &pipeline, args, n);
    }
    let inputs = Inputs::open(&pipeline)?;
    if let Some(path) = &args.html {
        return page::write(ctx, &pipeline.name, &inputs, args, path);
    }
    let view = View::new(&inputs.vocab, &inputs.rules, find(&inputs, args)?);
    let row = &view.rendered;
    ctx.print(one_line(&format!(
        "row {}  source {}  split {}  kind {}",
        row.id, row.source, row.split, row.kind
    )));
    match &view.fate {
        Ok(taken) => ctx.print(facts(&inputs.vocab, &view, taken)),
        Err(refusal) => ctx.print(one_line(&format!("not taken: {refusal}"))),
    }
    let all = view.all();
    if args.tokens {
        ctx.print(format!("\n{}{}", table_head(), table(&view, &all, 0)));
    } else if view.tokens.is_empty() {
        ctx.print(format!("\n{}", visible(&view.rendered.text)));
    } else {
        let is_colored = args.is_colored();
        ctx.print(legend(&looks(&view, &all), is_colored));
        ctx.print(format!("\n{}", picture(&view, &all, is_colored)));
    }
    Ok(Exit::Done)
}

fn find(inputs: &Inputs, args: &ShowArgs) -> Result<Rendered, Failure> {
    let split = args.split.unwrap_or(Split::Train);
    let mut n = 0;
    for rows in inputs.batches()? {
        for row in rows? {
            let counts =
                row.split == split && args.source.as_ref().is_none_or(|s| *s == row.source);
            let is_it = match &args.id {
                Some(id) => row.id == *id,
                None => counts && n == args.row.unwrap_or(0),
            };
            if is_it {
                return Ok(row);
            }
            n += usize::from(counts);
        }
    }
    Err(match (&args.id, &args.source) {
        (Some(id), _) => Failure::input(format!("no rendered row has the id `{}`", one_line(id))),
        (None, Some(source)) => Failure::input(format!(
            "split {split} has {n} rows of source `{}`, counted from 0",
            one_line(source)
        )),
        (None, None) => Failure::input(format!("split {split} has {n} rows, counted from 0")),
    })
}

fn facts(vocab: &Vocab, view: &View, taken: &Taken) -> String {
    let (before, now) = (view.before(), view.outcome());
    let stops: BTreeSet<u32> = taken.rows.iter().flat_map(|row| &row.stops).copied().collect();
    let stops: Vec<String> = stops
        .iter()
        .map(|id| format!("{} ({id})", one_line(&vocab.token(*id).unwrap_or_default())))
        .collect();
    let mut facts = format!(
        "{} tokens, {} trained, {} trained turns, stops at {}",
        now.tokens,
        now.trained,
        taken.rows.iter().map(|row| row.turns).sum::<u32>(),
        stops.join(", ")
    );
    if view.is_cut() {
        let lost = before.trained - now.trained;
        facts.push_str(&format!("; cut from {} tokens, {lost} trained ones lost", before.tokens));
    }
    if taken.rows.len() > 1 {
        facts.push_str(&format!("; in {} pieces", taken.rows.len()));
    }
    facts
}

/// The looks that some tokens have, in the order of the legend.
fn looks(view: &View, tokens: &[usize]) -> Vec<Look> {
    let used: Vec<Look> = tokens.iter().map(|t| Look::of(view, &view.tokens[*t])).collect();
    Look::ALL.into_iter().filter(|look| used.contains(look)).collect()
}

fn legend(looks: &[Look], is_colored: bool) -> String {
    let shown = looks.iter().filter(|look| is_colored || !look.marks(false)[0].is_empty());
    let shown: Vec<String> = shown
        .map(|look| {
            let [on, off] = look.marks(is_colored);
            format!("{on}{}{off}", look.name())
        })
        .collect();
    shown.join("  ")
}

/// The text of some tokens; each byte looks as the token that holds it.
fn picture(view: &View, tokens: &[usize], is_colored: bool) -> String {
    let mut out = String::new();
    // What is written next: its look, its weight and its bytes.
    let mut run: Option<(Look, f32, std::ops::Range<usize>)> = None;
    for piece in view.pieces(tokens) {
        let (look, weight) = match piece.token {
            None => (Look::Template, 0.0),
            Some(idx) => (Look::of(view, &view.tokens[idx]), view.tokens[idx].weight),
        };
        match &mut run {
            Some((l, w, bytes)) if (*l, *w) == (look, weight) && bytes.end == piece.bytes.start => {
                bytes.end = piece.bytes.end;
            }
            _ => {
                flush(&mut out, view, run.take(), is_colored);
                run = Some((look, weight, piece.bytes));
            }
        }
    }
    flush(&mut out, view, run, is_colored);
    out
}

fn flush(
    out: &mut String,
    view: &View,
    run: Option<(Look, f32, std::ops::Range<usize>)>,
    is_colored: bool,
) {
    let Some((look, weight, bytes)) = run else { return };
    paint(out, look.marks(is_colored), &visible(&view.rendered.text[bytes]));
    if weight > 0.0 && weight != 1.0 && look != Look::Cut {
        out.push_str(&format!("({weight})"));
    }
}

/// `text` between its marks, line by line, so that a colour never runs over a line end.
fn paint(out: &mut String, [on, off]: [&str; 2], text: &str) {
    for line in text.split_inclusive('\n') {
        let words = line.trim_end_matches('\n');
        if !words.is_empty() {
            out.push_str(&format!("{on}{words}{off}"));
        }
        if words.len() < line.len() {
            out.push('\n');
        }
    }
}

fn table_head() -> String {
    format!(
        "{:>6} {:>7} {:>13} {:>6}  {:<9} {:<10} {:>3}  {:<15}  text\n",
        "token", "id", "bytes", "weight", "part", "role", "msg", "rule"
    )
}

/// One line a token; tokens are counted from `first`. The text stands last, so that its width moves nothing.
fn table(view: &View, tokens: &[usize], first: usize) -> String {
    let mut out = String::new();
    for (n, token) in tokens.iter().map(|idx| &view.tokens[*idx]).enumerate() {
        let span = view.span(token);
        let message = span.and_then(|s| s.message).map_or("-".to_owned(), |m| m.to_string());
        let rule = if token.kept { token.rule.as_str() } else { "cut off" };
        let line = format!(
            "{:>6} {:>7} {:>13} {:>6}  {:<9} {:<10} {message:>3}  {rule:<15}  \"{}\"\n",
            first + n,
            token.id,
            format!("{}..{}", token.bytes.start, token.bytes.end),
            token.weight,
            span.map_or("-", |s| s.part.as_str()),
            span.map_or("-".to_owned(), |s| one_line(&s.role)),
            one_line(view.text(token)),
        );
        out.push_str(&line);
    }
    out
}

fn pack(
    ctx: &Context,
    common: &Common,
    pipeline: &Pipeline,
    args: &ShowArgs,
    n: usize,
) -> Result<Exit, Failure> {
    let packs = Packs::of(pipeline, common)?;
    let split = args.split.unwrap_or(Split::Train);
    let pack = packs.nth(split, n)?;
    let docs = documents(&pack);
    ctx.print(format!(
        "pack {n} of split {split}: {} documents, {} tokens, {} trained",
        docs.len(),
        pack.input_ids.len(),
        pack.n_trained()
    ));
    // An imported artefact has no rendered rows; its documents are shown by their ids.
    let found = Inputs::open(pipeline).and_then(|inputs| views(&inputs, &docs));
    let found = found.unwrap_or_else(|_| docs.iter().map(|_| None).collect());
    let vocab = packs.vocab()?;
    let is_colored = args.is_colored();
    if args.tokens {
        ctx.print(format!("\n{}", table_head().trim_end()));
    } else {
        let mut used: Vec<Look> = Vec::new();
        for (doc, view) in docs.iter().zip(&found) {
            match view {
                Some(view) => used.extend(looks(view, &doc.in_row())),
                None => used.push(Look::Trained),
            }
        }
        let used: Vec<Look> = Look::ALL.into_iter().filter(|look| used.contains(look)).collect();
        ctx.print(legend(&used, is_colored));
    }
    for (nr, (doc, view)) in docs.iter().zip(&found).enumerate() {
        ctx.print(format!("\n{}", border(doc, nr + 1, docs.len())));
        ctx.print(match (view, args.tokens) {
            (Some(view), true) => table(view, &doc.in_row(), doc.tokens.start),
            (Some(view), false) => picture(view, &doc.in_row(), is_colored),
            (None, true) => bare_table(&vocab, doc),
            (None, false) => bare_picture(&vocab, doc, is_colored),
        });
    }
    Ok(Exit::Done)
}

fn border(doc: &Document<'_>, nr: usize, of: usize) -> String {
    let trained = doc.weights.iter().skip(1).filter(|w| **w > 0.0).count();
    let truncated = if doc.doc.truncated { ", not the whole row" } else { "" };
    one_line(&format!(
        "── document {nr} of {of}: row {}  source {}  kind {}  tokens {}..{}, {trained} trained{truncated} ──",
        doc.doc.row_id, doc.doc.source, doc.doc.kind, doc.tokens.start, doc.tokens.end
    ))
}

/// A document whose row cannot be looked at: the text of its ids.
fn bare_picture(vocab: &Vocab, doc: &Document<'_>, is_colored: bool) -> String {
    let mut out = String::new();
    let mut at = 0;
    while at < doc.ids.len() {
        let weight = doc.weights[at];
        let n = doc.weights[at..].iter().take_while(|w| **w == weight).count();
        let look = if weight > 0.0 { Look::Trained } else { Look::Template };
        let text = vocab.decode(&doc.ids[at..at + n], false).unwrap_or_default();
        paint(&mut out, look.marks(is_colored), &visible(&text));
        at += n;
    }
    out
}

fn bare_table(vocab: &Vocab, doc: &Document<'_>) -> String {
    let mut out = String::new();
    for (n, (id, weight)) in doc.ids.iter().zip(doc.weights).enumerate() {
        let text = vocab.token(*id).unwrap_or_default();
        let line = format!(
            "{:>6} {id:>7} {:>13} {weight:>6}  {:<9} {:<10} {:>3}  {:<15}  \"{}\"\n",
            doc.tokens.start + n,
            "-",
            "-",
            "-",
            "-",
            "-",
            one_line(&text)
        );
        out.push_str(&line);
    }
    out
}
