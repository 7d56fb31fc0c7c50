//! The stage from files to a sealed artefact, and a walk over real data sets.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::Parser;
use hone_schema::{Kind, Manifest, Split};
use hone_store::Sealed;

use super::*;
use crate::args::{Paths, SourceConfig};
use crate::schema::Schema;

/// A temporary directory with rows and a pipeline file, and the stage run on it.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("the file is written");
        }
        Bench { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs with an `[ingest]` table in which `@` stands for the directory; the message is without
    /// it.
    fn run(&self, table: &str, flags: &[&str]) -> Result<Exit, (Exit, String)> {
        let dir = self.path().display().to_string();
        let pipeline = self.path().join("p.toml");
        let text = format!("seed = 3\n{}", table.replace('@', &dir));
        fs::write(&pipeline, text).expect("the pipeline is written");
        let runs = self.path().join("runs");
        let mut line =
            vec!["hone-ingest", "--quiet", "--pipeline", pipeline.to_str().expect("utf-8")];
        line.extend(["--runs", runs.to_str().expect("utf-8")]);
        line.extend(flags);
        let args = Args::try_parse_from(line).expect("good flags");
        let ctx = Context::new(&args.common);
        main(&args, &ctx).map_err(|f| (f.exit, f.message.replace(&format!("{dir}/"), "")))
    }

    fn out(&self) -> std::path::PathBuf {
        self.path().join("runs/p/ingest")
    }

    fn sealed(&self) -> Sealed {
        Sealed::open(&self.out(), ArtefactKind::Conversations).expect("a sealed artefact")
    }

    fn manifest(&self) -> Manifest {
        self.sealed().manifest().clone()
    }

    fn rows(&self) -> Vec<Conversation> {
        let batches = self.sealed().parquet("conversations.parquet").expect("its table");
        batches
            .flat_map(|batch| Conversation::from_batch(&batch.expect("a batch")).expect("its rows"))
            .collect()
    }

    fn rejects(&self) -> Vec<Reject> {
        let batches = self.sealed().parquet("rejects.parquet").expect("its table");
        batches
            .flat_map(|batch| Reject::from_batch(&batch.expect("a batch")).expect("its rows"))
            .collect()
    }
}

const ALPACA: &str = "{\"id\":\"one\",\"instruction\":\"q1\",\"output\":\"r1\",\"topic\":\"t\"}\n\
                      {\"instruction\":\"q2\",\"output\":\"r2\"}\n\
                      {\"instruction\":\"q2\",\"output\":\"r2\"}\n\
                      broken\n\
                      {\"instruction\":\"q3\",\"output\":\"\"}\n";

fn plain(n: usize) -> String {
    (0..n).map(|k| format!("{{\"text\":\"document {k}\"}}\n")).collect()
}

