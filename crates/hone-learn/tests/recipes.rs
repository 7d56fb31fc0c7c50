//! Recipes: however a step is cut it is the same step, any rule resumes exactly, groups have their
//! tensors, and what makes no sense is refused.

use hone_kernels::{Backend, Cpu, Reference, rng};
use hone_learn::{
    AdamWConfig, GroupConfig, LearnError, Learner, LossConfig, OptimizerConfig, Recipe,
    ScheduleConfig,
};
use hone_model::{
    Adapter, Batch, Decoder, LoraConfig, ModelConfig, NamedTensor, StoredType, Tensors, Training,
    init_weights,
};

/// Biases, grouped heads, a tied head, and matrices of more than 4096 values.
fn config() -> ModelConfig {
    let text = r#"{"model_type": "llama", "vocab_size": 131, "hidden_size": 72,
        "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "tie_word_embeddings": true, "max_position_embeddings": 128,
        "attention_bias": true, "initializer_range": 0.15}"#;
    ModelConfig::from_json(text).unwrap()
}

fn decoder<B: Backend>(backend: B, lora: bool) -> Decoder<B> {
    let (config, training) = (config(), if lora { Training::Frozen } else { Training::Full });
    let mut decoder = Decoder::load(backend, &config, &init_weights(&config, 4), training).unwrap();
    if lora {
        let adapter = Adapter::init(&config, LoraConfig::all_linear(4, 8.0), 2).unwrap();
        decoder.attach(&adapter, true).unwrap();
    }
    decoder
}

fn learner<B: Backend>(backend: B, lora: bool, recipe: &Recipe) -> Learner<B> {
    let schedule = ScheduleConfig::constant(3e-3, 100);
    Learner::new(decoder(backend, lora), recipe.clone(), schedule, 9).unwrap()
}

/// Eight ragged documents of a step; one of them has a single token, and one no target.
fn documents(step: u64) -> Vec<(Vec<u32>, Vec<f32>)> {
    let lens = [5, 1, 17, 2, 33, 8, 3, 29];
    let document = |(n, len): (usize, u64)| {
        let draw = |i: u64| rng::mix(step * 100 + n as u64, i);
        let ids = (0..len).map(|i| ((draw(0) + 7 * i) % 131) as u32).collect();
        let weight = |i: u64| if n == 5 { 0.0 } else { (draw(i + 1) % 3) as f32 / 2.0 };
        (ids, (0..len).map(weight).collect())
    };
    lens.into_iter().enumerate().map(document).collect()
}

/// The documents in micro-batches of `size`.
fn batches(documents: &[(Vec<u32>, Vec<f32>)], size: usize) -> Vec<Batch> {
    let batch = |part: &[(Vec<u32>, Vec<f32>)]| {
        let mut batch = Batch::new();
        part.iter().for_each(|(ids, weights)| batch.push(ids, weights).unwrap());
        batch
    };
    documents.chunks(size).map(batch).collect()
}

/// Every option alone, and all together.
fn options() -> Vec<Recipe> {
    let (recipe, loss) = (Recipe::default(), LossConfig::default());
    let with = |loss| Recipe { loss, ..recipe.clone() };
    let all = LossConfig { label_smoothing: 0.1, z_loss: 1e-2, dft: true, soft_cap: Some(2.0) };
    vec![
        recipe.clone(),
        with(LossConfig { label_smoothing: 0.1, ..loss }),
        with(LossConfig { z_loss: 1e-2, ..loss }),
        with(LossConfig { dft: true, ..loss }),
        with(LossConfig { soft_cap: Some(2.0), ..loss }),
        Recipe { neftune_alpha: 5.0, ..recipe.clone() },
        Recipe { neftune_alpha: 5.0, ..with(all) },
    ]
}

