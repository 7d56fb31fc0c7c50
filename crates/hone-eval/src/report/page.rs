//! The page, from top to bottom.

use std::fmt::Write;

use hone_cli::Failure;
use hone_model::Compute;
use hone_schema::Prompt;
use serde_json::Value;

use crate::args::EvalPlan;
use crate::gates::Gate;
use crate::groups::Field;
use crate::inputs::Inputs;
use crate::report::Drawn;
use crate::report::curve::Curve;
use crate::report::html::{count, decimals, escape, percent, signed_percent};
use crate::results::{Model, Results};

/// What the two lines of the curve are measured on.
const CURVE_NOTE: &str = "<p class=\"soft\">The training loss is that of each step’s own packs, of all \
    sources; the held-out loss is over the rows of the eval split, which no step sees.</p>\n";

/// Everything that the page shows.
pub(crate) struct Page<'a> {
    pub(crate) plan: &'a EvalPlan,
    pub(crate) inputs: &'a Inputs,
    pub(crate) results: &'a Results,
    pub(crate) prompts: &'a [Prompt],
    /// Rows shown side by side.
    pub(crate) shown: Vec<usize>,
    /// Drawn answers to the first of them.
    pub(crate) drawn: Drawn,
}

impl Page<'_> {
    /// The page: HTML that loads nothing.
    pub(crate) fn html(&self) -> Result<String, Failure> {
        let curve = self.inputs.metrics()?.map(|lines| Curve::read(&lines)).unwrap_or_default();
        let svg = curve.svg();
        let training = if svg.is_empty() {
            String::new()
        } else {
            format!("<section><h2>Training</h2>\n{svg}{CURVE_NOTE}</section>\n")
        };
        let name = escape(&self.plan.name);
        Ok(format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{name}: base and tuned</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n\
             {}{}{}{}{}{}</main>\n</body>\n</html>\n",
            include_str!("style.css"),
            self.header(),
            self.headline(),
            self.samples(),
            training,
            self.breakdowns(),
            self.record(),
        ))
    }

    fn header(&self) -> String {
        let failed: Vec<&Gate> = self.results.gates.iter().filter(|g| !g.passed()).collect();
        let n = self.results.gates.len();
        let verdict = match (n, failed.len()) {
            (0, _) => String::new(),
            (1, 0) => "<span class=\"pill good\">✓ the gate passed</span>".to_owned(),
            (_, 0) => format!("<span class=\"pill good\">✓ all {n} gates passed</span>"),
            (_, bad) => format!("<span class=\"pill bad\">✗ {bad} of {n} gates failed</span>"),
        };
        format!(
            "<header>\n<p class=\"over\">hone · evaluation</p>\n<h1>{}</h1>\n\
             <p class=\"lead\">{}</p>\n{verdict}\n</header>\n",
            escape(&self.plan.name),
            self.lead()
        )
    }

    /// What happened, in two sentences.
    fn lead(&self) -> String {
        let (base, tuned) = (&self.results.base, &self.results.tuned);
        let (asked, rates) = (base.asked.rates(), tuned.asked.rates());
        let mut lead = String::new();
        if rates.n > 0 {
            let _ = write!(
                lead,
                "Asked {} questions of the test split, the tuned model gives the reference answer \
                 to {} and stops by itself after {}; the base model gives it to {}.",
                count(rates.n),
                percent(rates.exact_match()),
                percent(rates.stop_rate()),
                percent(asked.exact_match()),
            );
        }
        if let Some(rise) = self.results.rise_percent() {
            let perplexity = |model: &Model| decimals(model.losses.plain().perplexity(), 3);
            let _ = write!(
                lead,
                " Its perplexity on plain text is {}, the base’s {} ({}).",
                perplexity(tuned),
                perplexity(base),
                signed_percent(rise),
            );
        }
        lead
    }

    fn headline(&self) -> String {
        let (base, tuned) = (&self.results.base, &self.results.tuned);
        let (a, b) = (base.asked.rates(), tuned.asked.rates());
        let bare = self.results.bare.rates();
        let mut rows = String::new();
        let mut shares = |name: &str, base: Option<f64>, tuned: Option<f64>, gates: &[&str]| {
            if base.is_some() || tuned.is_some() {
                rows.push_str(&row(name, (share(base), share(tuned)), &self.gates(gates)));
            }
        };
        let exact = format!("Exact match<small>{} questions</small>", count(b.n));
        shares(
            &exact,
            a.exact_match(),
            b.exact_match(),
            &["min_exact_match", "max_base_exact_match"],
        );
        let without = "Exact match, bare question<small>without chat markers</small>";
        shares(without, bare.exact_match(), None, &[]);
        let more = "Carries a question on with questions<small>bare questions, without chat markers</small>";
        shares(more, self.results.bare.question_share(), None, &[]);
        shares("Stops by itself", a.stop_rate(), b.stop_rate(), &["min_stop_rate"]);
        shares("Valid JSON", a.json_valid(), b.json_valid(), &["min_json_valid"]);
        shares("Fields right", a.field_accuracy(), b.field_accuracy(), &[]);
        rows.push_str(&self.numbers());
        format!(
            "<section><h2>Base and tuned</h2>\n<div class=\"wide\"><table>\n<thead><tr><th></th>\
             <th>base</th><th>tuned</th><th style=\"text-align:left\">gates</th></tr></thead>\n\
             <tbody>\n{rows}</tbody>\n</table></div></section>\n"
        )
    }

    /// The rows of losses and lengths.
    fn numbers(&self) -> String {
        let (base, tuned) = (&self.results.base, &self.results.tuned);
        let mut rows = String::new();
        let mut numbers =
            |name: &str, n: usize, of: &dyn Fn(&Model) -> Option<f64>, gates: &[&str]| {
                if of(base).is_some() || of(tuned).is_some() {
                    let cells = (decimals(of(base), n), decimals(of(tuned), n));
                    rows.push_str(&row(name, cells, &self.gates(gates)));
                }
            };
        let plain = tuned.losses.plain();
        let name = format!(
            "Perplexity of plain text<small>{} tokens of {} documents</small>",
            count(plain.n_tokens),
            count(plain.n_docs)
        );
        let rises = ["max_plain_perplexity_rise_percent", "min_plain_perplexity_rise_percent"];
        numbers(&name, 3, &|m| m.losses.plain().perplexity(), &rises);
        let total = tuned.losses.total;
        let name = format!(
            "Held-out loss<small>{} trained tokens of {} documents</small>",
            count(total.n_tokens),
            count(total.n_docs)
        );
        numbers(&name, 4, &|m| m.losses.total.mean(), &[]);
        numbers("New tokens of an answer", 1, &|m| m.asked.rates().mean_new_tokens(), &[]);
        rows
    }

    /// The gates of those names, each with its verdict.
    fn gates(&self, names: &[&str]) -> String {
        let gates = self.results.gates.iter().filter(|gate| names.contains(&gate.name));
        gates.map(gate).collect()
    }

    fn breakdowns(&self) -> String {
        let mut out = String::new();
        for field in &self.results.fields {
            out.push_str(&self.breakdown(field));
        }
        let sources = &self.results.tuned.losses.by_source;
        if sources.len() > 1 {
            let mut rows = String::new();
            for (name, tuned) in sources {
                let base = self.results.base.losses.by_source.get(name).copied();
                let base = base.unwrap_or_default();
                let cells = (decimals(base.perplexity(), 3), decimals(tuned.perplexity(), 3));
                rows.push_str(&part_row(name, tuned.n_tokens, cells));
            }
            out.push_str(&section("Perplexity by source", "trained tokens", &rows));
        }
        out
    }

    fn breakdown(&self, field: &Field) -> String {
        let mut rows = String::new();
        for (value, members) in &field.values {
            let rates = |model: &Model| model.asked.rates_of(members.iter().copied());
            let (base, tuned) = (rates(&self.results.base), rates(&self.results.tuned));
            let cells = (share(base.exact_match()), share(tuned.exact_match()));
            rows.push_str(&part_row(value, tuned.n, cells));
        }
        section(&format!("Exact match by {}", escape(&field.name)), "questions", &rows)
    }

    /// What was run: settings and hashes.
    fn record(&self) -> String {
        let mut facts = String::new();
        let mut fact = |name: &str, value: &str| {
            let _ = writeln!(facts, "<dt>{name}</dt><dd>{value}</dd>");
        };
        fact("pipeline", &format!("{}, seed {}", escape(&self.plan.name), self.plan.seed));
        fact("arithmetic", arithmetic(self.results.compute));
        let check = &self.inputs.tuned_manifest.report["check"];
        if let Some(diff) = check["exact"]["max_logit_diff"].as_f64() {
            let positions = check["n_positions"].as_u64().map_or_else(String::new, count);
            let text =
                format!("logits within {diff:.1e} of base and adapter at {positions} positions");
            fact("merge", &text);
        }
        let hash = |sha256: &str| format!("<code>{}</code>", escape(sha256));
        if let Some(sha256) = &self.results.template_sha256 {
            fact("chat template", &hash(sha256));
        }
        for input in &self.inputs.refs {
            fact(&escape(&input.role), &hash(&input.sha256.to_string()));
        }
        let mut settings = String::new();
        let mut config = |name: &str, value: &Value| {
            let text = serde_json::to_string_pretty(value).unwrap_or_default();
            let text = escape(&text);
            let _ = writeln!(
                settings,
                "<details><summary>settings of {name}</summary><pre>{text}</pre></details>"
            );
        };
        if let Some(train) = &self.inputs.train {
            config("train", &train.manifest().config);
        }
        config("merge", &self.inputs.tuned_manifest.config);
        config("eval", &serde_json::to_value(self.plan).unwrap_or_default());
        format!(
            "<section><h2>What was run</h2>\n<p class=\"soft\">Hashes are SHA-256 of what was read: \
             of an artefact’s manifest, of a model’s files.</p>\n<dl>\n{facts}</dl>\n{settings}</section>\n"
        )
    }
}