#[test]
fn rows_come_out_whole_and_accounted_for() {
    let bench = Bench::new(&[("a.jsonl", ALPACA), ("plain.jsonl", &plain(30))]);
    let exit = bench.run(
        "[ingest]\nmax_reject_share = 0.5\nreplay_share = 0.5\neval_share = 0\ntest_share = 0\n\
         [[ingest.source]]\npath = \"@/a.jsonl\"\nweight = 0.5\n\
         [[ingest.source]]\npath = \"@/plain.jsonl\"\nreplay = true\n",
        &[],
    );
    assert_eq!(exit, Ok(Exit::Done));
    let rows = bench.rows();
    assert_eq!(rows.len(), 4);
    let first = &rows[0];
    assert_eq!((first.id.as_str(), first.source.as_str(), first.source_row), ("one", "a", 1));
    assert_eq!((first.split, first.kind, first.weight), (Split::Train, Kind::Sft, 0.5));
    assert_eq!(
        first.messages,
        r#"[{"role":"user","content":"q1"},{"role":"assistant","content":"r1"}]"#
    );
    assert_eq!(first.meta.as_deref(), Some(r#"{"topic":"t"}"#));
    assert_eq!((rows[1].id.len(), rows[1].source_row), (32, 2));
    assert!(rows[2..].iter().all(|row| row.kind == Kind::Text && row.text.is_some()));
    let rejects: Vec<_> = bench.rejects().into_iter().map(|r| (r.line, r.reason, r.raw)).collect();
    assert_eq!(rejects[0], (4, "not json".to_owned(), "broken".to_owned()));
    assert_eq!((rejects[1].0, rejects[1].1.as_str()), (5, "empty response"));
    let ledger = bench.manifest().ledger;
    let reasons = |pairs: &[(&str, u64)]| -> BTreeMap<String, u64> {
        pairs.iter().map(|(reason, n)| ((*reason).to_owned(), *n)).collect()
    };
    let (a, plain) = (&ledger.sources["a"], &ledger.sources["plain"]);
    assert_eq!((a.rows_in, a.rows_out), (5, 2));
    assert_eq!(a.rejected, reasons(&[("duplicate", 1), ("empty response", 1), ("not json", 1)]));
    assert_eq!((plain.rows_in, plain.rows_out), (30, 2));
    assert_eq!(plain.rejected, reasons(&[("not sampled", 28)]));
    let report = bench.manifest().report;
    assert_eq!(report["sources"][0]["schema"], "alpaca");
    assert_eq!(
        report["sources"][0]["why"],
        "4 of the first 4 rows have `instruction` and `output`"
    );
    assert_eq!(report["sources"][1]["splits"]["train"]["rows"], 2);
}

#[test]
fn the_same_work_is_fresh_and_other_work_is_not() {
    let bench = Bench::new(&[("a.jsonl", ALPACA)]);
    let table = "[ingest]\nmax_reject_share = 0.5\n[[ingest.source]]\npath = \"@/a.jsonl\"\n";
    assert_eq!(bench.run(table, &[]), Ok(Exit::Done));
    let key = bench.manifest().key;
    assert_eq!(bench.run(table, &[]), Ok(Exit::Done));
    assert_eq!(bench.manifest().key, key);
    assert_eq!(bench.run(table, &["--set", "ingest.dedup=false"]), Ok(Exit::Done));
    assert_ne!(bench.manifest().key, key);
    assert_eq!(bench.rows().len(), 3);
    let ids: Vec<String> = bench.rows().into_iter().map(|row| row.id).collect();
    assert_eq!(ids[2], format!("{}#2", ids[1]));
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let text: String = (0..5000)
        .map(|k| format!("{{\"prompt\":\"p{}\",\"completion\":\"c{}\"}}\n", k % 4000, k % 4000))
        .collect();
    let bench = Bench::new(&[("a.jsonl", &text)]);
    let table = "[ingest]\n[[ingest.source]]\npath = \"@/a.jsonl\"\n";
    let mut seen = Vec::new();
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let exit = pool.install(|| bench.run(table, &["--force"]));
        assert_eq!(exit, Ok(Exit::Done));
        seen.push(fs::read(bench.out().join("manifest.json")).expect("the manifest"));
    }
    assert!(seen[0] == seen[1] && seen[1] == seen[2]);
    assert_eq!(bench.rows().len(), 4000);
}

#[test]
fn too_many_rejects_fail_the_gate_but_are_sealed() {
    let bench = Bench::new(&[("a.jsonl", ALPACA)]);
    let table = "[[ingest.source]]\npath = \"@/a.jsonl\"\n";
    assert_eq!(bench.run(table, &[]), Ok(Exit::GateFailed));
    assert_eq!(bench.run(table, &[]), Ok(Exit::GateFailed), "fresh, and no better for it");
    assert_eq!(bench.run(table, &["--why"]), Ok(Exit::Done));
    assert_eq!(bench.rows().len(), 2);
    let failed = bench.manifest().report["gate"]["failed"].clone();
    assert_eq!(failed.as_array().map(Vec::len), Some(1));
}

#[test]
fn rows_that_say_themselves_they_are_unwanted_are_left_out_without_blame() {
    let rows = "{\"prompt\":\"p\",\"completion\":\"good\",\"label\":true}\n\
                {\"prompt\":\"p\",\"completion\":\"bad\",\"label\":false}\n";
    let bench = Bench::new(&[("kto.jsonl", rows)]);
    assert_eq!(bench.run("[[ingest.source]]\npath = \"@/kto.jsonl\"\n", &[]), Ok(Exit::Done));
    assert_eq!(bench.rows().len(), 1);
    assert_eq!(bench.manifest().ledger.sources["kto"].rejected["labelled as undesired"], 1);
}

#[test]
fn a_directory_is_its_files_in_order() {
    let bench = Bench::new(&[]);
    fs::create_dir(bench.path().join("d")).expect("a directory");
    let write = |name: &str, text: &str| {
        fs::write(bench.path().join("d").join(name), text).expect("written")
    };
    write("b.csv", "prompt,completion\np2,c2\n");
    write("a.jsonl", "{\"prompt\":\"p1\",\"completion\":\"c1\"}\n");
    write("README.md", "# no rows");
    assert_eq!(
        bench.run("[[ingest.source]]\npath = \"@/d\"\nsplit = \"train\"\n", &[]),
        Ok(Exit::Done)
    );
    let rows = bench.rows();
    let seen: Vec<_> = rows.iter().map(|row| (row.source.as_str(), row.source_row)).collect();
    assert_eq!(seen, [("d", 1), ("d", 2)]);
    assert!(rows[1].messages.contains("p2"));
}

#[test]
fn what_is_refused_leaves_nothing_behind() {
    let check = |files: &[(&str, &str)], table: &str, exit: Exit, text: &str| {
        let bench = Bench::new(files);
        let (found, message) = bench.run(table, &[]).expect_err(text);
        assert_eq!(found, exit, "{message}");
        assert!(message.contains(text), "{message}");
        assert!(!bench.out().exists());
        let left: Vec<_> = fs::read_dir(bench.path().join("runs/p"))
            .map(|entries| entries.flatten().map(|e| e.file_name()).collect())
            .unwrap_or_default();
        assert!(left.iter().all(|name| name.to_string_lossy().ends_with(".lock")), "{left:?}");
    };
    let one = "[[ingest.source]]\npath = \"@/a.jsonl\"\n";
    check(&[], one, Exit::Input, "`a.jsonl` does not exist");
    check(&[("a.jsonl", "")], one, Exit::Input, "a.jsonl: there are no rows");
    check(
        &[("a.jsonl", "x\ny\n")],
        one,
        Exit::Input,
        "a.jsonl: none of the first rows is a JSON object",
    );
    check(&[("a.jsonl", "{\"question\":\"q\"}\n")], one, Exit::Input, "they have `question`");
    let empty = "{\"prompt\":\"p\",\"completion\":\"\"}\n";
    check(
        &[("a.jsonl", empty)],
        one,
        Exit::Input,
        "none of its 1 rows can be used as prompt-completion; 1 of them `empty response`, the first at a.jsonl:1",
    );
    check(
        &[("a.jsonl", "[{\"text\":\"a\"},")],
        one,
        Exit::Input,
        "a.jsonl:1: the file ends inside the array",
    );
    check(&[], "[ingest]\neval_shares = 1\n", Exit::Usage, "eval_shares");
    check(&[], "[ingest]\n", Exit::Usage, "names no source");
    let twice = "[[ingest.source]]\npath = \"@/a.jsonl\"\nschema = \"alpacca\"\n";
    check(&[("a.jsonl", empty)], twice, Exit::Usage, "no schema is named `alpacca`");
}

#[test]
fn inspect_says_what_a_file_is() {
    let bench = Bench::new(&[("a.jsonl", ALPACA), ("none.jsonl", "{\"a\":1}\n")]);
    let file = |name: &str| bench.path().join(name).display().to_string();
    let inspect = |flags: &[&str]| bench.run("", &[&["inspect"], flags].concat());
    assert_eq!(inspect(&[&file("a.jsonl")]), Ok(Exit::Done));
    assert_eq!(inspect(&[&file("a.jsonl"), "--json", "--rows", "1"]), Ok(Exit::Done));
    assert_eq!(inspect(&[&file("a.jsonl"), "--schema", "text"]), Ok(Exit::Input));
    assert_eq!(inspect(&[&file("none.jsonl")]).expect_err("no schema").0, Exit::Input);
}

/// What a file of the corpus has to come to.
enum Expect {
    /// Its schema, usable rows, and rejected ones by reason.
    Rows(Schema, u64, &'static [(&'static str, u64)]),
    /// A part of the message.
    Refused(&'static str),
}

