//! What bad input gets: a message with file, line and what to do, the documented exit code, and
//! nothing half-written.

use crate::fixture::{PIPELINE, Place, STAGES, differing, rows};

/// A run of `hone-<stage>` that is refused.
struct Case<'a> {
    stage: &'a str,
    args: &'a [&'a str],
    /// What is done to the place before.
    spoil: &'a dyn Fn(&Place),
    /// Exit code and stderr.
    said: &'a str,
}

const P: [&str; 2] = ["--pipeline", "p.toml"];

/// Runs the cases, each in a copy of `place`, and compares what is said word for word.
fn check(place: &Place, cases: &[Case]) {
    let mut faults = String::new();
    for case in cases {
        let place = place.copy();
        (case.spoil)(&place);
        let before = place.visible();
        let output = place.tree.run(&format!("hone-{}", case.stage), case.args);
        if output.said() != case.said {
            let (stage, args, want, got) = (case.stage, case.args, case.said, output.said());
            faults.push_str(&format!("{stage} {args:?}\n--- expected\n{want}--- said\n{got}\n"));
        }
        let changed = differing(&before, &place.visible());
        if !changed.is_empty() || !place.leftovers().is_empty() || !output.stdout.is_empty() {
            faults.push_str(&format!("{} {:?} wrote {changed:?}\n", case.stage, case.args));
        }
    }
    assert!(faults.is_empty(), "\n{faults}");
}

/// A change of the pipeline file.
fn file(from: &'static str, to: &'static str) -> impl Fn(&Place) {
    assert!(PIPELINE.contains(from), "{from} is not in the pipeline");
    move |place| {
        place.tree.write("p.toml", PIPELINE.replacen(from, to, 1));
    }
}

/// Other rows.
fn rows_are(text: &'static str) -> impl Fn(&Place) {
    move |place| {
        place.tree.write("rows.jsonl", text);
    }
}

fn nothing(_: &Place) {}

#[test]
fn every_program_refuses_a_pipeline_that_is_not_there_or_not_one() {
    let place = Place::new();
    place.tree.write("dir/x", "");
    let table = |place: &Place| {
        place.tree.write("p.toml", format!("{PIPELINE}\n[trian]\nlr = 1\n"));
    };
    let top = file("seed = 7", "sead = 7");
    for stage in STAGES {
        let case = |args, spoil, said| Case { stage, args, spoil, said };
        check(
            &place,
            &[
                case(
                    &["--pipeline", "nope.toml"],
                    &nothing,
                    "exit 2\n\
                     error: `nope.toml` does not exist\n\
                     hint: pipelines/ has examples\n",
                ),
                case(
                    &["--pipeline", "dir"],
                    &nothing,
                    "exit 2\n\
                     error: cannot read `dir`: is a directory\n\
                     hint: pipelines/ has examples\n",
                ),
                case(
                    &P,
                    &table,
                    "exit 2\n\
                     error: p.toml:35: unknown key or table `trian`\n\
                     hint: did you mean `train`?\n",
                ),
                case(
                    &P,
                    &top,
                    "exit 2\n\
                     error: p.toml:2: unknown key or table `sead`\n\
                     hint: did you mean `seed`?\n",
                ),
                case(
                    &P,
                    &file("seed = 7", "seed = \"x\""),
                    "exit 2\n\
                     error: p.toml: `seed` is \"x\", which is not an integer of at least 0\n",
                ),
                case(
                    &P,
                    &file("seed = 7", "seed = "),
                    "exit 2\n\
                     error: p.toml:2: string values must be quoted, expected literal string\n",
                ),
                case(
                    &[P[0], P[1], "--set", "train.lr"],
                    &nothing,
                    "exit 2\n\
                     error: `--set train.lr`: there is no `=`\n\
                     hint: write it as `--set train.lr=2e-4`\n",
                ),
                case(
                    &[P[0], P[1], "--set", "trian.lr=1"],
                    &nothing,
                    "exit 2\n\
                     error: `--set trian.lr=1`: unknown key or table `trian`\n\
                     hint: did you mean `train`?\n",
                ),
                case(
                    &[P[0], P[1], "--set", "seed.x=1"],
                    &nothing,
                    "exit 2\n\
                     error: `--set seed.x=1`: `x` does not lie in a table\n\
                     hint: write it as `--set train.lr=2e-4`\n",
                ),
                case(
                    &[P[0], P[1], "--threads", "0"],
                    &nothing,
                    "exit 2\n\
                     error: `--threads 0` leaves nobody to work\n\
                     hint: leave the flag out\n",
                ),
            ],
        );
    }
}

