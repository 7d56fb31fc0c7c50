//! The stage: measures one model after the other, seals, says the table.

use hone_cli::{Context, Exit, Failure, Outcome, StagePlan, run_stage};
use hone_kernels::{Backend, Cpu, OnBackend, Place, PlaceError};
use hone_model::{Compute, Decoder, Generator};
use hone_schema::{ArtefactKind, Ledger, Pack, Prompt, sha256};
use hone_store::{Draft, ModelDir, Sealed};
use hone_tokens::Vocab;
use serde_json::Value;

use crate::answers::ask;
use crate::args::{Args, EvalPlan, Format};
use crate::gates::gates;
use crate::groups::fields;
use crate::inputs::{Inputs, load};
use crate::report::{self, Drawn, Page};
use crate::results::{Answers, Model, Results};
use crate::rows;

/// Name of the results.
const RESULTS: &str = "results.json";

/// Name of the page.
const REPORT: &str = "report.html";

/// Longest file beside the weights that is read: twice the largest vocabulary seen.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Runs the stage.
pub(crate) fn eval(args: Args, ctx: &Context) -> Result<Exit, Failure> {
    let plan = EvalPlan::resolve(&args.common)?;
    let inputs = Inputs::open(ctx, &plan)?;
    let stage = StagePlan {
        stage: "eval",
        kind: ArtefactKind::Report,
        dir: plan.out.clone(),
        config: serde_json::to_value(&plan).expect("a plan has only string keys"),
        inputs: inputs.refs.clone(),
    };
    let exit = run_stage(ctx, &args.common, stage, |draft, _| work(ctx, &plan, &inputs, draft))?;
    if args.common.why {
        return Ok(exit);
    }
    // Said from what is sealed, so that a fresh stage shows its table too, and fails its gates
    // again.
    let sealed = Sealed::open(&plan.out, ArtefactKind::Report)?;
    let results: Value = serde_json::from_slice(&sealed.read(RESULTS)?)
        .map_err(|e| Failure::input(format!("`{}`: {e}", sealed.path(RESULTS).display())))?;
    ctx.note(report::table(&results));
    ctx.note(format!("report: {}", sealed.path(REPORT).display()));
    let failed = report::failed_gates(&results);
    if !failed.is_empty() {
        ctx.warn(format!("eval: these gates failed: {}", failed.join(", ")));
    }
    Ok(exit)
}

/// What both models are measured on.
struct Test {
    packs: Vec<Pack>,
    prompts: Vec<Prompt>,
    vocab: Vocab,
    generator: Generator,
    is_json: bool,
}

fn work(
    ctx: &Context,
    plan: &EvalPlan,
    inputs: &Inputs,
    draft: &Draft,
) -> Result<Outcome, Failure> {
    let config = &plan.config;
    let generator = Generator::greedy(config.max_new, &inputs.stop_ids()?);
    let test = Test {
        packs: inputs.packs()?,
        prompts: inputs.prompts(config.max_prompts)?,
        vocab: inputs.vocab()?,
        generator: Generator { batch_size: config.batch_size, ..generator },
        is_json: config.format == Format::Json,
    };
    if test.packs.is_empty() && test.prompts.is_empty() {
        let at = inputs.packs.dir().display();
        return Err(Failure::input(format!("`{at}` has no row of the test split"))
            .hint("give a source `split = \"test\"`, or set `ingest.test_share`"));
    }
    if config.device == Place::Cpu && config.compute == Compute::Bf16 && !Cpu::has_bf16() {
        ctx.note("eval: this processor has no instructions for bf16: it is slower than f32 here");
    }
    let measuring = Measuring { ctx, plan, inputs, test: &test };
    let measured = config.device.with(measuring);
    let Measured { results, shown, drawn } = measured.map_err(unusable)??;
    let page = Page { plan, inputs, results: &results, prompts: &test.prompts, shown, drawn };
    write(draft, &page)?;
    Ok(Outcome {
        ledger: ledger(inputs),
        summary: summary(&results),
        exit: if results.passed() { Exit::Done } else { Exit::GateFailed },
        report: results.to_json(),
    })
}

/// Asking both models, on whichever device.
struct Measuring<'a> {
    ctx: &'a Context,
    plan: &'a EvalPlan,
    inputs: &'a Inputs,
    test: &'a Test,
}

/// What was asked of both models, and what of it is shown.
struct Measured {
    results: Results,
    shown: Vec<usize>,
    drawn: Drawn,
}

impl OnBackend for Measuring<'_> {
    type Output = Result<Measured, Failure>;

    fn run<B: Backend>(self, backend: B) -> Result<Measured, Failure> {
        let Measuring { ctx, plan, inputs, test } = self;
        let config = &plan.config;
        let backend = backend.with_compute(config.compute);
        let mut results = Results {
            compute: config.compute,
            fields: fields(&test.prompts),
            template_sha256: template_sha256(&inputs.tuned)?,
            ..Results::default()
        };
        {
            let mut base = load(&inputs.base, backend.clone())?;
            results.base = test.measure(ctx, &mut base)?;
            results.bare = test.ask(ctx, &mut base, |prompt| &prompt.bare_ids)?;
        }
        let mut tuned = load(&inputs.tuned, backend)?;
        results.tuned = test.measure(ctx, &mut tuned)?;
        results.gates = gates(config, &results.values());
        let shown = report::choose(&results.tuned.asked.scores, config.samples);
        let drawn = test.draw(ctx, &mut tuned, plan, &shown)?;
        Ok(Measured { results, shown, drawn })
    }
}

