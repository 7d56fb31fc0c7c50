//! The bars that scores must reach.

use serde_json::{Value, json};

use crate::args::EvalConfig;

/// What the gates look at; `None` where there was nothing to measure it on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Values {
    /// Of the tuned model.
    pub(crate) exact_match: Option<f64>,
    /// Of the tuned model.
    pub(crate) stop_rate: Option<f64>,
    /// Of the tuned model.
    pub(crate) json_valid: Option<f64>,
    /// Of the base model, the better of both ways of asking.
    pub(crate) base_exact_match: Option<f64>,
    /// From base to tuned.
    pub(crate) plain_perplexity_rise_percent: Option<f64>,
}

/// A bar, and what was found.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Gate {
    /// Its key in the `[eval]` table.
    pub(crate) name: &'static str,
    /// The bar.
    pub(crate) bar: f64,
    /// What was found; a gate without a value fails.
    pub(crate) value: Option<f64>,
    /// Whether the bar is a floor; else it is a ceiling.
    pub(crate) is_floor: bool,
    /// Whether values are percent; else they are shares.
    pub(crate) is_percent: bool,
}

impl Gate {
    /// Whether the value is on the right side of the bar; on it counts.
    pub(crate) fn passed(&self) -> bool {
        self.value.is_some_and(
            |value| {
                if self.is_floor { value >= self.bar } else { value <= self.bar }
            },
        )
    }

    /// For `results.json`.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "bar": self.bar,
            "value": self.value,
            "passed": self.passed(),
        })
    }
}

/// The gates that the configuration asks for.
pub(crate) fn gates(config: &EvalConfig, values: &Values) -> Vec<Gate> {
    let rise = values.plain_perplexity_rise_percent;
    let (max_rise, min_rise) =
        (config.max_plain_perplexity_rise_percent, config.min_plain_perplexity_rise_percent);
    [
        ("min_exact_match", config.min_exact_match, values.exact_match, false),
        ("min_stop_rate", config.min_stop_rate, values.stop_rate, false),
        ("min_json_valid", config.min_json_valid, values.json_valid, false),
        ("max_base_exact_match", config.max_base_exact_match, values.base_exact_match, false),
        ("max_plain_perplexity_rise_percent", max_rise, rise, true),
        ("min_plain_perplexity_rise_percent", min_rise, rise, true),
    ]
    .into_iter()
    .filter_map(|(name, bar, value, is_percent)| {
        let is_floor = name.starts_with("min_");
        Some(Gate { name, bar: bar?, value, is_floor, is_percent })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_met_by_standing_on_it_and_not_by_nothing() {
        let check = |value: Option<f64>, is_floor: bool, passed: bool| {
            let gate = Gate { name: "g", bar: 0.5, value, is_floor, is_percent: false };
            assert_eq!(gate.passed(), passed, "{gate:?}");
        };
        check(Some(0.5), true, true);
        check(Some(0.49), true, false);
        check(Some(0.5), false, true);
        check(Some(0.51), false, false);
        check(Some(f64::NAN), true, false);
        check(Some(f64::NAN), false, false);
        check(None, true, false);
        check(None, false, false);
    }

    #[test]
    fn only_gates_that_are_asked_for_exist() {
        let mut config = EvalConfig::default();
        assert_eq!(gates(&config, &Values::default()), []);
        config.max_plain_perplexity_rise_percent = Some(5.0);
        config.min_stop_rate = Some(0.9);
        let values = Values {
            stop_rate: Some(1.0),
            plain_perplexity_rise_percent: Some(6.0),
            ..Values::default()
        };
        let found: Vec<(&str, bool)> =
            gates(&config, &values).iter().map(|g| (g.name, g.passed())).collect();
        let expected = [("min_stop_rate", true), ("max_plain_perplexity_rise_percent", false)];
        assert_eq!(found, expected);
    }
}
