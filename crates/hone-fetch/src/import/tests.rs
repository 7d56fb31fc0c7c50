//! Names, the order of rows, refusals, and the tokenizer.

use std::io::Cursor;

use hone_model::Tensors;
use tokenizers::Tokenizer as Reader;

use super::*;
use crate::fixture::{Meta, Writer, tiny};

fn import(writer: &Writer) -> Result<Import, ImportError> {
    Import::new(&Gguf::read(Cursor::new(writer.bytes()))?, StoredType::F32)
}

fn weights(writer: &Writer) -> Tensors {
    let mut out = Vec::new();
    let file = Cursor::new(writer.bytes());
    assert!(import(writer).unwrap().write_weights(file, &mut out, || true).unwrap());
    Tensors::from_safetensors(&[&out]).unwrap()
}

#[test]
fn a_tiny_model_comes_over() {
    let import = import(&tiny()).unwrap();
    let config = import.config();
    assert_eq!((config.rms_norm_eps, config.rope_theta, config.head_dim), (1e-5, 100_000.0, 4));
    assert!(config.tie_word_embeddings);
    assert_eq!((config.bos_token_id, config.pad_token_id), (Some(258), Some(259)));
    assert_eq!(config.eos_token_ids, [259]);
    let files = import.small_files();
    assert_eq!(files.len(), 6);
    let text = |name: &str| {
        let (_, bytes) = files.iter().find(|(found, _)| *found == name).unwrap();
        String::from_utf8(bytes.clone()).unwrap()
    };
    let value = |name: &str| serde_json::from_str::<Value>(&text(name)).unwrap();
    assert_eq!(ModelConfig::from_json(&text("config.json")).unwrap(), *config);
    assert_eq!(value("config.json")["torch_dtype"], "float32");
    let expected = json!({
        "_from_model_config": true, "bos_token_id": 258, "eos_token_id": 259, "pad_token_id": 259
    });
    assert_eq!(value("generation_config.json"), expected);
    let tokens = value("tokenizer_config.json");
    assert_eq!(
        (&tokens["bos_token"], &tokens["eos_token"]),
        (&json!("<|im_start|>"), &json!("<|im_end|>"))
    );
    assert_eq!(tokens["unk_token"], "<|endoftext|>");
    assert_eq!(tokens["added_tokens_decoder"]["257"]["content"], "<|endoftext|>");
    assert_eq!(value("special_tokens_map.json")["pad_token"]["content"], "<|im_end|>");
    assert!(text("chat_template.jinja").starts_with("{% for m in messages"));
}

/// llama.cpp's own forward permutation, as its converter writes it: (H, 2, K/2, in) with the axes 1
/// and 2 swapped.
fn permute(values: &[f32], shape: &[usize], n_heads: usize) -> Vec<f32> {
    let half = shape[0] / n_heads / 2;
    let row_len = shape[1..].iter().product::<usize>();
    let mut out = Vec::new();
    for head in 0..n_heads {
        for i in 0..half {
            for j in 0..2 {
                let row = (head * 2 + j) * half + i;
                out.extend_from_slice(&values[row * row_len..][..row_len]);
            }
        }
    }
    out
}

#[test]
fn rows_go_back_where_they_came_from() {
    // One head of width 4 and rows of one value: neighbours become halves.
    assert_eq!(llama::unpermute(&[0., 1., 2., 3.], &[4], 1), [0., 2., 1., 3.]);
    assert_eq!(
        llama::unpermute(&[0., 1., 2., 3., 4., 5., 6., 7.], &[8, 1], 2),
        [0., 2., 1., 3., 4., 6., 5., 7.]
    );
    for (shape, n_heads) in [(&[8, 3][..], 1), (&[24, 5], 3), (&[64], 4), (&[6, 2], 3)] {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| i as f32).collect();
        let stored = permute(&values, shape, n_heads);
        assert_eq!(llama::unpermute(&stored, shape, n_heads), values, "{shape:?}, {n_heads} heads");
    }
}

#[test]
fn only_queries_and_keys_are_reordered() {
    let found = weights(&tiny());
    assert_eq!(found.len(), 11);
    let first_column = |name: &str| {
        let tensor = found.get(name).unwrap();
        let width = tensor.shape[1];
        tensor
            .data
            .iter()
            .step_by(width)
            .map(|v| (v.fract() * 64.0) as usize / width)
            .collect::<Vec<_>>()
    };
    let layer = "model.layers.0.self_attn";
    assert_eq!(first_column(&format!("{layer}.q_proj.weight")), [0, 2, 1, 3, 4, 6, 5, 7]);
    assert_eq!(first_column(&format!("{layer}.k_proj.weight")), [0, 2, 1, 3]);
    assert_eq!(first_column(&format!("{layer}.v_proj.weight")), [0, 1, 2, 3]);
    assert_eq!(first_column(&format!("{layer}.o_proj.weight")), [0, 1, 2, 3, 4, 5, 6, 7]);
}

