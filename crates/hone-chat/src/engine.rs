//! The Jinja of chat templates: the environment that transformers sets up, on an engine that is
//! bounded.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};

use crate::date::Date;
use crate::source::GENERATION;
use crate::{filters, json, python};

/// Instructions that one rendering may take: a conversation of a thousand turns in the largest
/// known template takes a twentieth.
const FUEL: u64 = 5_000_000;

/// Most bytes of one rendering: a hundred times the longest context that is trained.
pub(crate) const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// Longest message of `raise_exception` that is kept, in characters.
const RAISED_CHARS_MAX: usize = 1000;

/// Name of the template in its environment; also what error messages of the engine call it.
pub(crate) const NAME: &str = "chat_template";

/// Names of the variables whose values a `generation` block writes around its body, when they are
/// set.
pub(crate) const MARKS: [&str; 2] = ["hone_generation_open", "hone_generation_close"];

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// An environment for one template.
pub(crate) fn environment(date: Option<Date>) -> Environment<'static> {
    let mut env = Environment::new();
    furnish(&mut env);
    if let Some(date) = date {
        env.add_function("strftime_now", move |form: &str| {
            date.format(form).map_err(|message| Error::new(ErrorKind::InvalidOperation, message))
        });
    }
    env
}

/// Gives an environment the dialect of transformers.
pub(crate) fn furnish(env: &mut Environment<'static>) {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("two flags leave the delimiters as they are");
    env.set_syntax(syntax);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(python::method);
    env.add_filter("tojson", json::tojson);
    env.add_filter("trim", python::trim);
    env.add_filter("replace", python::replace_filter);
    env.add_filter("indent", python::indent);
    env.add_filter("format", python::format);
    filters::furnish(env);
    env.add_test("iterable", python::is_iterable);
    env.add_function("raise_exception", raise);
    env.add_function(GENERATION, generation);
}

fn raise(message: Value) -> Result<Value, Error> {
    let mut message = message.to_string();
    if let Some((end, _)) = message.char_indices().nth(RAISED_CHARS_MAX) {
        message.truncate(end);
    }
    let error = Error::new(ErrorKind::InvalidOperation, "raise_exception");
    Err(error.with_source(Raised(message)))
}

/// A `generation` block: its body, between two marks when the caller of the template asked for
/// them.
fn generation(state: &mut State, kwargs: Kwargs) -> Result<Value, Error> {
    let body: Value = kwargs.get("caller")?;
    let body = body.call(state, &[])?;
    let mark = |name| state.lookup(name).filter(|mark| !mark.is_undefined());
    Ok(match (mark(MARKS[0]), mark(MARKS[1])) {
        (Some(open), Some(close)) => Value::from(format!("{open}{body}{close}")),
        _ => body,
    })
}
