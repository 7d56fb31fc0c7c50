//! One table a schema: a row in, a conversation or a reason out.

use super::*;

fn run(row: &str, schema: Schema) -> Result<Row, Fault> {
    convert(row.as_bytes(), schema, &Options::default())
}

fn messages(row: &str, schema: Schema, expect: &str) {
    match run(row, schema) {
        Ok(found) => assert_eq!(found.messages, expect, "{row}"),
        Err(fault) => panic!("{row}: {fault:?}"),
    }
}

fn refused(row: &str, schema: Schema, reason: Reason, detail: &str) {
    match run(row, schema) {
        Ok(found) => panic!("{row}: {found:?}"),
        Err(fault) => {
            assert_eq!(fault.reason, reason, "{row}: {fault:?}");
            assert!(fault.detail.contains(detail), "{row}: {fault:?}");
        }
    }
}

/// `u: text`, `a: text`, `s: text` as canonical messages.
fn chat(turns: &[&str]) -> String {
    let one = |turn: &&str| {
        let (role, text) = turn.split_once(": ").expect("a role and a text");
        let role = match role {
            "u" => "user",
            "a" => "assistant",
            "s" => "system",
            other => other,
        };
        messages::plain(role, text)
    };
    format!("[{}]", turns.iter().map(one).collect::<Vec<_>>().join(","))
}

