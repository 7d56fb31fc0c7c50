//! What can go wrong with files, and whose fault it is.

use std::io;
use std::path::{Path, PathBuf};

use hone_schema::{ArtefactKind, ManifestError, NameError, RowError, Sha256Hex};

/// Whether the input or the machine is to blame; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Exit code 3.
    Input,
    /// Exit code 4.
    Environment,
}

/// An error of this crate; every one names its path.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system said no.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried: `read`, `create`.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Nothing there.
    #[error("`{}` does not exist", path.display())]
    NotFound {
        /// Where.
        path: PathBuf,
    },
    /// A directory without a manifest.
    #[error("`{}` is not a sealed artefact: it has no manifest.json", path.display())]
    NotSealed {
        /// Where.
        path: PathBuf,
    },
    /// A manifest that cannot be trusted.
    #[error("`{}`: {source}", path.display())]
    Manifest {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// An artefact of another kind.
    #[error("`{}` holds {found}, not {expected}", path.display())]
    Kind {
        /// Where.
        path: PathBuf,
        /// What was asked for.
        expected: ArtefactKind,
        /// What is there.
        found: ArtefactKind,
    },
    /// The manifest names no such file.
    #[error("`{}` has no file `{name}`", path.display())]
    NoFile {
        /// The artefact.
        path: PathBuf,
        /// The file asked for.
        name: String,
    },
    /// Not a model directory.
    #[error("`{}` is not a model directory: {what}", path.display())]
    NotModel {
        /// Where.
        path: PathBuf,
        /// What it lacks.
        what: String,
    },
    /// A file that is not the one that was sealed.
    #[error("`{}` was changed after it was sealed: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// Size or hash, then and now.
        what: String,
    },
    /// Somebody else is at work.
    #[error("`{}` is being written by process {pid}", path.display())]
    Locked {
        /// The target.
        path: PathBuf,
        /// Its holder.
        pid: String,
    },
    /// The target is something else.
    #[error("`{}` exists and is not an artefact of hone", path.display())]
    Foreign {
        /// The target.
        path: PathBuf,
    },
    /// More bytes than the limit of this kind of file.
    #[error("`{}` has {bytes} bytes, more than the {max} allowed for such a file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// Not a name for a file of an artefact.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Rows that are not what they should be.
    #[error("`{}`: {source}", path.display())]
    Rows {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: RowError,
    },
    /// A table that cannot be read or written.
    #[error("`{}`: {message}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// What Arrow or Parquet said.
        message: String,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::NotFound && action != "create" {
            return StoreError::NotFound { path: path.to_owned() };
        }
        StoreError::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn table(path: &Path, source: impl std::fmt::Display) -> Self {
        StoreError::Table { path: path.to_owned(), message: source.to_string() }
    }

    /// An error of writing a table: the file system's when it is at the bottom of it, such as a
    /// full disk.
    pub(crate) fn write(path: &Path, source: &(dyn std::error::Error + 'static)) -> Self {
        let mut at = Some(source);
        while let Some(error) = at {
            if let Some(io) = error.downcast_ref::<io::Error>() {
                let copy = io::Error::new(io.kind(), io.to_string());
                return StoreError::io("write", path, copy);
            }
            at = error.source();
        }
        StoreError::table(path, source)
    }

    pub(crate) fn hash(path: &Path, sealed: &Sha256Hex, found: &Sha256Hex) -> Self {
        let what = format!("its hash was {}, it is {}", sealed.short(), found.short());
        StoreError::Changed { path: path.to_owned(), what }
    }

    /// Whose fault it is.
    pub fn class(&self) -> ErrorClass {
        match self {
            StoreError::Io { source, .. } if source.kind() == io::ErrorKind::IsADirectory => {
                ErrorClass::Input
            }
            StoreError::Io { .. } | StoreError::Locked { .. } => ErrorClass::Environment,
            _ => ErrorClass::Input,
        }
    }

    /// The path it is about, when it is about one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            StoreError::Name(_) => None,
            StoreError::Io { path, .. }
            | StoreError::NotFound { path }
            | StoreError::NotSealed { path }
            | StoreError::Manifest { path, .. }
            | StoreError::Kind { path, .. }
            | StoreError::NoFile { path, .. }
            | StoreError::NotModel { path, .. }
            | StoreError::Changed { path, .. }
            | StoreError::Locked { path, .. }
            | StoreError::Foreign { path }
            | StoreError::TooLarge { path, .. }
            | StoreError::Rows { path, .. }
            | StoreError::Table { path, .. } => Some(path),
        }
    }

    /// What to do about it, when there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            StoreError::NotFound { .. } => {
                Some("correct the path; it starts where the program is started".to_owned())
            }
            StoreError::NotSealed { .. } => {
                Some("run the stage that writes it, or correct the path".to_owned())
            }
            StoreError::Manifest { source: ManifestError::Schema { .. }, .. } => {
                Some("run the stage that wrote it again with this version of hone".to_owned())
            }
            StoreError::Manifest { .. } | StoreError::Changed { .. } => Some(
                "run the stage that wrote it again with `--force`; artefacts are not edited by hand"
                    .to_owned(),
            ),
            StoreError::NotModel { .. } => Some(
                "a model directory has config.json, tokenizer.json and *.safetensors; \
                 `hone-fetch model` makes one"
                    .to_owned(),
            ),
            StoreError::Locked { .. } => Some("wait for it, or stop it".to_owned()),
            StoreError::Foreign { .. } => Some("choose another `--out`, or move it away".to_owned()),
            StoreError::Io { source, path, .. } => io_hint(source, path),
            _ => None,
        }
    }
}

fn io_hint(source: &io::Error, path: &Path) -> Option<String> {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(format!(
            "free some space on the file system of `{}` and run the same command again",
            path.display()
        )),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Some("check the permissions of that place, or choose another with `--runs`".to_owned())
        }
        io::ErrorKind::IsADirectory => Some("name a file, not a directory".to_owned()),
        _ => None,
    }
}
