//! Control tokens where a template would write them as its own: in roles, types and keys.

use serde_json::{Map, Value};

use crate::template::{ChatTemplate, Given, TemplateError};

impl ChatTemplate {
    /// Refuses control tokens in what the template takes for its own: roles, types, keys.
    pub(crate) fn check_names(
        &self,
        messages: &[Map<String, Value>],
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
            self.check_name(&variable.to_string(), "variable", "of the variables")?;
            self.check_value(variable, "of the variables")?;
        }
        Ok(())
    }

    fn check_map(&self, map: &Map<String, Value>, message: &str) -> Result<(), TemplateError> {
        for (key, value) in map {
            self.check_name(key, "key", message)?;
            match (key.as_str(), value.as_str()) {
                ("role", Some(role)) => self.check_name(role, "role", message)?,
                ("type", Some(kind)) => self.check_name(kind, "type", message)?,
                _ => self.check_value(value, message)?,
            }
        }
        Ok(())
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
        match self.control_token_in(name) {
            None => Ok(()),
            Some(token) => Err(TemplateError::Forged {
                message: message.to_owned(),
                what,
                found: name.to_owned(),
                token: token.to_owned(),
            }),
        }
    }

    /// A control token that a text holds.
    pub(crate) fn control_token_in(&self, text: &str) -> Option<&str> {
        let tokens = self.dialect.added_tokens.iter().chain(self.dialect.tokens.values());
        tokens.map(String::as_str).find(|token| !token.is_empty() && text.contains(*token))
    }
}
