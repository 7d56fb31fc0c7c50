//! What can be wrong with a model, an adapter or a batch.

/// Why a model, an adapter or a batch was refused. Every message names the thing and what to do
/// about it.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A configuration file is not JSON, or a key has the wrong type.
    #[error("{file}: {reason}")]
    Config {
        /// `config.json` or `adapter_config.json`.
        file: &'static str,
        /// What is wrong, and with which key.
        reason: String,
    },
    /// A key of a configuration asks for something that this decoder does not compute.
    #[error("{file}: `{key}` = {value} is not supported: {reason}")]
    Unsupported {
        /// `config.json` or `adapter_config.json`.
        file: &'static str,
        /// The key.
        key: String,
        /// Its value, as JSON.
        value: String,
        /// What is supported instead.
        reason: String,
    },
    /// A safetensors file is malformed.
    #[error("not a valid safetensors file: {0}")]
    Format(String),
    /// Tensors that the configuration asks for are not there, or there are others.
    #[error("the weights do not fit the configuration: {}", names(.missing, .unexpected))]
    Names {
        /// Expected and absent.
        missing: Vec<String>,
        /// Present and unknown.
        unexpected: Vec<String>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor `{name}` has shape {found:?}, the configuration says {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor holds NaN or infinity.
    #[error("tensor `{name}` holds a value that is not finite at index {index}")]
    NotFinite {
        /// The tensor.
        name: String,
        /// Flat index of the first such value.
        index: usize,
    },
    /// A tensor was asked for that the source does not have.
    #[error("there is no tensor named `{0}`")]
    NoTensor(String),
    /// A batch breaks its own rules or the model's limits.
    #[error("bad batch: {0}")]
    Batch(String),
    /// An adapter does not fit the model.
    #[error("the adapter does not fit the model: {0}")]
    Adapter(String),
    /// Settings of a generation that make no sense.
    #[error("bad generation settings: {0}")]
    Generation(String),
    /// Writing failed.
    #[error("writing tensors: {0}")]
    Write(#[from] std::io::Error),
    /// Of tensors that lie in one buffer some were to be frozen.
    #[error(
        "`{frozen}` cannot be frozen without `{trained}`: both read the same input, as one map"
    )]
    Freeze {
        /// One that was.
        frozen: String,
        /// One that was not.
        trained: String,
    },
}

/// How many names of each kind a message lists.
const NAMES_SHOWN_MAX: usize = 8;

fn names(missing: &[String], unexpected: &[String]) -> String {
    let list = |what: &str, names: &[String]| {
        let shown = names.iter().take(NAMES_SHOWN_MAX).cloned().collect::<Vec<_>>().join(", ");
        let rest = names.len().saturating_sub(NAMES_SHOWN_MAX);
        let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
        format!("{what} {shown}{rest}")
    };
    let mut parts = Vec::new();
    if !missing.is_empty() {
        parts.push(list("missing", missing));
    }
    if !unexpected.is_empty() {
        parts.push(list("unexpected", unexpected));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_of_names_are_cut() {
        let missing = (0..10).map(|i| format!("t{i}")).collect();
        let error = ModelError::Names { missing, unexpected: vec!["x".into()] };
        assert_eq!(
            error.to_string(),
            "the weights do not fit the configuration: missing t0, t1, t2, t3, t4, t5, t6, t7 \
             and 2 more; unexpected x"
        );
    }
}
