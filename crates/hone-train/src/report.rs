//! What the report of a run says of sources and roles: what was trained of each, how well, and how
//! much of it was replay.

use serde_json::{Value, json};

use crate::epochs::Packs;
use crate::training::Trained;

/// Keys of a step's line that the report has of the last step.
const OF_LAST_STEP: [&str; 2] = ["losses", "losses_by_role"];

/// Adds it to a report. What comes from the record comes from its text, which is the same in a run
/// that was resumed.
pub(crate) fn tell_apart(report: &mut Value, train: &Packs, done: &Trained) {
    let lines = done.metrics.sealed().lines();
    let steps: Vec<Value> = lines
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line.get("loss").is_some())
        .collect();
    for key in OF_LAST_STEP {
        if let Some(losses) = steps.last().and_then(|line| line.get(key)) {
            report[key] = losses.clone();
        }
    }
    if let (Value::Object(eval), Value::Object(losses)) = (&mut report["eval"], &done.eval_losses) {
        eval.extend(losses.clone());
    }
    report["trained_tokens"] = json!({
        "by_source": train.sources().trained().collect::<Value>(),
        "by_role": train.roles().trained().collect::<Value>(),
    });
    report["replay_share"] = replay_share(&steps).into();
}

/// The share of replay in all tokens that were trained; `None` where there was none.
fn replay_share(steps: &[Value]) -> Option<f64> {
    let number = |line: &Value, key: &str| line.get(key).and_then(Value::as_f64);
    let mut sums = [0.0; 2];
    for line in steps {
        let trained = number(line, "num_trained_tokens")?;
        sums[0] += trained * number(line, "replay_share")?;
        sums[1] += trained;
    }
    (sums[1] > 0.0).then(|| sums[0] / sums[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(trained: u64, share: f64) -> Value {
        json!({"num_trained_tokens": trained, "replay_share": share})
    }

    #[test]
    fn the_share_of_replay_is_of_all_trained_tokens() {
        assert_eq!(replay_share(&[step(10, 0.5), step(30, 0.0)]), Some(0.125));
        assert_eq!(replay_share(&[json!({"num_trained_tokens": 10})]), None);
        assert_eq!(replay_share(&[]), None);
    }
}