/// Counts were taken with independent scripts (`wc`, Python's json and gzip), not with this
/// program.
#[rustfmt::skip]
const CORPUS: &[(&str, Expect)] = {
    use Expect::{Refused, Rows};
    use Schema::{Alpaca, Flan, Messages, Preference, PromptCompletion, Sharegpt, Text};
    const NO_SCHEMA: &str = "no known schema fits";
    &[
        ("bfcl/BFCL_v4_multi_turn_base.json", Refused(NO_SCHEMA)),
        ("bfcl/BFCL_v4_parallel.json", Refused(NO_SCHEMA)),
        ("bfcl/BFCL_v4_simple_python.json", Refused(NO_SCHEMA)),
        ("bfcl/answers_simple_python.json", Refused(NO_SCHEMA)),
        ("dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl", Rows(PromptCompletion, 1000, &[])),
        ("dolly_hhrlhf_small/text_data.jsonl", Rows(Text, 50, &[])),
        ("dolly_hhrlhf_small/train.jsonl", Refused("they have `choices`, `query`, `gold`")),
        ("fastchat_sharegpt_dummy/dummy_conversation.json", Rows(Sharegpt, 500, &[])),
        ("flan_cot/creak_train.tsv", Rows(Flan, 6915, &[])),
        ("flan_cot/qasc_train.tsv", Rows(Flan, 1084, &[])),
        ("flan_cot/strategyqa_train.tsv", Rows(Flan, 2061, &[])),
        ("gpteacher/toolformer-similarity-0.6-dataset.json", Rows(Alpaca, 2396, &[])),
        ("gsm8k/test.jsonl", Rows(PromptCompletion, 1319, &[])),
        ("gsm8k/test_socratic.jsonl", Rows(PromptCompletion, 1319, &[])),
        ("gsm8k/train.jsonl", Rows(PromptCompletion, 7473, &[])),
        ("hh_rlhf/test.jsonl.gz", Rows(Preference, 2308, &[("empty response", 4)])),
        // One object over many lines: a configuration, no rows.
        ("llamafactory_demo/dataset_info.json", Refused("none of the first rows is a JSON object")),
        ("llamafactory_demo/dpo_en_demo.json", Rows(Preference, 300, &[])),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", Rows(Sharegpt, 300, &[])),
        ("llamafactory_demo/identity.json", Rows(Alpaca, 91, &[])),
        ("llamafactory_demo/kto_en_demo.json", Rows(Messages, 150, &[("labelled as undesired", 150)])),
        ("llamafactory_demo/mllm_demo.json", Rows(Messages, 0, &[("not text", 6)])),
        ("llamafactory_demo/reason_tool_use_demo_50.jsonl", Rows(Messages, 50, &[])),
        ("llamafactory_demo/v1_dpo_demo.jsonl", Rows(Preference, 10, &[])),
        ("llamafactory_demo/v1_sft_demo.jsonl", Rows(Messages, 500, &[])),
        ("mlx_wikisql/test.jsonl", Rows(Text, 100, &[])),
        ("mlx_wikisql/train.jsonl", Rows(Text, 1000, &[])),
        ("mlx_wikisql/valid.jsonl", Rows(Text, 100, &[])),
        // Single messages and trees of them: `text` beside a role is no document.
        ("oasst_samples/en_100_message.jsonl", Refused(NO_SCHEMA)),
        ("oasst_samples/en_100_text.jsonl", Refused("none of the first rows is a JSON object")),
        ("oasst_samples/en_100_tree.jsonl", Refused(NO_SCHEMA)),
        ("oasst_samples/realistic_seed_data.json", Refused(NO_SCHEMA)),
        ("self_instruct/seed_tasks.jsonl", Rows(Alpaca, 175, &[])),
        ("self_instruct/text-davinci-003_predictions.jsonl", Rows(Alpaca, 252, &[])),
        ("self_instruct/user_oriented_instructions.jsonl", Rows(Alpaca, 252, &[])),
        ("t0_p3_prompt_completion/ag_news_classify.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/ag_news_classify_question_first.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/ag_news_classify_with_choices.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/ag_news_classify_with_choices_question_first.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/ag_news_recommend.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/ag_news_which_section.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/ag_news_which_section_choices.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/commonsense_qa_answer_given_question_without_options.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/commonsense_qa_answer_to_question.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/commonsense_qa_most_suitable_answer.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/commonsense_qa_question_answering.jsonl", Rows(PromptCompletion, 200, &[])),
        ("t0_p3_prompt_completion/commonsense_qa_question_to_answer_index.jsonl", Rows(PromptCompletion, 200, &[])),
    ]
};

