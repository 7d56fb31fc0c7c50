//! `show --html`: rows with their masks as one page that needs nothing beside it.
//!
//! Everything that comes from a row is text of an element or value of an attribute, escaped in `html`; the script builds no
//! markup from data. The page's own policy lets in just its one style and its one script, by their hashes, and no network.

mod html;
mod rows;
mod stats;

use std::collections::BTreeMap;
use std::path::Path;

use hone_cli::{Context, Exit, Failure};
use hone_schema::{Rendered, Split, sha256};
use rayon::prelude::*;

use crate::args::Config;
use crate::inputs::Inputs;
use crate::show::ShowArgs;
use crate::view::View;
use html::{attribute, bars, base64, content, count, percent};
use rows::{Shown, row};
use stats::{SHARES, Stats, octave_from};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Rows that are looked at together: bounds what is in memory, and is work enough for all threads.
const ROWS_A_CHUNK: usize = 256;

/// What the page is about.
struct About<'a> {
    name: &'a str,
    config: &'a Config,
    rendered: &'a str,
    split: Option<Split>,
    source: Option<&'a str>,
    worst: bool,
}

/// Writes the page to `path`.
pub(crate) fn write(
    ctx: &Context,
    name: &str,
    inputs: &Inputs,
    args: &ShowArgs,
    path: &Path,
) -> Result<Exit, Failure> {
    let (stats, shown) = scan(ctx, inputs, args)?;
    if stats.all.rows == 0 {
        return Err(Failure::input("no rendered row is in that split and source")
            .hint("leave `--split` and `--source` out, or look at the report of `hone-template`"));
    }
    let about = About {
        name,
        config: &inputs.files.job.config,
        rendered: inputs.files.rendered.sha256().short(),
        split: args.split,
        source: args.source.as_deref(),
        worst: args.worst,
    };
    let page = page(&about, &stats, &shown);
    hone_store::output::write(path, page.as_bytes())?;
    ctx.note(format!(
        "{} of {} rows, {} KiB: {}",
        shown.len(),
        stats.all.rows,
        page.len() / 1024,
        path.display()
    ));
    Ok(Exit::Done)
}

/// Looks at every row of the selection, counts them all and keeps those that are shown.
fn scan(ctx: &Context, inputs: &Inputs, args: &ShowArgs) -> Result<(Stats, Vec<Shown>), Failure> {
    let mut stats = Stats::default();
    let mut progress = ctx.progress(inputs.files.n_rows(), "rows");
    let mut numbers: BTreeMap<Split, u64> = BTreeMap::new();
    // By badness, and by order among equals.
    let mut shown: BTreeMap<(Badness, u64), Shown> = BTreeMap::new();
    let mut at = 0;
    for batch in inputs.batches()? {
        for rows in batch?.chunks(ROWS_A_CHUNK) {
            if let Some(exit) = ctx.stop() {
                return Err(Failure::stopped(exit));
            }
            let is_meant = |row: &Rendered| {
                args.split.is_none_or(|split| split == row.split)
                    && args.source.as_ref().is_none_or(|source| *source == row.source)
            };
            let views: Vec<Option<View>> = rows
                .par_iter()
                .map(|row| {
                    is_meant(row).then(|| View::new(&inputs.vocab, &inputs.rules, row.clone()))
                })
                .collect();
            for (row, view) in rows.iter().zip(views) {
                let number = numbers.entry(row.split).or_default();
                let n = *number;
                *number += 1;
                at += 1;
                let Some(view) = view else { continue };
                stats.add(&view);
                let badness = if args.worst { Badness::of(&view) } else { Badness::default() };
                shown.insert((badness, at), Shown { n, view });
                if shown.len() > args.rows {
                    shown.pop_last();
                }
            }
            progress.inc(rows.len() as u64);
        }
    }
    progress.finish();
    Ok((stats, shown.into_values().collect()))
}

/// What orders rows by how much is wrong with them, the worst least: refused ones, those that lost most trained tokens, those
/// of which the least share is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Badness {
    is_taken: bool,
    lost: std::cmp::Reverse<u64>,
    per_million: u64,
}

