//! Where a program computes: `device = "cuda:0" | "cpu" | "auto"`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Backend, Cpu};

/// A device by its name in a configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Place {
    /// `auto`: the first GPU, where there is one and the program can use it; else the processor.
    #[default]
    Auto,
    /// `cpu`: the processor.
    Cpu,
    /// `cuda:N`: this GPU of NVIDIA's; `cuda` is the first.
    Cuda(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Auto => write!(f, "auto"),
            Place::Cpu => write!(f, "cpu"),
            Place::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let ordinal = name.strip_prefix("cuda:").map(str::parse);
        match (name.as_str(), ordinal) {
            ("auto", _) => Ok(Place::Auto),
            ("cpu", _) => Ok(Place::Cpu),
            ("cuda", _) => Ok(Place::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Place::Cuda(ordinal)),
            _ => Err(format!("device `{name}` is none of \"cpu\", \"cuda:0\" and \"auto\"")),
        }
    }
}

/// Why a device cannot be used, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaceError {
    /// Why.
    pub what: String,
    /// What to do.
    pub hint: String,
}

/// What is done on a device, whichever it is.
pub trait OnBackend {
    /// What comes of it.
    type Output;
    /// Does it.
    fn run<B: Backend>(self, backend: B) -> Self::Output;
}

impl Place {
    /// The device that is meant here: `auto` becomes one of the others.
    pub fn found(self) -> Self {
        match self {
            Place::Auto if n_gpus() > 0 => Place::Cuda(0),
            Place::Auto => Place::Cpu,
            other => other,
        }
    }

    /// Whether it is the processor, by name.
    pub fn is_cpu(&self) -> bool {
        *self == Place::Cpu
    }

    /// Opens the device and does something on it. Errors: it cannot be used.
    pub fn with<T: OnBackend>(self, task: T) -> Result<T::Output, PlaceError> {
        match self.found() {
            Place::Cuda(ordinal) => on_gpu(ordinal, task),
            Place::Auto | Place::Cpu => Ok(task.run(Cpu::new())),
        }
    }
}

#[cfg(feature = "cuda")]
fn n_gpus() -> usize {
    crate::gpu::cuda::Cuda::count()
}

#[cfg(feature = "cuda")]
fn on_gpu<T: OnBackend>(ordinal: usize, task: T) -> Result<T::Output, PlaceError> {
    use crate::gpu::Gpu;
    use crate::gpu::cuda::Cuda;
    let device = Cuda::open(ordinal).map_err(|error| PlaceError {
        what: format!("device = \"cuda:{ordinal}\": {error}"),
        hint: "say `device = \"cpu\"` to compute on the processor".to_owned(),
    })?;
    Ok(task.run(Gpu::new(device)))
}

#[cfg(not(feature = "cuda"))]
fn n_gpus() -> usize {
    0
}

#[cfg(not(feature = "cuda"))]
fn on_gpu<T: OnBackend>(ordinal: usize, _task: T) -> Result<T::Output, PlaceError> {
    Err(PlaceError {
        what: format!("device = \"cuda:{ordinal}\": this program was built without CUDA"),
        hint: "build it with `--features cuda`, or say `device = \"cpu\"`".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (name, place) in [
            ("auto", Place::Auto),
            ("cpu", Place::Cpu),
            ("cuda:0", Place::Cuda(0)),
            ("cuda:3", Place::Cuda(3)),
        ] {
            assert_eq!(Place::try_from(name.to_owned()), Ok(place));
            assert_eq!(place.to_string(), name);
        }
        assert_eq!(Place::try_from("cuda".to_owned()), Ok(Place::Cuda(0)));
        for name in ["gpu", "cuda:", "cuda:-1", "CPU", ""] {
            let error = Place::try_from(name.to_owned()).expect_err(name);
            assert!(error.contains("none of \"cpu\", \"cuda:0\" and \"auto\""), "{error}");
        }
    }
}
