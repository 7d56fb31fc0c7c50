//! The known word nearest to an unknown one.

/// The word of `known` nearest to `word` by edits (insert, delete, replace, swap neighbours), when it is near enough to be
/// what was meant: at most a third of its letters differ, or one.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let best = known.into_iter().map(|k| (distance(word, k), k)).min_by_key(|(d, _)| *d)?;
    let near = (best.1.chars().count().max(word.chars().count()) / 3).max(1);
    (best.0 <= near).then_some(best.1)
}

/// Optimal string alignment distance.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let differs = usize::from(a[i - 1] != b[j - 1]);
            let mut d = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + differs);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                d = d.min(rows[i - 2][j - 2] + 1);
            }
            row.push(d);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(word: &str, expect: Option<&str>) {
        assert_eq!(
            nearest(word, ["lr", "warmup_steps", "batch_size", "max_len"]),
            expect,
            "{word}"
        );
    }

    #[test]
    fn a_slip_is_recognised_and_a_stranger_is_not() {
        check("lrr", Some("lr"));
        check("rl", Some("lr"));
        check("warmup_step", Some("warmup_steps"));
        check("bathc_size", Some("batch_size"));
        check("maxlen", Some("max_len"));
        check("colour", None);
    }
}
