//! The plan of a training run: what each optimizer step will see, known before anything is trained.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, ListArray, RecordBatch, UInt64Array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use crate::RowError;
use crate::columns::{column, item};

/// An optimizer step.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanStep {
    /// Its number, from 0.
    pub step: u64,
    /// Its epoch, from 0.
    pub epoch: u64,
    /// Indexes of its packs in `train.arrow`, in the order in which they are computed.
    pub packs: Vec<u64>,
    /// Its tokens.
    pub tokens: u64,
    /// Its tokens with a loss weight above 0 that something stands before.
    pub trained_tokens: u64,
    /// Sum of the weights of those: what its loss is divided by.
    pub weight: f64,
    /// Share of its trained tokens that are of replay sources.
    pub replay_share: f64,
    /// Its learning rate.
    pub learning_rate: f64,
}

impl PlanStep {
    /// Columns of the table.
    pub fn schema() -> SchemaRef {
        let number = |name| Field::new(name, DataType::UInt64, false);
        let share = |name| Field::new(name, DataType::Float64, false);
        let packs = DataType::List(Arc::new(number("item")));
        Arc::new(Schema::new(vec![
            number("step"),
            number("epoch"),
            Field::new("packs", packs, false),
            number("tokens"),
            number("trained_tokens"),
            share("weight"),
            share("replay_share"),
            share("learning_rate"),
        ]))
    }

    /// Steps as one batch.
    ///
    /// # Errors
    /// None that steps of this type can cause; Arrow's own are passed on.
    pub fn to_batch(steps: &[Self]) -> Result<RecordBatch, RowError> {
        let number = |of: fn(&Self) -> u64| -> ArrayRef {
            Arc::new(UInt64Array::from_iter_values(steps.iter().map(of)))
        };
        let float = |of: fn(&Self) -> f64| -> ArrayRef {
            Arc::new(Float64Array::from_iter_values(steps.iter().map(of)))
        };
        let offsets = OffsetBuffer::from_lengths(steps.iter().map(|s| s.packs.len()));
        let packs = UInt64Array::from_iter_values(steps.iter().flat_map(|s| s.packs.clone()));
        let field = Arc::new(Field::new("item", DataType::UInt64, false));
        let columns = vec![
            number(|s| s.step),
            number(|s| s.epoch),
            Arc::new(ListArray::try_new(field, offsets, Arc::new(packs), None)?),
            number(|s| s.tokens),
            number(|s| s.trained_tokens),
            float(|s| s.weight),
            float(|s| s.replay_share),
            float(|s| s.learning_rate),
        ];
        Ok(RecordBatch::try_new(Self::schema(), columns)?)
    }

    /// Steps of a batch.
    ///
    /// # Errors
    /// A missing or mistyped column.
    pub fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, RowError> {
        let number = |name| column::<UInt64Array>(batch, name);
        let float = |name| column::<Float64Array>(batch, name);
        let (step, epoch, tokens) = (number("step")?, number("epoch")?, number("tokens")?);
        let (trained, packs) = (number("trained_tokens")?, column::<ListArray>(batch, "packs")?);
        let (weight, replay) = (float("weight")?, float("replay_share")?);
        let learning_rate = float("learning_rate")?;
        (0..batch.num_rows())
            .map(|row| {
                Ok(PlanStep {
                    step: step.value(row),
                    epoch: epoch.value(row),
                    packs: item::<UInt64Array>(packs, row, "packs")?.values().to_vec(),
                    tokens: tokens.value(row),
                    trained_tokens: trained.value(row),
                    weight: weight.value(row),
                    replay_share: replay.value(row),
                    learning_rate: learning_rate.value(row),
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_read_back() {
        let step = |step: u64| PlanStep {
            step,
            epoch: step / 2,
            packs: (0..step).collect(),
            tokens: 100,
            trained_tokens: 50,
            weight: 49.5,
            replay_share: 0.1,
            learning_rate: 1e-4,
        };
        let steps: Vec<PlanStep> = (0..4).map(step).collect();
        assert_eq!(PlanStep::from_batch(&PlanStep::to_batch(&steps).unwrap()).unwrap(), steps);
    }
}
