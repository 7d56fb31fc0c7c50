//! A run's state as named tensors and JSON: enough to go on as if it had never stopped.

use hone_kernels::Backend;
use hone_model::{NamedTensor, ParamInfo, Tensors};
use serde_json::{Value, json};

use crate::rule::{Slot, State};
use crate::{LearnError, Learner};

/// Version of the layout; a state of another version is refused.
const VERSION: u64 = 1;

/// What comes before a parameter's name.
const VALUE: &str = "value.";
const AVERAGE: &str = "average.";

/// Codes of 8 bits in one f32: a whole number below 2^24, which f32 holds exactly.
const CODES_A_VALUE: usize = 3;

impl<B: Backend> Learner<B> {
    /// Everything that a resumed run needs, taken between steps: values, moments and averages of
    /// every trained tensor, exact, and the number of steps applied. The place in the data is the
    /// caller's.
    pub fn state(&self) -> (Tensors, Value) {
        let mut tensors = Tensors::new();
        for tensor in self.decoder.trained().iter() {
            let name = format!("{VALUE}{}", tensor.name);
            tensors.insert(NamedTensor { name, ..tensor.clone() });
        }
        let backend = self.decoder.backend();
        for Slot { info, state, .. } in &self.slots {
            let values = state.values.iter().map(|(prefix, buf)| (prefix, backend.download(buf)));
            let codes = state.codes.iter();
            let codes = codes.map(|(prefix, codes)| (prefix, pack(&backend.read_codes(codes))));
            for (prefix, data) in values.chain(codes) {
                let (name, shape) = (format!("{prefix}{}", info.name), shape(info, data.len()));
                tensors.insert(NamedTensor::new(name, shape, data));
            }
            if let Some(average) = &self.average {
                let mut data = vec![0.0; info.n_values()];
                backend.read(&average[info.buffer], info.offset, &mut data);
                let name = format!("{AVERAGE}{}", info.name);
                tensors.insert(NamedTensor::new(name, info.shape.clone(), data));
            }
        }
        let optimizer = self.recipe.optimizer.name();
        let (step, since) = (self.step, self.since);
        (tensors, json!({"version": VERSION, "step": step, "since": since, "optimizer": optimizer}))
    }

    /// Goes back to a state. Errors: another version or optimizer, or tensors that are missing, too
    /// many or of another shape; the learner is then unchanged.
    pub fn restore(&mut self, tensors: &Tensors, state: &Value) -> Result<(), LearnError> {
        let bad = |what: String| Err(LearnError::State(what));
        let step = steps_of(state)?;
        // States that do not say so have their moments from the first step on.
        let since = state.get("since").map_or(Some(0), Value::as_u64);
        let Some(since) = since.filter(|since| *since <= step) else {
            return bad("its moments begin after its last step".to_owned());
        };
        // States that name no optimizer are older than the choice.
        let found = state.get("optimizer").and_then(Value::as_str).unwrap_or("adamw");
        let ours = self.recipe.optimizer.name();
        if found != ours {
            return bad(format!("its optimizer is `{found}`, this run has `{ours}`"));
        }
        let values = self.check_state(tensors)?;
        self.decoder.set_trained(&values)?;
        let backend = self.decoder.backend();
        for Slot { info, state, .. } in &mut self.slots {
            for (prefix, buf) in &mut state.values {
                backend.write(buf, 0, &find(tensors, prefix, info).data);
            }
            for (prefix, codes) in &mut state.codes {
                let data = &find(tensors, prefix, info).data;
                backend.write_codes(codes, &unpack(data, info.n_values()));
            }
            if let Some(average) = &mut self.average {
                let data = &find(tensors, AVERAGE, info).data;
                backend.write(&mut average[info.buffer], info.offset, data);
            }
        }
        self.decoder.zero_gradients();
        self.forget();
        (self.step, self.since) = (step, since);
        Ok(())
    }

    /// Takes the values and the number of steps of a state, of whichever optimizer, and begins
    /// moments and average anew. Errors: as [`Learner::restore`], but for the optimizer.
    pub fn restart(&mut self, tensors: &Tensors, state: &Value) -> Result<(), LearnError> {
        let step = steps_of(state)?;
        let mut values = Tensors::new();
        for Slot { info, .. } in &self.slots {
            let tensor = check(tensors, VALUE, info, &info.shape)?;
            values.insert(NamedTensor { name: info.name.clone(), ..tensor.clone() });
        }
        let n_values = tensors.iter().filter(|tensor| tensor.name.starts_with(VALUE)).count();
        if n_values != self.slots.len() {
            let n = self.slots.len();
            let what = format!("it trains {n_values} tensors, this run {n}");
            return Err(LearnError::State(what));
        }
        self.decoder.set_trained(&values)?;
        let backend = self.decoder.backend();
        for Slot { info, state, .. } in &mut self.slots {
            *state = State::new(backend, &self.recipe.optimizer, info);
        }
        self.decoder.zero_gradients();
        self.forget();
        (self.step, self.since) = (step, step);
        Ok(())
    }

