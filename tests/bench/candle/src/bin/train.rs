//! LoRA on a Llama by candle's own autograd, in f32 (its CPU products know no bf16).
//!
//!   train BASE_DIR ADAPTER_DIR STEPS.json LR
//!
//! STEPS.json and the JSON line printed are those of `peers/torch_train.py`. Autograd keeps every intermediate, so each layer of a
//! document is a graph of its own, made again from its input when the gradient of its output is known: a fifth of the memory of one
//! graph a document, and no slower, since that much less memory is touched. Operators are the ones that candle can differentiate: its fused softmax,
//! RMSNorm and rotation have no backward.

use std::collections::HashMap;
use std::time::Instant;

use bench_candle::{Failure, ids, json, number, tensors};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, TensorId, Var};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use serde_json::Value;

/// Linear maps of a layer, by the names of their files.
const MAPS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Norm above which gradients are scaled down, as on the other sides.
const MAX_GRAD_NORM: f64 = 1.0;

/// A frozen weight (out, in) and its adapter.
struct Linear {
    weight: Tensor,
    a: Var,
    b: Var,
    scale: f64,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let low = x.matmul(&self.a.t()?)?.matmul(&self.b.t()?)?;
        x.matmul(&self.weight.t()?)? + (low * self.scale)?
    }
}

struct Layer {
    /// In the order of [`MAPS`].
    maps: Vec<Linear>,
    norm_in: Tensor,
    norm_mlp: Tensor,
}

impl Layer {
    fn vars(&self) -> Vec<Var> {
        self.maps.iter().flat_map(|map| [map.a.clone(), map.b.clone()]).collect()
    }
}

struct Model {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    eps: f32,
    n_q: usize,
    n_kv: usize,
    theta: f64,
}

impl Model {
    fn load(base: &str, adapter: &str) -> Result<Self, Failure> {
        let config = json(&format!("{base}/config.json"))?;
        let weights = tensors(&format!("{base}/model.safetensors"))?;
        let settings = json(&format!("{adapter}/adapter_config.json"))?;
        let scale = number(&settings, "lora_alpha")? / number(&settings, "r")?;
        let adapter = tensors(&format!("{adapter}/adapter_model.safetensors"))?;
        let f32 = |from: &HashMap<String, Tensor>, name: String| -> Result<Tensor, Failure> {
            let tensor = from.get(&name).ok_or_else(|| format!("no tensor `{name}`"))?;
            Ok(tensor.to_dtype(DType::F32)?)
        };
        let layer = |i: f64| -> Result<Layer, Failure> {
            let prefix = format!("model.layers.{i}");
            let map = |name: &&str| -> Result<Linear, Failure> {
                let low = format!("base_model.model.{prefix}.{name}");
                Ok(Linear {
                    weight: f32(&weights, format!("{prefix}.{name}.weight"))?,
                    a: Var::from_tensor(&f32(&adapter, format!("{low}.lora_A.weight"))?)?,
                    b: Var::from_tensor(&f32(&adapter, format!("{low}.lora_B.weight"))?)?,
                    scale,
                })
            };
            Ok(Layer {
                maps: MAPS.iter().map(map).collect::<Result<_, _>>()?,
                norm_in: f32(&weights, format!("{prefix}.input_layernorm.weight"))?,
                norm_mlp: f32(&weights, format!("{prefix}.post_attention_layernorm.weight"))?,
            })
        };
        let n_layers = number(&config, "num_hidden_layers")? as usize;
        Ok(Model {
            embedding: f32(&weights, "model.embed_tokens.weight".to_owned())?,
            layers: (0..n_layers).map(|i| layer(i as f64)).collect::<Result<_, _>>()?,
            norm: f32(&weights, "model.norm.weight".to_owned())?,
            eps: number(&config, "rms_norm_eps")? as f32,
            n_q: number(&config, "num_attention_heads")? as usize,
            n_kv: number(&config, "num_key_value_heads")? as usize,
            theta: number(&config, "rope_theta")
                .or_else(|_| number(&config["rope_parameters"], "rope_theta"))?,
        })
    }

    fn vars(&self) -> Vec<Var> {
        self.layers.iter().flat_map(Layer::vars).collect()
    }