/// The corpus folder, or a word that the test was left out.
fn corpus() -> Option<PathBuf> {
    let corpus = std::env::var_os("HONE_CORPUS").map(PathBuf::from);
    if corpus.is_none() {
        let ctx = Context::new(&Common::default());
        ctx.note("skipped: HONE_CORPUS is not set, so there is no corpus to walk over");
    }
    corpus
}

#[test]
fn real_data_sets_come_to_what_is_in_them() {
    let Some(corpus) = corpus() else { return };
    let rows = corpus.join("rows");
    let mut files = Vec::new();
    for entry in fs::read_dir(&rows).expect("the corpus").flatten() {
        for file in input::list(&entry.path()).expect("its folder") {
            if read::is_rows(&file) {
                files.push(file.strip_prefix(&rows).expect("below it").display().to_string());
            }
        }
    }
    files.sort();
    let named: Vec<&str> = CORPUS.iter().map(|(name, _)| *name).collect();
    assert_eq!(files, named, "every file of the corpus has an outcome");
    let ctx = Context::new(&Common { quiet: true, ..Common::default() });
    for (name, expect) in CORPUS {
        let path = rows.join(name);
        let source = SourceConfig { path: Paths::One(path.clone()), ..SourceConfig::default() };
        let plan =
            Config { source: vec![source], ..Config::default() }.resolve(1).expect("a good plan");
        let found = detect(&plan.sources[0], std::slice::from_ref(&path));
        match (found, expect) {
            (Ok(detected), Expect::Rows(schema, usable, rejected)) => {
                assert_eq!(detected.schema, *schema, "{name}");
                let opened = Opened { source: &plan.sources[0], files: vec![path], detected };
                let mut tally = Tally::default();
                walk(&ctx, &opened, &mut |file, raw, row| {
                    match row {
                        Ok(row) => tally.pass(&row),
                        Err(fault) => tally.reject(&fault, file, raw.line),
                    }
                    Ok(())
                })
                .unwrap_or_else(|failure| panic!("{name}: {}", failure.message));
                let reasons: Vec<_> = tally.reasons().into_iter().map(|(r, n, _)| (r, n)).collect();
                assert_eq!(
                    (tally.n_passed, reasons.as_slice()),
                    (*usable, *rejected),
                    "{name}: {:?}",
                    tally.reasons()
                );
            }
            (Err(failure), Expect::Refused(text)) => {
                assert!(failure.message.contains(text), "{name}: {}", failure.message);
            }
            (found, _) => panic!("{name}: {:?}", found.map_err(|f| f.message)),
        }
    }
}

/// Files that other programs trip over: none may do more than refuse, or give rows.
#[test]
fn foreign_bad_data_is_refused_or_read_and_never_a_crash() {
    let Some(corpus) = corpus() else { return };
    let mut n_files = BTreeMap::new();
    for folder in
        ["json_test_suite/test_parsing", "parquet_testing/bad_data", "parquet_testing/data"]
    {
        for path in input::list(&corpus.join("conformance").join(folder)).expect("the folder") {
            *n_files.entry(folder).or_insert(0) += 1;
            let Ok(rows) = read::open(&path, &Default::default()) else { continue };
            for row in rows.take(2000) {
                let Ok(row) = row else { break };
                let _ = convert(&row.bytes, Schema::Text, &Default::default());
            }
        }
    }
    let expect = BTreeMap::from([
        ("json_test_suite/test_parsing", 318),
        ("parquet_testing/bad_data", 9),
        ("parquet_testing/data", 90),
    ]);
    assert_eq!(n_files, expect);
}
