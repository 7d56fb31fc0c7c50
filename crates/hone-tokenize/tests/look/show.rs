//! `show`: rows, packs and the page, with rows that would drive whatever shows them.

use crate::support::{Place, chat, check, row, text};
use hone_schema::{Part, Rendered, Split};

/// Text that acts on terminals and pages.
const HOSTILE: &str = "\x1b[2J</script><img src=x onerror=alert(1)>\u{202e}\r\u{9b}m";

fn rows() -> Vec<Rendered> {
    let thinker = [
        ("<|bos|>", None, "", Part::Scaffold, 0.0),
        ("be brief", Some(0), "system", Part::Content, 1.0),
        ("q", Some(1), "user", Part::Content, 1.0),
        ("<|assistant|>", Some(2), "assistant", Part::Scaffold, 0.0),
        ("hm", Some(2), "assistant", Part::Reasoning, 1.0),
        (" ", Some(2), "assistant", Part::Scaffold, 1.0),
        ("f(1)", Some(2), "assistant", Part::ToolCall, 1.0),
        ("<|end|>", Some(2), "assistant", Part::Stop, 1.0),
        ("one", Some(3), "tool", Part::Content, 1.0),
        ("<|assistant|>", Some(4), "assistant", Part::Scaffold, 0.0),
        ("no", Some(4), "assistant", Part::Content, 0.0),
        ("<|end|>", Some(4), "assistant", Part::Stop, 0.0),
    ];
    vec![
        chat("a", "hi", "yo", 1.0),
        chat("half", "hi", "yo", 0.5),
        row("thinker", Split::Train, &thinker),
        chat("long", "q", &"x ".repeat(100), 1.0),
        Rendered { source: "t".into(), ..chat(HOSTILE, HOSTILE, "é漢", 1.0) },
    ]
}

fn place() -> Place {
    Place::new(&rows())
}

#[test]
fn a_row_is_drawn_with_its_mask() {
    let place = place();
    let check = |args: &[&str], picture: &str| {
        let shown = place.says(&[&["show"], args].concat());
        assert!(shown.ends_with(&format!("\n\n{picture}\n")), "{shown}");
    };
    check(&["--row", "0"], "<|bos|><|user|>hi<|end|><|assistant|>[yo]{<|end|>}");
    check(&["--id", "half"], "<|bos|><|user|>hi<|end|><|assistant|>[yo](0.5){<|end|>}(0.5)");
    let thinker = "<|bos|>be briefq<|assistant|>[hm][ ][f(1)]{<|end|>}one<|assistant|>no<|end|>";
    check(&["--id", "thinker"], thinker);
    check(&["--id", "thinker", "--color", "always", "--set", "tokenize.train_on=\"every\""], {
        "\x1b[2m<|bos|>\x1b[0m\x1b[32mbe briefq\x1b[0m\x1b[2m<|assistant|>\x1b[0m\x1b[35mhm\x1b[0m\
         \x1b[32m \x1b[0m\x1b[1;32mf(1)\x1b[0m\x1b[1;30;42m<|end|>\x1b[0m\x1b[32mone\x1b[0m\
         \x1b[2m<|assistant|>\x1b[0m\x1b[31mno\x1b[0m\x1b[2m<|end|>\x1b[0m"
    });
}

#[test]
fn every_token_has_a_line_with_its_rule() {
    let place = place();
    let shown = place.says(&["show", "--id", "thinker", "--tokens"]);
    let lines: Vec<Vec<&str>> = shown
        .lines()
        .skip_while(|line| !line.trim_start().starts_with("token"))
        .skip(1)
        .filter(|line| !line.is_empty())
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), 1 + 8 + 1 + 1 + 2 + 1 + 4 + 1 + 3 + 1 + 2 + 1);
    assert_eq!(lines[0], ["0", "0", "0..7", "0", "scaffold", "-", "first", "\"<|bos|>\""]);
    let rule = |n: usize| lines[n][7..].join(" ");
    assert_eq!(lines[9][4..7], ["content", "user", "1"]);
    assert_eq!(rule(9), "policy \"q\"");
    assert_eq!(lines[11][3..7], ["1", "reasoning", "assistant", "2"]);
    assert_eq!(rule(11), "said \"h\"");
    assert_eq!(rule(13), "inside response \" \"");
    assert_eq!(rule(18), "stop \"<|end|>\"");
    assert_eq!(rule(23), "weight 0 \"n\"");
    assert_eq!(rule(25), "untrained stop \"<|end|>\"");
}