#[test]
fn a_key_that_is_unknown_missing_or_mistyped_is_named_with_its_line() {
    let place = Place::new();
    let case = |stage, spoil, said| Case { stage, args: &P, spoil, said };
    check(
        &place,
        &[
            case(
                "ingest",
                &file("eval_share", "evalshare"),
                "exit 2\n\
                 error: p.toml:5: [ingest] unknown key `evalshare`\n\
                 hint: did you mean `eval_share`?\n",
            ),
            case(
                "ingest",
                &file("name = \"sums\"", "nmae = \"sums\""),
                "exit 2\n\
                 error: p.toml:9: [ingest] unknown key `nmae`\n\
                 hint: did you mean `name`?\n",
            ),
            case(
                "ingest",
                &file("eval_share = 0.1", "eval_share = \"much\""),
                "exit 2\n\
                 error: p.toml:5: [ingest] invalid type: string \"much\", expected a number\n",
            ),
            case(
                "ingest",
                &file("eval_share = 0.1", "eval_share = 1.5"),
                "exit 2\n\
                 error: p.toml:5: [ingest] `eval_share` is 1.5, not a share from 0 to 1\n",
            ),
            case(
                "ingest",
                &file("path = \"rows.jsonl\"", "schema = \"alpacca\""),
                "exit 2\n\
                 error: p.toml:4: [ingest] source 0 has no `path`\n",
            ),
            case(
                "ingest",
                &file("[[ingest.source]]\nname = \"sums\"\npath = \"rows.jsonl\"", ""),
                "exit 2\n\
                 error: p.toml:4: [ingest] names no source\n\
                 hint: add `[[ingest.source]]` with `path = \"rows.jsonl\"` to the pipeline file\n",
            ),
            case(
                "template",
                &file("template = \"chatml\"", "tmplate = \"chatml\""),
                "exit 2\n\
                 error: p.toml:13: [template] unknown key `tmplate`\n\
                 hint: did you mean `template`?\n",
            ),
            case(
                "tokenize",
                &file("max_len = 64", ""),
                "exit 2\n\
                 error: p.toml:15: [tokenize] `max_len` is not given\n\
                 hint: it has no default: write it there, or add `--set tokenize.max_len=...`\n",
            ),
            case(
                "tokenize",
                &file("max_len = 64", "max_len = 1"),
                "exit 2\n\
                 error: p.toml:16: [tokenize] `max_len` is 1\n\
                 hint: a pack holds 2 to 16777216 tokens\n",
            ),
            case(
                "tokenize",
                &file("max_len = 64", "max_len = -1"),
                "exit 2\n\
                 error: p.toml:16: [tokenize] invalid value: integer `-1`, expected a whole \
                 number of at least 0\n",
            ),
            case(
                "tokenize",
                &file("max_len = 64", "maxlen = 64"),
                "exit 2\n\
                 error: p.toml:16: [tokenize] unknown key `maxlen`\n\
                 hint: did you mean `max_len`?\n",
            ),
            case(
                "tokenize",
                &file("too_long = \"drop\"", ""),
                "exit 2\n\
                 error: p.toml:15: [tokenize] `too_long` is not given\n\
                 hint: it has no default: write it there, or add `--set tokenize.too_long=...`\n",
            ),
            case(
                "tokenize",
                &file("too_long = \"drop\"", "too_long = \"chop\""),
                "exit 2\n\
                 error: p.toml:17: [tokenize] invalid value: string \"chop\", expected `drop`, \
                 `split`, `error`, `{ truncate = \"keep-response\" }`, `{ truncate = \"head\" }` \
                 or `{ truncate = \"tail\" }`\n",
            ),
            case(
                "train",
                &file("lr = 1e-2", ""),
                "exit 2\n\
                 error: p.toml:19: [train] `lr` is not given\n\
                 hint: it has no default: 2e-4 is a common start for LoRA, 1e-5 for full \
                 fine-tuning\n",
            ),
            case(
                "train",
                &file("lr = 1e-2", "lrr = 1e-2"),
                "exit 2\n\
                 error: p.toml:24: [train] unknown key `lrr`\n\
                 hint: did you mean `lr`?\n",
            ),
            case(
                "train",
                &file("lr = 1e-2", "lr = \"1e-2\""),
                "exit 2\n\
                 error: p.toml:24: [train] invalid type: string \"1e-2\", expected a number\n",
            ),
            case(
                "train",
                &file("lr = 1e-2", "lr = -1"),
                "exit 2\n\
                 error: p.toml:24: [train] `lr` = -1 is not 0 or more\n",
            ),
            case(
                "train",
                &file("rank = 4", "rank = 0"),
                "exit 2\n\
                 error: p.toml:20: [train] `rank` is 0, and an adapter has at least 1\n",
            ),
            case(
                "template",
                &file("template = \"chatml\"", "colour = 4"),
                "exit 2\n\
                 error: p.toml:13: [template] unknown key `colour`\n\
                 hint: known are template, date, variables, rewritten, max_reject_share\n",
            ),
            case(
                "train",
                &file("rank = 4", "method = \"qora\""),
                "exit 2\n\
                 error: p.toml:20: [train] unknown variant `qora`, expected one of `lora`, `qlora`, `full`\n",
            ),
            case(
                "train",
                &file("base = \"base\"", ""),
                "exit 2\n\
                 error: p.toml: no base model is given\n\
                 hint: set `base = \"<model directory>\"` at the top of the pipeline file\n",
            ),
            case(
                "merge",
                &file("dtype = \"f32\"", "dtyp = \"f32\""),
                "exit 2\n\
                 error: p.toml:30: [merge] unknown key `dtyp`\n\
                 hint: did you mean `dtype`?\n",
            ),
            case(
                "merge",
                &file("dtype = \"f32\"", "dtype = \"f8\""),
                "exit 2\n\
                 error: p.toml:30: [merge] unknown variant `f8`, expected one of `base`, `f32`, \
                 `bf16`\n",
            ),
            case(
                "merge",
                &file("dtype = \"f32\"", "check_rows = 0"),
                "exit 2\n\
                 error: p.toml:30: [merge] `check_rows` is 0\n\
                 hint: a merge that nothing was computed with is not known to be one; give 1 or \
                 more\n",
            ),
        ],
    );
    let sets = [
        (
            "train",
            "train.lrr=1",
            "exit 2\n\
             error: `--set train.lrr=1`: [train] unknown key `lrr`\n\
             hint: did you mean `lr`?\n",
        ),
        (
            "train",
            "train.lr=fast",
            "exit 2\n\
             error: `--set train.lr=fast`: [train] invalid type: string \"fast\", expected a \
             number\n",
        ),
        (
            "train",
            "train.rank=0",
            "exit 2\n\
             error: `--set train.rank=0`: [train] `rank` is 0, and an adapter has at least 1\n",
        ),
        (
            "ingest",
            "ingest.source.1.name=x",
            "exit 2\n\
             error: `--set ingest.source.1.name=x`: `1` is not a table or a list\n\
             hint: write it as `--set train.lr=2e-4`\n",
        ),
        (
            "eval",
            "eval.max_new=0",
            "exit 2\n\
             error: `--set eval.max_new=0`: [eval] `max_new`, `batch_size` and `max_prompts` are at \
             least 1\n",
        ),
        (
            "eval",
            "eval.compute=f16",
            "exit 2\n\
             error: `--set eval.compute=f16`: [eval] unknown variant `f16`, expected `f32` or `bf16`\n",
        ),
        ("eval", "eval.max_nwe=1", "exit 2\n\
                 error: `--set eval.max_nwe=1`: [eval] unknown key `max_nwe`\n\
                 hint: did you mean `max_new`?\n"),
        (
            "tokenize",
            "tokenize.max_len=1",
            "exit 2\n\
             error: `--set tokenize.max_len=1`: [tokenize] `max_len` is 1\n\
             hint: a pack holds 2 to 16777216 tokens\n",
        ),
    ]
    .map(|(stage, set, said)| (stage, [P[0], P[1], "--set", set], said));
    let cases: Vec<Case> = sets
        .iter()
        .map(|(stage, args, said)| Case { stage, args, spoil: &nothing, said })
        .collect();
    check(&place, &cases);
    // A mistake in the file has its line also where something else is overridden.
    let args = [P[0], P[1], "--set", "train.rank=8"];
    let spoil = file("lr = 1e-2", "lrr = 1e-2");
    check(
        &place,
        &[Case {
            stage: "train",
            args: &args,
            spoil: &spoil,
            said: "exit 2\n\
                 error: p.toml:24: [train] unknown key `lrr`\n\
                 hint: did you mean `lr`?\n",
        }],
    );
}