    /// Logits (T, V) behind the last layer.
    fn head(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        candle_nn::ops::rms_norm_slow(x, &self.norm, self.eps)?.matmul(&self.embedding.t()?)
    }

    fn embed(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        self.embedding.index_select(&Tensor::new(ids, &Device::Cpu)?, 0) // (T, D)
    }

    fn layer(&self, layer: &Layer, x: &Tensor, at: &Positions) -> candle_core::Result<Tensor> {
        let [q, k, v, o, gate, up, down] = &layer.maps[..] else { unreachable!("MAPS has seven") };
        let h = candle_nn::ops::rms_norm_slow(x, &layer.norm_in, self.eps)?;
        let q = at.rotate(&split(&q.forward(&h)?, self.n_q)?)?;
        let k = at.rotate(&split(&k.forward(&h)?, self.n_kv)?)?;
        let (k, v) = (self.spread(&k)?, self.spread(&split(&v.forward(&h)?, self.n_kv)?)?);
        let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
        let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(&at.mask)?;
        let out = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?; // (1, H, T, K)
        let out = out.squeeze(0)?.transpose(0, 1)?.flatten_from(1)?;
        let x = (x + o.forward(&out)?)?;
        let h = candle_nn::ops::rms_norm_slow(&x, &layer.norm_mlp, self.eps)?;
        &x + down.forward(&(gate.forward(&h)?.silu()? * up.forward(&h)?)?)?
    }

    /// Each key/value head as often as queries share it.
    fn spread(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (_, g, t, k) = x.dims4()?;
        let shape = (1, g, self.n_q / self.n_kv, t, k);
        x.unsqueeze(2)?.broadcast_as(shape)?.reshape((1, self.n_q, t, k))
    }

    fn positions(&self, t: usize) -> candle_core::Result<Positions> {
        let k = self.embedding.dim(1)? / self.n_q;
        let angle = |i: usize| {
            let (position, pair) = (i / (k / 2), i % (k / 2));
            position as f64 / self.theta.powf(2.0 * pair as f64 / k as f64)
        };
        let table = |f: fn(f64) -> f64| {
            let values = (0..t * k / 2).map(|i| f(angle(i)) as f32).collect::<Vec<_>>();
            Tensor::from_vec(values, (t, k / 2), &Device::Cpu)
        };
        let unseen = |i: usize| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 };
        let mask = (0..t * t).map(unseen).collect::<Vec<_>>();
        let mask = Tensor::from_vec(mask, (1, 1, t, t), &Device::Cpu)?;
        Ok(Positions { cos: table(f64::cos)?, sin: table(f64::sin)?, mask })
    }
}

/// What depends on the positions of a document's tokens alone.
struct Positions {
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
}

impl Positions {
    fn rotate(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        candle_nn::rotary_emb::rope_slow(x, &self.cos, &self.sin)
    }
}

/// (T, n K) to (1, n, T, K).
fn split(x: &Tensor, n: usize) -> candle_core::Result<Tensor> {
    let (t, width) = x.dims2()?;
    x.reshape((t, n, width / n))?.transpose(0, 1)?.contiguous()?.unsqueeze(0)
}

/// Ids, and the weights of their losses.
type Document = (Vec<u32>, Vec<f32>);

/// Gradients so far.
type Sum = HashMap<TensorId, Tensor>;

fn read_steps(path: &str) -> Result<Vec<Vec<Document>>, Failure> {
    let steps = json(path)?;
    let document = |value: &Value| -> Result<Document, Failure> {
        let weights = value[1].as_array().ok_or("a document has no weights")?;
        Ok((ids(&value[0])?, weights.iter().map(|w| w.as_f64().unwrap_or(0.0) as f32).collect()))
    };
    let step = |step: &Value| -> Result<Vec<Document>, Failure> {
        let packs = step.as_array().ok_or("a step is no list of packs")?.iter();
        packs.flat_map(|p| p.as_array().into_iter().flatten()).map(document).collect()
    };
    steps["steps"].as_array().ok_or("no `steps`")?.iter().map(step).collect()
}

