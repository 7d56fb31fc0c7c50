//! Pre-tokenizers: into which words a text falls before anything is merged.

use std::ops::Range;

use fancy_regex::Regex;
use serde_json::Value;

use crate::encode::EncodeError;
use crate::fast::joins::Joins;
use crate::fast::scan::Scanner;
use crate::fast::view::View;

/// Most steps of a pre-tokenizer: twice what any known family has. Each is a level of recursion for every word.
const STEPS_MAX: usize = 16;

/// What is put before a part.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Prefix {
    /// Nothing.
    Nothing,
    /// A space, unless there is one.
    Space,
    /// Blanks become this mark, and one is put before the part unless there is one.
    Mark {
        /// The mark.
        mark: char,
        /// Whether one is put before a part.
        before: Scheme,
    },
}

/// Before which parts a mark is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// Every part.
    Always,
    /// The part that begins the text.
    First,
    /// None.
    Never,
}

/// One step of the way from parts to words.
enum Step {
    /// An expression that is known.
    Scan(Scanner),
    /// Numbers by themselves, each digit if so.
    Digits { each: bool },
    /// A word begins at each of these marks.
    Marks(char),
    /// Words are cut wherever no merge goes.
    Joins(Joins),
    /// An expression that is not known.
    Engine { regex: Box<Regex>, delimiter: Delimiter, invert: bool },
}

/// What becomes of a match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delimiter {
    Isolated,
    Removed,
    Contiguous,
    WithPrevious,
    WithNext,
}

/// A pre-tokenizer.
pub(crate) struct Splitter {
    pub(crate) prefix: Prefix,
    steps: Vec<Step>,
    /// Whether the model sees bytes, not characters.
    pub(crate) by_bytes: bool,
}

impl Splitter {
    /// The pre-tokenizer that a `tokenizer.json` names, if it is made of steps that are known.
    pub(crate) fn of(value: &Value) -> Option<Self> {
        let parts: Vec<&Value> = match (value, &value["pretokenizers"]) {
            (Value::Null, _) => Vec::new(),
            (_, Value::Array(parts)) if value["type"] == "Sequence" => parts.iter().collect(),
            _ => vec![value],
        };
        let mut splitter = Splitter { prefix: Prefix::Nothing, steps: Vec::new(), by_bytes: false };
        for (idx, part) in parts.iter().enumerate() {
            // Bytes as letters are the last step where they are one, and a mark or a space is only put before whole parts.
            if splitter.by_bytes || splitter.prefix != Prefix::Nothing {
                return None;
            }
            splitter.add(part, idx == 0)?;
            if splitter.steps.len() > STEPS_MAX {
                return None;
            }
        }
        Some(splitter)
    }

    fn add(&mut self, part: &Value, is_first: bool) -> Option<()> {
        match part["type"].as_str()? {
            "Split" => self.steps.push(Step::of_split(part)?),
            "Digits" => {
                self.steps.push(Step::Digits { each: part["individual_digits"].as_bool()? })
            }
            "ByteLevel" => {
                if part["add_prefix_space"].as_bool()? {
                    self.prefix = is_first.then_some(Prefix::Space)?;
                }
                if part.get("use_regex").is_none_or(|regex| regex == &Value::Bool(true)) {
                    self.steps.push(Step::Scan(Scanner::Gpt2));
                }
                self.by_bytes = true;
            }
            "Metaspace" if is_first => {
                let mut mark = part["replacement"].as_str()?.chars();
                let (mark, None) = (mark.next()?, mark.next()) else { return None };
                let before = match (&part["prepend_scheme"], &part["add_prefix_space"]) {
                    (Value::Null, Value::Null) => Scheme::Always,
                    (scheme, Value::Null) if scheme == "always" => Scheme::Always,
                    (scheme, Value::Null) if scheme == "first" => Scheme::First,
                    (scheme, Value::Null) if scheme == "never" => Scheme::Never,
                    _ => return None,
                };
                self.prefix = Prefix::Mark { mark, before };
                if part.get("split").is_none_or(|split| split == &Value::Bool(true)) {
                    self.steps.push(Step::Marks(mark));
                }
            }
            _ => return None,
        }
        Some(())
    }

    /// Whether text is not split at all.
    pub(crate) fn is_whole(&self) -> bool {
        self.steps.is_empty()
    }

    /// Drops steps that look for blanks, where there are none because they are written as something else.
    pub(crate) fn forget_blanks(&mut self) {
        self.steps.retain(|step| match step {
            Step::Engine { regex, delimiter, invert } => {
                regex.as_str() != " " || *invert || *delimiter == Delimiter::Contiguous
            }
            _ => true,
        });
    }

    /// Cuts text that is one word by the pre-tokenizer where the model's merges do not notice.
    pub(crate) fn cut_where_nothing_joins(&mut self, joins: Joins) {
        self.steps.push(Step::Joins(joins));
    }

