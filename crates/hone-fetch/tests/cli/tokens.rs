//! A base with new tokens: what stays as it was, what is new, and which bases are refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hone_model::{NamedTensor, StoredType, Tensors};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::Tokenizer;

use crate::fixture::{self, HIDDEN, VOCAB};
use crate::{Ended, MODEL_FILES, fetch, names};

/// Texts of which none holds a new token.
const TEXTS: [&str; 7] = [
    "",
    "he said: hello there",
    "<|im_start|>user\nhe<|im_end|>",
    "<|not<|note <|n ote|>",
    "<|endoftext|><|endoftext|>",
    "Äöü — 你好 🙂\u{0}\u{301}",
    "  two\t\tblanks \r\n",
];

const EMBEDDING: &str = "model.embed_tokens.weight";

/// A tiny base, and what is made of it.
struct Place {
    temp: TempDir,
}

impl Place {
    /// `writer` stored in f32, without a manifest.
    fn of(writer: &fixture::Writer) -> Self {
        let place = Place { temp: TempDir::new().unwrap() };
        let file = place.path("tiny.gguf");
        std::fs::write(&file, writer.bytes()).unwrap();
        let args =
            [file.to_str().unwrap(), "--out", place.base().to_str().unwrap()].map(str::to_owned);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        fetch(&[&["model", "--dtype", "f32"], &args[..]].concat(), &[]).check(0, "");
        std::fs::remove_file(place.base().join("manifest.json")).unwrap();
        place
    }

    fn tiny() -> Self {
        Self::of(&fixture::tiny())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn base(&self) -> PathBuf {
        self.path("base")
    }

    fn grown(&self) -> PathBuf {
        self.path("grown")
    }

    /// Adds tokens to the base.
    fn add(&self, tokens: &[&str], more: &[&str]) -> Ended {
        let (base, grown) = (self.base(), self.grown());
        let mut args = vec!["tokens", base.to_str().unwrap(), "--out", grown.to_str().unwrap()];
        tokens.iter().for_each(|token| args.extend(["--add", token]));
        fetch(&[&args, more].concat(), &[])
    }

    /// It is refused, and nothing is left.
    fn check_refused(&self, tokens: &[&str], code: i32, said: &str) {
        self.add(tokens, &[]).check(code, said);
        assert!(!self.grown().exists(), "{said}");
    }

    /// Edits a JSON file of the base; one that is not there begins empty.
    fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.base().join(name);
        let mut value = if path.exists() { json_of(&path) } else { json!({}) };
        edit(&mut value);
        std::fs::write(path, value.to_string()).unwrap();
    }

    /// Gives the base `n` rows, the new ones of 1e-3.
    fn pad(&self, n: usize) {
        let path = self.base().join("model.safetensors");
        let mut tensors = Tensors::from_safetensors(&[&std::fs::read(&path).unwrap()]).unwrap();
        let mut data = tensors.get(EMBEDDING).unwrap().data.clone();
        data.resize(n * HIDDEN as usize, 1e-3);
        tensors.insert(NamedTensor::new(EMBEDDING, vec![n, HIDDEN as usize], data));
        std::fs::write(path, tensors.to_safetensors(StoredType::F32).unwrap()).unwrap();
        self.edit("config.json", |config| config["vocab_size"] = n.into());
    }

    /// Leaves out a token of the vocabulary: a gap at its id.
    fn leave_out(&self, token: &str) {
        self.edit("tokenizer.json", |tokenizer| {
            let model = &mut tokenizer["model"];
            assert!(model["vocab"].as_object_mut().unwrap().shift_remove(token).is_some());
            model["merges"] = json!([]);
        });
    }

    /// Checks what must hold of every base that was made: old texts have the ids that they had,
    /// each new token its own, and the model is one that is brought in as it is.
    fn check_ids(&self, new: &[(&str, u32)]) {
        let load = |dir: &Path| Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        let (old, grown) = (load(&self.base()), load(&self.grown()));
        let ids = |of: &Tokenizer, text: &str| of.encode(text, false).unwrap().get_ids().to_vec();
        for text in TEXTS {
            assert_eq!(ids(&grown, text), ids(&old, text), "{text}");
        }
        for (text, id) in new {
            assert_eq!(ids(&grown, text), [*id], "{text}");
            assert_eq!(grown.id_to_token(*id).as_deref(), Some(*text));
            let (he, within) = (ids(&old, "he"), ids(&grown, &format!("he{text}he")));
            assert_eq!(within, [&he[..], &[*id], &he[..]].concat());
        }
        let mut vocab: BTreeMap<String, u32> = old.get_vocab(true).into_iter().collect();
        vocab.extend(new.iter().map(|(text, id)| ((*text).to_owned(), *id)));
        assert_eq!(grown.get_vocab(true).into_iter().collect::<BTreeMap<_, _>>(), vocab);
        let copy = self.path("copy");
        let (grown, copy) = (self.grown(), copy.to_str().unwrap().to_owned());
        fetch(&["model", grown.to_str().unwrap(), "--out", &copy, "--force"], &[]).check(0, "");
    }