fn refused(damage: impl FnOnce(&mut Writer), message: &str) {
    let mut writer = tiny();
    damage(&mut writer);
    match import(&writer) {
        Ok(_) => panic!("was taken, though: {message}"),
        Err(error) => assert!(error.to_string().contains(message), "{error}\nnot: {message}"),
    }
}

#[test]
fn what_cannot_be_brought_over_is_refused_by_name() {
    refused(|w| w.set("general.architecture", Meta::Str("mamba")), "the architecture `mamba`");
    refused(|w| w.remove("general.architecture"), "no key `general.architecture`");
    refused(|w| w.set("llama.expert_count", Meta::U32(8)), "`llama.expert_count` = 8");
    refused(|w| w.set("llama.rope.scaling.type", Meta::Str("yarn")), "`llama.rope.scaling.type`");
    refused(|w| w.set("llama.rope.dimension_count", Meta::U32(2)), "`llama.rope.dimension_count`");
    refused(|w| w.set("llama.vocab_size", Meta::U32(9)), "the embedding has 260 rows");
    refused(|w| w.remove("llama.block_count"), "no key `llama.block_count`");
    refused(|w| w.set("llama.block_count", Meta::U32(2)), "missing model.layers.1");
    refused(|w| w.set("llama.attention.head_count", Meta::U32(0)), "it is 0");
    refused(|w| w.set("llama.attention.head_count", Meta::Str("2")), "a text, not a whole number");
    refused(|w| w.f32_tensor("rope_freqs.weight", &[2], &[1.0, 2.0]), "`rope_freqs.weight`");
    refused(|w| w.f32_tensor("blk.0.attn_sinks.weight", &[1], &[0.0]), "`blk.0.attn_sinks.weight`");
    refused(|w| w.f32_tensor("blk.00.attn_q.weight", &[1], &[0.0]), "`blk.00.attn_q.weight`");
    let lost = |w: &mut Writer| _ = w.tensors.pop();
    refused(lost, "missing model.layers.0.mlp.down_proj.weight");
    let shape = |w: &mut Writer| w.tensors[4].1 = vec![4, 16];
    refused(shape, "has shape [4, 16], the configuration says [8, 8]");
}

#[test]
fn tokenizers_that_cannot_be_rebuilt_are_refused() {
    refused(|w| w.set("tokenizer.ggml.model", Meta::Str("llama")), "the tokenizer model `llama`");
    refused(|w| w.set("tokenizer.ggml.pre", Meta::Str("tekken")), "the pre-tokenizer `tekken`");
    refused(|w| w.remove("tokenizer.ggml.pre"), "no key `tokenizer.ggml.pre`");
    refused(|w| w.set("tokenizer.ggml.bos_token_id", Meta::U32(260)), "there is no token 260");
    refused(|w| w.set("tokenizer.ggml.token_type", Meta::I32s(vec![1])), "1 values for 260 tokens");
    let doubled = vec!["a".to_owned(); 260];
    refused(
        |w| w.set("tokenizer.ggml.tokens", Meta::Strs(doubled)),
        "the token \"a\" is there twice",
    );
    let merges = vec!["x y".to_owned()];
    refused(|w| w.set("tokenizer.ggml.merges", Meta::Strs(merges)), "cannot be used");
    let many = (0..261).map(|i| format!("t{i}")).collect();
    let more = |w: &mut Writer| {
        w.set("tokenizer.ggml.tokens", Meta::Strs(many));
        w.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; 261]));
        w.set("tokenizer.ggml.merges", Meta::Strs(Vec::new()));
    };
    refused(more, "261 tokens, the embedding only 260 rows");
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let mut writer = tiny();
    writer.tensors[1].3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let file = Cursor::new(writer.bytes());
    let error = import(&writer).unwrap().write_weights(file, Vec::new(), || true).unwrap_err();
    assert!(error.to_string().contains("`model.norm.weight` holds a value that is not finite"));
}

fn encode(tokenizer: &Reader, text: &str, with_special: bool) -> Vec<u32> {
    tokenizer.encode(text, with_special).unwrap().get_ids().to_vec()
}

fn tokenizer(writer: &Writer) -> Reader {
    Reader::from_bytes(import(writer).unwrap().tokenizer.json).unwrap()
}

#[test]
fn bytes_merges_and_special_tokens() {
    let tokenizer = tokenizer(&tiny());
    let check = |text: &str, expected: &[u32]| {
        assert_eq!(encode(&tokenizer, text, true), expected, "{text:?}");
        let back = tokenizer.decode(expected, false).unwrap();
        assert_eq!(back, text);
    };
    check("he", &[256]);
    check("hehh", &[256, 104, 104]);
    check("\n\n1.", &[10, 10, 49, 46]);
    check("é你🙂", &[195, 169, 228, 189, 160, 240, 159, 153, 130]);
    check("<|im_start|>he<|im_end|>", &[258, 256, 259]);
}