/// A document's part of the loss, from what stands behind the last layer.
fn loss_of(
    model: &Model,
    x: &Tensor,
    document: &Document,
    total: f32,
) -> candle_core::Result<Tensor> {
    let (ids, weights) = document;
    let logits = model.head(x)?.narrow(0, 0, ids.len() - 1)?;
    let targets = Tensor::new(&ids[1..], &Device::Cpu)?.unsqueeze(1)?;
    let losses = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?.neg()?;
    let weights = Tensor::new(&weights[1..], &Device::Cpu)?.unsqueeze(1)?;
    (losses * weights)?.sum_all()? / f64::from(total)
}

/// Adds the gradients of `vars` alone: the store has those of frozen weights too.
fn add(vars: &[Var], new: &GradStore, sum: &mut Sum) -> candle_core::Result<()> {
    for var in vars {
        let Some(new) = new.get(var) else { continue };
        let added = match sum.get(&var.id()) {
            Some(old) => (old + new)?,
            None => new.clone(),
        };
        sum.insert(var.id(), added);
    }
    Ok(())
}

/// Adds the gradients of one document; returns its part of the loss.
fn learn(
    model: &Model,
    document: &Document,
    total: f32,
    sum: &mut Sum,
) -> candle_core::Result<f64> {
    let at = model.positions(document.0.len())?;
    let mut inputs = vec![model.embed(&document.0)?];
    for layer in &model.layers {
        let x = model.layer(layer, &inputs[inputs.len() - 1], &at)?.detach();
        inputs.push(x);
    }
    let gradient = |of: &Var, store: &GradStore| {
        store.get(of).cloned().ok_or_else(|| candle_core::Error::msg("no gradient"))
    };
    let x = Var::from_tensor(&inputs[model.layers.len()])?;
    let loss = loss_of(model, &x, document, total)?;
    let mut dy = gradient(&x, &loss.backward()?)?;
    for (layer, x) in model.layers.iter().zip(&inputs).rev() {
        let x = Var::from_tensor(x)?;
        // The gradient of this scalar is the one wanted: candle starts from a one.
        let store = (model.layer(layer, &x, &at)? * dy)?.sum_all()?.backward()?;
        add(&layer.vars(), &store, sum)?;
        dy = gradient(&x, &store)?;
    }
    Ok(f64::from(loss.to_scalar::<f32>()?))
}

/// Scales all gradients so that their norm is at most [`MAX_GRAD_NORM`]; returns the norm before.
fn clip(sum: &mut Sum) -> candle_core::Result<f64> {
    let mut squares = 0.0;
    for grad in sum.values() {
        squares += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let norm = squares.sqrt();
    if norm > MAX_GRAD_NORM {
        for grad in sum.values_mut() {
            *grad = (&*grad * (MAX_GRAD_NORM / norm))?;
        }
    }
    Ok(norm)
}

/// The gradients in the form that candle's optimizer takes, which only a backward makes.
fn store_of(vars: &[Var], sum: &mut Sum) -> candle_core::Result<GradStore> {
    let mut store = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
    for var in vars {
        if let Some(grad) = sum.remove(&var.id()) {
            store.insert(var, grad);
        }
    }
    Ok(store)
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, steps, lr] = &args[..] else {
        return Err("usage: train BASE_DIR ADAPTER_DIR STEPS.json LR".into());
    };
    let (model, steps) = (Model::load(base, adapter)?, read_steps(steps)?);
    let vars = model.vars();
    let settings = ParamsAdamW { lr: lr.parse()?, weight_decay: 0.0, ..Default::default() };
    let mut adamw = AdamW::new(vars.clone(), settings)?;
    let (mut losses, mut norms, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    for documents in &steps {
        let begun = Instant::now();
        let total = documents.iter().flat_map(|(_, weights)| &weights[1..]).sum::<f32>();
        let (mut sum, mut loss) = (Sum::new(), 0.0);
        for document in documents {
            loss += learn(&model, document, total, &mut sum)?;
        }
        norms.push(clip(&mut sum)?);
        adamw.step(&store_of(&vars, &mut sum)?)?;
        seconds.push(begun.elapsed().as_secs_f64());
        losses.push(loss);
    }
    let report = serde_json::json!({"losses": losses, "grad_norms": norms, "seconds": seconds});
    println!("{report}");
    Ok(())
}