    /// The rows of a matrix, as the file has them.
    fn rows(&self, dir: &Path, tensor: &str) -> Vec<Vec<u8>> {
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let (length, rest) = bytes.split_at(8);
        let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&rest[..length]).unwrap();
        let entry = &header[tensor];
        assert_eq!(entry["dtype"], "F32");
        let at = |i: usize| length + entry["data_offsets"][i].as_u64().unwrap() as usize;
        rest[at(0)..at(1)].chunks(4 * HIDDEN as usize).map(<[u8]>::to_vec).collect()
    }

    /// Checks the rows of a matrix: `new` are the mean of those of the `before` old tokens, the
    /// others what they were, byte by byte.
    fn check_rows(&self, tensor: &str, before: usize, new: &[usize], n: usize) {
        let (old, grown) = (self.rows(&self.base(), tensor), self.rows(&self.grown(), tensor));
        assert_eq!(grown.len(), n);
        let value = |row: &[u8], j: usize| {
            f64::from(f32::from_le_bytes(row[4 * j..4 * j + 4].try_into().unwrap()))
        };
        let mean: Vec<u8> = (0..HIDDEN as usize)
            .map(|j| old[..before].iter().map(|row| value(row, j)).sum::<f64>() / before as f64)
            .flat_map(|x| (x as f32).to_le_bytes())
            .collect();
        for (at, row) in grown.iter().enumerate() {
            let is_new = new.contains(&at);
            assert!(*row == if is_new { mean.clone() } else { old[at].clone() }, "row {at}");
        }
    }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The value of the mean is known here: column `j` of row `i` is `(8 i + j) / 64`.
#[test]
fn new_rows_are_the_mean_and_the_others_stay() {
    let place = Place::tiny();
    place
        .add(&["<|note|>", "<|end note|>"], &[])
        .check(0, "<|note|> = 260, <|end note|> = 261; 262 rows");
    place.check_ids(&[("<|note|>", 260), ("<|end note|>", 261)]);
    place.check_rows(EMBEDDING, 260, &[260, 261], 262);
    let row = place.rows(&place.grown(), EMBEDDING).swap_remove(261);
    let expected = (0..8_u8).flat_map(|j| ((1036.0 + f32::from(j)) / 64.0).to_le_bytes());
    assert_eq!(row, expected.collect::<Vec<u8>>());
    let all = |dir: &Path| {
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let mut tensors = Tensors::from_safetensors(&[&bytes]).unwrap();
        tensors.remove(EMBEDDING).unwrap();
        tensors
    };
    assert!(all(&place.base()) == all(&place.grown()));
    assert_eq!(names(&place.grown()), MODEL_FILES);
    assert_eq!(json_of(&place.grown().join("config.json"))["vocab_size"], 262);
}

/// A head of its own has its own mean.
#[test]
fn an_untied_head_grows_too() {
    let mut writer = fixture::tiny();
    let values: Vec<f32> = (0..VOCAB * HIDDEN).map(|i| 9.0 - i as f32 / 32.0).collect();
    writer.f32_tensor("output.weight", &[VOCAB, HIDDEN], &values);
    let place = Place::of(&writer);
    place.add(&["<|note|>"], &["--pad-to", "8"]).check(0, "<|note|> = 260; 264 rows");
    let new: Vec<usize> = (260..264).collect();
    place.check_rows(EMBEDDING, 260, &new, 264);
    place.check_rows("lm_head.weight", 260, &new, 264);
    place.check_ids(&[("<|note|>", 260)]);
}

/// Rows of padding that become a token's get the mean of the tokens'; the rest stays padding.
#[test]
fn padding_is_used_first() {
    let place = Place::tiny();
    place.pad(270);
    place.add(&["<|a|>", "<|b|>"], &[]).check(0, "<|a|> = 260, <|b|> = 261; 270 rows");
    place.check_ids(&[("<|a|>", 260), ("<|b|>", 261)]);
    place.check_rows(EMBEDDING, 260, &[260, 261], 270);
    place.add(&["<|a|>"], &["--pad-to", "64"]).check(0, "<|a|> = 260; 320 rows");
    let new: Vec<usize> = std::iter::once(260).chain(270..320).collect();
    place.check_rows(EMBEDDING, 260, &new, 320);
}

