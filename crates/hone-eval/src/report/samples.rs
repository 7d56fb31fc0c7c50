//! Which prompts are shown, and how.

use std::fmt::Write;

use crate::inputs::spaced;
use crate::report::html::escape;
use crate::report::page::Page;
use crate::score::Score;

/// Rows to show: a third of them where the tuned model is wrong, when it is wrong so often, the
/// others where it is right; each evenly spaced over all, in the order of the rows.
pub(crate) fn choose(scores: &[Score], n: usize) -> Vec<usize> {
    let of = |is_exact: bool| -> Vec<usize> {
        (0..scores.len()).filter(|row| scores[*row].is_exact == is_exact).collect()
    };
    let (right, wrong) = (of(true), of(false));
    let n = n.min(scores.len());
    // When too few are right, the wrong ones fill up.
    let n_wrong = wrong.len().min((n / 3).max(n.saturating_sub(right.len())));
    let pick = |rows: &[usize], n: usize| -> Vec<usize> {
        spaced(rows.len(), n).into_iter().map(|i| rows[i]).collect()
    };
    let mut shown = pick(&wrong, n_wrong);
    shown.extend(pick(&right, n - n_wrong));
    shown.sort_unstable();
    shown
}

/// Longest text shown of an answer, in characters: a page is read, not searched.
const SHOWN_CHARS_MAX: usize = 1200;

/// A text of a model, cut and escaped; an empty one is said to be empty.
fn quote(text: &str, is_stopped: bool) -> String {
    let text = text.trim();
    if text.is_empty() {
        return "<em class=\"soft\">nothing</em>".to_owned();
    }
    let cut: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    let is_cut = cut.len() < text.len();
    let end = if is_cut || !is_stopped { "<span class=\"soft\"> …</span>" } else { "" };
    format!("{}{end}", escape(&cut))
}

impl Page<'_> {
    /// The section of side-by-side samples; nothing when there is no prompt.
    pub(crate) fn samples(&self) -> String {
        let mut cards = String::new();
        for (i, &row) in self.shown.iter().enumerate() {
            cards.push_str(&self.card(i, row));
        }
        if cards.is_empty() {
            return String::new();
        }
        let scores = &self.results.tuned.asked.scores;
        let n_wrong = self.shown.iter().filter(|row| !scores[**row].is_exact).count();
        let chosen = match n_wrong {
            0 => "evenly spaced over the test rows; none of those shown is wrong".to_owned(),
            n => {
                format!("evenly spaced over the test rows, {n} of them picked among the wrong ones")
            }
        };
        let n = self.shown.len();
        format!(
            "<section><h2>Side by side</h2>\n<p class=\"soft\">{n} prompts, {chosen}. \
             A text that ends in … ran into the limit of {} tokens.</p>\n\
             <div class=\"cards\">\n{cards}</div></section>\n",
            self.plan.config.max_new
        )
    }

    fn card(&self, i: usize, row: usize) -> String {
        let (prompt, results) = (&self.prompts[row], self.results);
        let (tuned, score) = (&results.tuned.asked.answers[row], results.tuned.asked.scores[row]);
        let bare = &results.bare.answers[row];
        let verdict = match (score.is_exact, score.is_stopped, score.json) {
            (true, ..) => "<b class=\"good\">✓ right</b>",
            (_, true, Some(json)) if json.is_valid => "<b class=\"bad\">✗ other values</b>",
            (_, true, _) => "<b class=\"bad\">✗ wrong</b>",
            (_, false, _) => "<b class=\"bad\">✗ does not stop</b>",
        };
        let mut card = String::new();
        let mut part = |class: &str, label: &str, text: &str| {
            let _ = writeln!(
                card,
                "<div class=\"say {class}\"><span class=\"who\">{label}</span><p>{text}</p></div>"
            );
        };
        part("base", "base carries on", &quote(&bare.text, bare.is_stopped));
        let label = format!("tuned answers {verdict}");
        part("tuned", &label, &quote(&tuned.text, tuned.is_stopped));
        if let Some(drawn) = self.drawn.get(i) {
            let label = format!("tuned, drawn at temperature {}", self.plan.config.temperature);
            part("drawn", &label, &quote(&drawn.text, drawn.is_stopped));
        }
        part("reference", "reference", &escape(prompt.reference.trim()));
        let question = escape(prompt.question.trim());
        format!("<article class=\"card\"><h3>{question}</h3>\n{card}</article>\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(exact: &[u8], n: usize, shown: &[usize]) {
        let score = |e: &u8| Score { is_exact: *e == 1, ..Score::default() };
        let scores: Vec<Score> = exact.iter().map(score).collect();
        assert_eq!(choose(&scores, n), shown);
    }

    #[test]
    fn wrong_answers_are_shown_too() {
        check(&[1, 1, 1, 0, 1, 1], 3, &[0, 2, 3]);
        check(&[1, 1, 1, 1], 3, &[0, 1, 2]);
        check(&[0, 0, 0, 1], 3, &[0, 1, 3]);
        check(&[0, 1], 9, &[0, 1]);
        check(&[], 9, &[]);
    }

    #[test]
    fn an_answer_that_ran_on_is_seen_to() {
        assert_eq!(quote(" a<b ", true), "a&lt;b");
        assert!(quote("a", false).contains('…'));
        assert!(quote(" ", true).contains("nothing"));
    }
}