/// Loss and gradients of step 0, cut into micro-batches of `size` documents.
fn cut<B: Backend>(learner: &mut Learner<B>, size: usize) -> (f64, Tensors) {
    let batches = batches(&documents(0), size);
    let weight = batches.iter().map(Batch::weight).sum();
    let losses = batches.iter().map(|b| learner.accumulate(b, weight).unwrap().weighted_loss);
    let loss = losses.sum::<f64>() / weight;
    (loss, learner.decoder().gradients())
}

/// Largest difference of two sets of tensors, each over the first's largest value.
fn distance(a: &Tensors, b: &Tensors) -> f64 {
    assert_eq!(a.len(), b.len());
    let one = |tensor: &NamedTensor| {
        let other = &b.get(&tensor.name).unwrap().data;
        let top = tensor.data.iter().fold(1e-30_f32, |top, x| top.max(x.abs()));
        let off = tensor.data.iter().zip(other).fold(0.0_f32, |top, (x, y)| top.max((x - y).abs()));
        f64::from(off / top)
    };
    a.iter().map(one).fold(0.0, f64::max)
}

/// Eight micro-batches of one document, four of two, one of eight: the same loss and gradients.
fn check_cuts<B: Backend>(backend: B, bound: f64) {
    let (mut n_checked, mut losses) = (0, Vec::new());
    for recipe in options() {
        let mut results = Vec::new();
        for size in [8, 4, 2, 1, 3] {
            let mut learner = learner(backend.clone(), false, &recipe);
            results.push(cut(&mut learner, size));
        }
        let (loss, gradients) = results.remove(0);
        for (other_loss, other) in results {
            let off = (loss - other_loss).abs();
            assert!(off <= 1e-6, "{} {recipe:?}: the loss is off by {off:e}", backend.name());
            let off = distance(&gradients, &other);
            assert!(off <= bound, "{} {recipe:?}: gradients are off by {off:e}", backend.name());
            n_checked += 1;
        }
        losses.push(loss);
    }
    assert_eq!(n_checked, 7 * 4);
    for (i, a) in losses.iter().enumerate() {
        assert!(losses[..i].iter().all(|b| (a - b).abs() > 1e-4), "an option does nothing");
    }
}

#[test]
fn however_a_step_is_cut_it_is_the_same_step() {
    check_cuts(Reference, 1e-7);
    // Sums of f32 in another order.
    check_cuts(Cpu::new(), 2e-6);
}

#[test]
fn evaluation_is_plain_and_silent() {
    for recipe in options() {
        let batches = batches(&documents(1), 3);
        if recipe.loss.soft_cap.is_some() {
            continue;
        }
        let plain = learner(Cpu::new(), true, &Recipe::default()).evaluate(&batches).unwrap();
        let mut with_options = learner(Cpu::new(), true, &recipe);
        assert_eq!(with_options.evaluate(&batches).unwrap(), plain, "{recipe:?}");
        // After a training pass too.
        with_options.accumulate(&batches[0], 1.0).unwrap();
        assert_eq!(with_options.evaluate(&batches).unwrap(), plain, "{recipe:?}");
    }
}

