//! The templates that hone brings along.

/// Names and sources of the built-in templates.
///
/// `plain` and `alpaca` end each answer with `eos_token`: without it a model would never learn to
/// stop.
pub const BUILTINS: [(&str, &str); 5] = [
    ("alpaca", include_str!("../templates/alpaca.jinja")),
    ("chatml", include_str!("../templates/chatml.jinja")),
    ("llama2", include_str!("../templates/llama2.jinja")),
    ("llama3", include_str!("../templates/llama3.jinja")),
    ("plain", include_str!("../templates/plain.jinja")),
];

/// The source of the built-in template of that name.
pub fn builtin(name: &str) -> Option<&'static str> {
    BUILTINS.iter().find(|(known, _)| *known == name).map(|(_, source)| *source)
}
