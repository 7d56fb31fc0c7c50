//! What a template sees: an object that answers by name, so that nothing is copied for a rendering
//! but what is its own.

use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Enumerator, Object, Serde};
use serde_json::Map;

use crate::engine::MARKS;
use crate::template::{Dialect, Given};

/// What is the same in every rendering: tokens, and the dialect's variables, which go before them.
#[derive(Debug)]
pub(crate) struct Fixed(Vec<(String, Value)>);

impl Fixed {
    pub(crate) fn new(dialect: &Dialect) -> Self {
        let variables =
            dialect.variables.iter().map(|(name, v)| (name.clone(), Value::from(Serde(v))));
        let tokens = dialect.tokens.iter();
        let tokens = tokens.map(|(name, token)| (name.clone(), Value::from(token.as_str())));
        Fixed(variables.chain(tokens).collect())
    }
}

/// One rendering.
#[derive(Debug)]
pub(crate) struct Context {
    fixed: Arc<Fixed>,
    /// Variables of the row's own.
    own: Vec<(String, Value)>,
    messages: Value,
    tools: Value,
    /// What the row gives, `none` where it gives none.
    documents: Option<Value>,
    add_generation_prompt: bool,
    /// What stands around generation blocks.
    marks: Option<[Value; 2]>,
}

impl Context {
    pub(crate) fn new(
        fixed: &Arc<Fixed>,
        messages: Vec<Value>,
        given: &Given,
        add_generation_prompt: bool,
        marks: Option<[char; 2]>,
    ) -> Self {
        let value = |value: &serde_json::Value| Value::from(Serde(value));
        let own = |map: &Map<String, serde_json::Value>| {
            map.iter().map(|(name, v)| (name.clone(), value(v))).collect()
        };
        Context {
            fixed: Arc::clone(fixed),
            own: given.variables.map(own).unwrap_or_default(),
            messages: Value::from(messages),
            tools: given.tools.map_or(Value::from(()), value),
            documents: given.documents.map(value),
            add_generation_prompt,
            marks: marks.map(|marks| marks.map(|mark| Value::from(mark.to_string()))),
        }
    }

    fn named(&self, name: &str) -> Option<Value> {
        let listed = |list: &[(String, Value)]| {
            list.iter().find(|(own, _)| own == name).map(|(_, value)| value.clone())
        };
        match name {
            "messages" => return Some(self.messages.clone()),
            "tools" => return Some(self.tools.clone()),
            "documents" if self.documents.is_some() => return self.documents.clone(),
            "add_generation_prompt" => return Some(Value::from(self.add_generation_prompt)),
            _ => {}
        }
        if let Some(marks) = &self.marks
            && let Some(at) = MARKS.iter().position(|mark| *mark == name)
        {
            return Some(marks[at].clone());
        }
        let none = || (name == "documents").then(|| Value::from(()));
        listed(&self.own).or_else(|| listed(&self.fixed.0)).or_else(none)
    }
}

impl Object for Context {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.named(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.named(key)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::NonEnumerable
    }
}
