//! LoRA on a Llama by candle's own autograd, in f32 (its CPU products know no bf16).
//!
//!   train BASE_DIR ADAPTER_DIR STEPS.json LR
//!
//! STEPS.json and the JSON line printed are those of `peers/torch_train.py`. Each document is a graph of its own whose gradients
//! are added up: a graph of four documents of 512 tokens takes some 20 GB, since autograd keeps every intermediate. Operators are
//! the ones that candle can differentiate: its fused softmax, RMSNorm and rotation have no backward.

use std::collections::HashMap;
use std::time::Instant;

use bench_candle::{Failure, ids, json, number, tensors};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};
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
        let maps = self.layers.iter().flat_map(|layer| &layer.maps);
        maps.flat_map(|map| [map.a.clone(), map.b.clone()]).collect()
    }

    /// Logits (T, V) of a document.
    fn logits(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let t = ids.dim(0)?;
        let positions = self.positions(t, self.embedding.dim(1)? / self.n_q)?;
        let mut x = self.embedding.index_select(&ids, 0)?; // (T, D)
        for layer in &self.layers {
            x = self.layer(layer, &x, &positions)?;
        }
        candle_nn::ops::rms_norm_slow(&x, &self.norm, self.eps)?.matmul(&self.embedding.t()?)
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

    fn positions(&self, t: usize, k: usize) -> candle_core::Result<Positions> {
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

/// One step's documents: ids, and the weights of their losses.
type Documents = Vec<(Vec<u32>, Vec<f32>)>;

fn read_steps(path: &str) -> Result<Vec<Documents>, Failure> {
    let steps = json(path)?;
    let document = |value: &Value| -> Result<(Vec<u32>, Vec<f32>), Failure> {
        let weights = value[1].as_array().ok_or("a document has no weights")?;
        Ok((ids(&value[0])?, weights.iter().map(|w| w.as_f64().unwrap_or(0.0) as f32).collect()))
    };
    let step = |step: &Value| -> Result<Documents, Failure> {
        let packs = step.as_array().ok_or("a step is no list of packs")?.iter();
        packs.flat_map(|p| p.as_array().into_iter().flatten()).map(document).collect()
    };
    steps["steps"].as_array().ok_or("no `steps`")?.iter().map(step).collect()
}

/// Adds the gradients of one document; returns its part of the loss.
fn learn(
    model: &Model,
    vars: &[Var],
    (ids, weights): &(Vec<u32>, Vec<f32>),
    total: f32,
    sum: &mut Option<GradStore>,
) -> candle_core::Result<f64> {
    let n = ids.len() - 1;
    let logits = model.logits(ids)?.narrow(0, 0, n)?;
    let targets = Tensor::new(&ids[1..], &Device::Cpu)?.unsqueeze(1)?;
    let losses = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?.neg()?;
    let weights = Tensor::new(&weights[1..], &Device::Cpu)?.unsqueeze(1)?;
    let loss = ((losses * weights)?.sum_all()? / f64::from(total))?;
    let mut grads = loss.backward()?;
    if let Some(before) = sum {
        for var in vars {
            let (Some(old), Some(new)) = (before.get(var), grads.get(var)) else { continue };
            let added = (old + new)?;
            grads.insert(var, added);
        }
    }
    *sum = Some(grads);
    Ok(f64::from(loss.to_scalar::<f32>()?))
}

/// Scales all gradients so that their norm is at most [`MAX_GRAD_NORM`]; returns the norm before.
fn clip(vars: &[Var], grads: &mut GradStore) -> candle_core::Result<f64> {
    let mut squares = 0.0;
    for var in vars {
        let grad = grads.get(var).ok_or_else(|| candle_core::Error::msg("no gradient"))?;
        squares += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let norm = squares.sqrt();
    if norm > MAX_GRAD_NORM {
        for var in vars {
            if let Some(grad) = grads.remove(var) {
                grads.insert(var, (grad * (MAX_GRAD_NORM / norm))?);
            }
        }
    }
    Ok(norm)
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
        let (mut grads, mut loss) = (None, 0.0);
        for document in documents {
            loss += learn(&model, &vars, document, total, &mut grads)?;
        }
        let mut grads = grads.ok_or("a step without documents")?;
        norms.push(clip(&vars, &mut grads)?);
        adamw.step(&grads)?;
        seconds.push(begun.elapsed().as_secs_f64());
        losses.push(loss);
    }
    let report = serde_json::json!({"losses": losses, "grad_norms": norms, "seconds": seconds});
    println!("{report}");
    Ok(())
}
