"""The conversations that the parity test renders and tokenizes: made ones, the same every time, and rows of the corpus.

`made()` is hone's own text and is committed as chats.json for the test that needs nothing but the corpus' tokenizers;
`corpus(folder)` reads rows in place.
"""

import gzip
import json
import random

SENTENCES = [
    "The kettle had been on for an hour before anyone noticed.",
    "A ferry leaves every forty minutes, except on the last Sunday of March.",
    "Nobody in the village could agree on how old the bridge was.",
    "Please list the parts of a bicycle in the order in which they wear out.",
    "She said the map was wrong, and that the river knew it.",
    "It's not that we don't care; it's that we've seen it before, haven't we?",
    "I'd rather they'd've asked first: we're busy, you'll wait, he's late, I'M NOT, THEY'LL SEE.",
    "Prices rose by 3.75 % to 1,204,599.00 between 1998 and 2026.",
    "Water boils at 99.97 degrees C at 101325 Pa, which is 211.95 F.",
    "Call +49 (0)30 1234-5678 or write to a.b+c@example.org, subject: Re: [urgent!!!]",
    "An owl, two hares & one very old badger (see p. 12) met at dusk ...",
    "Why does bread rise? Because yeast breathes out, and gluten holds it in.",
]
SCRIPTS = [
    "Größe, Straße, ÄÖÜ äöü ß: fünf Dutzend Äpfel.",
    "Où est l'été ? À Noël, garçon, cœur, naïveté…",
    "Съешь ещё этих мягких булок, да выпей чаю.",
    "Η γλώσσα είναι ελληνική, με τόνους: ά έ ή ί ό ύ ώ.",
    "今日は良い天気ですね。明日は雨が降るでしょう。カタカナとひらがな。",
    "你好，世界！机器学习模型的训练数据。１２３４５",
    "안녕하세요. 한국어 문장입니다. 가나다라마바사",
    "مرحبا بالعالم، هذه جملة عربية قصيرة. ٠١٢٣٤٥",
    "שלום עולם, זה משפט בעברית.",
    "नमस्ते दुनिया, यह एक हिंदी वाक्य है। क्षत्रिय",
    "สวัสดีชาวโลก นี่คือประโยคภาษาไทย",
    "Xin chào thế giới, đây là một câu tiếng Việt có dấu.",
    "မင်္ဂလာပါ ကမ္ဘာကြီး။ ဘာသာမန် အက္ခရ်မန်",
    "🐈 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ☕️ ✈︎ 🫠",
    "e\u0301 a\u0308 n\u0303 versus é ä ñ; \ufb01 \u2126 \u212b \u00b2 \u00bd",
    "zero\u200bwidth\u200djoin soft\u00adhyphen nbsp\u00a0here \u3000wide \u2028line sep \u2009thin",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕬 𠮷野家 𐍈 \U0001f9ff \ue000 \uf8ff \ufffd",
    "ıİ ſ ẞ ǆ ŉ Ǆ ŀ ϒ ϐ ⅷ ℡ ㎏ ﷺ ﻻ",
]
CODE = [
    "def area(r):\n    \"\"\"Of a circle.\"\"\"\n    return 3.14159 * r ** 2\n\n\nprint(f\"{area(2):.3f}\")\n",
    "fn main() {\n\tlet xs: Vec<u32> = (0..10).filter(|x| x % 2 == 0).collect();\n\tprintln!(\"{xs:?}\");\n}",
    "SELECT name, COUNT(*) AS n FROM birds WHERE seen >= '2020-01-01' GROUP BY name HAVING n > 3 ORDER BY n DESC;",
    "{\"a\": [1, 2.5, -3e-7, null, true], \"b\": {\"c\": \"\\u00e9\\n\", \"d\": \"\"}}",
    "#include <stdio.h>\nint main(void) { for (int i = 0; i < 3; ++i) { printf(\"%d\\n\", i); } return 0; }",
    "for f in *.txt; do\n  [ -s \"$f\" ] && grep -qE '^[0-9]+$' \"$f\" || echo \"$f\" >&2\ndone",
    "{% for x in xs %}{{ x | upper }}{% endfor %} {# a comment #} {{ messages[0]['content'] }}",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n\n- [ ] one\n- [x] two\n\n> quote\n\n```text\nfence\n```\n",
    "x\t=\t1\r\ny = 2\r\n\r\n\r\nz\r= 3",
    "https://example.org/a/b?c=d&e=%20f#g C:\\Users\\me\\file.txt ../up/./here ~/.config",
    "a<b && c>d || x<<2 >>= 1; if (p->q != &r) { s |= ~t; } <not a tag> </> <>",
]
EDGES = [
    "",
    " ",
    "\n",
    "  two before",
    "two after  ",
    "\n\nlines around\n\n",
    "\t tab first",
    "a",
    ".",
    "    indented\n        more\n    back",
    "many      blanks          inside      and\n\n\n\n\n\nempty lines",
    "trailing newline\n",
    "0", "00000000000000000000", "1234567890123456789012345678901234567890",
    "!!!!!!!!!!!!!!!!????????????........,,,,,,,,;;;;;;;------------_______=====",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "CamelCaseIdentifierNames and snake_case_names and kebab-case-names and SCREAMING_CASE",
    "user: hi\nassistant: hello\nsystem: no",
    "### Instruction:\nwrite\n\n### Response:\ndone",
]
TOOLS = [
    {"type": "function", "function": {
        "name": "find_train", "description": "Next trains between two places.",
        "parameters": {"type": "object", "required": ["start", "end"], "properties": {
            "start": {"type": "string", "description": "where from"},
            "end": {"type": "string", "description": "where to"},
            "limit": {"type": "integer", "description": "at most", "enum": [1, 2, 3]}}}}},
    {"type": "function", "function": {
        "name": "weather", "description": "Weather \"now\" <there> & 'then'.",
        "parameters": {"type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "die Stadt, z. B. Köln"},
            "days": {"type": "array", "items": {"type": "string"}, "description": "which days"}}}}},
]


