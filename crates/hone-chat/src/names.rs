//! Control tokens where a template would write them as its own: in roles, types and keys.

use serde_json::{Map, Value};

use crate::template::{ChatTemplate, Given, TemplateError};
use crate::words::is_name;

impl ChatTemplate {
    /// Refuses control tokens in what the template takes for its own: roles, types, keys.
    pub(crate) fn check_names(
        &self,
        messages: &[&Map<String, Value>],
        given: &Given,
    ) -> Result<(), TemplateError> {
        for (at, message) in messages.iter().enumerate() {
            self.check_map(message, &at.to_string())?;
        }
        let check = |value: Option<&Value>, whose| {
            value.map_or(Ok(()), |value| self.check_value(value, whose))
        };
        check(given.tools, "of the tools")?;
        check(given.documents, "of the documents")?;
        // Texts of variables are for the template to compare, and so count as its own.
        for (name, variable) in given.variables.into_iter().flatten() {
            self.check_name(name, "variable", "of the variables")?;
            self.check_variable(variable)?;
        }
        Ok(())
    }

    fn check_map(&self, map: &Map<String, Value>, message: &str) -> Result<(), TemplateError> {
        for (key, value) in map {
            self.check_name(key, "key", message)?;
            match key.as_str() {
                "role" => self.check_kept(value, "role", message)?,
                "type" => self.check_kept(value, "type", message)?,
                _ if is_name(key, map) => self.check_kept(value, "required key", message)?,
                _ => self.check_value(value, message)?,
            }
        }
        Ok(())
    }

    /// What module `words` keeps of a value: its text, or the texts of a list.
    fn check_kept(
        &self,
        value: &Value,
        what: &'static str,
        message: &str,
    ) -> Result<(), TemplateError> {
        match value {
            Value::String(text) => self.check_name(text, what, message),
            Value::Array(items) => items.iter().try_for_each(|v| self.check_kept(v, what, message)),
            other => self.check_value(other, message),
        }
    }

    /// Every text and key of a variable.
    fn check_variable(&self, value: &Value) -> Result<(), TemplateError> {
        let whose = "of the variables";
        match value {
            Value::String(text) => self.check_name(text, "variable", whose),
            Value::Array(items) => items.iter().try_for_each(|v| self.check_variable(v)),
            Value::Object(map) => map.iter().try_for_each(|(key, value)| {
                self.check_name(key, "key", whose)?;
                self.check_variable(value)
            }),
            _ => Ok(()),
        }
    }

    fn check_value(&self, value: &Value, message: &str) -> Result<(), TemplateError> {
        match value {
            Value::Object(map) => self.check_map(map, message),
            Value::Array(items) => items.iter().try_for_each(|v| self.check_value(v, message)),
            _ => Ok(()),
        }
    }

    fn check_name(
        &self,
        name: &str,
        what: &'static str,
        message: &str,
    ) -> Result<(), TemplateError> {
        match self.control.find(name) {
            None => Ok(()),
            Some(token) => Err(TemplateError::Forged {
                message: message.to_owned(),
                what,
                found: name.to_owned(),
                token: token.to_owned(),
            }),
        }
    }
}