#[test]
fn rows_that_are_none_are_refused_with_file_and_line() {
    let place = Place::new();
    let case = |spoil, said| Case { stage: "ingest", args: &P, spoil, said };
    check(
        &place,
        &[
            case(
                &|place: &Place| place.tree.remove("rows.jsonl"),
                "exit 3\n\
                 error: `rows.jsonl` does not exist\n\
                 hint: correct the path; it starts where the program is started\n",
            ),
            case(
                &rows_are(""),
                "exit 3\n\
                 ingest: runs because there is no sealed output yet\n\
                 error: rows.jsonl: there are no rows\n",
            ),
            case(
                &rows_are("not json\n"),
                "exit 3\n\
                 ingest: runs because there is no sealed output yet\n\
                 error: rows.jsonl: none of the first rows is a JSON object; line 1: not json: \
                 expected ident, column 2\n\
                 hint: known are alpaca, sharegpt, messages, prompt-completion, flan, text, \
                 preference, one object a line or in one array; `rename = { old = \"new\" }` \
                 gives columns the names they have there\n",
            ),
            case(
                &rows_are("{\"messages\": []}\n"),
                "exit 3\n\
                 ingest: runs because there is no sealed output yet\n\
                 ingest: sums: schema messages (1 of the first 1 rows have `messages`)\n\
                 error: source `sums`: none of its 1 rows can be used as messages; 1 of them \
                 `empty conversation`, the first at rows.jsonl:1: there are no messages\n\
                 hint: `hone-ingest inspect rows.jsonl` shows rows and reasons\n",
            ),
            case(
                &rows_are("{\"instruction\": \"a\", \"output\": \"\"}\n"),
                "exit 3\n\
                 ingest: runs because there is no sealed output yet\n\
                 ingest: sums: schema alpaca (1 of the first 1 rows have `instruction` and \
                 `output`)\n\
                 error: source `sums`: none of its 1 rows can be used as alpaca; 1 of them \
                 `empty response`, the first at rows.jsonl:1: the response is empty\n\
                 hint: `hone-ingest inspect rows.jsonl` shows rows and reasons\n",
            ),
            case(
                &rows_are("{\"question\": \"a\"}\n"),
                "exit 3\n\
                 ingest: runs because there is no sealed output yet\n\
                 error: rows.jsonl: no known schema fits the first 1 rows; they have `question`\n\
                 hint: known are alpaca, sharegpt, messages, prompt-completion, flan, text, \
                 preference, one object a line or in one array; `rename = { old = \"new\" }` \
                 gives columns the names they have there\n",
            ),
            case(
                &file("path = \"rows.jsonl\"", "path = \"base\""),
                "exit 3\n\
                 ingest: sums: model.safetensors left aside\n\
                 ingest: runs because there is no sealed output yet\n\
                 error: base/config.json: no known schema fits the first 1 rows; they have \
                 `architectures`, `model_type`, `hidden_act`, `hidden_size`, \
                 `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, \
                 `num_key_value_heads`, `head_dim`, `max_position_embeddings`, `rms_norm_eps`, \
                 `rope_theta`; line 1: not json: EOF while parsing an object, column 1\n\
                 hint: known are alpaca, sharegpt, messages, prompt-completion, flan, text, \
                 preference, one object a line or in one array; `rename = { old = \"new\" }` \
                 gives columns the names they have there\n",
            ),
        ],
    );
}