/// A device that cannot be used.
fn unusable(error: PlaceError) -> Failure {
    Failure::environment(error.what).hint(error.hint)
}

/// The chat template of a model: what the merge says that rows were rendered with, else what lies beside the weights. Of a
/// list of templates it is the default one, in every place.
fn template_sha256(model: &ModelDir) -> Result<Option<String>, Failure> {
    let object = |name: &str| -> Result<Value, Failure> {
        let bytes = model.try_read(name, FILE_BYTES_MAX)?;
        let value = bytes.map_or(Ok(Value::Null), |bytes| serde_json::from_slice(&bytes));
        let at = || model.dir().join(name);
        value.map_err(|e| Failure::input(format!("`{}`: {e}", at().display())))
    };
    if let Some(said) = object("merge.json")?["template"].as_str() {
        return Ok(Some(said.to_owned()));
    }
    if let Some(template) = model.try_read("chat_template.jinja", FILE_BYTES_MAX)? {
        return Ok(Some(sha256(&template).to_string()));
    }
    let template = match &object("tokenizer_config.json")?["chat_template"] {
        Value::Array(named) => {
            let default = named.iter().find(|template| template["name"] == "default");
            default.map_or(Value::Null, |template| template["template"].clone())
        }
        one => one.clone(),
    };
    Ok(template.as_str().map(|template| sha256(template.as_bytes()).to_string()))
}

impl Test {
    fn measure<B: Backend>(
        &self,
        ctx: &Context,
        decoder: &mut Decoder<B>,
    ) -> Result<Model, Failure> {
        let losses = crate::losses::measure(ctx, decoder, &self.packs)?;
        let asked = self.ask(ctx, decoder, |prompt| &prompt.prompt_ids)?;
        Ok(Model { losses, asked })
    }

    fn ask<B: Backend>(
        &self,
        ctx: &Context,
        decoder: &mut Decoder<B>,
        ids: impl Fn(&Prompt) -> &Vec<u32>,
    ) -> Result<Answers, Failure> {
        let ids: Vec<Vec<u32>> = self.prompts.iter().map(|prompt| ids(prompt).clone()).collect();
        let answers = ask(ctx, decoder, &self.vocab, &self.generator, &ids)?;
        Ok(Answers::new(answers, &self.prompts, self.is_json))
    }

    /// Draws answers to the first of the shown prompts.
    fn draw<B: Backend>(
        &self,
        ctx: &Context,
        decoder: &mut Decoder<B>,
        plan: &EvalPlan,
        shown: &[usize],
    ) -> Result<Drawn, Failure> {
        let config = &plan.config;
        let (temperature, top_p) = (config.temperature, config.top_p);
        let stop_ids = &self.generator.stop_ids;
        let generator = Generator::sampled(config.max_new, stop_ids, temperature, top_p, plan.seed);
        let generator = Generator { batch_size: config.batch_size, ..generator };
        let rows = shown.iter().take(config.sampled);
        let ids: Vec<Vec<u32>> = rows.map(|row| self.prompts[*row].prompt_ids.clone()).collect();
        ask(ctx, decoder, &self.vocab, &generator, &ids)
    }
}

fn write(draft: &Draft, page: &Page<'_>) -> Result<(), Failure> {
    let results = page.results.to_json();
    let text = serde_json::to_string_pretty(&results).expect("JSON values have only string keys");
    draft.write(RESULTS, format!("{text}\n").as_bytes(), None)?;
    let table = rows::table(page.prompts, page.results)?;
    let mut file = draft.parquet("rows.parquet", table.schema())?;
    file.write(&table)?;
    file.finish()?;
    Ok(draft.write(REPORT, page.html()?.as_bytes(), None)?)
}

fn summary(results: &Results) -> String {
    let values = results.values();
    let mut parts = Vec::new();
    if let Some(exact) = values.exact_match {
        let n = results.tuned.asked.answers.len();
        parts.push(format!("{} of {n} answers exact", report::percent(Some(exact))));
    }
    if let Some(rise) = values.plain_perplexity_rise_percent {
        parts.push(format!("plain perplexity {rise:+.1} %"));
    }
    if let Some(loss) = results.tuned.losses.total.mean() {
        parts.push(format!("held-out loss {loss:.4}"));
    }
    parts.join(", ")
}

/// Every row of the packs passes through; those of the test split are measured.
fn ledger(inputs: &Inputs) -> Ledger {
    let mut ledger = Ledger::default();
    for (source, before) in &inputs.packs.manifest().ledger.sources {
        let account = ledger.source(source);
        (account.rows_in, account.rows_out) = (before.rows_out, before.rows_out);
    }
    ledger
}