fn optimizer(text: &str) -> OptimizerConfig {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Every rule, with and without what it may keep.
fn recipes() -> Vec<Recipe> {
    let texts = [
        r#""adamw""#,
        r#"{"name": "adamw8bit", "weight_decay": 0.1}"#,
        r#"{"name": "adamw8bit", "min_8bit_size": 16, "f32_embeddings": false}"#,
        r#""lion""#,
        r#""adafactor""#,
        r#"{"name": "adafactor", "beta1": 0.9, "scale_parameter": true}"#,
        r#"{"name": "adafactor", "relative_step": true, "scale_parameter": true}"#,
        r#""sgd""#,
        r#"{"name": "sgd", "momentum": 0.0}"#,
        r#"{"name": "sgd", "nesterov": true, "weight_decay": 0.01}"#,
        r#"{"name": "muon", "adamw_lr_scale": 0.3}"#,
        r#"{"name": "muon", "adjust_lr": "match_rms_adamw", "nesterov": false}"#,
    ];
    let recipe = |(i, text): (usize, &&str)| Recipe {
        // Every other one with an average and noise.
        ema_decay: (i % 2 == 0).then_some(0.7),
        neftune_alpha: if i % 2 == 0 { 3.0 } else { 0.0 },
        ..Recipe::from(optimizer(text))
    };
    texts.iter().enumerate().map(recipe).collect()
}

fn bytes(tensors: &Tensors) -> Vec<u8> {
    tensors.to_safetensors(StoredType::F32).unwrap()
}

fn run(learner: &mut Learner<Cpu>, from: u64, to: u64) -> Vec<f64> {
    let step = |step| learner.train_step(&batches(&documents(step), 3)).unwrap().loss;
    (from..to).map(step).collect()
}

#[test]
fn any_rule_resumes_exactly() {
    for lora in [false, true] {
        for recipe in recipes() {
            let mut straight = learner(Cpu::new(), lora, &recipe);
            let losses = run(&mut straight, 0, 7);
            let mut first = learner(Cpu::new(), lora, &recipe);
            assert_eq!(run(&mut first, 0, 3), losses[..3]);
            let (tensors, json) = first.state();
            let tensors = Tensors::from_safetensors(&[&bytes(&tensors)]).unwrap();
            let json = serde_json::from_str(&json.to_string()).unwrap();
            let mut second = learner(Cpu::new(), lora, &recipe);
            second.accumulate(&batches(&documents(5), 8)[0], 1.0).unwrap();
            second.restore(&tensors, &json).unwrap();
            assert_eq!(run(&mut second, 3, 7), losses[3..], "{recipe:?}");
            assert_eq!(bytes(&second.state().0), bytes(&straight.state().0), "{recipe:?}");
        }
    }
}

#[test]
fn any_rule_gives_the_same_bytes_on_any_number_of_threads() {
    for recipe in recipes() {
        let with = |n: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| {
                let mut learner = learner(Cpu::new(), false, &recipe);
                (run(&mut learner, 0, 3), bytes(&learner.state().0))
            })
        };
        let one = with(1);
        for n in [2, 8] {
            assert!(with(n) == one, "{n} threads: {recipe:?}");
        }
    }
}

#[test]
fn any_rule_learns() {
    for recipe in recipes() {
        let mut learner = learner(Cpu::new(), false, &recipe);
        let batches = batches(&documents(0), 8);
        // Without noise, which would hide the small steps of bare descent.
        let first = learner.evaluate(&batches).unwrap().unwrap().loss;
        (0..40).for_each(|_| _ = learner.train_step(&batches).unwrap());
        let last = learner.evaluate(&batches).unwrap().unwrap().loss;
        assert!(last < first - 0.02, "{:?}: {first} to {last}", recipe.optimizer);
    }
}