/// More faulty rows than are allowed: the output is there to be looked at, and the exit code says
/// so, also when it is fresh.
#[test]
fn too_many_faulty_rows_fail_a_gate() {
    let place = Place::new();
    let text = format!("{}not json\n{{\"messages\": []}}\n", rows(40));
    place.tree.write("rows.jsonl", text);
    assert_eq!(
        place.run("ingest", &[]).said(),
        "exit 1\n\
         ingest: runs because there is no sealed output yet\n\
         ingest: sums: schema alpaca (42 of the first 43 rows have `instruction` and `output`)\n\
         error: source `sums`: 3 of 44 rows are rejected (6.8 %, allowed are 5.0 %); 1 of them \
         `empty response`, the first at rows.jsonl:42: the response is empty\n\
         hint: look at rejects.parquet, then mend the rows or raise `ingest.max_reject_share`\n\
         ingest: 41 of 44 rows kept: 34 train, 2 eval, 5 test; not kept: 1 empty response, 1 missing \
         field, 1 not json  runs/p/ingest\n"
    );
    assert_eq!(
        place.run("ingest", &[]).said(),
        "exit 1\n\
         ingest: fresh  runs/p/ingest\n\
         warning: ingest: a gate failed when this was made\n\
         warning: source `sums`: 3 of 44 rows are rejected (6.8 %, allowed are 5.0 %); 1 of them \
         `empty response`, the first at rows.jsonl:42: the response is empty\n"
    );
    assert!(place.artefact("ingest").contains_key("runs/p/ingest/rejects.parquet"));
}