impl Badness {
    fn of(view: &View) -> Self {
        let (before, now) = (view.before(), view.outcome());
        Badness {
            is_taken: view.fate.is_ok(),
            lost: std::cmp::Reverse(before.trained - now.trained),
            per_million: 1_000_000 * now.trained / now.tokens.max(1),
        }
    }
}

fn page(about: &About<'_>, stats: &Stats, shown: &[Shown]) -> String {
    let hash = |text: &str| {
        let hex = sha256(text.as_bytes()).to_string();
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("a hash is hex");
        let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        format!("'sha256-{}'", base64(&bytes))
    };
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src {}; \
         script-src {}; base-uri 'none'; form-action 'none'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n\
         <title>{}: what is trained</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
        hash(STYLE),
        hash(SCRIPT),
        content(about.name),
    );
    head(&mut out, about, stats);
    numbers(&mut out, stats, about.config.max_len);
    tables(&mut out, stats);
    tools(&mut out, about, stats, shown);
    out.push_str("<section id=\"rows\">\n");
    shown.iter().for_each(|shown| out.push_str(&row(shown)));
    out.push_str("</section>\n</main>\n<div id=\"tip\" hidden></div>\n");
    out.push_str(&format!("<script>{SCRIPT}</script>\n</body>\n</html>\n"));
    out
}

fn head(out: &mut String, about: &About<'_>, stats: &Stats) {
    let config = serde_json::to_value(about.config).expect("the configuration is plain data");
    let mut words: Vec<String> = Vec::new();
    for (key, value) in config.as_object().into_iter().flatten() {
        words.push(format!("<code>{} = {}</code>", content(key), content(&value.to_string())));
    }
    let of = match (about.split, about.source) {
        (None, None) => "all splits and sources".to_owned(),
        (Some(split), None) => format!("split {split}"),
        (None, Some(source)) => format!("source {}", content(source)),
        (Some(split), Some(source)) => format!("split {split}, source {}", content(source)),
    };
    out.push_str(&format!(
        "<p class=\"over\">hone · what is trained</p>\n<h1>{}</h1>\n\
         <p class=\"soft\">{of}; rendered text {}. {}</p>\n",
        content(about.name),
        about.rendered,
        words.join(" "),
    ));
    let share = percent(stats.all.tokens.trained, stats.all.tokens.tokens);
    let card = |what: &str, value: &str, more: &str, class: &str| {
        format!(
            "<div class=\"{class}\"><span>{what}</span><b>{value}</b><small>{more}</small></div>\n"
        )
    };
    let all = &stats.all;
    let bad = |n: u64| if n > 0 { "bad" } else { "" };
    let reasons: Vec<String> = stats.refused.iter().map(|(r, n)| format!("{n} {r}")).collect();
    out.push_str("<div class=\"cards\">\n");
    out.push_str(&card("rows", &count(all.rows - all.refused), "go out", ""));
    out.push_str(&card("tokens", &count(all.tokens.tokens), "in those rows", ""));
    let trained = format!("{share} of the tokens");
    out.push_str(&card("trained", &count(all.tokens.trained), &trained, "good"));
    out.push_str(&card("refused rows", &count(all.refused), &reasons.join(", "), bad(all.refused)));
    let lost = stats.lost.trained;
    let cut = format!("of refused rows, and of {} cut ones", count(all.cut));
    out.push_str(&card("trained tokens lost", &count(lost), &cut, bad(lost)));
    out.push_str("</div>\n");
}

fn numbers(out: &mut String, stats: &Stats, max_len: u32) {
    let step = 100 / SHARES;
    let shares: Vec<(String, u64, bool)> = stats
        .shares
        .iter()
        .enumerate()
        .map(|(idx, n)| (format!("{} to {} %", idx * step, (idx + 1) * step), *n, idx == 0))
        .collect();
    let from = stats.lengths.keys().next().copied().unwrap_or(0);
    let to = stats.lengths.keys().last().copied().unwrap_or(0);
    let lengths: Vec<(String, u64, bool)> = (from..=to)
        .map(|octave| {
            let (least, next) = (octave_from(octave), octave_from(octave + 1));
            let n = stats.lengths.get(&octave).copied().unwrap_or(0);
            let name = format!("{} to {} tokens", count(least), count(next.max(least + 1) - 1));
            (name, n, least > u64::from(max_len))
        })
        .collect();
    out.push_str(&format!(
        "<div class=\"charts\">\n<figure><figcaption>Rows by their share of trained tokens</figcaption>{}\
         <div class=\"axis\"><span>0 %</span><span>50 %</span><span>100 %</span></div></figure>\n\
         <figure><figcaption>Rows by their length, doubling every second bar</figcaption>{}\
         <div class=\"axis\"><span>{}</span><span>{} tokens</span></div></figure>\n</div>\n",
        bars(&shares),
        bars(&lengths),
        count(octave_from(from)),
        count(octave_from(to + 1) - 1),
    ));
}

