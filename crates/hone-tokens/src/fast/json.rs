//! The parts of a `tokenizer.json` that the encoder compiles, read in one pass and without copies where JSON allows it.
//!
//! Whatever is out of the ordinary here (a key twice, a model of another kind, a merge with three parts) is an error, and the
//! file goes to the tokenizers crate, which has the last word on what it means.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// A `tokenizer.json`.
#[derive(Deserialize)]
pub(crate) struct Document<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    version: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    truncation: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    padding: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    added_tokens: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    pub(crate) normalizer: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    pub(crate) pre_tokenizer: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    post_processor: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    decoder: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) model: Model<'a>,
}

/// A part that is there, be it `null`.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<&'de RawValue>, D::Error> {
    Deserialize::deserialize(from).map(Some)
}

impl Document<'_> {
    /// What the document says of its added tokens.
    pub(crate) fn added_tokens<T: serde::de::DeserializeOwned>(
        &self,
    ) -> serde_json::Result<Vec<T>> {
        self.added_tokens.map_or(Ok(Vec::new()), |part| serde_json::from_str(part.get()))
    }

    /// The document with a model that knows only `tokens`: everything but the model is read by the tokenizers crate from it.
    pub(crate) fn shell(&self, tokens: serde_json::Map<String, serde_json::Value>) -> String {
        let vocab = serde_json::Value::Object(tokens);
        let mut json = format!(r#"{{"model":{{"type":"BPE","vocab":{vocab},"merges":[]}}"#);
        let parts = [
            ("version", self.version),
            ("truncation", self.truncation),
            ("padding", self.padding),
            ("added_tokens", self.added_tokens),
            ("normalizer", self.normalizer),
            ("pre_tokenizer", self.pre_tokenizer),
            ("post_processor", self.post_processor),
            ("decoder", self.decoder),
        ];
        for (name, part) in parts.into_iter().filter_map(|(name, part)| Some((name, part?))) {
            json.push_str(&format!(r#","{name}":{}"#, part.get()));
        }
        json.push('}');
        json
    }
}

/// The model of a `tokenizer.json`, if it is a BPE.
#[derive(Deserialize)]
pub(crate) struct Model<'a> {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) dropout: Option<f32>,
    #[serde(default)]
    pub(crate) unk_token: Option<String>,
    #[serde(default)]
    pub(crate) continuing_subword_prefix: Option<String>,
    #[serde(default)]
    pub(crate) end_of_word_suffix: Option<String>,
    #[serde(default)]
    pub(crate) fuse_unk: Option<bool>,
    #[serde(default)]
    pub(crate) byte_fallback: Option<bool>,
    #[serde(default)]
    pub(crate) ignore_merges: Option<bool>,
    #[serde(borrow)]
    pub(crate) vocab: Entries<'a>,
    #[serde(borrow)]
    pub(crate) merges: Merges<'a>,
}

/// The vocabulary's entries in their order.
pub(crate) struct Entries<'a>(pub(crate) Vec<(Cow<'a, str>, u32)>);

/// The two parts of each merge, the first merge first.
pub(crate) struct Merges<'a>(pub(crate) Vec<(Cow<'a, str>, Cow<'a, str>)>);

/// A string, borrowed from the document unless it holds an escape.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        from.deserialize_str(Reader)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Entries<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("tokens with their ids")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some((Text(token), id)) = map.next_entry()? {
                    entries.push((token, id));
                }
                Ok(Entries(entries))
            }
        }
        from.deserialize_map(Reader)
    }
}

/// One merge: `["a", "b"]`, or `"a b"` in older files.
struct Merge<'a>(Cow<'a, str>, Cow<'a, str>);

impl<'de> Deserialize<'de> for Merge<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Merge<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("two tokens")
            }
            fn visit_borrowed_str<E: Error>(self, line: &'de str) -> Result<Self::Value, E> {
                let (left, right) = halves(line).ok_or_else(|| E::custom("not two tokens"))?;
                Ok(Merge(Cow::Borrowed(left), Cow::Borrowed(right)))
            }
            fn visit_str<E: Error>(self, line: &str) -> Result<Self::Value, E> {
                let (left, right) = halves(line).ok_or_else(|| E::custom("not two tokens"))?;
                Ok(Merge(Cow::Owned(left.to_owned()), Cow::Owned(right.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut next =
                    || seq.next_element::<Text>()?.ok_or_else(|| A::Error::custom("one token"));
                let (Text(left), Text(right)) = (next()?, next()?);
                match seq.next_element::<Text>()? {
                    None => Ok(Merge(left, right)),
                    Some(_) => Err(A::Error::custom("three tokens")),
                }
            }
        }
        from.deserialize_any(Reader)
    }
}

/// A `#version` line would shift the ranks; no file in JSON has one, and with one the crate decides.
fn halves(line: &str) -> Option<(&str, &str)> {
    let (left, right) = line.split_once(' ')?;
    (!right.contains(' ') && !line.starts_with("#version")).then_some((left, right))
}

impl<'de: 'a, 'a> Deserialize<'de> for Merges<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Merges<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("merges")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut merges = Vec::new();
                while let Some(Merge(left, right)) = seq.next_element()? {
                    merges.push((left, right));
                }
                Ok(Merges(merges))
            }
        }
        from.deserialize_seq(Reader)
    }
}