def chat(name, *turns, tools=None):
    messages = [dict(role=role, content=text) if isinstance(text, str) else dict(role=role, **text) for role, text in turns]
    return dict(name=name, messages=messages) | (dict(tools=tools) if tools else {})


def turns(draw, pool, n, system=None):
    out = [("system", system)] if system is not None else []
    for _ in range(n):
        out += [("user", draw.choice(pool)), ("assistant", draw.choice(pool))]
    return out


def call(name, arguments, at):
    return dict(type="function", id=f"call{at:05d}", function=dict(name=name, arguments=arguments))


def with_tools(draw):
    """One call and its result; two at once; two in a row; a call with something said; no call at all."""
    city, days = draw.choice(["Köln", "São Paulo", "O'Fallon", "日光"]), draw.choice([["mon"], [], ["sat", "sun"]])
    ask = ("user", f"How is the weather in {city}, and how do I get there?")
    first = call("weather", dict(city=city, days=days), 1)
    second = call("find_train", dict(start="here", end=city, limit=draw.choice([1, 2, 3])), 2)
    result = lambda at, text: ("tool", dict(content=text, tool_call_id=f"call{at:05d}", name="weather" if at == 1 else "find_train"))
    done = ("assistant", f"It is {draw.randrange(-9, 39)} degrees in {city}.")
    rain = json.dumps(dict(rain=draw.random() < 0.5, note="a \"b\" <c>"), ensure_ascii=False)
    yield chat("tools one call", ask, ("assistant", dict(content="", tool_calls=[first])), result(1, rain), done, tools=TOOLS)
    yield chat("tools said and called", ("system", "Be brief."), ask,
               ("assistant", dict(content="Let me look.", tool_calls=[second])), result(2, "[]"), done, tools=TOOLS)
    yield chat("tools two at once", ask, ("assistant", dict(content="", tool_calls=[first, second])),
               result(1, rain), result(2, "09:41, 10:21"), done, tools=TOOLS)
    yield chat("tools two in a row", ask, ("assistant", dict(content="", tool_calls=[first])), result(1, rain),
               ("assistant", dict(content="", tool_calls=[second])), result(2, "none"), done, tools=TOOLS)
    yield chat("tools not called", ask, ("assistant", "Look out of the window."), tools=TOOLS)


def with_reasoning(draw):
    think = lambda text, say: dict(reasoning_content=text, content=say)
    a, b = draw.choice(SENTENCES), draw.choice(SENTENCES)
    yield chat("reasoning last", ("user", a), ("assistant", think(f"First: {b}\nThen decide.", "Yes.")))
    yield chat("reasoning in both", ("user", a), ("assistant", think("short", b)), ("user", b), ("assistant", think("again", a)))
    yield chat("reasoning empty", ("user", a), ("assistant", think("", b)))


def with_thoughts_inside(draw):
    """Thoughts in the text of an answer, as most sets write them: their marks are control tokens, for hone too."""
    a, b = draw.choice(SENTENCES), draw.choice(SENTENCES)
    yield chat("thought inside", ("user", a), ("assistant", f"<think>\n{b}\n</think>\n\nYes."))
    yield chat("thought inside, close", ("system", "Be brief."), ("user", a), ("assistant", f"<think>{b}</think>{a}"))
    yield chat("thoughts inside both", ("user", a), ("assistant", f"<think>\nshort\n</think>\n\n{b}"), ("user", b), ("assistant", f"<think>\n\nagain: {a} \n</think>\n{b}"))


