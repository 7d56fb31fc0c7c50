//! The loss curve as inline SVG.
//!
//! The drawing is stretched to its box and its lines keep their width; the numbers on the axes are
//! HTML, so that they stay readable at any width.

use std::fmt::Write;

use serde_json::Value;

/// Most points of a line: more cannot be told apart on a screen.
const POINTS_MAX: usize = 400;

/// Width and height of the drawing's own coordinates.
const SIZE: (f64, f64) = (1000.0, 300.0);

/// Losses by step.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Curve {
    /// Of training.
    pub(crate) train: Vec<(f64, f64)>,
    /// Held-out.
    pub(crate) held_out: Vec<(f64, f64)>,
}

impl Curve {
    /// Reads the lines of `metrics.jsonl`; what is no number of a step is passed over.
    pub(crate) fn read(lines: &str) -> Self {
        let mut curve = Curve::default();
        for line in lines.lines() {
            let Ok(value) = serde_json::from_str::<Value>(line) else { continue };
            let number = |key: &str| value.get(key).and_then(Value::as_f64);
            let Some(step) = number("step") else { continue };
            curve.train.extend(number("loss").map(|loss| (step, loss)));
            curve.held_out.extend(number("eval_loss").map(|loss| (step, loss)));
        }
        curve
    }

    /// The drawing; nothing when there is not enough to draw a line.
    pub(crate) fn svg(&self) -> String {
        if self.train.len() < 2 {
            return String::new();
        }
        let (train, together) = thin(&self.train);
        let all = || self.train.iter().chain(&self.held_out);
        let x_max = all().map(|p| p.0).fold(1.0, f64::max);
        let y_max = all().map(|p| p.1).fold(0.0, f64::max);
        let (x_ticks, y_ticks) = (ticks(x_max, 6), covering(y_max, 5));
        let y_top = y_ticks.last().copied().unwrap_or(1.0).max(f64::MIN_POSITIVE);
        let at = |(x, y): &(f64, f64)| (x / x_max * SIZE.0, SIZE.1 * (1.0 - y / y_top));
        let mut out = String::from("<div class=\"plot\">");
        for tick in &y_ticks {
            let top = 100.0 * (1.0 - tick / y_top);
            let _ = write!(out, "<span class=\"y\" style=\"top:{top:.2}%\">{tick}</span>");
        }
        for tick in &x_ticks {
            let left = 100.0 * tick / x_max;
            let _ = write!(out, "<span class=\"x\" style=\"left:{left:.2}%\">{tick}</span>");
        }
        let _ = write!(
            out,
            "<svg viewBox=\"0 0 {} {}\" preserveAspectRatio=\"none\" role=\"img\" \
             aria-label=\"loss by optimizer step\">",
            SIZE.0, SIZE.1
        );
        for tick in &y_ticks {
            let y = SIZE.1 * (1.0 - tick / y_top);
            let _ = write!(out, "<path class=\"grid\" d=\"M0 {y:.1}H{}\"/>", SIZE.0);
        }
        let _ = write!(out, "<path class=\"train\" d=\"{}\"/>", line(train.iter().map(at)));
        let held_out = || self.held_out.iter().map(at);
        let _ = write!(out, "<path class=\"held\" d=\"{}\"/>", line(held_out()));
        // A line of no length with round ends is a dot that is not stretched.
        let dots: String = held_out().map(|(x, y)| format!("M{x:.1} {y:.1}h0")).collect();
        let _ = write!(out, "<path class=\"dots\" d=\"{dots}\"/></svg></div>");
        format!(
            "<figure>{}{out}<p class=\"axis\">optimizer step</p></figure>\n",
            self.key(together)
        )
    }

