//! Other people's cases of the Jinja language, against what Jinja2 makes of them in the environment
//! of transformers. `tests/golden/README.md` says how the golden is made; the cases themselves are
//! read in place, from `HONE_CORPUS`.

use std::path::{Path, PathBuf};

use hone_chat::{ChatTemplate, Date, Dialect, Given};
use hone_schema::{parse_messages, sha256};
use serde_json::{Map, Value};

/// Cases that come out otherwise than in Python, and why.
const DIFFERENT: [(&str, &str); 6] = [
    ("UNARY_SIGN_EXPRESSIONS", "the engine has no sign `+`"),
    ("FILTER_OPERATOR_6", "the engine takes a slice of a generator, which Python refuses"),
    ("SORT_UNDEFINED_VALUES", "the engine writes `undefined` inside lists with a small letter"),
    ("SORT_MIXED_BOOL_NUM", "the engine sorts truth values before numbers, Python among them"),
    ("CONTEXT_KEYWORDS", "the engine takes no keyword for the name of a variable"),
    (
        "ai21labs/AI21-Jamba-Large-1.6",
        "not told whether an answer is wanted; transformers always tells, and so does hone",
    ),
];

/// Renders a case with all its context.
fn render(source: &str, context: &Map<String, Value>, now: &str) -> Result<String, String> {
    let mut variables = context.clone();
    let generation_prompt =
        variables.remove("add_generation_prompt").is_some_and(|value| value == true);
    let tools = variables.remove("tools").filter(|tools| !tools.is_null());
    let messages = variables.remove("messages").unwrap_or(Value::Array(Vec::new()));
    let messages = parse_messages(&messages.to_string()).map_err(|e| e.to_string())?;
    let date = Date::parse(now).expect("a date");
    let dialect = Dialect { date: Some(date), ..Dialect::default() };
    let template = ChatTemplate::new(source, dialect).map_err(|e| e.to_string())?;
    let given = Given { tools: tools.as_ref(), variables: Some(&variables), ..Given::default() };
    template.render_with(&messages, &given, generation_prompt).map_err(|e| e.to_string())
}

fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn cases_of_the_language_render_as_in_python() {
    let Some(corpus) = std::env::var_os("HONE_CORPUS").map(PathBuf::from) else {
        use std::io::Write;
        let said = writeln!(std::io::stderr(), "skipped: HONE_CORPUS is not set");
        return said.expect("stderr is open");
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/conformance.json");
    let golden = json(&golden);
    let now = golden["now"].as_str().expect("a date");
    let (mut n, mut wrong) = (0, Vec::new());
    for set in golden["renders"].as_array().expect("a list") {
        let name = set["template"].as_str().expect("a name");
        let cases = json(&corpus.join(name));
        let cells = set["whole"].as_array().expect("a list");
        for (case, golden) in cases.as_array().expect("a list").iter().zip(cells) {
            n += 1;
            let source = case.get("template").or(case.get("chat_template"));
            let context = case.get("context").or(case.get("data"));
            let found = render(
                source.and_then(Value::as_str).expect("a template"),
                context.and_then(Value::as_object).expect("an object"),
                now,
            );
            let is_same = match (&found, golden) {
                (Ok(text), Value::Array(cell)) => {
                    cell[0] == sha256(text.as_bytes()).as_str() && cell[1] == text.len()
                }
                (Err(_), Value::Object(_)) => true,
                _ => false,
            };
            let name = case["name"].as_str().expect("a name");
            if !is_same {
                let python = case.get("jinja2_3_1_6").or(case.get("target"));
                wrong.push((name.to_owned(), format!("{golden} {python:?}\n   found {found:?}")));
            }
        }
    }
    assert_eq!(n, golden["count"].as_u64().expect("a count"));
    let known: Vec<&str> = DIFFERENT.map(|(name, _)| name).to_vec();
    let names: Vec<&str> = wrong.iter().map(|(name, _)| name.as_str()).collect();
    let lines: Vec<String> = wrong.iter().map(|(name, how)| format!("{name}: {how}")).collect();
    assert_eq!(names, known, "{} of {n}:\n{}", wrong.len(), lines.join("\n"));
}