    /// Calls `emit` with the words of a part of the view: with the view they lie in, which is another where the pre-tokenizer
    /// writes text differently, and with their bytes there.
    pub(crate) fn words(
        &self,
        view: &View<'_>,
        part: Range<usize>,
        mut emit: impl FnMut(&View<'_>, Range<usize>),
    ) -> Result<(), EncodeError> {
        let text = &view.text[part.clone()];
        let is_first = || view.original(part.start..part.start + 1).start == 0;
        let rewritten = match self.prefix {
            Prefix::Space if !text.starts_with(' ') => view.rewritten(part, Some(" "), None),
            Prefix::Mark { mark, before } => {
                let goes_before = !text.starts_with([' ', mark])
                    && (before == Scheme::Always || before == Scheme::First && is_first());
                let mut buffer = [0; 4];
                let prefix = goes_before.then_some(&*mark.encode_utf8(&mut buffer));
                view.rewritten(part, prefix, Some(mark))
            }
            _ => return walk(&self.steps, &view.text, part, &mut |word| emit(view, word)),
        };
        let all = 0..rewritten.text.len();
        walk(&self.steps, &rewritten.text, all, &mut |word| emit(&rewritten, word))
    }
}

impl Step {
    fn of_split(part: &Value) -> Option<Self> {
        let delimiter = match part["behavior"].as_str()? {
            "Isolated" => Delimiter::Isolated,
            "Removed" => Delimiter::Removed,
            "Contiguous" => Delimiter::Contiguous,
            "MergedWithPrevious" => Delimiter::WithPrevious,
            "MergedWithNext" => Delimiter::WithNext,
            _ => return None,
        };
        let invert = part["invert"].as_bool()?;
        let pattern = match &part["pattern"]["Regex"] {
            Value::String(pattern) => pattern.clone(),
            _ => fancy_regex::escape(part["pattern"]["String"].as_str()?).into_owned(),
        };
        match Scanner::of(&pattern) {
            Some(scanner) if delimiter == Delimiter::Isolated => Some(Step::Scan(scanner)),
            // What is between the matches is removed, and nothing is.
            Some(scanner) if delimiter == Delimiter::Removed && invert && scanner.covers() => {
                Some(Step::Scan(scanner))
            }
            _ => {
                let regex = Box::new(Regex::new(&pattern).ok()?);
                Some(Step::Engine { regex, delimiter, invert })
            }
        }
    }
}

/// Splits a part by the first step, each of its pieces by the next, and so on.
fn walk<F: FnMut(Range<usize>)>(
    steps: &[Step],
    text: &str,
    part: Range<usize>,
    emit: &mut F,
) -> Result<(), EncodeError> {
    let Some((step, rest)) = steps.split_first() else {
        emit(part);
        return Ok(());
    };
    // A step sees its piece and nothing beyond it.
    let text = &text[..part.end];
    match step {
        Step::Scan(scanner) => {
            let (mut gap, mut at) = (part.start, part.start);
            while at < text.len() {
                let Some(end) = scanner.word(text, at) else {
                    at += char_len(text, at);
                    continue;
                };
                if gap < at {
                    walk(rest, text, gap..at, emit)?;
                }
                walk(rest, text, at..end, emit)?;
                (gap, at) = (end, end);
            }
            if gap < at {
                walk(rest, text, gap..at, emit)?;
            }
        }
        Step::Digits { each } => {
            let mut piece = part.start..part.start;
            let mut was_digit = false;
            for (idx, c) in text[part.clone()].char_indices() {
                let at = part.start + idx;
                let is_digit = c.is_numeric();
                if at > piece.start && (is_digit != was_digit || is_digit && *each) {
                    walk(rest, text, piece.start..at, emit)?;
                    piece.start = at;
                }
                was_digit = is_digit;
            }
            walk(rest, text, piece.start..part.end, emit)?;
        }
        Step::Marks(mark) => {
            let mut start = part.start;
            for (idx, _) in text[part.clone()].match_indices(*mark).filter(|(idx, _)| *idx > 0) {
                walk(rest, text, start..part.start + idx, emit)?;
                start = part.start + idx;
            }
            walk(rest, text, start..part.end, emit)?;
        }
        Step::Joins(joins) => {
            let mut at = part.start;
            while at < part.end {
                let end = joins.word(text, at);
                walk(rest, text, at..end, emit)?;
                at = end;
            }
        }
        Step::Engine { regex, delimiter, invert } => {
            for piece in delimited(regex, *delimiter, *invert, &text[part.clone()])? {
                walk(rest, text, part.start + piece.start..part.start + piece.end, emit)?;
            }
        }
    }
    Ok(())
}

fn char_len(text: &str, at: usize) -> usize {
    text[at..].chars().next().map_or(1, char::len_utf8)
}

/// The pieces of a text between and around the matches of an expression.
///
/// # Errors
/// The engine's, if it gives up: the tokenizers crate takes that for the end of the matches, and goes on with other ids.
fn delimited(
    regex: &Regex,
    delimiter: Delimiter,
    invert: bool,
    text: &str,
) -> Result<Vec<Range<usize>>, EncodeError> {
    let mut tiles: Vec<(Range<usize>, bool)> = Vec::new();
    let mut done = 0;
    for found in regex.find_iter(text) {
        let found = found.map_err(|e| {
            EncodeError::Fault(format!("the expression `{regex}` of the pre-tokenizer: {e}"))
        })?;
        if done < found.start() {
            tiles.push((done..found.start(), invert));
        }
        tiles.push((found.range(), !invert));
        done = found.end();
    }
    if done < text.len() {
        tiles.push((done..text.len(), invert));
    }
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut joins = false;
    for (idx, (tile, is_match)) in tiles.iter().enumerate() {
        let was_match = idx > 0 && tiles[idx - 1].1;
        let will_match = tiles.get(idx + 1).is_some_and(|(_, is_match)| *is_match);
        match pieces.last_mut() {
            Some(last) if joins => last.end = tile.end,
            Some(last) if delimiter == Delimiter::Contiguous && was_match == *is_match => {
                last.end = tile.end;
            }
            Some(last) if delimiter == Delimiter::WithPrevious && *is_match && !was_match => {
                last.end = tile.end;
            }
            _ if delimiter == Delimiter::Removed && *is_match => {}
            _ => pieces.push(tile.clone()),
        }
        joins = delimiter == Delimiter::WithNext && *is_match && !will_match;
    }
    pieces.retain(|piece| !piece.is_empty());
    Ok(pieces)
}
