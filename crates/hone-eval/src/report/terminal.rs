//! The table on stderr, from `results.json`.

use serde_json::Value;

use crate::report::html::{decimals, percent};

/// Measures of both models: a name, its key, whether it is a share.
const MEASURES: [(&str, &str, bool); 7] = [
    ("exact match", "exact_match", true),
    ("stops by itself", "stop_rate", true),
    ("valid JSON", "json_valid", true),
    ("fields right", "field_accuracy", true),
    ("held-out loss", "test_loss", false),
    ("held-out perplexity", "test_perplexity", false),
    ("plain perplexity", "plain_perplexity", false),
];

/// Names of the gates that failed.
pub(crate) fn failed_gates(results: &Value) -> Vec<String> {
    let gates = results["gates"].as_array().map(Vec::as_slice).unwrap_or_default();
    let failed = gates.iter().filter(|gate| gate["passed"] != true);
    failed.filter_map(|gate| gate["name"].as_str().map(str::to_owned)).collect()
}

/// The table, as lines.
pub(crate) fn table(results: &Value) -> String {
    let mut lines = vec![format!("{:<40}{:>10}{:>10}", "", "base", "tuned")];
    for (name, key, is_share) in MEASURES {
        let of = |model: &str| results[model][key].as_f64();
        if of("base").is_none() && of("tuned").is_none() {
            continue;
        }
        let form = |value| if is_share { percent(value) } else { decimals(value, 4) };
        lines.push(format!("{name:<40}{:>10}{:>10}", form(of("base")), form(of("tuned"))));
    }
    if let Some(bare) = results["base_bare"]["exact_match"].as_f64() {
        let name = "exact match without chat markers";
        lines.push(format!("{name:<40}{:>10}{:>10}", percent(Some(bare)), ""));
    }
    let gates = results["gates"].as_array().map(Vec::as_slice).unwrap_or_default();
    for gate in gates {
        let name = gate["name"].as_str().unwrap_or_default();
        let is_percent = name.ends_with("_percent");
        let form = |key: &str| {
            let value = gate[key].as_f64();
            if is_percent { decimals(value, 1) + " %" } else { percent(value) }
        };
        let verdict = if gate["passed"] == true { "passed" } else { "FAILED" };
        let side = if name.starts_with("min_") { "at least" } else { "at most" };
        let (name, bar) = (format!("gate {name}"), form("bar"));
        lines.push(format!("{name:<40}{:>20}  {side} {bar}: {verdict}", form("value")));
    }
    lines.iter().map(|line| format!("  {}", line.trim_end())).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_table_holds_what_was_measured() {
        let results = json!({
            "base": {"exact_match": 0.0, "plain_perplexity": 3.2},
            "tuned": {"exact_match": 0.974, "plain_perplexity": 3.25},
            "base_bare": {"exact_match": 0.01},
            "gates": [
                {"name": "min_exact_match", "bar": 0.95, "value": 0.974, "passed": true},
                {"name": "min_stop_rate", "bar": 0.98, "value": null, "passed": false},
            ],
        });
        let expected = [
            "                                                base     tuned",
            "  exact match                                  0.0 %    97.4 %",
            "  plain perplexity                            3.2000    3.2500",
            "  exact match without chat markers             1.0 %",
            "  gate min_exact_match                                  97.4 %  at least 95.0 %: passed",
            "  gate min_stop_rate                                         –  at least 98.0 %: FAILED",
        ];
        assert_eq!(table(&results).lines().collect::<Vec<_>>(), expected);
        assert_eq!(failed_gates(&results), ["min_stop_rate"]);
    }
}