#[test]
fn rows_that_do_not_fit_are_refused_with_the_reason() {
    let place = Place::after(&["ingest", "template"]);
    let case = |spoil, said| Case { stage: "tokenize", args: &P, spoil, said };
    check(
        &place,
        &[
            case(
                &file("max_len = 64", "max_len = 8"),
                "exit 3\n\
                 tokenize: runs because there is no sealed output yet\n\
                 error: none of 41 rows can be trained: 41 of them for `too long`\n\
                 hint: raise tokenize.max_len\n",
            ),
            case(
                &file(
                    "max_len = 64\ntoo_long = \"drop\"",
                    "max_len = 8\ntoo_long = { truncate = \"head\" }",
                ),
                "exit 3\n\
                 tokenize: runs because there is no sealed output yet\n\
                 error: none of 41 rows can be trained: 41 of them for `response cut off`\n\
                 hint: raise tokenize.max_len\n",
            ),
            case(
                &file("too_long = \"drop\"", "too_long = \"error\""),
                "exit 3\n\
                 tokenize: runs because there is no sealed output yet\n\
                 error: row `e67770affe2d12d8c6bb48318363f672` of `sums`: 174 tokens, a pack \
                 holds 64\n\
                 hint: raise tokenize.max_len, or set tokenize.too_long to \"drop\", \"split\" or \
                 { truncate = \"keep-response\" }; `hone-tokenize show --id \
                 e67770affe2d12d8c6bb48318363f672` prints the row\n",
            ),
        ],
    );
}

