//! Filters that take their arguments, or give their results, otherwise in Jinja2 than in the
//! engine.

use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

use crate::source::EACH;

/// Filters that are generators in Jinja2: what they give is true even when it is empty, and has no
/// length.
const GENERATORS: [(&str, &str); 9] = [
    ("batch", "hone_batch"),
    ("items", "hone_items"),
    ("map", "hone_map"),
    ("reject", "hone_reject"),
    ("rejectattr", "hone_rejectattr"),
    ("select", "hone_select"),
    ("selectattr", "hone_selectattr"),
    ("slice", "hone_slice"),
    ("unique", "hone_unique"),
];

/// Puts them into an environment.
pub(crate) fn furnish(env: &mut Environment<'static>) {
    env.add_filter("hone_batch", filters::batch);
    env.add_filter("hone_items", filters::items);
    env.add_filter("hone_map", filters::map);
    env.add_filter("hone_reject", filters::reject);
    env.add_filter("hone_rejectattr", filters::rejectattr);
    env.add_filter("hone_select", filters::select);
    env.add_filter("hone_selectattr", filters::selectattr);
    env.add_filter("hone_slice", filters::slice);
    env.add_filter("hone_unique", filters::unique);
    for (name, own) in GENERATORS {
        env.add_filter(name, move |state: &mut State, args: Rest<Value>, kwargs: Kwargs| {
            generate(state, own, &args, kwargs)
        });
    }
    for name in ["length", "count"] {
        env.add_filter(name, length);
    }
    for name in ["default", "d"] {
        env.add_filter(name, default);
    }
    env.add_filter("int", int);
    env.add_filter("float", float);
    env.add_filter("sort", sort);
    env.add_test("callable", is_callable);
    env.add_function(EACH, each);
}

/// What a generator gives.
#[derive(Debug)]
struct Generated(Vec<Value>);

impl Object for Generated {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.clone())
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}

fn generate(
    state: &mut State,
    filter: &str,
    args: &[Value],
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let mut args = args.to_vec();
    if kwargs.args().next().is_some() {
        args.push(Value::from(kwargs));
    }
    let list = state.apply_filter(filter, &args)?;
    let items: Result<Vec<Value>, Error> = list.try_iter()?.checked().collect();
    Ok(Value::from_object(Generated(items?)))
}

fn length(value: &Value) -> Result<usize, Error> {
    if value.downcast_object_ref::<Generated>().is_some() {
        let message = "a generator has no length; make it a list first";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    filters::length(value)
}

/// `default(default_value='', boolean=False)`.
fn default(value: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let named: Option<Value> = kwargs.get("default_value")?;
    let boolean: Option<Value> = kwargs.get("boolean")?;
    kwargs.assert_all_used()?;
    let boolean = args.get(1).cloned().or(boolean).is_some_and(|boolean| boolean.is_true());
    if value.is_undefined() || (boolean && !value.is_true()) {
        return Ok(args.first().cloned().or(named).unwrap_or_else(|| Value::from("")));
    }
    Ok(value)
}

/// What a conversion gives, or for what cannot be converted `default`.
fn or_default(found: Result<Value, Error>, default: Value) -> Result<Value, Error> {
    match found {
        Err(e) if e.kind() == ErrorKind::InvalidOperation => Ok(default),
        found => found,
    }
}

/// `int(default=0, base=10)`.
fn int(
    state: &State,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named: Option<Value> = kwargs.get("default")?;
    let default = default.or(named).unwrap_or_else(|| Value::from(0));
    or_default(filters::int(state, value, Some(default.clone()), base, kwargs), default)
}

/// `float(default=0.0)`.
fn float(
    state: &State,
    value: &Value,
    default: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named: Option<Value> = kwargs.get("default")?;
    let default = default.or(named).unwrap_or_else(|| Value::from(0.0));
    or_default(filters::float(state, value, Some(default.clone()), kwargs), default)
}

/// `sort(reverse=False, case_sensitive=False, attribute=None)`.
fn sort(state: &State, value: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let names = ["reverse", "case_sensitive", "attribute"];
    if args.len() > names.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut all: Vec<(String, Value)> = Vec::new();
    for (name, value) in names.iter().zip(args.iter()) {
        all.push(((*name).to_owned(), value.clone()));
    }
    for name in kwargs.args() {
        all.push((name.to_owned(), kwargs.peek(name)?));
    }
    filters::sort(state, value, all.into_iter().collect())
}

/// The test `callable`: functions and macros.
fn is_callable(value: Value) -> bool {
    value.kind() == ValueKind::Plain && value.as_object().is_some()
}

/// What a loop goes over, which `none` is not in Python.
fn each(value: Value) -> Result<Value, Error> {
    if value.is_none() {
        let message = "none is nothing to loop over";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    /// Each pair: a template, and what Python 3.11 with Jinja2 3.1 makes of it, or hone's error.
    fn check(cases: &[(&str, &str)]) {
        let mut env = minijinja::Environment::new();
        crate::engine::furnish(&mut env);
        for (template, expect) in cases {
            let source = crate::source::scan(template).source;
            let found = env.render_str(&source, ());
            let found = found.unwrap_or_else(|e| format!("error: {}", e.detail().unwrap_or("")));
            assert_eq!(&found, expect, "{template}");
        }
    }

    #[test]
    fn generators_are_true_and_have_no_length() {
        let no_length = "error: a generator has no length; make it a list first";
        check(&[
            ("{{ 'yes' if []|select else 'no' }}", "yes"),
            ("{{ 'yes' if []|select|list else 'no' }}", "no"),
            ("{{ [0, 1, 2]|select|list|length }}", "2"),
            ("{{ [0, 1]|reject('odd')|length }}", no_length),
            (
                "{% for a in [1, 2]|map('string') %}{{ a }}{{ ',' if not loop.last }}{% endfor %}",
                "1,2",
            ),
            (
                "{{ [{'a': 1}, {'a': 2}]|selectattr('a', 'equalto', 2)|map(attribute='a')|join }}",
                "2",
            ),
            ("{% for k, v in {'a': 1}|items %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ]);
    }

    #[test]
    fn arguments_are_jinjas() {
        check(&[
            ("{{ 'x'|int }} {{ 'x'|int(-1) }} {{ '2'|int }} {{ 'x'|int(default=3) }}", "0 -1 2 3"),
            ("{{ 'x'|float }} {{ 'x'|float('y') }} {{ '1.5'|float }}", "0.0 y 1.5"),
            ("{{ 0|default('a', boolean=true) }}{{ 0|d('a') }}{{ b|default }}", "a0"),
            ("{{ [1, 3, 2]|sort(true)|join }} {{ ['b', 'A']|sort(false, true)|join }}", "321 Ab"),
            ("{{ 'aaa'|replace('a', 'b', count=1) }}", "baa"),
            (
                "{{ range is callable }} {{ 1 is callable }} {{ 'a' is callable }}",
                "True False False",
            ),
        ]);
    }

    #[test]
    fn nobody_loops_over_none() {
        let error = "error: none is nothing to loop over";
        check(&[
            ("{% for a in none %}{% endfor %}", error),
            ("{% for a in none or [1] %}{{ a }}{% endfor %}", "1"),
            ("{% for a in missing %}{% else %}empty{% endfor %}", "empty"),
            ("{% for a, b in [(1, 2)] if a < b %}{{ b }}{% endfor %}", "2"),
        ]);
    }
}
