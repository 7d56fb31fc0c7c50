//! What the model answers while it is trained, to the same few held-out prompts.

use hone_cli::Failure;
use hone_kernels::Backend;
use hone_model::{Decoder, Generator};
use hone_schema::{Prompt, Split};
use hone_store::Sealed;
use hone_tokens::Vocab;
use serde_json::{Value, json};

use crate::args::TrainConfig;

/// Prompts, and what is needed to answer them.
pub(crate) struct Samples {
    prompts: Vec<Prompt>,
    vocab: Vocab,
    generator: Generator,
}

/// An answer.
pub(crate) struct Sample {
    /// Id of the prompt.
    pub(crate) id: String,
    question: String,
    reference: String,
    text: String,
    is_stopped: bool,
}

impl Samples {
    /// The prompts of the packs artefact; `None` when none are wanted.
    ///
    /// # Errors
    /// They are wanted and there are none.
    pub(crate) fn open(packs: &Sealed, config: &TrainConfig) -> Result<Option<Self>, Failure> {
        if config.sample_every == 0 {
            return Ok(None);
        }
        let mut prompts = packs.parquet("prompts.parquet")?.rows(Prompt::from_batch)?;
        prompts.retain(|prompt| prompt.split == Split::Eval && !prompt.prompt_ids.is_empty());
        if prompts.is_empty() {
            let at = packs.dir().display();
            let message = format!("{at}: there is no held-out prompt to make samples from");
            return Err(Failure::input(message)
                .hint("set `ingest.eval_share` above 0, or `train.sample_every` to 0"));
        }
        let n = config.sample_prompts.min(prompts.len());
        let prompts = (0..n).map(|i| prompts[i * prompts.len() / n].clone()).collect();
        let at = |name| packs.path(name).display().to_string();
        let name = "tokenizer.json";
        let vocab = Vocab::from_json(&packs.read(name)?)
            .map_err(|e| Failure::input(format!("`{}`: {e}", at(name))))?;
        let name = "stops.json";
        let stops: Value = serde_json::from_slice(&packs.read(name)?)
            .map_err(|e| Failure::input(format!("`{}`: {e}", at(name))))?;
        let stops: Vec<u32> = serde_json::from_value(stops["stop_ids"].clone())
            .map_err(|e| Failure::input(format!("`{}`: `stop_ids`: {e}", at(name))))?;
        let generator = Generator::greedy(config.sample_tokens, &stops);
        Ok(Some(Samples { prompts, vocab, generator }))
    }

    /// Answers every prompt. One that is too long for the model is left out.
    pub(crate) fn make<B: Backend>(
        &self,
        decoder: &mut Decoder<B>,
    ) -> Result<Vec<Sample>, Failure> {
        let limit = decoder.config().context();
        let fits = |prompt: &&Prompt| prompt.prompt_ids.len() < limit;
        let prompts: Vec<&Prompt> = self.prompts.iter().filter(fits).collect();
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.prompt_ids.clone()).collect();
        let bad = |e: &dyn std::fmt::Display| Failure::input(format!("a sample: {e}"));
        let answers = self.generator.run(decoder, &ids).map_err(|e| bad(&e))?;
        let sample = |(prompt, answer): (&Prompt, hone_model::Generation)| {
            let text = self.vocab.decode(&answer.ids, false).map_err(|e| bad(&e))?;
            Ok(Sample {
                id: prompt.id.clone(),
                question: prompt.question.clone(),
                reference: prompt.reference.clone(),
                text,
                is_stopped: answer.stopped(),
            })
        };
        prompts.into_iter().zip(answers).map(sample).collect()
    }
}

impl Sample {
    /// As it stands in `metrics.jsonl`.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "question": self.question,
            "answer": self.text,
            "reference": self.reference,
            "stopped": self.is_stopped,
        })
    }

    /// As TensorBoard shows it: literally, whatever the texts contain.
    pub(crate) fn to_markdown(&self) -> String {
        let block =
            |text: &str| text.lines().map(|line| format!("    {line}\n")).collect::<String>();
        let end = if self.is_stopped { "" } else { " (cut)" };
        format!(
            "question\n\n{}\nanswer{end}\n\n{}\nreference\n\n{}",
            block(&self.question),
            block(&self.text),
            block(&self.reference)
        )
    }
}
