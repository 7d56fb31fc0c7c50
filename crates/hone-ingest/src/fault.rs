//! Why a row is not taken.

use hone_schema::Reject;

/// The reasons, as the ledger and `rejects.parquet` name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Reason {
    NotUtf8,
    NotJson,
    TooDeep,
    LineTooLong,
    NotAnObject,
    ColumnCount,
    RepeatedKey,
    MissingField,
    WrongType,
    UnknownRole,
    NotText,
    ToolCall,
    TwoThoughts,
    EmptyConversation,
    EmptyPrompt,
    NoResponse,
    EmptyResponse,
    EmptyText,
    SameAnswers,
    /// A row that says itself that its answer is not wanted; left out, but no fault.
    Undesired,
}

impl Reason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Reason::NotUtf8 => "not utf-8",
            Reason::NotJson => "not json",
            Reason::TooDeep => "nested too deeply",
            Reason::LineTooLong => "line too long",
            Reason::NotAnObject => "not an object",
            Reason::ColumnCount => "wrong number of columns",
            Reason::RepeatedKey => "repeated key",
            Reason::MissingField => "missing field",
            Reason::WrongType => "wrong type",
            Reason::UnknownRole => "unknown role",
            Reason::NotText => "not text",
            Reason::ToolCall => "unreadable tool call",
            Reason::TwoThoughts => "two thoughts in a message",
            Reason::EmptyConversation => "empty conversation",
            Reason::EmptyPrompt => "empty prompt",
            Reason::NoResponse => "no response",
            Reason::EmptyResponse => "empty response",
            Reason::EmptyText => "empty text",
            Reason::SameAnswers => "chosen equals rejected",
            Reason::Undesired => "labelled as undesired",
        }
    }

    /// Whether it counts for `max_reject_share`.
    pub(crate) fn is_fault(self) -> bool {
        self != Reason::Undesired
    }
}

/// A reason, and what exactly was wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) reason: Reason,
    pub(crate) detail: String,
}

impl Fault {
    pub(crate) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Fault { reason, detail: detail.into() }
    }

    pub(crate) fn missing(field: &str) -> Self {
        Fault::new(Reason::MissingField, format!("no `{field}`"))
    }

    /// The row for `rejects.parquet`.
    pub(crate) fn reject(&self, source: &str, file: &str, line: u64, raw: &[u8]) -> Reject {
        let head = &raw[..raw.len().min(Reject::RAW_BYTES_MAX)];
        Reject {
            source: source.to_owned(),
            file: file.to_owned(),
            line,
            reason: self.reason.as_str().to_owned(),
            detail: self.detail.clone(),
            raw: String::from_utf8_lossy(head).into_owned(),
        }
    }
}
