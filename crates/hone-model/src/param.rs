//! Parameters that live as plain buffers, and the names of what lies in them.

use hone_kernels::Backend;

use crate::held::VALUE_BYTES;
use crate::tensors::{NamedTensor, Tensors};
use crate::{Decoder, ModelError};

/// What a parameter is: decides weight decay and what the self-test expects of its gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// The token embedding, and the head where it is tied to it.
    Embedding,
    /// A head of its own.
    Head,
    /// The matrix of a linear map.
    Matrix,
    /// The scale of a norm.
    Norm,
    /// The bias of a linear map.
    Bias,
    /// The first factor of an adapter, (r, in).
    LoraA,
    /// The second factor of an adapter, (out, r).
    LoraB,
}

impl ParamKind {
    /// Whether weight decay applies: to matrices, embeddings included, and to no norm or bias.
    pub fn decays(self) -> bool {
        !matches!(self, ParamKind::Norm | ParamKind::Bias)
    }
}

/// A named tensor inside a trained buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamInfo {
    /// Hugging Face's name, or PEFT's for an adapter.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParamKind,
    /// Index of its buffer in the order of [`crate::Decoder::for_each_trained`].
    pub buffer: usize,
    /// Index of its first value in that buffer.
    pub offset: usize,
}

impl ParamInfo {
    /// Number of values.
    pub fn n_values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A name inside a [`Param`].
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

/// A buffer of one or more named tensors laid end to end, with their gradient when they are
/// trained.
pub(crate) struct Param<B: Backend> {
    /// The values; empty while they lie packed.
    pub(crate) value: B::Buf,
    pub(crate) grad: Option<B::Buf>,
    pub(crate) kind: ParamKind,
    pieces: Vec<Piece>,
    /// The values of one matrix, packed for multiplication: exactly, or they would not be.
    packed: Option<B::Frozen>,
}

impl<B: Backend> Param<B> {
    /// The tensors end to end on the device; with a gradient of zeros if `trained`.
    pub(crate) fn new(
        backend: &B,
        kind: ParamKind,
        tensors: Vec<NamedTensor>,
        trained: bool,
    ) -> Self {
        let mut pieces = Vec::with_capacity(tensors.len());
        let mut data = Vec::new();
        for tensor in tensors {
            pieces.push(Piece { name: tensor.name, shape: tensor.shape });
            if data.is_empty() {
                data = tensor.data;
            } else {
                data.extend_from_slice(&tensor.data);
            }
        }
        let grad = trained.then(|| backend.zeros(data.len()));
        Param { value: backend.upload(&data), grad, kind, pieces, packed: None }
    }

    /// One matrix whose values the backend holds exactly when it freezes them: in that form alone.
    pub(crate) fn packed(backend: &B, kind: ParamKind, tensor: NamedTensor) -> Self {
        let NamedTensor { name, shape, data } = tensor;
        let packed = Some(backend.freeze(&data, shape[0], shape[1]));
        let pieces = vec![Piece { name, shape }];
        Param { value: backend.zeros(0), grad: None, kind, pieces, packed }
    }

    /// Lays packed values out in the buffer, to be written over; [`Param::pack`] is the way back.
    pub(crate) fn unpack(&mut self, backend: &B) {
        if let Some(packed) = self.packed.take() {
            self.value = backend.upload(&backend.thaw(&packed));
        }
    }

    /// Packs the values, which must be those that were unpacked.
    pub(crate) fn pack(&mut self, backend: &B) {
        let shape = &self.pieces[0].shape;
        let packed = backend.freeze(&backend.download(&self.value), shape[0], shape[1]);
        (self.packed, self.value) = (Some(packed), backend.zeros(0));
    }

    /// The matrix: a plain buffer, or packed.
    pub(crate) fn matrix(&self) -> Result<&B::Buf, &B::Frozen> {
        self.packed.as_ref().map_or(Ok(&self.value), Err)
    }

    /// All values.
    pub(crate) fn values(&self, backend: &B) -> Vec<f32> {
        match self.matrix() {
            Ok(value) => backend.download(value),
            Err(packed) => backend.thaw(packed),
        }
    }