#[test]
fn an_artefact_that_is_missing_or_no_artefact_names_the_program_that_makes_it() {
    let place = Place::after(&STAGES);
    let gone = |dir: &'static str| move |place: &Place| place.tree.remove(dir);
    let case = |stage, spoil, said| Case { stage, args: &P, spoil, said };
    check(
        &place,
        &[
            case(
                "template",
                &gone("runs/p/ingest"),
                "exit 3\n\
                 error: `runs/p/ingest` does not exist\n\
                 hint: run `hone-ingest` first, or say with `--runs` where its output lies\n",
            ),
            case(
                "tokenize",
                &gone("runs/p/template"),
                "exit 3\n\
                 error: `runs/p/template` does not exist\n\
                 hint: run `hone-template` first, or say with `--runs` where its output lies\n",
            ),
            case(
                "train",
                &gone("runs/p/tokenize"),
                "exit 3\n\
                 error: `runs/p/tokenize` does not exist\n\
                 hint: run `hone-tokenize` first, or say with `--runs` where its output lies\n",
            ),
            case(
                "merge",
                &gone("runs/p/train"),
                "exit 3\n\
                 error: `runs/p/train` does not exist\n\
                 hint: run `hone-train` first, or say with `--runs` where its output lies\n",
            ),
            case(
                "eval",
                &gone("runs/p/merge"),
                "exit 3\n\
                 error: `runs/p/merge` does not exist\n\
                 hint: run `hone-merge` first, or say with `--runs` where its output lies\n",
            ),
            case(
                "template",
                &gone("runs/p/ingest/manifest.json"),
                "exit 3\n\
                 error: `runs/p/ingest` is not a sealed artefact: it has no manifest.json\n\
                 hint: run `hone-ingest` first, or say with `--runs` where its output lies\n",
            ),
            case(
                "ingest",
                &gone("runs/p/ingest/manifest.json"),
                "exit 3\n\
                 ingest: runs because there is no sealed output yet\n\
                 error: `runs/p/ingest` exists and is not an artefact of hone\n\
                 hint: choose another `--out`, or move it away\n",
            ),
            case(
                "train",
                &gone("runs/p/tokenize/train.arrow"),
                "exit 3\n\
                 error: `runs/p/tokenize/train.arrow` does not exist\n\
                 hint: run `hone-tokenize` first, or say with `--runs` where its output lies\n",
            ),
        ],
    );
    let args = [P[0], P[1], "--out", "base"];
    check(
        &place,
        &[Case {
            stage: "ingest",
            args: &args,
            spoil: &nothing,
            said: "exit 3\n\
                 ingest: runs because there is no sealed output yet\n\
                 error: `base` exists and is not an artefact of hone\n\
                 hint: choose another `--out`, or move it away\n",
        }],
    );
}

