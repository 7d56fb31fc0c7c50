//! A look at one file: what it is taken for and why, its rows as conversations, what would be
//! rejected.

use hone_cli::{Common, Context, Exit, Failure};
use hone_schema::{Kind, parse_messages};
use serde_json::{Value, json};

use crate::args::{Config, InspectArgs, Paths, SourceConfig};
use crate::convert::Row;
use crate::read;
use crate::report::Tally;
use crate::run::{Opened, detect, walk};

/// Characters of a message that are shown.
const SHOWN_CHARS: usize = 400;

/// Reads a file as the stage would, and prints what it found on stdout.
///
/// # Errors
/// As the stage.
pub(crate) fn inspect(args: &InspectArgs, common: &Common, ctx: &Context) -> Result<Exit, Failure> {
    let source = SourceConfig {
        path: Paths::One(args.file.clone()),
        schema: args.schema.clone().unwrap_or_else(|| "auto".to_owned()),
        columns: args.columns.clone(),
        ..SourceConfig::default()
    };
    let plan = Config { source: vec![source], ..Config::default() }.resolve(0)?;
    let source = &plan.sources[0];
    let files = vec![args.file.clone()];
    let format = read::open(&args.file, &source.table)?.format;
    let detected = detect(source, &files)?;
    let opened = Opened { source, files, detected };
    let (mut tally, mut shown) = (Tally::default(), Vec::new());
    walk(ctx, &opened, &mut |file, raw, row| {
        match row {
            Ok(row) => {
                tally.pass(&row);
                if shown.len() < args.rows {
                    shown.push((raw.line, row));
                }
            }
            Err(fault) => tally.reject(&fault, file, raw.line),
        }
        Ok(())
    })?;
    tally.remark(&opened);
    let text = if common.json {
        as_json(&opened, &tally, &shown).to_string()
    } else {
        as_text(format.name(), &opened, &tally, &shown)
    };
    ctx.print(text);
    Ok(if tally.n_passed == 0 { Exit::Input } else { Exit::Done })
}

fn as_json(opened: &Opened, tally: &Tally, shown: &[(u64, Row)]) -> Value {
    let rejected = tally.reasons().into_iter();
    let rejected: Vec<Value> = rejected
        .map(|(reason, n, first)| json!({"reason": reason, "rows": n, "first": first}))
        .collect();
    let parsed = |text: &str| serde_json::from_str(text).unwrap_or(Value::Null);
    let rows = shown.iter().map(|(line, row)| {
        json!({
            "line": line,
            "id": row.id,
            "kind": row.kind.as_str(),
            "messages": parsed(&row.messages),
            "tools": row.tools.as_deref().map(parsed),
            "text": row.text,
            "chosen": row.chosen.as_deref().map(parsed),
            "rejected": row.rejected.as_deref().map(parsed),
            "meta": row.meta.as_deref().map(parsed),
        })
    });
    json!({
        "schema": opened.detected.schema.name(),
        "why": opened.detected.why,
        "rows": tally.n_rows(),
        "usable": tally.n_passed,
        "rejected": rejected,
        "notes": tally.notes,
        "shown": rows.collect::<Vec<_>>(),
    })
}

fn as_text(format: &str, opened: &Opened, tally: &Tally, shown: &[(u64, Row)]) -> String {
    let mut out = vec![
        format!("file      {} ({format})", opened.source.paths[0].display()),
        format!("schema    {} ({})", opened.detected.schema.name(), opened.detected.why),
        format!("rows      {}, usable {}", tally.n_rows(), tally.n_passed),
    ];
    for (reason, n, first) in tally.reasons() {
        out.push(format!("rejected  {n} `{reason}`, the first at {}", printable(first)));
    }
    out.extend(tally.notes.iter().map(|note| format!("note      {}", printable(note))));
    for (line, row) in shown {
        let id = row.id.as_ref().map(|id| format!(", id {}", printable(id))).unwrap_or_default();
        out.push(format!("\n--- line {line}{id}, {}", row.kind));
        if let Some(text) = &row.text {
            out.push(printable(text));
        }
        out.extend(turns("", &row.messages));
        if row.kind == Kind::Preference {
            out.extend(turns("chosen ", row.chosen.as_deref().unwrap_or("[]")));
            out.extend(turns("rejected ", row.rejected.as_deref().unwrap_or("[]")));
        }
        for (name, value) in [("tools", &row.tools), ("meta", &row.meta)] {
            out.extend(value.as_ref().map(|value| format!("[{name}] {}", printable(value))));
        }
    }
    out.join("\n")
}

fn turns(before: &str, messages: &str) -> Vec<String> {
    let messages = parse_messages(messages).unwrap_or_default();
    let one = |message: &hone_schema::Message| {
        let mut text = message.text().map(printable).unwrap_or_default();
        for (key, value) in &message.value {
            if key != "role" && key != "content" {
                text.push_str(&format!("\n  {key}: {}", printable(&value.to_string())));
            }
        }
        format!("[{before}{}] {text}", message.role)
    };
    messages.iter().map(one).collect()
}

/// The beginning of a text without characters that would steer the terminal.
fn printable(text: &str) -> String {
    let n_chars = text.chars().count();
    let shown = text.chars().take(SHOWN_CHARS).map(|c| match c {
        '\n' | '\t' => c,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    });
    let mut shown: String = shown.collect();
    if n_chars > SHOWN_CHARS {
        shown.push_str(&format!(" ... ({n_chars} characters)"));
    }
    shown
}
