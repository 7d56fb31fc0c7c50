//! A compiled template: rendering, and what can go wrong with it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use hone_schema::{Message, Span};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use crate::context::{Context, Fixed};
use crate::date::Date;
use crate::engine::{self, NAME, OUTPUT_BYTES_MAX, Raised};
use crate::forged::Control;
use crate::source;
use crate::symbols;
use crate::thoughts::under_all_names;
use crate::turns::Turns;

/// Longest template that is read: twenty times the longest known.
pub const SOURCE_BYTES_MAX: usize = 1 << 20;

/// What a template is rendered with, beside the conversation.
#[derive(Clone, Debug, Default)]
pub struct Dialect {
    /// `bos_token`, `eos_token` and so on, by these names; a name that is not here is undefined in
    /// the template.
    pub tokens: BTreeMap<String, String>,
    /// Texts of all tokens that the tokenizer knows as wholes (its added tokens), in any order.
    pub added_tokens: Vec<String>,
    /// What `strftime_now` formats; without it that function is undefined, and most templates have
    /// a date of their own then.
    pub date: Option<Date>,
    /// Further variables, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

/// What a row gives the template beside its messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct Given<'a> {
    /// The tools that may be called: a list.
    pub tools: Option<&'a Value>,
    /// The documents to answer from: a list.
    pub documents: Option<&'a Value>,
    /// Variables of the row's own; of those of one name they go before the dialect's.
    pub variables: Option<&'a Map<String, Value>>,
}

impl<'a> Given<'a> {
    /// Tools and nothing else.
    pub fn tools(tools: Option<&'a Value>) -> Self {
        Given { tools, ..Given::default() }
    }
}

/// Why something was not rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template itself is not valid.
    #[error("chat template, line {line}: {message}")]
    Source {
        /// Line in the template, from 1; 0 when the engine does not know.
        line: usize,
        /// What the engine says.
        message: String,
    },
    /// The template called `raise_exception`.
    #[error("the chat template refuses this conversation: {0}")]
    Raised(String),
    /// The template failed on this conversation.
    #[error("chat template, line {line}: {message}")]
    Failed {
        /// Line in the template, from 1; 0 when the engine does not know.
        line: usize,
        /// What the engine says.
        message: String,
    },
    /// The template took too long, or wrote too much.
    #[error("the chat template goes beyond its limit of {0}")]
    Limit(&'static str),
    /// The template leaves out of an answer, once others follow, what it writes when it is the
    /// last; or it moves behind it what stands before it then.
    #[error(
        "the chat template rewrites message {message} once others follow: \
         in the whole conversation it renders {whole:?}, as served {served:?}"
    )]
    Rewritten {
        /// Index of the message.
        message: usize,
        /// The text around the first difference, of the whole conversation.
        whole: String,
        /// The same of the conversation up to that message.
        served: String,
    },
    /// Nothing of what a trained answer says is in the text.
    #[error(
        "the chat template writes nothing of what message {message} says \
         (some take contents in parts only, and some know no thoughts)"
    )]
    Unsaid {
        /// Index of the message.
        message: usize,
    },
    /// A role, a key or a type holds a control token: the template would write it as if it were its
    /// own.
    #[error("message {message}: {what} `{found}` holds the control token `{token}`")]
    Forged {
        /// Index of the message, or of what else is given: `of the tools`.
        message: String,
        /// `role`, `key`, `type` or `variable`.
        what: &'static str,
        /// Its text.
        found: String,
        /// The token.
        token: String,
    },
    /// It is not known for each byte who wrote it.
    #[error(
        "cannot tell what the chat template wrote from what the messages say: {why}; \
         with the messages as they are it renders {plain:?}, with their words marked {marked:?}"
    )]
    Provenance {
        /// What did not work.
        why: &'static str,
        /// The text around the first difference.
        plain: String,
        /// The same of the marked text.
        marked: String,
    },
}

impl TemplateError {
    /// A short name for the ledger.
    pub fn reason(&self) -> &'static str {
        match self {
            TemplateError::Source { .. } | TemplateError::Failed { .. } => "template failed",
            TemplateError::Raised(_) => "refused by the template",
            TemplateError::Limit(_) => "template limit",
            TemplateError::Rewritten { .. } => "history rewritten",
            TemplateError::Unsaid { .. } => "answer left out by the template",
            TemplateError::Forged { .. } => "forged control token",
            TemplateError::Provenance { .. } => "provenance unknown",
        }
    }
}

/// A conversation as a text of which each byte is accounted for.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    /// What the template renders (and, where [`ChatTemplate::appends_eos`], the end-of-text token
    /// behind the last answer).
    pub text: String,
    /// Cover the text from its first byte to its last.
    pub spans: Vec<Span>,
    /// Length of what a served model is given, when the last message is an answer and that is how
    /// the text begins.
    pub prompt_len: Option<u32>,
    /// What a report should count: `no stop marker`, `prompt is not a prefix`, `end-of-text token
    /// appended`.
    pub notes: Vec<&'static str>,
}