#[test]
fn states_of_other_recipes_are_refused() {
    let state = |recipe: &Recipe| {
        let mut learner = learner(Cpu::new(), false, recipe);
        run(&mut learner, 0, 1);
        learner.state()
    };
    let plain = Recipe::from(optimizer(r#""lion""#));
    let check =
        |recipe: &Recipe, (tensors, json): &(Tensors, serde_json::Value), expected: &str| {
            let message = learner(Cpu::new(), false, recipe).restore(tensors, json).unwrap_err();
            assert!(message.to_string().contains(expected), "{message}");
        };
    check(&Recipe::default(), &state(&plain), "its optimizer is `lion`, this run has `adamw`");
    let averaged = Recipe { ema_decay: Some(0.5), ..plain.clone() };
    check(&averaged, &state(&plain), "tensors, this run has");
    let coded = Recipe::from(optimizer(r#""adamw8bit""#));
    let (mut tensors, json) = state(&coded);
    let name = "exp_avg_codes.model.layers.0.mlp.up_proj.weight";
    let mut codes = tensors.remove(name).unwrap();
    codes.data[0] = 0.5;
    tensors.insert(codes);
    check(&coded, &(tensors, json), "holds something that is no code");
}

#[test]
fn the_average_is_evaluated_and_given_back() {
    let recipe = Recipe { ema_decay: Some(0.5), ..Recipe::default() };
    let mut averaged = learner(Cpu::new(), true, &recipe);
    assert!(!averaged.swap_average(), "there is none before the first step");
    let mut values = Vec::new();
    for step in 0..3 {
        run(&mut averaged, step, step + 1);
        values.push(averaged.decoder().trained());
    }
    let held_out = batches(&documents(9), 8);
    let of_weights = averaged.evaluate(&held_out).unwrap();
    let of_average = averaged.evaluate_average(&held_out).unwrap();
    assert_ne!(of_weights, of_average);
    assert_eq!(averaged.evaluate(&held_out).unwrap(), of_weights);
    assert!(averaged.swap_average());
    assert_eq!(averaged.evaluate(&held_out).unwrap(), of_average);
    let found = averaged.decoder().trained();
    let mut expected = values.remove(0);
    for later in values {
        for tensor in later.iter() {
            let average = expected.get_mut(&tensor.name).unwrap();
            average.data.iter_mut().zip(&tensor.data).for_each(|(a, x)| *a = 0.5 * x + 0.5 * *a);
        }
    }
    assert_eq!(found, expected);
    assert!(averaged.swap_average());
    let mut plain = learner(Cpu::new(), true, &Recipe::default());
    run(&mut plain, 0, 3);
    assert_eq!(averaged.decoder().trained(), plain.decoder().trained());
    assert!(!plain.swap_average());
    assert_eq!(plain.evaluate_average(&held_out).unwrap(), None);
}

/// Bytes of all states over the values trained: 8 for AdamW, a little over 2 in 8 bits.
#[test]
fn states_have_their_sizes() {
    let per_value = |text: &str| {
        let optimizer = optimizer(text);
        let learner = learner(Cpu::new(), false, &Recipe::from(optimizer));
        let n: usize = learner.rates().map(|(info, _)| info.n_values()).sum();
        let bytes: u64 = learner.rates().map(|(info, _)| optimizer.state_bytes(info)).sum();
        bytes as f64 / n as f64
    };
    assert_eq!(per_value(r#""adamw""#), 8.0);
    assert_eq!(per_value(r#""lion""#), 4.0);
    assert_eq!(per_value(r#""sgd""#), 4.0);
    assert_eq!(per_value(r#"{"name": "sgd", "momentum": 0}"#), 0.0);
    let eight_bits =
        per_value(r#"{"name": "adamw8bit", "min_8bit_size": 0, "f32_embeddings": false}"#);
    assert!((2.03..2.1).contains(&eight_bits), "{eight_bits}");
    let usual = per_value(r#""adamw8bit""#);
    assert!((2.5..4.0).contains(&usual), "the embedding and the biases stay f32: {usual}");
    assert!(per_value(r#""adafactor""#) < 0.2);
    assert!((4.0..6.0).contains(&per_value(r#""muon""#)));
}

fn group(pattern: &str) -> GroupConfig {
    GroupConfig { pattern: pattern.to_owned(), ..GroupConfig::default() }
}

#[test]
fn groups_have_their_tensors() {
    let adamw = OptimizerConfig::AdamW(AdamWConfig { weight_decay: 0.1, ..Default::default() });
    let groups = vec![
        GroupConfig { lr: Some(3e-4), ..group(r"layers\.1\.self_attn\.q_proj") },
        GroupConfig { lr_scale: Some(0.5), weight_decay: Some(0.0), ..group("mlp") },
        GroupConfig { weight_decay: Some(0.2), ..group("norm.weight$") },
    ];
    let learner = learner(Cpu::new(), false, &Recipe { groups, ..Recipe::from(adamw) });
    let rates = |name: &str| {
        let (_, rates) = learner.rates().find(|(info, _)| info.name == name).unwrap();
        (rates.group, (rates.lr_scale * 1e6).round() / 1e6, rates.weight_decay)
    };
    assert_eq!(rates("model.layers.1.self_attn.q_proj.weight"), (Some(0), 0.1, 0.1));
    assert_eq!(rates("model.layers.1.self_attn.q_proj.bias"), (Some(0), 0.1, 0.0));
    assert_eq!(rates("model.layers.0.self_attn.q_proj.weight"), (None, 1.0, 0.1));
    assert_eq!(rates("model.layers.0.mlp.down_proj.weight"), (Some(1), 0.5, 0.0));
    assert_eq!(rates("model.norm.weight"), (Some(2), 1.0, 0.2));
    assert_eq!(rates("model.layers.0.self_attn.o_proj.bias"), (None, 1.0, 0.0));
}

/// PEFT's `create_loraplus_optimizer`: every B has the rate of A times the ratio.
#[test]
fn lora_plus_is_a_group() {
    let groups = vec![GroupConfig { lora_plus_ratio: Some(16.0), ..group("lora_") }];
    let learner = learner(Cpu::new(), true, &Recipe { groups, ..Recipe::default() });
    let mut n_b = 0;
    for (info, rates) in learner.rates() {
        let is_b = info.name.contains("lora_B");
        assert_eq!(rates.lr_scale, if is_b { 16.0 } else { 1.0 }, "{}", info.name);
        n_b += usize::from(is_b);
    }
    assert_eq!(n_b, 14);
}

/// A group's rates are those of a run whose schedule has them: frozen by a rate of 0, for one.
#[test]
fn rates_of_groups_are_used() {
    for recipe in recipes() {
        let groups = vec![GroupConfig { lr_scale: Some(0.0), ..group("q_proj") }];
        let mut learner = learner(Cpu::new(), false, &Recipe { groups, ..recipe.clone() });
        let before = learner.decoder().trained();
        run(&mut learner, 0, 2);
        for tensor in learner.decoder().trained().iter() {
            let is_same = tensor.data == before.get(&tensor.name).unwrap().data;
            assert_eq!(is_same, tensor.name.contains("q_proj"), "{} {recipe:?}", tensor.name);
        }
    }
}

fn refused(recipe: Recipe, lr: f64) -> LearnError {
    let schedule = ScheduleConfig::constant(lr, 10);
    Learner::new(decoder(Cpu::new(), true), recipe, schedule, 0).err().unwrap()
}

#[test]
fn groups_that_make_no_sense_are_refused() {
    let with = |groups| Recipe { groups, ..Recipe::default() };
    let half = |pattern| GroupConfig { lr_scale: Some(0.5), ..group(pattern) };
    let check = |groups, expected: &str| {
        let message = refused(with(groups), 1e-3).to_string();
        assert!(message.contains(expected), "{message}");
    };
    check(
        vec![half("self_attn.q_prj")],
        "group `match` = \"self_attn.q_prj\": it matches no trained tensor; the nearest are \
         `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`",
    );
    check(vec![half("lora_"), half("q_proj")], "earlier groups have every tensor");
    check(vec![half("q_proj(")], "it is no regular expression: unclosed group");
    check(vec![group("q_proj")], "a group that changes something");
    check(vec![GroupConfig { lr: Some(1e-3), ..half("q_proj") }], "give one of them");
    check(vec![GroupConfig { lr_scale: Some(-1.0), ..group("q_proj") }], "`lr_scale` = -1 is not");
    let own_lr = vec![GroupConfig { lr: Some(1e-3), ..group("q_proj") }];
    assert!(refused(with(own_lr), 0.0).to_string().contains("a schedule whose own `lr`"));
}

#[test]
fn recipes_are_read_and_written() {
    let text = r#"{"optimizer": {"name": "muon", "momentum": 0.9, "adamw": {"beta2": 0.95}},
        "max_grad_norm": null, "groups": [{"match": "lora_B", "lr_scale": 2}],
        "loss": {"dft": true}, "neftune_alpha": 5, "ema_decay": 0.999}"#;
    let recipe: Recipe = serde_json::from_str(text).unwrap();
    recipe.check().unwrap();
    assert_eq!(recipe.groups, [GroupConfig { lr_scale: Some(2.0), ..group("lora_B") }]);
    let OptimizerConfig::Muon(muon) = recipe.optimizer else { panic!("{recipe:?}") };
    assert_eq!((muon.momentum, muon.adamw.beta2, muon.ns_steps), (0.9, 0.95, 5));
    for recipe in recipes().into_iter().chain([recipe]) {
        let value = serde_json::to_value(&recipe).unwrap();
        assert_eq!(serde_json::from_value::<Recipe>(value).unwrap(), recipe);
    }
    // A table of AdamW's knobs without a name, as configurations had before there was a choice.
    let adamw = AdamWConfig { beta2: 0.95, ..Default::default() };
    assert_eq!(optimizer(r#"{"beta2": 0.95}"#), OptimizerConfig::AdamW(adamw));
    for name in OptimizerConfig::NAMES {
        assert_eq!(optimizer(&format!("{name:?}")).name(), name);
    }
}

#[test]
fn bad_recipes_are_refused() {
    let unread = |text: &str, expected: &str| {
        let message = serde_json::from_str::<Recipe>(text).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    unread(r#"{"optimizer": "adam"}"#, "`adam` is not one of `adamw`, `adamw8bit`, `lion`");
    unread(r#"{"optimizer": {"name": "lion", "eps": 1}}"#, "`lion`: unknown field `eps`");
    unread(r#"{"optimizer": {"name": 3}}"#, "`name` = 3 is not a name");
    unread(r#"{"optimizer": {"name": "muon", "adjust_lr": "none"}}"#, "unknown variant `none`");
    unread(r#"{"loss": {"smoothing": 0.1}}"#, "unknown field `smoothing`");
    unread(r#"{"groups": [{"pattern": "q"}]}"#, "unknown field `pattern`");
    unread(r#"{"neftune": 5}"#, "unknown field `neftune`");
    let bad = |text: &str, expected: &str| {
        let message = serde_json::from_str::<Recipe>(text).unwrap().check().unwrap_err();
        assert!(message.to_string().contains(expected), "{message}");
    };
    bad(r#"{"optimizer": {"name": "lion", "beta2": 1}}"#, "`beta2` = 1 is not at least 0");
    bad(r#"{"optimizer": {"name": "adamw8bit", "eps": 0}}"#, "`eps` = 0 is not above 0");
    bad(r#"{"optimizer": {"name": "adafactor", "decay_rate": 0.8}}"#, "`decay_rate` = 0.8");
    bad(r#"{"optimizer": {"name": "adafactor", "warmup_init": true}}"#, "`relative_step = true`");
    bad(r#"{"optimizer": {"name": "sgd", "nesterov": true, "momentum": 0}}"#, "`nesterov`");
    bad(r#"{"optimizer": {"name": "muon", "ns_steps": 0}}"#, "`ns_steps` = 0 is not from 1 to 99");
    bad(r#"{"optimizer": {"name": "muon", "adamw": {"beta1": 2}}}"#, "`beta1` = 2");
    bad(r#"{"loss": {"label_smoothing": 1}}"#, "`label_smoothing` = 1");
    bad(r#"{"loss": {"z_loss": -1}}"#, "`z_loss` = -1");
    bad(r#"{"loss": {"soft_cap": 0}}"#, "`soft_cap` = 0 is not above 0");
    bad(r#"{"neftune_alpha": -5}"#, "`neftune_alpha` = -5");
    bad(r#"{"ema_decay": 1}"#, "`ema_decay` = 1");
}
