//! The templates that hone brings along.

/// Names and sources of the built-in templates, in the order of the names.
///
/// They are for models that have no template of their own, in the formats that their families were
/// tuned with, each in hone's own words and without tools. In all of them what a conversation
/// renders to so far is the beginning of what it renders to later, and every answer has an end:
/// without it a model would never learn to stop. Where that is `eos_token`, it has to be there.
pub const BUILTINS: [(&str, &str); 14] = [
    ("alpaca", include_str!("../templates/alpaca.jinja")),
    ("chatml", include_str!("../templates/chatml.jinja")),
    ("command", include_str!("../templates/command.jinja")),
    ("deepseek", include_str!("../templates/deepseek.jinja")),
    ("gemma", include_str!("../templates/gemma.jinja")),
    ("llama2", include_str!("../templates/llama2.jinja")),
    ("llama3", include_str!("../templates/llama3.jinja")),
    ("mistral", include_str!("../templates/mistral.jinja")),
    ("phi3", include_str!("../templates/phi3.jinja")),
    ("phi4", include_str!("../templates/phi4.jinja")),
    ("plain", include_str!("../templates/plain.jinja")),
    ("tulu", include_str!("../templates/tulu.jinja")),
    ("vicuna", include_str!("../templates/vicuna.jinja")),
    ("zephyr", include_str!("../templates/zephyr.jinja")),
];

/// The source of the built-in template of that name.
pub fn builtin(name: &str) -> Option<&'static str> {
    BUILTINS.iter().find(|(known, _)| *known == name).map(|(_, source)| *source)
}
