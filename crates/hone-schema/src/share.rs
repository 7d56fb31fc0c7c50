//! Which of a row's answers a sample is there for, where the template stage makes several of one row.

/// Which of its row's answers a sample trains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Share {
    /// The last one, and all others that have no sample of their own: every row that is one sample.
    #[default]
    Main,
    /// Answers before the last one, which another sample trains.
    Earlier,
    /// None: each has a sample of its own. What other roles say is left.
    Rest,
}

impl Share {
    /// Every value.
    pub const ALL: [Share; 3] = [Share::Main, Share::Earlier, Share::Rest];

    /// Its name in files.
    pub fn as_str(self) -> &'static str {
        match self {
            Share::Main => "main",
            Share::Earlier => "earlier",
            Share::Rest => "rest",
        }
    }

    /// The value of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Share::ALL.into_iter().find(|share| share.as_str() == name)
    }
}
