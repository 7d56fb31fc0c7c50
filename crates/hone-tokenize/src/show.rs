//! `show`: one example, its trained tokens marked.

use std::fmt::Write as _;
use std::io::IsTerminal;

use hone_cli::{Common, Context, Exit, Failure, Pipeline};
use hone_schema::{Part, Rendered};
use hone_tokens::{Row, tokenize};

use crate::args::{Color, ShowArgs};
use crate::run::Inputs;

/// How each kind of text is marked: what stands before it and behind it.
struct Marks {
    plain: [&'static str; 2],
    trained: [&'static str; 2],
    stop: [&'static str; 2],
}

const COLORS: Marks = Marks {
    plain: ["\x1b[2m", "\x1b[0m"],
    trained: ["\x1b[32m", "\x1b[0m"],
    stop: ["\x1b[1;30;42m", "\x1b[0m"],
};

const CHARACTERS: Marks = Marks { plain: ["", ""], trained: ["[", "]"], stop: ["{", "}"] };

/// Prints one example.
pub(crate) fn show(ctx: &Context, common: &Common, args: &ShowArgs) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let inputs = Inputs::open(&pipeline)?;
    let rendered = find(&inputs, args)?;
    let color = match args.color {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => std::io::stdout().is_terminal(),
    };
    let marks = if color { &COLORS } else { &CHARACTERS };
    ctx.print(format!(
        "row {}  source {}  split {}  kind {}",
        rendered.id, rendered.source, rendered.split, rendered.kind
    ));
    match tokenize(&inputs.vocab, &rendered, &inputs.rules) {
        Ok(row) => {
            ctx.print(facts(&inputs, &row));
            ctx.print(legend(marks));
            ctx.print("");
            ctx.print(picture(&rendered, &row, marks));
            Ok(Exit::Done)
        }
        Err(refusal) => {
            ctx.print(format!("not taken: {refusal}\n\n{}", rendered.text));
            Ok(Exit::Done)
        }
    }
}

fn find(inputs: &Inputs, args: &ShowArgs) -> Result<Rendered, Failure> {
    let mut n = 0;
    for rows in inputs.batches()? {
        for row in rows? {
            let is_it = match &args.id {
                Some(id) => row.id == *id,
                None => row.split == args.split && n == args.row.unwrap_or(0),
            };
            if is_it {
                return Ok(row);
            }
            n += usize::from(row.split == args.split);
        }
    }
    Err(match &args.id {
        Some(id) => Failure::input(format!("no rendered row has the id `{id}`")),
        None => Failure::input(format!("split {} has {n} rows, counted from 0", args.split)),
    })
}

fn facts(inputs: &Inputs, row: &Row) -> String {
    let (now, stops) = (row.counts(), row.stops.iter());
    let stops: Vec<String> =
        stops.map(|id| format!("{} ({id})", inputs.vocab.token(*id).unwrap_or_default())).collect();
    let mut facts = format!(
        "{} tokens, {} trained, {} trained turns, stops at {}",
        now.tokens,
        now.trained,
        row.turns,
        stops.join(", ")
    );
    if now.tokens < row.before.tokens {
        let lost = row.before.trained - now.trained;
        write!(facts, "; cut from {} tokens, {lost} trained ones lost", row.before.tokens)
            .expect("writing into a text cannot fail");
    }
    facts
}

fn legend(marks: &Marks) -> String {
    let show = |[on, off]: [&str; 2], what: &str| format!("{on}{what}{off}");
    format!(
        "{}  {}  {}",
        show(marks.plain, "not trained"),
        show(marks.trained, "trained"),
        show(marks.stop, "trained stop token")
    )
}

#[derive(Clone, Copy, PartialEq)]
enum Look {
    Plain,
    Trained(f32),
    Stop,
    Cut,
}

/// The row's text; each byte looks as the token that holds it is trained.
fn picture(rendered: &Rendered, row: &Row, marks: &Marks) -> String {
    let mut looks = vec![Look::Plain; rendered.text.len()];
    for (bytes, weight) in row.offsets.iter().zip(&row.weights) {
        let span = rendered.spans.partition_point(|span| span.end as usize <= bytes.start);
        let is_stop = rendered.spans.get(span).is_some_and(|s| s.part == Part::Stop);
        let look = match (*weight > 0.0, is_stop) {
            (false, _) => Look::Plain,
            (true, true) => Look::Stop,
            (true, false) => Look::Trained(*weight),
        };
        looks[bytes.clone()].fill(look);
    }
    if (row.ids.len() as u64) < row.before.tokens {
        let end = row.offsets.last().map_or(0, |bytes| bytes.end);
        looks[end..].fill(Look::Cut);
    }
    let mut out = String::new();
    let mut at = 0;
    while at < rendered.text.len() {
        let look = looks[at];
        let n = looks[at..].iter().take_while(|l| **l == look).count();
        let text = &rendered.text[at..at + n];
        match look {
            Look::Plain => paint(&mut out, marks.plain, text),
            Look::Trained(weight) => {
                paint(&mut out, marks.trained, text);
                if weight != 1.0 {
                    out.push_str(&format!("({weight})"));
                }
            }
            Look::Stop => paint(&mut out, marks.stop, text),
            Look::Cut => {
                out.push_str("\n-- cut here --\n");
                paint(&mut out, marks.plain, text);
            }
        }
        at += n;
    }
    out
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