    /// What the lines are, with their last values.
    fn key(&self, together: usize) -> String {
        let last = |points: &[(f64, f64)]| points.last().map_or(f64::NAN, |p| p.1);
        let each = match together {
            1 => String::new(),
            n => format!(", each point the mean of {n} steps"),
        };
        let mut key = format!(
            "<span class=\"train\">training loss, last {:.4}{each}</span>",
            last(&self.train)
        );
        if !self.held_out.is_empty() {
            let value = last(&self.held_out);
            let _ = write!(key, "<span class=\"held\">held-out loss, last {value:.4}</span>");
        }
        format!("<figcaption>{key}</figcaption>")
    }
}

/// At most [`POINTS_MAX`] points, each the mean of as many neighbours as the second value says.
fn thin(points: &[(f64, f64)]) -> (Vec<(f64, f64)>, usize) {
    let together = points.len().div_ceil(POINTS_MAX).max(1);
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
    };
    (points.chunks(together).map(mean).collect(), together)
}

/// A polyline as path data.
fn line(points: impl Iterator<Item = (f64, f64)>) -> String {
    let mut path = String::new();
    for (i, (x, y)) in points.enumerate() {
        let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
    }
    path
}

/// Multiples of 1, 2 or 5 times a power of ten, from 0 up to `max`, about `n` of them.
fn ticks(max: f64, n: usize) -> Vec<f64> {
    if !(max > 0.0 && max.is_finite()) {
        return vec![0.0];
    }
    let rough = max / n as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough);
    let step = step.unwrap_or(10.0 * power);
    // Rounded to the step's own digits, so that 3 x 0.1 prints as 0.3.
    let digits = (1.0 - step.log10().floor()).clamp(0.0, 12.0) as i32;
    let round = |value: f64| (value * 10_f64.powi(digits)).round() / 10_f64.powi(digits);
    (0..).map(|i| round(f64::from(i) * step)).take_while(|tick| *tick <= max).collect()
}

/// [`ticks`] up to the first that is not below `max`.
fn covering(max: f64, n: usize) -> Vec<f64> {
    let mut all = ticks(max, n);
    if let [.., before, last] = all[..]
        && last < max
    {
        // Through the last but one, so that the new tick is as round as they are.
        let count = (last / (last - before)).round();
        all.push(last * (count + 1.0) / count);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        let check = |max: f64, n: usize, expected: &[f64]| assert_eq!(ticks(max, n), expected);
        check(8.3, 5, &[0.0, 2.0, 4.0, 6.0, 8.0]);
        check(0.45, 5, &[0.0, 0.1, 0.2, 0.3, 0.4]);
        check(120.0, 6, &[0.0, 20.0, 40.0, 60.0, 80.0, 100.0, 120.0]);
        check(f64::NAN, 5, &[0.0]);
        assert_eq!(covering(8.3, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(covering(0.4, 4), [0.0, 0.1, 0.2, 0.3, 0.4]);
    }

    #[test]
    fn the_record_of_a_run_is_drawn() {
        let lines = "{\"step\": 1, \"loss\": 4.0}\n{\"step\": 1, \"eval_loss\": 3.5}\nnot json\n\
                     {\"step\": 2, \"loss\": 2.0}\n{\"step\": 3, \"loss\": null}\n";
        let curve = Curve::read(lines);
        assert_eq!(curve.train, [(1.0, 4.0), (2.0, 2.0)]);
        assert_eq!(curve.held_out, [(1.0, 3.5)]);
        let svg = curve.svg();
        assert!(svg.contains("M500.0 0.0L1000.0 150.0"), "{svg}");
        assert!(svg.contains("held-out loss, last 3.5000"), "{svg}");
        assert_eq!(Curve::default().svg(), "");
    }

    #[test]
    fn long_runs_are_averaged() {
        let points: Vec<(f64, f64)> = (0..1000).map(|i| (f64::from(i), 1.0)).collect();
        let (thinned, together) = thin(&points);
        assert_eq!((thinned.len(), together), (334, 3));
        assert_eq!(thinned[0], (1.0, 1.0));
    }
}