    /// Bytes of the values.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        match self.matrix() {
            Ok(value) => VALUE_BYTES * backend.len(value) as u64,
            Err(packed) => backend.frozen_bytes(packed),
        }
    }

    /// `y (ids.len(), D) <-` rows of the matrix (V, D).
    pub(crate) fn gather(&self, backend: &B, ids: &[u32], d: usize, y: &mut B::Buf) {
        match self.matrix() {
            Ok(value) => backend.gather_rows(value, ids, d, y),
            Err(packed) => backend.gather_frozen(packed, ids, y),
        }
    }

    /// The name of the tensor, if there is only one.
    pub(crate) fn name(&self) -> Option<&str> {
        match self.pieces.as_slice() {
            [only] => Some(&only.name),
            _ => None,
        }
    }

    /// Names and places of the tensors, this being trained buffer number `buffer`.
    pub(crate) fn infos(&self, buffer: usize) -> impl Iterator<Item = ParamInfo> + '_ {
        let mut offset = 0;
        self.pieces.iter().map(move |piece| {
            let info = ParamInfo {
                name: piece.name.clone(),
                shape: piece.shape.clone(),
                kind: self.kind,
                buffer,
                offset,
            };
            offset += info.n_values();
            info
        })
    }

    /// Copies the named tensors of `buf` (this parameter's value, its gradient, or a moment of the
    /// same shape) to the host.
    pub(crate) fn export(&self, backend: &B, buf: &B::Buf, into: &mut Tensors) {
        for info in self.infos(0) {
            let mut data = vec![0.0; info.n_values()];
            backend.read(buf, info.offset, &mut data);
            into.insert(NamedTensor::new(info.name, info.shape, data));
        }
    }

    /// Copies the named tensors to the host.
    pub(crate) fn export_values(&self, backend: &B, into: &mut Tensors) {
        match self.matrix() {
            Ok(value) => self.export(backend, value, into),
            Err(packed) => {
                let Piece { name, shape } = self.pieces[0].clone();
                into.insert(NamedTensor::new(name, shape, backend.thaw(packed)));
            }
        }
    }

    /// Overwrites the value with tensors of the same names.
    pub(crate) fn import(&mut self, backend: &B, from: &Tensors) -> Result<(), ModelError> {
        let infos: Vec<ParamInfo> = self.infos(0).collect();
        for info in infos {
            let tensor = named(from, &info.name, &info.shape)?;
            backend.write(&mut self.value, info.offset, &tensor.data);
        }
        Ok(())
    }
}

/// Values copied at once to be looked at.
const LOOK_VALUES: usize = 1 << 16;

impl<B: Backend> Decoder<B> {
    /// What is trained, in the order of [`Decoder::for_each_trained`].
    pub fn trained_params(&self) -> Vec<ParamInfo> {
        let mut infos = Vec::new();
        let mut buffer = 0;
        self.visit(&mut |param| {
            if param.grad.is_some() {
                infos.extend(param.infos(buffer));
                buffer += 1;
            }
        });
        infos
    }

    /// Everything that is trained with the sums of the squares of its values and of its gradient, in
    /// the order of [`Decoder::trained_params`]. Nothing large is copied.
    pub fn squares_of_trained(&self) -> Vec<(ParamInfo, f64, f64)> {
        let (mut all, mut copy, mut buffer) = (Vec::new(), Vec::new(), 0);
        let backend = self.backend();
        let mut squares = |buf: &B::Buf, info: &ParamInfo| {
            let (mut sum, end) = (0.0, info.offset + info.n_values());
            for start in (info.offset..end).step_by(LOOK_VALUES) {
                copy.resize(LOOK_VALUES.min(end - start), 0.0_f32);
                backend.read(buf, start, &mut copy);
                copy.iter().for_each(|&value| sum += f64::from(value).powi(2));
            }
            sum
        };
        self.visit(&mut |param| {
            let Some(grad) = &param.grad else { return };
            for info in param.infos(buffer) {
                let (values, gradient) = (squares(&param.value, &info), squares(grad, &info));
                all.push((info, values, gradient));
            }
            buffer += 1;
        });
        all
    }
}

/// The tensor of that name and shape.
pub(crate) fn named<'a>(
    tensors: &'a Tensors,
    name: &str,
    shape: &[usize],
) -> Result<&'a NamedTensor, ModelError> {
    let tensor = tensors.get(name).ok_or_else(|| ModelError::NoTensor(name.to_owned()))?;
    if tensor.shape != shape {
        let (found, expected) = (tensor.shape.clone(), shape.to_vec());
        return Err(ModelError::Shape { name: name.to_owned(), found, expected });
    }
    Ok(tensor)
}