#[test]
fn an_artefact_edited_by_hand_is_refused() {
    let place = Place::after(&STAGES);
    // A byte in the middle of a file; the output of the reader is stale, so that it reads.
    let flips = [
        ("template", "ingest", "conversations.parquet"),
        ("tokenize", "template", "rendered.parquet"),
        ("tokenize", "template", "template.json"),
        ("train", "tokenize", "train.arrow"),
        ("train", "tokenize", "eval.arrow"),
        ("merge", "train", "adapter_model.safetensors"),
        ("merge", "train", "adapter_config.json"),
        ("merge", "tokenize", "tokenizer.json"),
        ("eval", "merge", "model.safetensors"),
        ("eval", "tokenize", "prompts.parquet"),
    ];
    for (stage, made_by, name) in flips {
        let place = place.copy();
        place.flip(&format!("runs/p/{made_by}/{name}"));
        let before = place.visible();
        let output = place.run(stage, &["--force", "--quiet"]);
        let said = format!(
            "exit 3\nerror: `runs/p/{made_by}/{name}` was changed after it was sealed: its hash was \
             [HASH], it is [HASH]\nhint: run `hone-{made_by} --force` to make it again; artefacts \
             are not edited by hand\n"
        );
        assert_eq!(output.said(), said, "{stage}");
        assert_eq!(differing(&before, &place.visible()), Vec::<String>::new());
        assert_eq!(place.leftovers(), Vec::<String>::new());
        place.done(made_by, &["--force"]);
        place.done(stage, &["--force"]);
    }
}

/// Replaces a text in the manifest of the packs.
fn manifest(from: &'static str, to: &'static str) -> impl Fn(&Place) {
    move |place| {
        let path = "runs/p/tokenize/manifest.json";
        let text = std::fs::read_to_string(place.tree.path(path)).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        place.tree.write(path, text.replacen(from, to, 1));
    }
}

#[test]
fn a_manifest_edited_by_hand_is_refused() {
    let place = Place::after(&["ingest", "template", "tokenize"]);
    let case = |spoil, said| Case { stage: "train", args: &P, spoil, said };
    check(
        &place,
        &[
            case(
                &manifest("\"rows_out\": 40", "\"rows_out\": 39"),
                "exit 3\n\
                 error: `runs/p/tokenize/manifest.json`: the ledger does not balance: source \
                 `sums`: 41 rows in, but 39 out and 1 accounted for as lost\n\
                 hint: run `hone-tokenize --force` to make it again; artefacts are not edited by \
                 hand\n",
            ),
            case(
                &manifest("\"schema\": 4", "\"schema\": 999"),
                "exit 3\n\
                 error: `runs/p/tokenize/manifest.json`: the manifest has schema 999, this \
                 program reads 4\n\
                 hint: run `hone-tokenize --force` to make it again; artefacts are not edited by \
                 hand\n",
            ),
            case(
                &manifest("\"name\": \"eval.arrow\"", "\"name\": \"../eval.arrow\""),
                "exit 3\n\
                 error: `runs/p/tokenize/manifest.json`: the manifest is not one of hone's: file \
                 name \"../eval.arrow\" has '.'; letters, digits, `.`, `_` and `-` may stand \
                 there\n\
                 hint: run `hone-tokenize --force` to make it again; artefacts are not edited by \
                 hand\n",
            ),
            case(
                &manifest("\"kind\": \"packs\"", "\"kind\": \"rendered\""),
                "exit 3\n\
                 error: `runs/p/tokenize` holds rendered, not packs\n\
                 hint: run `hone-tokenize` to make it again\n",
            ),
            case(
                &manifest("\"kind\"", "kind"),
                "exit 3\n\
                 error: `runs/p/tokenize/manifest.json`: the manifest is not one of hone's: key \
                 must be a string at line 3 column 3\n\
                 hint: run `hone-tokenize --force` to make it again; artefacts are not edited by \
                 hand\n",
            ),
            case(
                &manifest("\"kind\"", "\"surprise\": 1, \"kind\""),
                "exit 3\n\
                 error: `runs/p/tokenize/manifest.json`: the manifest is not one of hone's: \
                 unknown field `surprise`, expected one of `schema`, `kind`, `stage`, `key`, \
                 `program`, `config`, `inputs`, `files`, `ledger`, `report`\n\
                 hint: run `hone-tokenize --force` to make it again; artefacts are not edited by \
                 hand\n",
            ),
        ],
    );
    // The program that made it makes it again.
    manifest("\"kind\"", "kind")(&place);
    let output = place.done("tokenize", &[]);
    assert!(output.stderr.starts_with("tokenize: runs because its output cannot be used: "));
}