fn tables(out: &mut String, stats: &Stats) {
    out.push_str(
        "<div class=\"charts\">\n<div class=\"wide\"><table><thead><tr><th>who and what</th><th>tokens</th>\
         <th>trained</th><th></th></tr></thead><tbody>\n",
    );
    for ((role, part), counts) in &stats.parts {
        let role = if role.is_empty() { "template" } else { role };
        out.push_str(&format!(
            "<tr><th>{} <small>{part}</small></th><td>{}</td><td>{}</td><td>{}</td></tr>\n",
            content(role),
            count(counts.tokens),
            count(counts.trained),
            percent(counts.trained, counts.tokens)
        ));
    }
    out.push_str(
        "</tbody></table></div>\n<div class=\"wide\"><table><thead><tr><th>source</th><th>rows</th><th>refused</th>\
         <th>cut</th><th>trained</th></tr></thead><tbody>\n",
    );
    for (name, source) in &stats.sources {
        out.push_str(&format!(
            "<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n",
            content(name),
            count(source.rows),
            count(source.refused),
            count(source.cut),
            percent(source.tokens.trained, source.tokens.tokens)
        ));
    }
    out.push_str("</tbody></table></div>\n</div>\n");
}

fn tools(out: &mut String, about: &About<'_>, stats: &Stats, shown: &[Shown]) {
    let options = |names: Vec<&str>| -> String {
        let mut names = names;
        names.sort_unstable();
        names.dedup();
        let option =
            |n: &&str| format!("<option value=\"{}\">{}</option>", attribute(n), content(n));
        names.iter().map(option).collect()
    };
    let sources = options(shown.iter().map(|s| s.view.rendered.source.as_str()).collect());
    let roles = shown.iter().flat_map(|s| &s.view.rendered.spans).map(|s| s.role.as_str());
    let roles = options(roles.filter(|role| !role.is_empty()).collect());
    let which = if about.worst { "worst" } else { "first" };
    out.push_str(&format!(
        "<p class=\"soft\">On this page are the {which} {} of {} rows.</p>\n\
         <p class=\"legend\"><span class=\"on\">trained</span> <span class=\"on think\">trained thought</span> \
         <span class=\"on call\">trained tool call</span> <span class=\"on stop\">trained stop</span> \
         <span class=\"user\">user</span> <span class=\"sys\">system</span> <span class=\"tool\">tool result</span> \
         <span class=\"head\">template</span> <span class=\"off\">said, not trained</span> \
         <span class=\"on lost\">cut off</span></p>\n\
         <form id=\"tools\" hidden>\n\
         <input id=\"q\" type=\"search\" placeholder=\"Search text and ids\" aria-label=\"Search\">\n\
         <select id=\"sort\" aria-label=\"Order\"><option value=\"\">as in the data</option>\
         <option value=\"worst\">worst first</option><option value=\"long\">longest first</option>\
         <option value=\"least\">least trained first</option></select>\n\
         <select id=\"source\" aria-label=\"Source\"><option value=\"\">every source</option>{sources}</select>\n\
         <select id=\"role\" aria-label=\"Role\"><option value=\"\">every role</option>{roles}</select>\n\
         <select id=\"state\" aria-label=\"State\"><option value=\"\">every state</option>\
         <option>taken</option><option>cut</option><option>refused</option></select>\n\
         <input id=\"row\" type=\"number\" min=\"0\" placeholder=\"Row\" aria-label=\"Jump to a row\">\n\
         <label><input id=\"borders\" type=\"checkbox\"> token borders</label>\n\
         <output id=\"hits\"></output>\n</form>\n",
        count(shown.len() as u64),
        count(stats.all.rows),
    ));
}