#[test]
fn texts_begin_as_the_file_says() {
    let mut writer = tiny();
    writer.set("tokenizer.ggml.add_bos_token", Meta::Bool(true));
    assert_eq!(encode(&tokenizer(&writer), "he", true), [258, 256]);
    assert_eq!(encode(&tokenizer(&writer), "he", false), [256]);
    writer.set("tokenizer.ggml.add_eos_token", Meta::Bool(true));
    assert_eq!(encode(&tokenizer(&writer), "he", true), [258, 256, 259]);
    writer.remove("tokenizer.ggml.add_bos_token");
    writer.remove("tokenizer.ggml.add_eos_token");
    assert_eq!(encode(&tokenizer(&writer), "he", true), [256]);
    writer.set("tokenizer.ggml.pre", Meta::Str("llama-bpe"));
    assert_eq!(encode(&tokenizer(&writer), "he", true), [258, 256], "this scheme's default");
    writer.set("tokenizer.ggml.eot_token_id", Meta::U32(257));
    let both = import(&writer).unwrap();
    assert_eq!(both.config().eos_token_ids, [259, 257]);
    assert_eq!(both.tokenizer.generation_config()["eos_token_id"], json!([259, 257]));
}

/// How each scheme splits: pieces joined by `|`, spaces as `_`.
#[test]
fn every_scheme_splits_in_its_own_way() {
    let text = "I'LL don't 1234 a\n\n 5é!!  x";
    let check = |name: &'static str, expected: &str| {
        let mut writer = tiny();
        writer.set("tokenizer.ggml.pre", Meta::Str(name));
        let reader = tokenizer(&writer);
        let mut pieces = tokenizers::PreTokenizedString::from(text);
        use tokenizers::PreTokenizer as _;
        reader.get_pre_tokenizer().unwrap().pre_tokenize(&mut pieces).unwrap();
        let letters = crate::fixture::byte_letters();
        let byte = |c: char| letters.iter().position(|l| *l == c.to_string()).unwrap() as u8;
        let splits = pieces
            .get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
        let piece = |letters: &str| {
            String::from_utf8_lossy(&letters.chars().map(byte).collect::<Vec<_>>()).into_owned()
        };
        let found: Vec<String> = splits.iter().map(|(text, ..)| piece(text)).collect();
        assert_eq!(found.join("|").replace(' ', "_").replace('\n', "/"), expected, "{name}");
    };
    let digits = "I|'|LL|_don|'t|_|1|2|3|4|_a|//_|5|é|!!|_|_x";
    check("smollm", digits);
    check("starcoder", digits);
    check("gpt-2", "I|'|LL|_don|'t|_1234|_a|//|_5|é|!!|_|_x");
    let llama = "I|'LL|_don|'t|_|123|4|_a|//|_|5|é|!!|_|_x";
    check("llama-bpe", llama);
    check("llama3", llama);
    check("llama-v3", llama);
    check("qwen2", "I|'LL|_don|'t|_|1|2|3|4|_a|//|_|5|é|!!|_|_x");
    check("deepseek-coder", "I|'|LL|_don|'|t|_|1|2|3|4|_a|/|/|_|5|é|!!|_|_x");
    assert_eq!(pretokenizer::KNOWN.len(), 8, "a scheme was added or lost");
    assert!(pretokenizer::KNOWN.iter().all(|name| pretokenizer::scheme(name).is_some()));
}

/// llama.cpp's own tables of texts and ids, for the vocabularies that can be rebuilt.
#[test]
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
fn vocabularies_of_the_corpus() {
    let Ok(corpus) = std::env::var("HONE_CORPUS") else {
        eprintln!("skipped: HONE_CORPUS does not name the corpus");
        return;
    };
    for (name, n_cases) in [("gpt-2", 46), ("starcoder", 46), ("deepseek-coder", 46)] {
        let path = format!("{corpus}/vocab/ggml-vocab-{name}.gguf");
        let gguf = Gguf::read(std::fs::File::open(&path).unwrap()).unwrap();
        let tokenizer = Tokenizer::from_metadata(&gguf.metadata).unwrap();
        let reader = Reader::from_bytes(&tokenizer.json).unwrap();
        let read = |end: &str| std::fs::read_to_string(format!("{path}{end}")).unwrap();
        let (texts, ids) = (read(".inp"), read(".out"));
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let ids: Vec<&str> = ids.lines().collect();
        let mut n = 0;
        for (text, expected) in texts.iter().zip(&ids) {
            let found = encode(&reader, text, false);
            let expected: Vec<u32> =
                expected.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(found, expected, "{name}: {text:?}");
            n += 1;
        }
        assert_eq!(n, n_cases, "{name}");
    }
    for name in ["llama-spm", "phi-3"] {
        let path = format!("{corpus}/vocab/ggml-vocab-{name}.gguf");
        let gguf = Gguf::read(std::fs::File::open(&path).unwrap()).unwrap();
        let error = Tokenizer::from_metadata(&gguf.metadata).unwrap_err();
        assert!(error.to_string().contains("the tokenizer model `llama`"), "{error}");
    }
}