#[test]
fn a_directory_that_is_no_model_is_refused() {
    let place = Place::after(&["ingest", "template", "tokenize"]);
    let gone = |name: &'static str| move |place: &Place| place.tree.remove(name);
    let is = |name: &'static str, text: &'static str| {
        move |place: &Place| {
            place.tree.write(name, text);
        }
    };
    let case = |stage, spoil, said| Case { stage, args: &P, spoil, said };
    check(
        &place,
        &[
            case(
                "template",
                &gone("base"),
                "exit 3\n\
                 error: `base` is not a model directory: it does not exist\n\
                 hint: a model directory has config.json, tokenizer.json and *.safetensors; \
                 `hone-fetch model` makes one\n",
            ),
            case(
                "train",
                &gone("base"),
                "exit 3\n\
                 error: `base` is not a model directory: it does not exist\n\
                 hint: a model directory has config.json, tokenizer.json and *.safetensors; \
                 `hone-fetch model` makes one\n",
            ),
            case(
                "train",
                &gone("base/config.json"),
                "exit 3\n\
                 error: `base` is not a model directory: it has no `config.json`\n\
                 hint: a model directory has config.json, tokenizer.json and *.safetensors; \
                 `hone-fetch model` makes one\n",
            ),
            case(
                "train",
                &gone("base/model.safetensors"),
                "exit 3\n\
                 train: runs because there is no sealed output yet\n\
                 error: `base` is not a model directory: it has no weights (`*.safetensors`)\n\
                 hint: a model directory has config.json, tokenizer.json and *.safetensors; \
                 `hone-fetch model` makes one\n",
            ),
            case(
                "train",
                &is("base/model.safetensors", "weights"),
                "exit 3\n\
                 train: runs because there is no sealed output yet\n\
                 error: base/model.safetensors: not a valid safetensors file: it has only 7 bytes\n\
                 hint: fetch or copy the model again; the file is not whole, or another kind\n",
            ),
            case(
                "train",
                &is("base/config.json", "{"),
                "exit 3\n\
                 error: base: config.json: not JSON: EOF while parsing an object at line 1 \
                 column 1\n",
            ),
            case(
                "train",
                &is("base/config.json", "{\"model_type\": \"gpt2\"}"),
                "exit 3\n\
                 error: base: config.json: `model_type` = \"gpt2\" is not supported: this \
                 version knows llama, smollm3, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, \
                 granite, olmo2\n",
            ),
            case(
                "tokenize",
                &gone("base/tokenizer.json"),
                "exit 3\n\
                 error: base: there is no tokenizer.json\n\
                 hint: hone needs the tokenizer in the form of the tokenizers library\n",
            ),
            case(
                "tokenize",
                &is("base/tokenizer.json", "{}"),
                "exit 3\n\
                 tokenize: runs because the input `tokenizer` changed\n\
                 error: base/tokenizer.json: tokenizer.json is not a tokenizer: Model missing. \
                 at line 1 column 2\n",
            ),
            case(
                "template",
                &file("template = \"chatml\"", "template = \"auto\""),
                "exit 3\n\
                 error: the base model has no chat template\n\
                 hint: choose a built-in one with `--set template.template=chatml` (there are \
                 alpaca, chatml, command, deepseek, gemma, llama2, llama3, mistral, phi3, phi4, \
                 plain, tulu, vicuna, zephyr)\n",
            ),
            case(
                "template",
                &file("template = \"chatml\"", "template = \"chatmll\""),
                "exit 2\n\
                 error: there is no built-in template `chatmll`\n\
                 hint: did you mean `chatml`? A file is given as `{ file = \"x.jinja\" }`\n",
            ),
        ],
    );
}