    /// Checks that all tensors are there and no others; returns the values.
    fn check_state(&self, tensors: &Tensors) -> Result<Tensors, LearnError> {
        let backend = self.decoder.backend();
        let n_parts = |slot: &Slot<B>| slot.state.values.len() + slot.state.codes.len();
        let extra = 1 + usize::from(self.average.is_some());
        let expected: usize = self.slots.iter().map(|slot| n_parts(slot) + extra).sum();
        if tensors.len() != expected {
            let what = format!("it has {} tensors, this run has {expected}", tensors.len());
            return Err(LearnError::State(what));
        }
        let mut values = Tensors::new();
        for Slot { info, state, .. } in &self.slots {
            let tensor = check(tensors, VALUE, info, &info.shape)?;
            values.insert(NamedTensor { name: info.name.clone(), ..tensor.clone() });
            for (prefix, buf) in &state.values {
                check(tensors, prefix, info, &shape(info, backend.len(buf)))?;
            }
            for (prefix, _) in &state.codes {
                let len = info.n_values().div_ceil(CODES_A_VALUE);
                let tensor = check(tensors, prefix, info, &shape(info, len))?;
                if !tensor.data.iter().all(|&x| is_packed(x)) {
                    let what = format!("`{}` holds something that is no code", tensor.name);
                    return Err(LearnError::State(what));
                }
            }
            if self.average.is_some() {
                check(tensors, AVERAGE, info, &info.shape)?;
            }
        }
        Ok(values)
    }
}

/// The number of steps of a state, of this version.
fn steps_of(state: &Value) -> Result<u64, LearnError> {
    let bad = |what: String| Err(LearnError::State(what));
    if state.get("version").and_then(Value::as_u64) != Some(VERSION) {
        return bad(format!("its version is not {VERSION}"));
    }
    match state.get("step").and_then(Value::as_u64) {
        Some(step) => Ok(step),
        None => bad("it has no step".to_owned()),
    }
}

/// The shape of a part of `len` values: the tensor's where it has as many.
fn shape(info: &ParamInfo, len: usize) -> Vec<usize> {
    if len == info.n_values() { info.shape.clone() } else { vec![len] }
}

/// Codes as whole numbers, three a value.
fn pack(codes: &[u8]) -> Vec<f32> {
    let number = |codes: &[u8]| codes.iter().rev().fold(0, |n, &code| n << 8 | u32::from(code));
    codes.chunks(CODES_A_VALUE).map(|codes| number(codes) as f32).collect()
}

/// The first `n` codes of what [`pack`] made.
fn unpack(data: &[f32], n: usize) -> Vec<u8> {
    let bytes = |x: &f32| {
        let [a, b, c, _] = (*x as u32).to_le_bytes();
        [a, b, c]
    };
    data.iter().flat_map(bytes).take(n).collect()
}

/// Whether a value is one that [`pack`] makes.
fn is_packed(x: f32) -> bool {
    (0.0..16_777_216.0).contains(&x) && x.fract() == 0.0
}

/// Checks that a tensor is there, with its shape and finite values.
fn check<'a>(
    tensors: &'a Tensors,
    prefix: &str,
    info: &ParamInfo,
    shape: &[usize],
) -> Result<&'a NamedTensor, LearnError> {
    let name = format!("{prefix}{}", info.name);
    match tensors.get(&name) {
        None => Err(LearnError::State(format!("it has no tensor `{name}`"))),
        Some(tensor) if tensor.shape != shape => Err(LearnError::State(format!(
            "`{name}` has shape {:?}, here it is {shape:?}",
            tensor.shape
        ))),
        Some(tensor) => {
            tensor.check_finite()?;
            Ok(tensor)
        }
    }
}

/// A tensor that [`check`] has found.
fn find<'a>(tensors: &'a Tensors, prefix: &str, info: &ParamInfo) -> &'a NamedTensor {
    tensors.get(&format!("{prefix}{}", info.name)).expect("`check` has found it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_as_numbers() {
        for n in [0, 1, 2, 3, 4, 1000] {
            let codes: Vec<u8> = (0..n).map(|i| (i * 37 % 256) as u8).collect();
            let packed = pack(&codes);
            assert!(packed.iter().all(|&x| is_packed(x)));
            assert_eq!(unpack(&packed, n), codes);
        }
        assert_eq!(unpack(&pack(&[255; 3]), 3), [255; 3]);
        assert!(!is_packed(0.5) && !is_packed(-1.0) && !is_packed(16_777_216.0));
    }
}
