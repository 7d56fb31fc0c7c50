//! What is trained of a conversation: the policies that a pipeline chooses from, and how they are written there.

use std::fmt;

use hone_schema::{Kind, Part, Rendered, Share, Span};
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Role of the messages that are responses.
pub(crate) const RESPONSE: &str = "assistant";

/// What is trained of a row, beside what the row says itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Which messages.
    pub train_on: TrainOn,
    /// Which of the markers that end a response.
    pub stop: TrainOnStop,
    /// What a response thinks before it speaks.
    pub reasoning: Learn,
    /// Thoughts without a thought in them, such as `<think>\n\n</think>`.
    pub empty_thoughts: Learn,
}

/// Which messages are trained. A message of weight 0 never is; one that the row itself wants trained (`train: true`) always is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TrainOn {
    /// Every response.
    #[default]
    All,
    /// The last response of the row, whichever of its samples trains that.
    Last,
    /// What every role says; still no header.
    Every,
    /// What these roles say; of an empty list, only what the rows themselves want trained.
    Roles(Vec<String>),
}

/// Which stop markers are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOnStop {
    /// That of each trained response, with it.
    #[default]
    Turn,
    /// Every one that the template writes, also behind messages that are not trained, in rows with a response to know it by.
    All,
    /// That of the row's last trained response; of a row that became several samples, in the one that trains its last answer.
    Last,
    /// None.
    None,
}

/// Whether a part of a response is trained with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Learn {
    /// It is.
    #[default]
    Train,
    /// It is not.
    Mask,
}

impl TrainOn {
    /// The roles that are asked for by name.
    pub fn roles(&self) -> &[String] {
        match self {
            TrainOn::Roles(roles) => roles,
            _ => &[],
        }
    }

    /// Whether the policy takes the message that a span belongs to; `last` is the row's [`last_response`].
    pub(crate) fn takes(&self, row: &Rendered, span: &Span, last: Option<u32>) -> bool {
        if row.kind == Kind::Text {
            return span.part != Part::Scaffold;
        }
        let Some(message) = span.message else { return false };
        span.chosen
            || match self {
                TrainOn::All => span.role == RESPONSE,
                TrainOn::Last => {
                    row.share == Share::Main && Some(message) == last && span.role == RESPONSE
                }
                TrainOn::Every => true,
                TrainOn::Roles(roles) => roles.contains(&span.role),
            }
    }
}

/// The last message that is a response.
pub(crate) fn last_response(row: &Rendered) -> Option<u32> {
    let responses = row.spans.iter().filter(|span| span.role == RESPONSE);
    responses.filter_map(|span| span.message).max()
}

impl fmt::Display for TrainOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrainOn::All => f.write_str("\"all\""),
            TrainOn::Last => f.write_str("\"last\""),
            TrainOn::Every => f.write_str("\"every\""),
            TrainOn::Roles(roles) => write!(f, "{roles:?}"),
        }
    }
}

impl Serialize for TrainOn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            TrainOn::All => serializer.serialize_str("all"),
            TrainOn::Last => serializer.serialize_str("last"),
            TrainOn::Every => serializer.serialize_str("every"),
            TrainOn::Roles(roles) => roles.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TrainOn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TrainOnVisitor)
    }
}

struct TrainOnVisitor;

impl<'de> Visitor<'de> for TrainOnVisitor {
    type Value = TrainOn;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`all`, `last`, `every`, or a list of roles such as [\"assistant\", \"tool\"]")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<TrainOn, E> {
        match name {
            // The name that other tools' users know.
            "all" | "assistant" => Ok(TrainOn::All),
            "last" => Ok(TrainOn::Last),
            "every" => Ok(TrainOn::Every),
            other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<TrainOn, A::Error> {
        let mut roles: Vec<String> = Vec::new();
        while let Some(role) = seq.next_element::<String>()? {
            if role.is_empty() {
                return Err(de::Error::custom("a role has no name"));
            }
            if !roles.contains(&role) {
                roles.push(role);
            }
        }
        match roles.as_slice() {
            [role] if role == RESPONSE => Ok(TrainOn::All),
            _ => Ok(TrainOn::Roles(roles)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(toml: &str, expect: Result<TrainOn, &str>) {
        let json = serde_json::from_str::<TrainOn>(toml);
        match (json, expect) {
            (Ok(found), Ok(expect)) => assert_eq!(found, expect),
            (Err(e), Err(part)) => assert!(e.to_string().contains(part), "{e}"),
            (found, expect) => panic!("{toml}: {found:?}, not {expect:?}"),
        }
    }

    #[test]
    fn policies_are_read_and_written() {
        check(r#""all""#, Ok(TrainOn::All));
        check(r#""assistant""#, Ok(TrainOn::All));
        check(r#"["assistant"]"#, Ok(TrainOn::All));
        check(r#""last""#, Ok(TrainOn::Last));
        check(r#""every""#, Ok(TrainOn::Every));
        let roles = TrainOn::Roles(vec!["assistant".into(), "tool".into()]);
        check(r#"["assistant", "tool", "tool"]"#, Ok(roles.clone()));
        check(
            r#""tool""#,
            Err("expected `all`, `last`, `every`, or a list of roles such as [\"assistant\","),
        );
        check("[]", Ok(TrainOn::Roles(Vec::new())));
        check(r#"["user", ""]"#, Err("a role has no name"));
        check("3", Err("invalid type: integer `3`, expected `all`, `last`"));
        for policy in [TrainOn::All, TrainOn::Last, TrainOn::Every, roles] {
            let json = serde_json::to_string(&policy).expect("a policy is plain data");
            check(&json, Ok(policy));
        }
    }
}