#[test]
fn alpaca() {
    let ok = |row: &str, turns: &[&str]| messages(row, Schema::Alpaca, &chat(turns));
    ok(r#"{"instruction":"Add","input":"1 2","output":"3"}"#, &["u: Add\n1 2", "a: 3"]);
    ok(r#"{"instruction":"Add","input":"","output":"3"}"#, &["u: Add", "a: 3"]);
    ok(r#"{"instruction":"Add","input":null,"output":"3"}"#, &["u: Add", "a: 3"]);
    ok(r#"{"instruction":"Add","output":"3"}"#, &["u: Add", "a: 3"]);
    ok(r#"{"instruction":"","input":"x","output":"3"}"#, &["u: x", "a: 3"]);
    ok(r#"{"instruction":"Add","context":"1 2","response":"3"}"#, &["u: Add\n1 2", "a: 3"]);
    ok(r#"{"system":"S","instruction":"q","output":"r"}"#, &["s: S", "u: q", "a: r"]);
    ok(r#"{"system":"","instruction":"q","output":"r"}"#, &["u: q", "a: r"]);
    ok(
        r#"{"instruction":"q2","output":"r2","history":[["q1","r1"]],"system":"S"}"#,
        &["s: S", "u: q1", "a: r1", "u: q2", "a: r2"],
    );
    ok(
        r#"{"instruction":"q","output":"r","history":"[[\"h\",\"i\"]]"}"#,
        &["u: h", "a: i", "u: q", "a: r"],
    );
    ok(r#"{"instruction":"q","output":"r","history":""}"#, &["u: q", "a: r"]);
    ok(r#"{"instruction":"q","instances":[{"input":"i","output":"o"}]}"#, &["u: q\ni", "a: o"]);
    ok(r#"{"instruction":" q ","output":" r\n"}"#, &["u:  q ", "a:  r\n"]);
    let no = |row: &str, reason, detail| refused(row, Schema::Alpaca, reason, detail);
    no(r#"{"output":"r"}"#, Reason::MissingField, "no `instruction`");
    no(r#"{"instruction":"q"}"#, Reason::MissingField, "no `output`");
    no(r#"{"instruction":"q","output":null}"#, Reason::MissingField, "no `output`");
    no(r#"{"instruction":"q","output":""}"#, Reason::EmptyResponse, "empty");
    no(r#"{"instruction":"q","output":" \n"}"#, Reason::EmptyResponse, "empty");
    no(r#"{"instruction":"","output":"r"}"#, Reason::EmptyPrompt, "nothing");
    no(r#"{"instruction":3,"output":"r"}"#, Reason::WrongType, "`instruction` is a number");
    no(r#"{"instruction":"q","output":["r"]}"#, Reason::WrongType, "`output` is a list");
    no(r#"{"instruction":"q","output":"r","history":[["q"]]}"#, Reason::WrongType, "`history`");
    no(r#"{"instruction":"q","instances":[]}"#, Reason::WrongType, "holds 0 tasks");
    no(
        r#"{"instruction":"q","output":"r","instruction":"p"}"#,
        Reason::RepeatedKey,
        "`instruction`",
    );
}

#[test]
fn sharegpt() {
    let ok = |row: &str, expect: &str| messages(row, Schema::Sharegpt, expect);
    ok(
        r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"r"}]}"#,
        &chat(&["u: q", "a: r"]),
    );
    ok(
        r#"{"conversation":[{"from":"human","value":"q","k":[1.0]},{"from":"gpt","value":"r"}],"system":"S"}"#,
        r#"[{"role":"system","content":"S"},{"role":"user","content":"q","k":[1.0]},{"role":"assistant","content":"r"}]"#,
    );
    // The conversation's own system message stands, and the column is not lost.
    let both = r#"{"conversations":[{"value":"A","from":"system"},{"from":"gpt","value":"r"}],"system":"B"}"#;
    let row = run(both, Schema::Sharegpt).unwrap();
    assert_eq!(
        row.messages,
        r#"[{"content":"A","role":"system"},{"role":"assistant","content":"r"}]"#
    );
    assert_eq!(row.meta.as_deref(), Some(r#"{"system":"B"}"#));
    ok(
        r#"{"conversations":[{"from":"human","value":"q"},{"from":"function_call","value":"{\"name\": \"f\", \"arguments\": {\"x\": 1.0}}"},{"from":"observation","value":"{}"},{"from":"gpt","value":"r"}]}"#,
        r#"[{"role":"user","content":"q"},{"role":"assistant","content":"","tool_calls":[{"type":"function","function":{"name":"f","arguments":{"x":1.0}}}]},{"role":"tool","content":"{}"},{"role":"assistant","content":"r"}]"#,
    );
    let no = |row: &str, reason, detail| refused(row, Schema::Sharegpt, reason, detail);
    no(r#"{"conversations":[]}"#, Reason::EmptyConversation, "no messages");
    no(r#"{"conversations":[{"from":"human","value":"q"}]}"#, Reason::NoResponse, "assistant");
    no(
        r#"{"conversations":[{"from":"narrator","value":"q"}]}"#,
        Reason::UnknownRole,
        "message 0 is of `narrator`",
    );
    no(r#"{"conversations":[{"value":"q"}]}"#, Reason::MissingField, "message 0 has no `role`");
    no(r#"{"conversations":[{"from":"gpt"}]}"#, Reason::MissingField, "message 0 has no `content`");
    no(
        r#"{"conversations":[{"from":"gpt","value":null}]}"#,
        Reason::WrongType,
        "the content is null",
    );
    no(
        r#"{"conversations":[{"from":"gpt","value":3}]}"#,
        Reason::WrongType,
        "the content is a number",
    );
    no(r#"{"conversations":["q"]}"#, Reason::WrongType, "message 0 is a text, not an object");
    no(r#"{"conversations":{"from":"gpt"}}"#, Reason::WrongType, "an object, not a list");
    no(
        r#"{"conversations":[{"from":"function_call","value":"f(x)"}]}"#,
        Reason::ToolCall,
        "message 0",
    );
    no(
        r#"{"conversations":[{"from":"function_call","value":"{\"arguments\":{}}"}]}"#,
        Reason::ToolCall,
        "name",
    );
}

#[test]
fn messages_keep_what_they_came_with() {
    let ok = |row: &str, expect: &str| messages(row, Schema::Messages, expect);
    let calls = r#"[{"role":"user","content":"q"},{"role":"assistant","content":null,"tool_calls":[{"id":"c","function":{"name":"f","arguments":"{\"x\":1e2}"}}]},{"role":"tool","tool_call_id":"c","content":"1"},{"role":"assistant","content":"r","train":false}]"#;
    ok(&format!(r#"{{"messages":{calls}}}"#), calls);
    ok(&format!(r#"{{"messages":{}}}"#, crate::json::quote(calls)), calls);
    ok(
        r#"{"messages":[{"role":"Human","content":"q","name":null},{"content":"r","role":"ASSISTANT"}]}"#,
        r#"[{"role":"user","content":"q","name":null},{"content":"r","role":"assistant"}]"#,
    );
    // A call without content stays without content.
    let call = r#"[{"role":"assistant","tool_calls":[{"function":{"name":"f"}}]}]"#;
    ok(&format!(r#"{{"messages":{call}}}"#), call);
    ok(
        r#"{"messages":[{"role":"developer","content":"d"},{"role":"assistant","content":"r"}]}"#,
        &chat(&["developer: d", "a: r"]),
    );
    // An empty response that is not trained does no harm.
    let untrained =
        r#"[{"role":"assistant","content":"","train":false},{"role":"assistant","content":"r"}]"#;
    ok(&format!(r#"{{"messages":{untrained}}}"#), untrained);
    let no = |row: &str, reason, detail| refused(row, Schema::Messages, reason, detail);
    no(r#"{"messages":"hello"}"#, Reason::WrongType, "`messages` is a text");
    no(r#"{"messages":null}"#, Reason::MissingField, "no `messages`");
    no(
        r#"{"messages":[{"role":"assistant","content":""}]}"#,
        Reason::EmptyResponse,
        "message 0 is empty",
    );
    no(
        r#"{"messages":[{"role":"assistant","content":"a"},{"role":"assistant","content":" "}]}"#,
        Reason::EmptyResponse,
        "message 1",
    );
    no(
        r#"{"messages":[{"role":"assistant","content":"","tool_calls":[]}]}"#,
        Reason::EmptyResponse,
        "message 0",
    );
    no(
        r#"{"messages":[{"role":"assistant","content":"r","weight":-1}]}"#,
        Reason::WrongType,
        "`weight` -1",
    );
    no(
        r#"{"messages":[{"role":"assistant","role":"user","content":"r"}]}"#,
        Reason::RepeatedKey,
        "`role` stands twice",
    );
    no(r#"{"messages":[{"role":7,"content":"r"}]}"#, Reason::WrongType, "`role` is a number");
}

#[test]
fn content_of_parts() {
    let ok = |content: &str, expect: &str| {
        let row = format!(r#"{{"messages":[{{"role":"assistant","content":{content}}}]}}"#);
        messages(&row, Schema::Messages, &format!(r#"[{{"role":"assistant",{expect}}}]"#));
    };
    ok(r#"[{"type":"text","text":"a"},{"type":"text","value":"b"},"c"]"#, r#""content":"abc""#);
    ok(
        r#"[{"type":"reasoning","value":"think"},{"type":"text","value":"say"}]"#,
        r#""content":"say","reasoning_content":"think""#,
    );
    ok(
        r#"[{"type":"tool_call","value":"{\"name\": \"f\", \"arguments\": {}}"}]"#,
        r#""content":"","tool_calls":[{"type":"function","function":{"name":"f","arguments":{}}}]"#,
    );
    ok(
        r#"[{"type":"text","text":"a","weight":0},{"type":"text","text":"b","weight":0}]"#,
        r#""content":"ab","weight":0"#,
    );
    let no = |content: &str, reason, detail| {
        let row = format!(r#"{{"messages":[{{"role":"assistant","content":{content}}}]}}"#);
        refused(&row, Schema::Messages, reason, detail);
    };
    no(r#"[{"type":"image_url","image_url":{"url":"x"}}]"#, Reason::NotText, "`image_url`");
    no(r#"[{"type":"text","text":"a"},{"type":"image"}]"#, Reason::NotText, "`image`");
    no(r#"[3]"#, Reason::NotText, "a number");
    let weighed = r#"[{"type":"text","text":"a","train":true},{"type":"text","text":"b"}]"#;
    ok(weighed, &format!(r#""content":{weighed}"#));
    let thought =
        r#"[{"type":"thinking","thinking":"a","train":false},{"type":"text","text":"b"}]"#;
    ok(thought, &format!(r#""content":{thought}"#));
    // Two weights of a part both count; weights by two names are left as they are.
    let two = r#"[{"type":"text","text":"a","train":true,"weight":0.5}]"#;
    ok(two, &format!(r#""content":{two}"#));
    let named = r#"[{"type":"text","text":"a","weight":1},{"type":"text","text":"b","loss":1}]"#;
    ok(named, &format!(r#""content":{named}"#));
    let call = r#"{"type":"tool_call","value":"{\"name\": \"f\"}","train":false}"#;
    ok(
        &format!("[{call}]"),
        r#""content":"","train":false,"tool_calls":[{"type":"function","function":{"name":"f"}}]"#,
    );
    let beside = format!(r#"[{call},{{"type":"text","text":"a"}}]"#);
    no(&beside, Reason::ToolCall, "another weight");
    let thinks = r#"[{"type":"thinking","thinking":"a"},{"type":"text","text":"b"}]"#;
    for key in ["reasoning_content", "thinking"] {
        no(&format!(r#"{thinks},"{key}":"c""#), Reason::TwoThoughts, key);
    }
    ok(
        &format!(r#"{thinks},"reasoning_content":null"#),
        r#""content":"b","reasoning_content":"a""#,
    );
    no(r#"[{"type":"text","text":"a","train":2e40}]"#, Reason::WrongType, "`train`");
    no(r#"[]"#, Reason::EmptyResponse, "message 0");
}

#[test]
fn variables_of_the_chat_template_go_with_their_row() {
    let check = |columns: &str, variables: Option<&str>, meta: Option<&str>| {
        let row = format!(r#"{{"prompt":"p","completion":"c",{columns}}}"#);
        let row = run(&row, Schema::PromptCompletion).unwrap();
        assert_eq!((row.variables.as_deref(), row.meta.as_deref()), (variables, meta));
    };
    let documents = r#"[{"title":"t","text":"x"}]"#;
    check(
        r#""chat_template_kwargs":{"enable_thinking":false}"#,
        Some(r#"{"enable_thinking":false}"#),
        None,
    );
    check(r#""chat_template_kwargs":"{\"a\": 1}""#, Some(r#"{"a":1}"#), None);
    check(r#""chat_template_kwargs":null"#, None, None);
    let both = format!(r#""chat_template_kwargs":{{"a":1}},"documents":{documents}"#);
    check(&both, Some(&format!(r#"{{"a":1,"documents":{documents}}}"#)), None);
    check(r#""documents":["x"]"#, None, Some(r#"{"documents":["x"]}"#));
    let wrong = r#"{"prompt":"p","completion":"c","chat_template_kwargs":"x"}"#;
    refused(wrong, Schema::PromptCompletion, Reason::WrongType, "`chat_template_kwargs` is a text");
    let hash = |columns: &str| {
        let row = format!(r#"{{"prompt":"p","completion":"c"{columns}}}"#);
        run(&row, Schema::PromptCompletion).unwrap().content()
    };
    assert_ne!(hash(""), hash(&format!(r#","documents":{documents}"#)));
}

#[test]
fn prompt_and_completion() {
    let ok = |row: &str, turns: &[&str]| messages(row, Schema::PromptCompletion, &chat(turns));
    ok(r#"{"prompt":"p","completion":"c"}"#, &["u: p", "a: c"]);
    ok(r#"{"prompt":"p","response":" c"}"#, &["u: p", "a:  c"]);
    ok(r#"{"question":"p","answer":"c"}"#, &["u: p", "a: c"]);
    ok(r#"{"system_prompt":"s","question":"p","response":"c"}"#, &["s: s", "u: p", "a: c"]);
    ok(
        r#"{"prompt":[{"role":"user","content":"p"}],"completion":[{"role":"assistant","content":"c"}]}"#,
        &["u: p", "a: c"],
    );
    ok(r#"{"prompt":[{"role":"user","content":"p"}],"completion":"c"}"#, &["u: p", "a: c"]);
    let no = |row: &str, reason, detail| refused(row, Schema::PromptCompletion, reason, detail);
    no(r#"{"prompt":"p"}"#, Reason::MissingField, "no `completion`");
    no(r#"{"prompt":"p","completion":""}"#, Reason::EmptyResponse, "empty");
    no(r#"{"prompt":" ","completion":"c"}"#, Reason::EmptyPrompt, "nothing");
    no(r#"{"prompt":{"a":1},"completion":"c"}"#, Reason::WrongType, "`prompt` is an object");
    no(r#"{"prompt":"p","completion":"c","label":false}"#, Reason::Undesired, "`label` is false");
    ok(r#"{"prompt":"p","completion":"c","label":true}"#, &["u: p", "a: c"]);
    messages(r#"{"inputs":"p","targets":"c"}"#, Schema::Flan, &chat(&["u: p", "a: c"]));
    refused(r#"{"inputs":"p"}"#, Schema::Flan, Reason::MissingField, "no `targets`");
}

#[test]
fn text() {
    let row = run(r#"{"text":"a\nb","url":"u"}"#, Schema::Text).unwrap();
    assert_eq!(
        (row.kind, row.text.as_deref(), row.messages.as_str()),
        (Kind::Text, Some("a\nb"), "[]")
    );
    assert_eq!(row.meta.as_deref(), Some(r#"{"url":"u"}"#));
    refused(r#"{"text":" "}"#, Schema::Text, Reason::EmptyText, "empty");
    refused(r#"{"text":["a"]}"#, Schema::Text, Reason::WrongType, "`text` is a list");
    refused(r#"{"body":"a"}"#, Schema::Text, Reason::MissingField, "no `text`");
}

#[test]
fn preference() {
    let ok = |row: &str, prompt: &[&str], chosen: &[&str], rejected: &[&str]| {
        let found = run(row, Schema::Preference).unwrap_or_else(|fault| panic!("{row}: {fault:?}"));
        assert_eq!(found.kind, Kind::Preference);
        let expect = (chat(prompt), Some(chat(chosen)), Some(chat(rejected)));
        assert_eq!((found.messages, found.chosen, found.rejected), expect, "{row}");
    };
    let (c, r) = (&["a: c"], &["a: r"]);
    ok(r#"{"prompt":"p","chosen":"c","rejected":"r"}"#, &["u: p"], c, r);
    ok(r#"{"system":"s","question":"p","chosen":"c","rejected":"r"}"#, &["s: s", "u: p"], c, r);
    ok(r#"{"instruction":"p","input":"i","chosen":"c","rejected":"r"}"#, &["u: p\ni"], c, r);
    ok(
        r#"{"conversations":[{"from":"human","value":"p"}],"chosen":{"from":"gpt","value":"c"},"rejected":{"from":"gpt","value":"r"}}"#,
        &["u: p"],
        c,
        r,
    );
    let lists = r#""chosen":[{"role":"user","content":"p"},{"role":"assistant","content":"c"}],"rejected":[{"role":"user","content":"p"},{"role":"assistant","content":"r"}]"#;
    ok(&format!("{{{lists}}}"), &["u: p"], c, r);
    ok(&format!(r#"{{"prompt":"p",{lists}}}"#), &["u: p"], c, r);
    ok(
        r#"{"chosen":"\n\nHuman: p\n\nAssistant: m\n\nHuman: q\n\nAssistant: c","rejected":"\n\nHuman: p\n\nAssistant: m\n\nHuman: q\n\nAssistant: r"}"#,
        &["u: p", "a: m", "u: q"],
        c,
        r,
    );
    let no = |row: &str, reason, detail| refused(row, Schema::Preference, reason, detail);
    no(r#"{"prompt":"p","chosen":"c","rejected":"c"}"#, Reason::SameAnswers, "equal");
    no(r#"{"prompt":"p","chosen":"","rejected":"c"}"#, Reason::EmptyResponse, "`chosen`");
    no(r#"{"chosen":"c","rejected":"r"}"#, Reason::MissingField, "there is no `prompt`");
    no(r#"{"prompt":"p","chosen":"c"}"#, Reason::MissingField, "no `rejected`");
    no(
        r#"{"prompt":[{"role":"user","content":"p","weight":"x"}],"chosen":"c","rejected":"r"}"#,
        Reason::WrongType,
        "`prompt`: message 0 has `weight`",
    );
}

#[test]
fn what_every_row_may_have() {
    let row = run(
        r#"{"prompt":"p","completion":"c","id":7,"weight":0.5,"tools":"[ {\"name\": \"f\"} ]","k":[1.0, null],"n":null}"#,
        Schema::PromptCompletion,
    )
    .unwrap();
    assert_eq!(row.id.as_deref(), Some("7"));
    assert_eq!(row.weight, 0.5);
    assert_eq!(row.tools.as_deref(), Some(r#"[{"name":"f"}]"#));
    assert_eq!(row.meta.as_deref(), Some(r#"{"k":[1.0,null],"n":null}"#));
    let with = |extra: &str| {
        run(&format!(r#"{{"prompt":"p","completion":"c",{extra}}}"#), Schema::PromptCompletion)
    };
    assert_eq!(with(r#""tools":"[]""#).unwrap().tools, None);
    assert_eq!(with(r#""tools":[]"#).unwrap().tools, None);
    assert_eq!(with(r#""tools":"""#).unwrap().tools, None);
    assert_eq!(with(r#""id":"""#).unwrap().id, None);
    assert_eq!(
        with(r#""id":{"$oid":"x"}"#).unwrap().meta.as_deref(),
        Some(r#"{"id":{"$oid":"x"}}"#)
    );
    assert_eq!(with(r#""weight":"0.25""#).unwrap().weight, 0.25);
    let fault = |extra| with(extra).unwrap_err();
    assert_eq!(fault(r#""weight":"70 kg""#).reason, Reason::WrongType);
    assert_eq!(fault(r#""weight":-1"#).reason, Reason::WrongType);
    assert_eq!(fault(r#""tools":"f(x)""#).reason, Reason::WrongType);
    assert_eq!(fault(r#""images":["a.png"]"#).reason, Reason::NotText);
    assert!(with(r#""images":[]"#).is_ok());
}

#[test]
fn content_decides_the_hash_and_nothing_else_does() {
    let hash = |row| run(row, Schema::PromptCompletion).unwrap().content();
    let one = hash(r#"{"prompt":"p","completion":"c"}"#);
    assert_eq!(
        one,
        hash(r#"{ "completion" : "c", "prompt" : "\u0070", "id":"x", "weight":2, "k":1 }"#)
    );
    assert_ne!(one, hash(r#"{"prompt":"p","completion":"d"}"#));
    assert_ne!(one, hash(r#"{"prompt":"p","completion":"c","tools":[1]}"#));
}

#[test]
fn options() {
    let options = Options {
        rename: [("gold".to_owned(), "completion".to_owned())].into(),
        strip_suffix: Some("<|endoftext|>".to_owned()),
    };
    let row = br#"{"prompt":"p","gold":"c<|endoftext|>"}"#;
    let found = convert(row, Schema::PromptCompletion, &options).unwrap();
    assert_eq!(found.messages, chat(&["u: p", "a: c"]));
    let row = br#"{"prompt":"p","gold":"<|endoftext|>"}"#;
    let fault = convert(row, Schema::PromptCompletion, &options).unwrap_err();
    assert_eq!(fault.reason, Reason::EmptyResponse);
    let plain =
        run(r#"{"prompt":"p","completion":"c<|endoftext|>"}"#, Schema::PromptCompletion).unwrap();
    assert_eq!(plain.end_marker(), Some("<|endoftext|>"));
    let html = run(r#"{"prompt":"p","completion":"<b>c</b>"}"#, Schema::PromptCompletion).unwrap();
    assert_eq!(html.end_marker(), None);
}

#[test]
fn what_is_no_row() {
    let no = |bytes: &[u8], reason| {
        assert_eq!(convert(bytes, Schema::Text, &Options::default()).unwrap_err().reason, reason);
    };
    no(b"{\"text\":\"\xff\"}", Reason::NotUtf8);
    no(b"not json", Reason::NotJson);
    no(b"[1]", Reason::NotAnObject);
    no(b"\"text\"", Reason::NotAnObject);
    no(b"null", Reason::NotAnObject);
}

/// Every row that is let through can be read by the stages behind: whatever single byte of it is
/// another, it is a sound conversation or a reason.
#[test]
fn no_changed_byte_gets_past_the_checks() {
    let rows = [
        (
            Schema::Alpaca,
            r#"{"instruction":"q","input":"i","output":"r","history":[["a","b"]],"id":1}"#,
        ),
        (
            Schema::Sharegpt,
            r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"\u00e9","weight":0.5}],"tools":"[{}]"}"#,
        ),
        (
            Schema::Messages,
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"q"}]},{"role":"assistant","content":"r"}],"k":{"a":[1e2]}}"#,
        ),
        (
            Schema::Preference,
            r#"{"prompt":"p","chosen":[{"role":"assistant","content":"c"}],"rejected":"\n\nAssistant: r"}"#,
        ),
        (Schema::Text, r#"{"text":"\ud83d\ude00","weight":2}"#),
    ];
    let (mut n_passed, mut n_refused) = (0, 0);
    for (schema, row) in rows {
        convert(row.as_bytes(), schema, &Options::default()).expect("sound before it is changed");
        for at in 0..row.len() {
            for byte in
                [b'"', b'\\', b'{', b'}', b'[', b']', b',', b':', b'0', b'-', b'e', b' ', 0, 0xff]
            {
                let mut bytes = row.as_bytes().to_vec();
                bytes[at] = byte;
                match convert(&bytes, schema, &Options::default()) {
                    Ok(row) => {
                        n_passed += 1;
                        sound(&row);
                    }
                    Err(fault) => {
                        n_refused += 1;
                        assert!(!fault.detail.is_empty(), "{fault:?}");
                    }
                }
            }
        }
    }
    assert!(n_passed > 500 && n_refused > 3000, "{n_passed} passed, {n_refused} refused");
}

fn sound(row: &Row) {
    let lists = [Some(&row.messages), row.chosen.as_ref(), row.rejected.as_ref()];
    for list in lists.into_iter().flatten() {
        hone_schema::parse_messages(list).unwrap_or_else(|e| panic!("{list}: {e}"));
    }
    for json in [&row.tools, &row.meta].into_iter().flatten() {
        serde_json::from_str::<serde_json::Value>(json).unwrap_or_else(|e| panic!("{json}: {e}"));
    }
    assert!(row.weight.is_finite() && row.weight >= 0.0);
}