def made():
    draw = random.Random(20260102)
    out = []
    for i, text in enumerate(SENTENCES):
        out.append(chat("plain", ("user", text), ("assistant", SENTENCES[-1 - i])))
        out.append(chat("system", ("system", text), ("user", SENTENCES[i - 1]), ("assistant", SENTENCES[i - 2])))
    for n in (2, 3, 5, 8):
        out.append(chat(f"{n} turns", *turns(draw, SENTENCES, n)))
        out.append(chat(f"{n} turns, system", *turns(draw, SENTENCES, n, "You answer in one line.")))
    for i, text in enumerate(SCRIPTS):
        out.append(chat("script", ("user", text), ("assistant", SCRIPTS[i - 1])))
        out.append(chat("script, system", ("system", SCRIPTS[i - 2]), ("user", text + "\n" + SENTENCES[i % 12]), ("assistant", SENTENCES[i % 12] + " " + text)))
    for i, text in enumerate(CODE):
        out.append(chat("code", ("user", SENTENCES[i % 12]), ("assistant", text)))
        out.append(chat("code in both", ("user", text), ("assistant", CODE[i - 1]), ("user", CODE[i - 2]), ("assistant", text)))
    for i, text in enumerate(EDGES):
        out.append(chat("edge of the question", ("user", text), ("assistant", "yes")))
        out.append(chat("edge of the answer", ("user", "say it"), ("assistant", text)))
        out.append(chat("edges in a row", ("system", EDGES[i - 1]), ("user", EDGES[i - 2]), ("assistant", text), ("user", EDGES[i - 3]), ("assistant", "ok")))
    everything = SENTENCES + SCRIPTS + CODE
    for n in (40, 120):
        out.append(chat("long", ("user", "\n\n".join(draw.choice(everything) for _ in range(n))), ("assistant", " ".join(draw.choice(everything) for _ in range(n)))))
    for _ in range(3):
        out += with_tools(draw)
        out += with_reasoning(draw)
        out += with_thoughts_inside(draw)
    out.append(chat("open end", ("user", "hello"), ("assistant", "hi"), ("user", "and now?")))
    return out


ROLES = dict(human="user", gpt="assistant", user="user", assistant="assistant", system="system", observation="tool", function_call=None)


def typed(message):
    """A message whose content is a list of typed values, as text, reasoning and tool calls."""
    out = dict(role=message["role"], content="")
    for part in message["content"]:
        if part["type"] == "text":
            out["content"] += part["value"]
        elif part["type"] == "reasoning":
            out["reasoning_content"] = part["value"]
        elif part["type"] == "tool_call":
            out.setdefault("tool_calls", []).append(dict(type="function", function=json.loads(part["value"])))
        else:
            return None
    return out


def spread(rows, n):
    step = max(1, len(rows) // n)
    return rows[::step][:n]


def corpus(folder):
    """(name, messages, tools) of rows as people have them, some of each set."""
    rows = folder / "rows"
    lines = lambda path: [json.loads(line) for line in open(rows / path, encoding="utf-8") if line.strip()]
    out = []
    for row in spread(lines("self_instruct/seed_tasks.jsonl"), 20):
        for one in row["instances"][:1]:
            ask = row["instruction"] + ("\n" + one["input"] if one["input"] else "")
            out.append(chat("self_instruct", ("user", ask), ("assistant", one["output"])))
    for row in spread(lines("gsm8k/train.jsonl"), 15):
        out.append(chat("gsm8k", ("user", row["question"]), ("assistant", row["answer"])))
    for row in spread(lines("llamafactory_demo/v1_sft_demo.jsonl"), 15):
        out.append(dict(name="v1_sft_demo", messages=[typed(m) for m in row["messages"]]))
    for row in spread(lines("llamafactory_demo/reason_tool_use_demo_50.jsonl"), 12):
        messages = [typed(m) for m in row["messages"]]
        tools = row["tools"] if isinstance(row["tools"], list) else json.loads(row["tools"])
        if all(messages):
            out.append(dict(name="reason_tool_use", messages=messages, tools=tools))
    for row in spread(json.load(open(rows / "fastchat_sharegpt_dummy/dummy_conversation.json")), 15):
        out.append(dict(name="sharegpt", messages=[dict(role=ROLES[m["from"]], content=m["value"]) for m in row["conversations"]]))
    for row in spread(lines("oasst_samples/en_100_tree.jsonl"), 15):
        node, messages = row["prompt"], []
        while node:
            messages.append(dict(role="user" if node["role"] == "prompter" else "assistant", content=node["text"]))
            node = node["replies"][0] if node["replies"] else None
        out.append(dict(name="oasst", messages=messages))
    for row in spread([json.loads(x) for x in gzip.open(rows / "hh_rlhf/test.jsonl.gz", "rt")], 10):
        messages = []
        for part in row["chosen"].split("\n\n")[1:]:
            for head, role in (("Human:", "user"), ("Assistant:", "assistant")):
                if part.startswith(head):
                    messages.append(dict(role=role, content=part[len(head):].strip()))
                    break
            else:
                if messages:
                    messages[-1]["content"] += "\n\n" + part
        out.append(dict(name="hh_rlhf", messages=messages))
    return out