/// A row of a table of base and tuned; `name` and the cells are HTML.
fn row(name: &str, (base, tuned): (String, String), gates: &str) -> String {
    format!(
        "<tr><th scope=\"row\">{name}</th><td>{base}</td><td class=\"tuned\">{tuned}</td>\
         <td class=\"gate\">{gates}</td></tr>\n"
    )
}

/// A row of a breakdown: a part of the data, how large it is, and both models on it.
fn part_row(name: &str, n: u64, (base, tuned): (String, String)) -> String {
    format!(
        "<tr><th scope=\"row\">{}</th><td>{}</td><td>{base}</td><td class=\"tuned\">{tuned}</td>\
         </tr>\n",
        escape(name),
        count(n)
    )
}

/// A breakdown; `things` are what its parts are made of.
fn section(title: &str, things: &str, rows: &str) -> String {
    format!(
        "<section><h2>{title}</h2>\n<div class=\"wide\"><table>\n<thead><tr><th></th>\
         <th>{things}</th><th>base</th><th>tuned</th></tr></thead>\n<tbody>\n{rows}</tbody>\n\
         </table></div></section>\n"
    )
}

/// What models were computed with, in words.
fn arithmetic(compute: Compute) -> &'static str {
    match compute {
        Compute::F32 => "f32",
        Compute::Bf16 => "factors of products in bf16, sums in f32",
    }
}

/// A share as a number over a bar.
fn share(share: Option<f64>) -> String {
    let Some(value) = share else { return percent(None) };
    let width = 100.0 * value.clamp(0.0, 1.0);
    format!("{}<span class=\"bar\"><i style=\"width:{width:.1}%\"></i></span>", percent(share))
}

/// A gate in words: `≥ 95.0 % ✓`.
fn gate(gate: &Gate) -> String {
    let what = match (gate.name, gate.is_percent) {
        ("max_base_exact_match", _) => "base ",
        (_, true) => "rise ",
        _ => "",
    };
    let sign = if gate.is_floor { "≥" } else { "≤" };
    let form = |value: f64| {
        if gate.is_percent { format!("{value:.1} %") } else { percent(Some(value)) }
    };
    let (class, mark) = if gate.passed() { ("good", "✓ passed") } else { ("bad", "✗ failed") };
    let found = match gate.value {
        None => " (nothing to measure)".to_owned(),
        Some(value) if gate.is_percent => format!(" ({})", signed_percent(value)),
        Some(_) => String::new(),
    };
    format!("<span>{what}{sign} {} <b class=\"{class}\">{mark}</b>{found}</span>", form(gate.bar))
}
