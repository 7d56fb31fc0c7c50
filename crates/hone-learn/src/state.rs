//! A run's state as named tensors and JSON: enough to go on as if it had never stopped.

use hone_kernels::Backend;
use hone_model::{LossSums, NamedTensor, ParamInfo, Tensors};
use serde_json::{Value, json};

use crate::learner::Moments;
use crate::{LearnError, Learner};

/// Version of the layout; a state of another version is refused.
const VERSION: u64 = 1;

/// What comes before a parameter's name.
const VALUE: &str = "value.";
const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";

impl<B: Backend> Learner<B> {
    /// Everything that a resumed run needs, taken between steps: values and both moments of every
    /// trained tensor, f32 and exact, and the number of steps applied. The place in the data is the
    /// caller's.
    pub fn state(&self) -> (Tensors, Value) {
        let mut tensors = Tensors::new();
        for tensor in self.decoder.trained().iter() {
            let name = format!("{VALUE}{}", tensor.name);
            tensors.insert(NamedTensor { name, ..tensor.clone() });
        }
        for info in self.decoder.trained_params() {
            let Moments { first, second } = &self.moments[info.buffer];
            for (prefix, buf) in [(FIRST, first), (SECOND, second)] {
                let mut data = vec![0.0; info.n_values()];
                self.decoder.backend().read(buf, info.offset, &mut data);
                let name = format!("{prefix}{}", info.name);
                tensors.insert(NamedTensor::new(name, info.shape.clone(), data));
            }
        }
        (tensors, json!({"version": VERSION, "step": self.step}))
    }

    /// Goes back to a state. Errors: another version, or tensors that are missing, too many or of
    /// another shape; the learner is then unchanged.
    pub fn restore(&mut self, tensors: &Tensors, state: &Value) -> Result<(), LearnError> {
        let bad = |what: String| Err(LearnError::State(what));
        if state.get("version").and_then(Value::as_u64) != Some(VERSION) {
            return bad(format!("its version is not {VERSION}"));
        }
        let Some(step) = state.get("step").and_then(Value::as_u64) else {
            return bad("it has no step".to_owned());
        };
        let params = self.decoder.trained_params();
        if tensors.len() != 3 * params.len() {
            let expected = 3 * params.len();
            return bad(format!("it has {} tensors, this run has {expected}", tensors.len()));
        }
        let mut values = Tensors::new();
        for info in &params {
            for prefix in [VALUE, FIRST, SECOND] {
                check(tensors, prefix, info)?;
            }
            let tensor = find(tensors, VALUE, info);
            values.insert(NamedTensor { name: info.name.clone(), ..tensor.clone() });
        }
        self.decoder.set_trained(&values)?;
        for info in &params {
            let Moments { first, second } = &mut self.moments[info.buffer];
            let backend = self.decoder.backend();
            backend.write(first, info.offset, &find(tensors, FIRST, info).data);
            backend.write(second, info.offset, &find(tensors, SECOND, info).data);
        }
        self.decoder.zero_gradients();
        self.sums = LossSums::default();
        self.n_micro = 0;
        self.step = step;
        Ok(())
    }
}

/// Checks that a tensor is there, with its shape and finite values.
fn check(tensors: &Tensors, prefix: &str, info: &ParamInfo) -> Result<(), LearnError> {
    let name = format!("{prefix}{}", info.name);
    match tensors.get(&name) {
        None => Err(LearnError::State(format!("it has no tensor `{name}`"))),
        Some(tensor) if tensor.shape != info.shape => Err(LearnError::State(format!(
            "`{name}` has shape {:?}, here it is {:?}",
            tensor.shape, info.shape
        ))),
        Some(tensor) => Ok(tensor.check_finite()?),
    }
}

/// A tensor that [`check`] has found.
fn find<'a>(tensors: &'a Tensors, prefix: &str, info: &ParamInfo) -> &'a NamedTensor {
    tensors.get(&format!("{prefix}{}", info.name)).expect("`check` has found it")
}