/// The tokenizers library counts tokens to number a new one; with a gap that id is another's.
#[test]
fn a_gap_in_the_vocabulary_is_no_id_for_a_new_token() {
    let place = Place::tiny();
    place.leave_out("he");
    place.add(&["<|a|>", "<|b|>"], &[]).check(0, "<|a|> = 260, <|b|> = 261; 262 rows");
    place.check_ids(&[("<|a|>", 260), ("<|b|>", 261)]);
    place.check_rows(EMBEDDING, 260, &[260, 261], 262);
    // What was made can be added to again.
    std::fs::rename(place.grown(), place.path("first")).unwrap();
    std::fs::remove_dir_all(place.base()).unwrap();
    std::fs::rename(place.path("first"), place.base()).unwrap();
    place.add(&["<|c|>"], &[]).check(0, "<|c|> = 262; 263 rows");
    place.check_ids(&[("<|c|>", 262)]);
    place.check_rows(EMBEDDING, 262, &[262], 263);
}

/// Gaps where no id can be given that is right for every reader.
#[test]
fn gaps_that_cannot_be_gone_round_are_refused() {
    let place = Place::tiny();
    place.leave_out("he");
    place.check_refused(&["好"], 3, "the ids of its vocabulary have gaps");
    place.edit("tokenizer.json", |tokenizer| tokenizer["model"]["ignore_merges"] = true.into());
    place.check_refused(&["<|a|>"], 3, "the ids of its vocabulary have gaps");
    let place = Place::tiny();
    place.pad(270);
    place.edit("tokenizer.json", |tokenizer| {
        let mut token = tokenizer["added_tokens"][0].clone();
        token["content"] = "<|far|>".into();
        token["id"] = 264.into();
        tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    });
    place.check_refused(
        &["<|a|>"],
        3,
        "gives `<|far|>` the id 264, the tokenizers library reads it as 260",
    );
}

/// The files that list tokens beside `tokenizer.json` have the new ones too.
#[test]
fn every_list_of_tokens_has_them() {
    let place = Place::tiny();
    let lists = json!(["<|im_start|>"]);
    place.edit("special_tokens_map.json", |map| map["additional_special_tokens"] = lists.clone());
    place.edit("tokenizer_config.json", |map| map["extra_special_tokens"] = lists.clone());
    place.edit("added_tokens.json", |map| *map = json!({"<|im_start|>": 258}));
    place.add(&["<|note|>"], &[]).check(0, "");
    let made = |name: &str| json_of(&place.grown().join(name));
    let both = json!(["<|im_start|>", "<|note|>"]);
    assert_eq!(made("special_tokens_map.json")["additional_special_tokens"], both);
    assert_eq!(made("added_tokens.json"), json!({"<|im_start|>": 258, "<|note|>": 260}));
    let config = made("tokenizer_config.json");
    assert_eq!(config["extra_special_tokens"], both);
    let expected = json!({
        "content": "<|note|>", "lstrip": false, "normalized": false, "rstrip": false,
        "single_word": false, "special": true
    });
    assert_eq!(config["added_tokens_decoder"]["260"], expected);
    assert_eq!(config["added_tokens_decoder"].as_object().unwrap().len(), 4);
}

/// A token that only a list has would lose its id to a new one.
#[test]
fn tokens_that_only_a_list_has_are_not_run_over() {
    let place = Place::tiny();
    place.pad(270);
    place.edit("added_tokens.json", |map| *map = json!({"<|im_start|>": 258, "<pad>": 260}));
    place.check_refused(&["<|a|>"], 3, "`added_tokens.json` has a token of id 260, which");
    std::fs::remove_file(place.base().join("added_tokens.json")).unwrap();
    place.edit("tokenizer_config.json", |map| {
        map["added_tokens_decoder"]["265"] = json!({"content": "<pad>"});
    });
    place.check_refused(&["<|a|>"], 3, "`tokenizer_config.json` has a token of id 265, which");
}

#[test]
fn tokens_that_are_none_are_refused() {
    let place = Place::tiny();
    place.check_refused(&[" "], 2, "`--add` is given no token");
    place.check_refused(&["<|a|>", "<|b|>", "<|a|>"], 2, "`--add <|a|>` is given twice");
    let said = "`--add <|im_end|>`: it is a token already, the one of id 259";
    place.check_refused(&["<|im_end|>"], 2, said);
    let (base, small) = (place.base(), place.path("small"));
    let (base, small) = (base.to_str().unwrap(), small.to_str().unwrap());
    fetch(&["quantize", base, "--out", small], &[]).check(0, "");
    let out = place.grown();
    let args = ["tokens", small, "--add", "<|a|>", "--out", out.to_str().unwrap()];
    fetch(&args, &[]).check(3, "its weights lie in 4 bits");
}