#[test]
fn nothing_of_a_row_reaches_the_terminal_as_it_is() {
    let place = place();
    check(&place.tokenize(&[]), 0, &[]);
    for args in [
        &["show", "--row", "0", "--source", "t"][..],
        &["show", "--row", "0", "--source", "t", "--tokens"],
        &["show", "--pack", "0"],
        &["show", "--pack", "0", "--tokens"],
    ] {
        let shown = place.says(args);
        let is_hostile = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!shown.contains(is_hostile), "{shown:?}");
        assert!(shown.contains("⟨U+001B⟩"), "{shown}");
    }
    let missing = place.tokenize(&["show", "--id", HOSTILE, "--set", "tokenize.max_len=9"]);
    assert!(!text(&missing.stdout).contains('\x1b'));
}

#[test]
fn a_pack_is_shown_with_its_borders() {
    let place = place();
    check(&place.tokenize(&[]), 0, &[]);
    let n_packs = place.packs("runs/p/tokenize").len();
    let all = || -> String {
        (0..n_packs).map(|n| place.says(&["show", "--pack", &n.to_string()])).collect()
    };
    let shown = all();
    assert_eq!(shown.matches("── document ").count(), 4, "{shown}");
    assert!(shown.contains("[yo](0.5){<|end|>}(0.5)"), "{shown}");
    // Without the rendered rows there are ids and weights still.
    std::fs::remove_dir_all(place.path("runs/p/template")).unwrap();
    let bare = all();
    assert!(bare.contains("[yo<|end|>]"), "{bare}");
    let none = place.tokenize(&["show", "--pack", "99"]);
    check(&none, 3, &[&format!("split train has {n_packs} packs, counted from 0")]);
    check(&place.tokenize(&["show", "--pack", "0", "--split", "test"]), 3, &["has 0 packs"]);
}

#[test]
fn the_page_holds_every_row_and_no_foreign_markup() {
    let place = place();
    let write = |args: &[&str]| {
        let output = place.tokenize(&[&["show", "--html", "out/page.html"], args].concat());
        check(&output, 0, &["of 5 rows", "out/page.html"]);
        std::fs::read_to_string(place.path("out/page.html")).unwrap()
    };
    let page = write(&[]);
    assert_eq!(page.matches("<article ").count(), 5);
    assert_eq!(page.matches("<script").count(), 1);
    assert_eq!(page.matches("</script>").count(), 1);
    assert!(!page.contains("<img") && !page.contains('\x1b') && !page.contains('\u{202e}'));
    assert!(page.contains("<u>U+001B</u>"));
    assert!(page.contains("refused: too long"), "a refused row has its reason");
    assert!(page.contains("default-src 'none'"));
    assert!(!page.contains("://"), "nothing is fetched");
    let worst = write(&["--worst", "--rows", "2"]);
    assert_eq!(worst.matches("<article ").count(), 2);
    let first = worst.find("<article class=\"refused\"").expect("the refused row is there");
    assert!(worst[..first].find("<article ").is_none(), "and it is the first");
    let one = place.tokenize(&["show", "--html", "p.html", "--source", "t"]);
    check(&one, 0, &["1 of 1 rows"]);
    let none = place.tokenize(&["show", "--html", "p.html", "--split", "eval"]);
    check(&none, 3, &["no rendered row is in that split and source"]);
}