/// A chat template, compiled. It may be used from any number of threads at once.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    pub(crate) dialect: Dialect,
    pub(crate) literals: Vec<String>,
    /// Names of attributes and literals of the template: what it looks up.
    pub(crate) own_names: HashSet<String>,
    pub(crate) control: Control,
    fixed: Arc<Fixed>,
    pub(crate) has_generation: bool,
    pub(crate) reserved: HashSet<char>,
    pub(crate) turns: Turns,
}

impl ChatTemplate {
    /// Compiles a template, and renders small conversations with it to learn how it begins and ends
    /// an answer.
    ///
    /// # Errors
    /// [`TemplateError::Source`]; [`TemplateError::Limit`] when even the small conversations are too
    /// much.
    pub fn new(template: &str, dialect: Dialect) -> Result<Self, TemplateError> {
        if template.len() > SOURCE_BYTES_MAX {
            let message = format!("longer than {SOURCE_BYTES_MAX} bytes");
            return Err(TemplateError::Source { line: 0, message });
        }
        let scanned = source::scan(template);
        let mut env = engine::environment(dialect.date);
        env.add_template_owned(NAME, scanned.source).map_err(|e| TemplateError::Source {
            line: e.line().unwrap_or(0),
            message: describe(&e),
        })?;
        let mut reserved = HashSet::new();
        symbols::private_use(template, &mut reserved);
        for token in dialect.tokens.values().chain(&dialect.added_tokens) {
            symbols::private_use(token, &mut reserved);
        }
        symbols::private_use(&Value::Object(dialect.variables.clone()).to_string(), &mut reserved);
        let control = Control::new(dialect.added_tokens.iter().chain(dialect.tokens.values()))?;
        let fixed = Arc::new(Fixed::new(&dialect));
        let mut chat = ChatTemplate {
            env,
            dialect,
            literals: scanned.literals.clone(),
            has_generation: scanned.has_generation,
            own_names: scanned.attributes.into_iter().chain(scanned.literals).collect(),
            control,
            fixed,
            reserved,
            turns: Turns::default(),
        };
        chat.turns = Turns::learn(&chat)?;
        // A token of the frame in a message stays a word to be found, whatever the template looks
        // for.
        let frame = &chat.turns.frame;
        chat.literals.retain(|literal| !frame.iter().any(|token| literal.contains(token.as_str())));
        Ok(chat)
    }

    /// Renders a conversation as `apply_chat_template` of transformers does.
    ///
    /// # Errors
    /// What the template refuses or fails on, and its limits.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        self.render_with(messages, &Given::tools(tools), add_generation_prompt)
    }

    /// The same with all that a row may give.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(
        &self,
        messages: &[Message],
        given: &Given,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let messages = messages.iter().map(|message| Cow::Borrowed(&message.value));
        self.render_values(values(messages), given, add_generation_prompt, None)
    }

    /// Texts that end an answer, the longest first; what generation stops at.
    pub fn stops(&self) -> &[String] {
        &self.turns.stops
    }

    /// Whether [`ChatTemplate::locate`] puts the end-of-text token behind the last answer, because
    /// the template ends it with nothing.
    pub fn appends_eos(&self) -> bool {
        self.turns.appends_eos
    }

    /// What the template writes to make a model answer, when that is the same for every
    /// conversation.
    pub fn generation_prompt(&self) -> Option<&str> {
        self.turns.header.as_deref()
    }

    /// The special token of that name, such as `eos_token`.
    pub fn token(&self, name: &str) -> Option<&str> {
        self.dialect.tokens.get(name).map(String::as_str)
    }

    /// Renders messages that are already values of the engine ([`values`]).
    pub(crate) fn render_values(
        &self,
        messages: Vec<minijinja::Value>,
        given: &Given,
        add_generation_prompt: bool,
        marks: Option<[char; 2]>,
    ) -> Result<String, TemplateError> {
        let fixed = &self.fixed;
        let context = Context::new(fixed, messages, given, add_generation_prompt, marks);
        let template = self.env.get_template(NAME).map_err(failure)?;
        let mut out = Bounded::default();
        match template.render_captured_to(minijinja::Value::from_object(context), &mut out) {
            Ok(_) => {}
            Err(_) if out.is_full => return Err(TemplateError::Limit("output bytes")),
            Err(e) => return Err(failure(e)),
        }
        String::from_utf8(out.bytes)
            .map_err(|e| TemplateError::Failed { line: 0, message: e.to_string() })
    }
}

/// Messages as values of the engine, with thoughts under all their names.
pub(crate) fn values<'a>(
    messages: impl Iterator<Item = Cow<'a, Map<String, Value>>>,
) -> Vec<minijinja::Value> {
    messages
        .map(|m| minijinja::Value::from(minijinja::value::Serde(&*under_all_names(m))))
        .collect()
}

/// Takes bytes up to the limit.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    is_full: bool,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > OUTPUT_BYTES_MAX - self.bytes.len() {
            self.is_full = true;
            return Err(std::io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An error of the engine as one of ours.
fn failure(error: minijinja::Error) -> TemplateError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref::<Raised>() {
            return TemplateError::Raised(message.clone());
        }
        source = cause.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::Limit("instructions");
    }
    TemplateError::Failed { line: error.line().unwrap_or(0), message: describe(&error) }
}

fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
